"""Buffers of a program, by rules that say what runtimes do: what is fused, renamed, and written in place."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.bodies import body_graphs, read_values
from sartor.ir.extents import Extent
from sartor.ir.fusion import json_attributes, partition
from sartor.ir.fusion_layout import blocked_values, layout_changes
from sartor.ir.liveness import body_peak
from sartor.ir.memory.assembly import Assembled, Bypass, KernelNodes, NodeBuffers, Parts, assemble
from sartor.ir.memory.buffers import BufferGraph, moments
from sartor.ir.memory.peak import peaks
from sartor.ir.memory.rules import DEFAULT, Rules
from sartor.ir.operands import Operand, Tensors
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity, largest, whole

_BLOCK = 16
"""Channels of one block of the layout where vectors have 512 bits; see `sartor.ir.fusion_layout`."""
Fractions = Mapping[str, Any]
Removed = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramBuffers:
    """Buffers of a program with sizes as functions of a plan. Made by `program_buffers`."""

    parts: Parts
    _made: dict[frozenset[str], Assembled] = dataclasses.field(default_factory=dict, repr=False)

    def graph(self, removed: Iterable[str] = ()) -> BufferGraph:
        """Buffers at full width, without these blocks."""
        return self._assembled(frozenset(removed)).graph

    def at(self, fractions: Fractions | None = None, removed: Removed | None = None) -> BufferGraph:
        """Buffers under one plan."""
        gone = frozenset(
            name for name, flag in (removed or {}).items() if flag and name in self.parts.bypasses
        )
        made = self._assembled(gone)

        def under_plan(sizes: Mapping[str, Quantity]) -> dict[str, int]:
            return {name: _bytes(size.evaluate(fractions or {})) for name, size in sizes.items()}

        constants = under_plan(made.constants)
        return dataclasses.replace(made.graph, sizes=under_plan(made.sizes), constants=constants)

    def peaks(
        self,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        order: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Peak bytes of a population of plans, an array `[plans]` (0-d for a single plan).

        Args:
            fractions: kept fraction per group; scalars or arrays of one common length.
            removed: removed blocks; scalars or bool arrays of the same length.
            order: steps of `graph()` in another order; where a block is removed, the steps that stay keep to it.
        """
        names = None if order is None else [self.graph().steps[i].name for i in order]

        def of(made: Assembled, kept: Fractions) -> Any:
            graph = made.graph if names is None else _in_order(made.graph, names)
            return peaks(moments(graph), {name: size.evaluate(kept) for name, size in made.sizes.items()})

        return self._over_plans(of, fractions, removed)

    def traffic_bytes(self, fractions: Fractions | None = None, removed: Removed | None = None) -> np.ndarray:
        """Bytes that steps read and write, constants included, `[plans]`; arguments as of `peaks`."""

        def of(made: Assembled, kept: Fractions) -> Any:
            sizes = {**made.sizes, **made.constants}
            moved = [b for s in made.graph.steps for b in (*s.reads, *s.writes, *s.constants)]
            return sum(
                sizes[name].evaluate(kept) * times for name, times in collections.Counter(moved).items()
            )

        return self._over_plans(of, fractions, removed)

    def constant_bytes(
        self, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> np.ndarray:
        """Bytes of initializers, `[plans]`; arguments as of `peaks`."""

        def of(made: Assembled, kept: Fractions) -> Any:
            return sum(size.evaluate(kept) for size in made.constants.values())

        return self._over_plans(of, fractions, removed)

    def _over_plans(
        self,
        of: Callable[[Assembled, Fractions], Any],
        fractions: Fractions | None,
        removed: Removed | None,
    ) -> np.ndarray:
        """`of` for each plan; it is asked once per set of removed blocks."""
        kept = {name: np.asarray(value, float) for name, value in (fractions or {}).items()}
        gone = {name: np.asarray(value, bool) for name, value in (removed or {}).items()}
        names = [name for name in self.parts.bypasses if name in gone]
        shape = np.broadcast_shapes(*(v.shape for v in kept.values()), *(v.shape for v in gone.values()))
        flags = np.zeros((*shape, len(names)), bool)
        for index, name in enumerate(names):
            flags[..., index] = gone[name]
        flat = flags.reshape(math.prod(shape), len(names))
        result = np.zeros(flat.shape[0])
        columns = {name: np.broadcast_to(value, shape).reshape(-1) for name, value in kept.items()}
        for row in np.unique(flat, axis=0) if names else flat[:1]:
            where = (flat == row).all(-1)
            part = {name: value[where] for name, value in columns.items()}
            without = frozenset(n for n, flag in zip(names, row, strict=True) if flag)
            result[where] = whole(of(self._assembled(without), part))
        return result.reshape(shape)

    def _assembled(self, removed: frozenset[str]) -> Assembled:
        if removed not in self._made:
            self._made[removed] = assemble(self.parts, removed)
        return self._made[removed]


def _bytes(size: Any) -> int:
    return math.ceil(float(whole(size)))


def _in_order(graph: BufferGraph, names: Sequence[str]) -> BufferGraph:
    """As close to the order of `names` as the graph allows: steps that are not among them run when they can."""
    rank = {name: i for i, name in enumerate(names)}
    made = set(graph.inputs)
    left = list(range(len(graph.steps)))
    order: list[int] = []
    while left:
        ready = [i for i in left if made.issuperset(graph.steps[i].reads)]
        step = min(ready, key=lambda i: (rank.get(graph.steps[i].name, -1), i))
        order.append(step)
        left.remove(step)
        made.update(graph.steps[step].writes)
    return graph.reordered(order)


def program_buffers(
    program: Program,
    rules: Rules = DEFAULT,
    extents: Mapping[str, tuple[Extent, ...]] | None = None,
    blocks: Sequence[Any] = (),
) -> ProgramBuffers:
    """Buffers of the main graph.

    Args:
        program: at its reference shapes.
        rules: of the runtime.
        extents: dimensions per value name; values that are absent keep their reference shape.
        blocks: removable blocks with `name`, `nodes`, `inputs` and `outputs`: without one, what reads its output
            reads its input instead.

    Raises:
        ModelError: a shape depends on data.
    """
    tensors = Tensors(program, extents)
    blocks_of: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        for name in block.nodes:
            blocks_of[name] = (*blocks_of.get(name, ()), block.name)
    if rules.fusion is None:
        grouped: list[tuple[ir.Node, Sequence[ir.Node]]] = [(node, [node]) for node in program.nodes()]
    else:
        grouped = [(group.lead, group.nodes) for group in partition(program, blocks_of, rules.fusion)]
    stored = set(program.initializers)
    values = [v for v in program.graph.inputs if v.name not in stored]
    values += [v for node in program.nodes() for v in node.outputs if v.name]
    constants = {name: tensors[value].bytes for name, value in program.initializers.items()}
    bypasses = {}
    for block in blocks:
        if block.inputs:
            replaced = dict.fromkeys(map(_name, block.outputs), _name(block.inputs[0]))
            bypasses[block.name] = Bypass(frozenset(block.nodes), replaced)
    kernels = [
        KernelNodes(lead.name or "", tuple(_node(node, stored, tensors) for node in nodes))
        for lead, nodes in grouped
    ]
    parts = Parts(
        rules=rules,
        kernels=tuple(kernels),
        sizes={v.name or "": tensors[v].bytes for v in values},
        shapes=program.shapes(),
        inputs=tuple(v.name or "" for v in program.graph.inputs if v.name not in stored),
        outputs=tuple(v.name or "" for v in program.graph.outputs),
        constants=constants,
        bypasses=bypasses,
    )
    if rules.layout:
        parts = _in_layout(parts, program, {v.name or "": tensors[v] for v in values})
    return ProgramBuffers(parts)


def _name(value: Any) -> str:
    return value if isinstance(value, str) else value.name


def _node(node: ir.Node, stored: set[str], tensors: Tensors) -> NodeBuffers:
    read = dict.fromkeys(v.name or "" for v in read_values(node))
    first = node.inputs[0].name or "" if node.inputs and node.inputs[0] is not None else ""
    return NodeBuffers(
        name=node.name or "",
        op_type=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
        reads=tuple(name for name in read if name not in stored),
        writes=tuple(v.name for v in node.outputs if v.name),
        stored=tuple(name for name in read if name in stored),
        first=first,
        scratch=largest([body_peak(body, node.op_type, tensors) for body in body_graphs(node)]),
        plane=_plane(node, tensors),
        padded=_padded(node, tensors),
        accumulators=_accumulators(node, tensors),
    )


def _plane(node: ir.Node, tensors: Tensors) -> Quantity | None:
    if node.op_type != "Conv" or node.inputs[0] is None:
        return None
    data, result = tensors[node.inputs[0]], tensors[node.outputs[0]]
    channels = round(data.dims[1].full)
    groups = int(json_attributes(node).get("group", 1))
    if not 1 < groups == channels == round(result.dims[1].full):
        return None
    planes = [Quantity.product(t.item_bytes, (t.dims[0], *t.dims[2:])) for t in (data, result)]
    return largest(planes)


@dataclasses.dataclass(frozen=True)
class _RoundedUp(Extent):
    """A length in whole blocks."""

    inner: Extent = dataclasses.field(default_factory=lambda: Extent(()))

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """See `Extent.evaluate`."""
        return _BLOCK * np.ceil(whole(self.inner.evaluate(fractions)) / _BLOCK)


def _in_blocks(operand: Operand) -> Quantity:
    """Bytes of a value in the blocked layout: its channels are filled up."""
    channels = operand.dims[1]
    full = float(_BLOCK * math.ceil(channels.full / _BLOCK))
    wide = _RoundedUp(((full, tuple(sorted(channels.groups))),), channels)
    return Quantity.product(operand.item_bytes, (operand.dims[0], wide, *operand.dims[2:]))


def _in_layout(parts: Parts, program: Program, tensors: Mapping[str, Operand]) -> Parts:
    """With values in the blocked layout, and copies of those that some nodes read in the other one."""
    into, out = layout_changes(program)
    blocked = blocked_values(program)
    copied: dict[str, set[str]] = {v.name or "": {""} for v in program.graph.outputs if v.name in out}
    for node in program.nodes():
        inside = bool(node.outputs) and node.outputs[0].name in blocked
        for value in read_values(node):
            name = value.name or ""
            if (name in into and inside) or (name in out and not inside):
                copied.setdefault(name, set()).add(node.name or "")
    wide = {name: _in_blocks(tensors[name]) for name in {*blocked, *into} if name in tensors}
    return dataclasses.replace(
        parts,
        sizes={name: wide[name] if name in blocked else size for name, size in parts.sizes.items()},
        copied={name: frozenset(readers) for name, readers in copied.items()},
        copied_early=out,
        copy_sizes={**{name: parts.sizes[name] for name in out}, **{name: wide[name] for name in into - out}},
    )


def _padded(node: ir.Node, tensors: Tensors) -> Quantity | None:
    """Bytes of a convolution's or pooling's input with its pads; None where TensorFlow has a name for them."""
    attributes = json_attributes(node)
    pads = attributes.get("pads", [])
    if node.op_type not in ("Conv", "MaxPool") or node.inputs[0] is None or not any(pads):
        return None
    data, result = tensors[node.inputs[0]], tensors[node.outputs[0]]
    lengths, outputs = ([round(e.full) for e in tensor.dims[2:]] for tensor in (data, result))
    rank = len(lengths)
    kernel = attributes.get("kernel_shape", [])
    if node.op_type == "Conv" and node.inputs[1] is not None:
        kernel = [round(e.full) for e in tensors[node.inputs[1]].dims[2:]]
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    axes = zip(lengths, outputs, kernel, strides, dilations, strict=True)
    if list(zip(pads[:rank], pads[rank:], strict=True)) == [_same_pads(*axis) for axis in axes]:
        return None
    wide = [Extent.constant(n + pads[i] + pads[rank + i]) for i, n in enumerate(lengths)]
    return Quantity.product(data.item_bytes, (*data.dims[:2], *wide))


def _same_pads(length: int, output: int, kernel: int, stride: int, dilation: int) -> tuple[int, int] | None:
    """Pads of "SAME" along one axis, the odd one behind; None if its result has another length."""
    if output != -(-length // stride):
        return None
    total = max(0, (output - 1) * stride + dilation * (kernel - 1) + 1 - length)
    return total // 2, total - total // 2


def _accumulators(node: ir.Node, tensors: Tensors) -> Quantity | None:
    if node.op_type not in ("ConvTranspose", "ReduceMean", "ReduceSum", "GlobalAveragePool"):
        return None
    return Quantity.product(4, tensors[node.outputs[0]].dims)
