"""Where zeros must go so that removed features contribute nothing: the MASKED form of a plan.

Every path from a removed feature to an output runs through a contraction over its axis (anything else
blocks the group). The contraction's weight gets zeros in its slices. Where both operands are computed, as
in q·k, the left one must become zero: its producer's rows and every bias on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sartor.errors import PassError
from sartor.ir.branches import selectors
from sartor.ir.channels.labels import Factor

if TYPE_CHECKING:
    from sartor.ir.channels.propagate import Propagation, Sink

_SAME_ATOMS = frozenset(
    """Transpose Reshape Squeeze Unsqueeze Flatten Cast Identity Slice Split Gather Neg Expand Tile Relu LeakyRelu
    Gelu Tanh Erf HardSwish Mish Elu Selu Celu Abs Sign Sqrt Sin Sinh Atan Asin MaxPool AveragePool LpPool
    GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin DepthToSpace SpaceToDepth""".split()
)
"""Operators that map zero to zero and keep the atoms of their first input."""

_LINEAR = frozenset(
    """Transpose Reshape Squeeze Unsqueeze Flatten Cast Identity Slice Split Gather Neg Expand Tile AveragePool
    GlobalAveragePool ReduceMean ReduceSum DepthToSpace SpaceToDepth""".split()
)
"""Those of them that map a multiple to the same multiple."""


class UnmaskableError(PassError):
    """Features that no zeroed parameter turns into zeros.

    Attributes:
        reason: what stands in the way, without the place.
        node: name of the node.
    """

    def __init__(self, reason: str, node: str, where: str):
        super().__init__(
            f"The MASKED form cannot be built: {reason}, at {where}. Protect the producer with --keep."
        )
        self.reason, self.node = reason, node


@dataclasses.dataclass(frozen=True, eq=False)
class Zero:
    """Indices of one parameter axis to be zeroed, as one use of the parameter sees it.

    Attributes:
        initializer: parameter name.
        axis: its axis.
        mask: boolean per index of the axis.
        node: the node that reads it.
        input: the position at which that node reads it.
    """

    initializer: str
    axis: int
    mask: np.ndarray
    node: str
    input: int


def zeros(
    propagation: Propagation, dead: np.ndarray, sinks: Sequence[Sink] | None = None, *, linear: bool = False
) -> list[Zero]:
    """What to zero so that the atoms in `dead` contribute nothing.

    Args:
        propagation: of the program.
        dead: boolean per atom.
        sinks: where to look; everywhere by default.
        linear: not only zeros but any factor must get through.

    Raises:
        UnmaskableError: an operator on the way from a query to its producer does not keep zeros; names it.
    """
    walk = _Walk(propagation, linear)
    for sink in propagation.sinks if sinks is None else sinks:
        gone = dead[sink.atoms]
        if (linear or not sink.weight) and len(sink.summed) < gone.ndim:
            # A slice that goes as a whole, as a head of q·k does, is cut where its result is read. Where a weight
            # reads it (a grouped convolution), zeros do no harm, but a factor would count twice.
            gone = gone & ~gone.all(axis=sink.summed, keepdims=True)
        wanted = np.zeros_like(dead)
        wanted[sink.atoms[gone]] = True
        if not wanted.any():
            continue
        node = walk.nodes[sink.node]
        index = next(i for i, v in enumerate(node.inputs) if v is not None and v.name == sink.value.name)
        walk.zero(node, index, wanted)
    return walk.merged()


class _Walk:
    def __init__(self, propagation: Propagation, linear: bool):
        self.propagation = propagation
        self.nodes = propagation.nodes
        self.linear = linear
        self.found: dict[tuple[str, int, str, int], np.ndarray] = {}

    def merged(self) -> list[Zero]:
        return [Zero(name, axis, mask, node, index) for (name, axis, node, index), mask in self.found.items()]

    def zero(self, node: ir.Node, index: int, wanted: np.ndarray) -> None:
        """Make input `index` of `node` zero wherever its own atoms are wanted."""
        value = node.inputs[index]
        if value is None or not wanted.any():
            return
        wanted = self._with_children(wanted)
        name = value.name or ""
        if self.propagation.is_parameter(value):
            for axis in range(len(self.propagation.shape(value))):
                atoms = self.propagation.parameter_atoms.get((name, axis))
                if atoms is not None and wanted[atoms].any():
                    key = (name, axis, node.name or "", index)
                    self.found[key] = self.found.get(key, np.zeros(len(atoms), dtype=bool)) | wanted[atoms]
            return
        producer = value.producer()
        if producer is None:
            raise UnmaskableError("no parameter makes these features", "", f"graph input '{name}'")
        self._through(producer, value, wanted)

    def _through(self, node: ir.Node, value: ir.Value, wanted: np.ndarray) -> None:
        operator = node.op_type
        if operator in (_LINEAR if self.linear else _SAME_ATOMS):
            self.zero(node, 0, wanted)
        elif operator == "Concat":
            for index, operand in enumerate(node.inputs):
                self.zero(node, index, self._beside(operand, value, wanted))
        elif operator == "Clip" and not self.linear and self._clip_keeps_zero(node):
            self.zero(node, 0, wanted)
        elif operator in ("Mul", "Div"):
            candidates = [0] if operator == "Div" else [0, 1]
            for index in sorted(candidates, key=lambda i: not self._carries(node.inputs[i], wanted)):
                selected, complete = self._at_operand(node.inputs[index], value, wanted)
                if complete:
                    self.zero(node, index, selected)
                    return
            self._refuse(node)
        elif operator in ("Add", "Sub", "Where"):
            for index in range(1 if operator == "Where" else 0, len(node.inputs)):
                selected, complete = self._at_operand(node.inputs[index], value, wanted)
                if not complete:
                    self._refuse(node)
                self.zero(node, index, selected)
        elif operator == "If":
            for identity in selectors(node, node.outputs.index(value)):
                selection, complete = self._at_operand(identity.inputs[0], value, wanted)
                if not complete:
                    self._refuse(node)
                self.zero(identity, 0, selection)
        elif operator in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            source = [i for i in (1, 0) if self._carries(node.inputs[i], wanted)]
            if not source:
                self._refuse(node)
            self.zero(node, source[0], wanted)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._parameters(node, value, wanted, [2], axis=None if operator == "Gemm" else 1)
        elif operator == "BatchNormalization":
            self._parameters(node, value, wanted, [1, 2], axis=1)
        else:
            self._refuse(node)

    def _refuse(self, node: ir.Node) -> None:
        kept = "multiples" if self.linear else "zeros"
        reason = f"{node.op_type} between a query and its producer does not keep {kept}"
        raise UnmaskableError(reason, node.name or "", self.propagation.program.where(node))

    def _with_children(self, wanted: np.ndarray) -> np.ndarray:
        """A wanted slice wants everything in it."""
        result = wanted
        for projection in reversed(self.propagation.space.projections):
            hit = result[projection.slices]
            if hit.any():
                if result is wanted:
                    result = wanted.copy()
                result[projection.children[hit].ravel()] = True
        return result

    def _factors(self, value: ir.Value) -> tuple[Factor, ...]:
        return self.propagation.labels(value)

    def _carries(self, value: ir.Value | None, wanted: np.ndarray) -> bool:
        if value is None:
            return False
        closed = self._with_children(wanted)
        if self.propagation.is_constant(value) and not self.propagation.is_parameter(value):
            return any(closed[f.atoms].any() for f in self.propagation.value_labels.get(value.name or "", ()))
        if self.propagation.is_parameter(value):
            keys = [(value.name or "", axis) for axis in range(len(self.propagation.shape(value)))]
            arrays = [
                self.propagation.parameter_atoms[k] for k in keys if k in self.propagation.parameter_atoms
            ]
            return any(closed[a].any() for a in arrays)
        return any(closed[f.atoms].any() for f in self._factors(value))

    def _beside(self, operand: ir.Value | None, output: ir.Value, wanted: np.ndarray) -> np.ndarray:
        """`wanted`, with an operand's atoms on the axes that a concatenation shares between its operands."""
        own = {factor.axes: factor.atoms for factor in self._factors(operand)} if operand is not None else {}
        result = wanted
        for factor in self._factors(output):
            atoms = own.get(factor.axes)
            if atoms is not None and atoms.shape == factor.atoms.shape and wanted[factor.atoms].any():
                result = result.copy() if result is wanted else result
                result[atoms[wanted[factor.atoms]]] = True
        return result

    def _at_operand(
        self, operand: ir.Value | None, output: ir.Value, wanted: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """Wanted atoms of a broadcast operand at the positions wanted in the output, and whether all are."""
        selected = np.zeros_like(wanted)
        if operand is None:
            return selected, False
        shift = len(self.propagation.shape(output)) - len(self.propagation.shape(operand))
        complete = True
        for factor in self._factors(output):
            mask = wanted[factor.atoms]
            if not mask.any():
                continue
            covered = np.zeros_like(mask)
            for own in self._factors(operand):
                axes = tuple(a + shift for a in own.axes)
                if not set(axes) <= set(factor.axes):
                    continue
                rest = tuple(i for i, a in enumerate(factor.axes) if a not in axes)
                hit = mask.all(axis=rest)
                selected[own.atoms[hit]] = True
                shape = [factor.atoms.shape[i] if a in axes else 1 for i, a in enumerate(factor.axes)]
                covered |= hit.reshape(shape)
            complete &= bool((covered == mask).all())
        return selected, complete

    def _parameters(
        self, node: ir.Node, output: ir.Value, wanted: np.ndarray, inputs: list[int], axis: int | None
    ) -> None:
        """Zero per-channel parameters at the positions wanted along the output's channel axis."""
        for index in inputs:
            value = node.inputs[index]
            if value is None:
                continue
            along = axis if axis is not None else 1
            for factor in self._factors(output):
                if factor.axes != (along,):
                    continue
                for own in self._factors(value):
                    if len(own.atoms) == len(factor.atoms):
                        selected = np.zeros_like(wanted)
                        selected[own.atoms[wanted[factor.atoms]]] = True
                        self.zero(node, index, selected)

    def _clip_keeps_zero(self, node: ir.Node) -> bool:
        bounds = [self.propagation.constant(v) for v in node.inputs[1:]]
        low, high = [*bounds, None, None][:2]
        return (low is None or float(low) <= 0) and (high is None or float(high) >= 0)
