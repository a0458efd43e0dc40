"""Another input size: how long every axis is then, and which constants have to say so.

Forward through the graph, every value has its axes (`sartor.ir.lengths`), and one rule per operator says what those of
its results are and rewrites what was written for the old size: shapes, crops, sizes of Resize, kernels of pools over
the whole map, and tables of positions. What a rule cannot scale is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import InternalError, PlanError
from sartor.ir.bodies import body_graphs, read_values
from sartor.ir.cleanup import array_of
from sartor.ir.lengths import Axis, Unscalable
from sartor.ir.program import Program
from sartor.passes.positions import resampled
from sartor.passes.rewriter import Rewriter

Axes = tuple[Axis, ...]


def resize_inputs(program: Program, sizes: Mapping[str, Sequence[int]], rewriter: Rewriter) -> None:
    """Rewrite `program` in place so that its inputs have these shapes.

    Args:
        program: canonical.
        sizes: shape per input; inputs that are not named keep theirs. The batch stays.
        rewriter: of `program`.

    Raises:
        PlanError: an unknown input, another rank or batch, or a node that cannot be scaled, with the reason.
    """
    then = dict(program.input_shapes)
    for name, size in sizes.items():
        then[name] = _checked(program, name, size)
    if then == dict(program.input_shapes):
        return
    if program.tail is not None:
        raise PlanError(f"The input cannot have another size: {program.tail.reason()}.")
    trace = Trace(program, then, rewriter)
    trace.run()
    program.input_shapes = then
    program.invalidate()
    for value in program.graph.inputs:
        value.shape = _resized(value, trace.axes_of(value))
    for node in program.graph.all_nodes():
        for output in node.outputs:
            output.shape = _resized(output, trace.axes_of(output)) if output.is_graph_output() else None
    found = program.shapes()
    for value, axes in trace.axes.items():
        said, shape = tuple(axis.then for axis in axes), found.get(value.name or "")
        if shape is not None and shape != said:
            raise InternalError(
                f"Pass '{rewriter.pass_name}' expects '{value.name}' to have shape {list(said)} at the new input size, "
                f"found {list(shape)}. Report this with the model's structure."
            )


def _checked(program: Program, name: str, size: Sequence[int]) -> tuple[int, ...]:
    old = program.input_shapes.get(name)
    if old is None:
        raise PlanError(
            f"The plan resizes input '{name}', which the program does not have; it has {sorted(program.input_shapes)}."
        )
    if len(size) != len(old) or any(length < 1 for length in size):
        raise PlanError(f"Input '{name}' of shape {list(old)} cannot have shape {list(size)}.")
    if name in program.batch.inputs and size[0] != old[0]:
        raise PlanError(
            f"The plan changes the batch of input '{name}' from {old[0]} to {size[0]}; it must stay."
        )
    return tuple(map(int, size))


def _resized(value: ir.Value, axes: Axes) -> ir.Shape | None:
    """The shape of an input or output at the new size; symbolic axes stay symbolic."""
    if value.shape is None:
        return None
    return ir.Shape(
        [axis.then if isinstance(dim, int) else dim for dim, axis in zip(value.shape, axes, strict=True)]
    )


class Trace:
    """Axes so far, and what rules do to constants.

    Attributes:
        program: being rewritten.
        rewriter: of it.
        shapes: of every value, now.
        axes: of values that depend on inputs, in the order in which they are computed.
    """

    def __init__(self, program: Program, then: Mapping[str, tuple[int, ...]], rewriter: Rewriter):
        self.program, self.rewriter = program, rewriter
        self.shapes = dict(program.shapes())
        self.axes: dict[ir.Value, Axes] = {}
        for value in program.graph.inputs:
            lengths = zip(self.shape(value), then[value.name or ""], strict=True)
            self.axes[value] = tuple(Axis.of(*pair) for pair in lengths)

    def run(self) -> None:
        """Rewrite every node, in order.

        Raises:
            PlanError: one cannot be scaled.
        """
        from sartor.passes.resolution_rules import RULES

        for node in list(self.program.graph):
            read = [v for v in node.inputs if v is not None] if not body_graphs(node) else read_values(node)
            if not any(axis.scaled for value in read for axis in self.axes_of(value)):
                for output in node.outputs:
                    self.axes[output] = tuple(map(Axis.of, self.shape(output)))
                continue
            rule = RULES.get(node.op_type) if node.domain == "" and not body_graphs(node) else None
            try:
                if rule is None:
                    raise Unscalable("there is no rule for this operator at another input size")
                rule(self, node)
            except Unscalable as reason:
                raise PlanError(
                    f"The input cannot have another size: node {self.program.where(node)} {reason}."
                ) from None

    # ---- looking ---------------------------------------------------------------------------
    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Shape now."""
        return self.shapes[value.name or ""] if value is not None else ()

    def axes_of(self, value: ir.Value | None) -> Axes:
        """Axes of any value; those of constants stay."""
        if value is None:
            return ()
        known = self.axes.get(value)
        return known if known is not None else tuple(map(Axis.of, self.shapes.get(value.name or "", ())))

    def constant(self, node: ir.Node, index: int) -> list[int]:
        """A constant list of integers that a node reads; empty where it is absent.

        Raises:
            Unscalable: it is computed.
        """
        if index >= len(node.inputs) or node.inputs[index] is None:
            return []
        array = array_of(node, index)
        if array is None:
            raise Unscalable(f"computes its input {index}")
        return [int(entry) for entry in np.atleast_1d(array)]

    # ---- writing ---------------------------------------------------------------------------
    def mark(self, node: ir.Node, *axes: Sequence[Axis]) -> None:
        """Say what the axes of a node's outputs are; the last for all that are left."""
        for index, output in enumerate(node.outputs):
            if output.name:
                self.axes[output] = tuple(axes[min(index, len(axes) - 1)])

    def rewrite(self, node: ir.Node, index: int, entries: Sequence[int]) -> None:
        """Replace a constant list of integers, for this node alone."""
        value = node.inputs[index]
        if value is None or self.constant(node, index) == list(entries):
            return
        array = array_of(node, index)
        assert array is not None
        own = self.rewriter.private_initializer(node, index)
        self.rewriter.set_initializer(own, np.asarray(entries, array.dtype).reshape(array.shape))
        self.rewriter.count("sizes_rewritten")

    def retable(self, node: ir.Node, index: int, axes: Sequence[Axis]) -> None:
        """Give a constant operand the new length along the axes in which it has an entry per position.

        Raises:
            Unscalable: it is computed, or no table that can be interpolated.
        """
        array = array_of(node, index)
        if array is None:
            raise Unscalable(f"its input {index} is computed for the old size")
        own = tuple(axes)[len(axes) - array.ndim :]
        even, odd = [], list(own)
        for at, axis in enumerate(own):
            first = np.take(array, [0], at)
            if array.shape[at] == 1 or not axis.scaled:
                odd[at] = Axis.of(array.shape[at])
            elif np.array_equal(np.broadcast_to(first, array.shape), array):
                odd[at] = Axis.of(array.shape[at])
                even.append((at, axis.then))
        if any(axis.scaled for axis in odd):
            if array.dtype.kind != "f" or node.op_type not in ("Add", "Sub") or _is_mask(array):
                raise Unscalable(
                    f"its input {index} of shape {list(array.shape)} has an entry per position, and is no table of "
                    "positions that is added"
                )
            array = resampled(array, odd)
            self.rewriter.count("tables_interpolated")
        for at, length in even:
            array = np.repeat(np.take(array, [0], at), length, at)
        self.rewriter.set_initializer(
            self.rewriter.private_initializer(node, index), np.ascontiguousarray(array)
        )


def _is_mask(array: np.ndarray) -> bool:
    """Whether it switches positions off: few values, of which one is far below the others."""
    values = np.unique(array[np.isfinite(array)])
    return bool(np.isinf(array).any() or (len(values) <= 2 and values.size and values.min() <= -10.0))
