"""Fused kernels: how runtimes group the nodes of a program, with sizes as functions of a plan.

One kernel is a contraction (Conv, ConvTranspose, Gemm, MatMul) with what a runtime executes inside it:
a following BatchNormalization, a bias or residual Add, one activation; and whatever else its `FusionRules` say.
Every other node is a kernel of its own; nodes that only change metadata cost nothing and belong to no kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sartor.ir.bodies import read_values
from sartor.ir.extents import Extent
from sartor.ir.fusion import Fused, Group, constant_nodes, json_attributes, partition
from sartor.ir.fusion_rules import ACTIVATIONS, GENERIC, FusionRules
from sartor.ir.operands import (
    RECURRENT,
    Operand,
    Tensors,
    channels_per_group,
    convolution_attributes,
    dims_of,
    macs,
)
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity

FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant"})
"""Operators that change only metadata."""
_ARITHMETIC = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Log", "Erf"}
    | {"Where", "PRelu", "Min", "Max", "Cast"}
)
_PARTS = frozenset({"Slice", "Gather"})
_FREE_INTEGER_ELEMENTS = 64  # shape arithmetic: a few integers cost nothing beside any kernel


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One unit of execution.

    Attributes:
        name: name of the leading node.
        op_type: operator of the leading node.
        family: `conv`, `depthwise`, `gemm`, `matmul`, `recurrent`, `elementwise`, `pool`, `norm`, `other`.
        nodes: names of all nodes in it, in execution order.
        attributes: of the leading node, JSON values, defaults of convolutions filled in.
        inputs: operands of the leading node (None where an optional one is absent).
        outputs: values that leave the kernel.
        epilogue: what is fused behind the leading node, BatchNormalization excepted: it folds away.
        prologue: what is fused in front of it, on one of its inputs: `Transpose`, `Scale`, `Add`. Its `inputs` are
            still those of the leading node; what is read from memory is in `bytes_read`.
        groups: of a convolution, the number of its groups, which falls when a plan removes whole groups; 1 where it
            is not grouped, the number of channels where it is depthwise. None for everything else.
        in_per_group: input channels of one group of a convolution.
        out_per_group: output channels of one group of a convolution.
        macs: multiply-accumulates (1 MAC = 2 FLOP).
        bytes_read: activations and initializers read.
        bytes_written: activations written.
        blocks: removable blocks that contain it; it disappears with any of them.
        instead_of: when not empty, the kernel exists only if one of these blocks is removed: it is what
            remains of a fused kernel whose leading node went with the block. A runtime may fuse it with what
            is then in front of it; here it stays a kernel of its own.
    """

    name: str
    op_type: str
    family: str
    nodes: tuple[str, ...]
    attributes: Mapping[str, Any]
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]
    epilogue: tuple[Fused, ...]
    macs: Quantity
    bytes_read: Quantity
    bytes_written: Quantity
    blocks: tuple[str, ...] = ()
    instead_of: tuple[str, ...] = ()
    prologue: tuple[Fused, ...] = ()
    groups: Extent | None = None
    in_per_group: Extent | None = None
    out_per_group: Extent | None = None

    def at(self, size: int, batch: int) -> Kernel:
        """The same with the input's size and the batch fixed."""

        def fixed(part: Any) -> Any:
            return None if part is None else part.at(size, batch)

        return dataclasses.replace(
            self,
            inputs=tuple(map(fixed, self.inputs)),
            outputs=tuple(map(fixed, self.outputs)),
            **{name: fixed(getattr(self, name)) for name in _EXTENTS},
        )


_EXTENTS = ("macs", "bytes_read", "bytes_written", "groups", "in_per_group", "out_per_group")


def build_kernels(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None,
    blocks_of: Mapping[str, tuple[str, ...]],
    rules: FusionRules = GENERIC,
) -> tuple[Kernel, ...]:
    """Kernels of the main graph in execution order.

    Args:
        extents: dimensions per value name; values that are absent keep their reference shape.
        blocks_of: names of the removable blocks that contain a node, by node name.
        rules: what the runtime executes as one kernel.
    """
    folded = constant_nodes(program) if rules.folds_constants else ()
    tensors = Tensors(program, extents, frozenset(o.name or "" for node in folded for o in node.outputs))
    kernels: list[Kernel] = []
    for group in partition(program, blocks_of, rules):
        if all(_is_free(node, tensors) for node in group.nodes):
            continue
        lead_blocks = blocks_of.get(group.lead.name or "", ())
        kernels.append(_kernel(program, tensors, group, lead_blocks, ()))
        for node in group.nodes:
            own = blocks_of.get(node.name or "", ())
            gone = tuple(b for b in lead_blocks if b not in own)
            folds = node.op_type == "BatchNormalization" or _is_free(node, tensors)
            if gone and node is not group.lead and not folds:
                kernels.append(_kernel(program, tensors, Group(node, (node,)), own, gone))
    return tuple(kernels)


def kernel_alone(program: Program, tensors: Tensors, node: ir.Node, blocks: tuple[str, ...]) -> Kernel:
    """A node as a kernel of its own, whatever takes it in by the rules.

    Args:
        program: that it belongs to.
        tensors: of the program.
        node: any of its main graph.
        blocks: removable blocks with which it disappears.
    """
    return _kernel(program, tensors, Group(node, (node,)), blocks, ())


def _is_free(node: ir.Node, tensors: Tensors) -> bool:
    if node.op_type in FREE and node.domain in ("", "ai.onnx"):
        return True
    outputs = [tensors[o] for o in node.outputs if o.name]
    return all(
        "INT" in o.dtype and math.prod(e.full for e in o.dims) <= _FREE_INTEGER_ELEMENTS for o in outputs
    )


def _kernel(
    program: Program,
    tensors: Tensors,
    group: Group,
    blocks: tuple[str, ...],
    instead_of: tuple[str, ...],
) -> Kernel:
    lead, nodes = group.lead, group.nodes
    inside = set(nodes)
    made = {o for node in nodes for o in node.outputs}
    read: dict[ir.Value, None] = {}
    for node in nodes:
        read.update((value, None) for value in read_values(node) if value not in made)
    written = [
        o
        for node in nodes
        for o in node.outputs
        if o.name and (o.is_graph_output() or not inside.issuperset(u.node for u in o.uses()))
    ]
    attributes = json_attributes(lead)
    inputs = tuple(None if v is None else tensors[v] for v in lead.inputs)
    outputs = tuple(tensors[o] for o in written) or tuple(tensors[o] for o in lead.outputs if o.name)
    first = tensors[lead.outputs[0]]
    op_type = lead.op_type
    grouped: dict[str, Extent] = {}
    if op_type in _PARTS and len(outputs) > 1:  # several parts of one value: what runs is a Split
        op_type, attributes, inputs = "Split", *_as_split(attributes, inputs, outputs)
    if lead.op_type in ("Conv", "ConvTranspose"):
        attributes = convolution_attributes(attributes, inputs, first)
        grouped = channels_per_group(lead.op_type, inputs, first)
    work = [
        macs(
            node.op_type,
            json_attributes(node),
            [None if v is None else tensors[v] for v in node.inputs],
            tensors[node.outputs[0]],
        )
        for node in nodes
    ]
    return Kernel(
        name=lead.name or "",
        op_type=op_type,
        family=_family(lead, attributes, inputs),
        nodes=tuple(n.name or "" for n in nodes),
        attributes=attributes,
        inputs=inputs,
        outputs=outputs,
        epilogue=group.after,
        macs=sum(work, Quantity()) + tensors.body_macs(lead),
        bytes_read=sum((tensors[v].bytes for v in read), Quantity()),
        bytes_written=sum((tensors[v].bytes for v in written), Quantity()),
        blocks=blocks,
        instead_of=instead_of,
        prologue=group.before,
        **grouped,
    )


def _as_split(
    attributes: Mapping[str, Any], inputs: Sequence[Operand | None], outputs: Sequence[Operand]
) -> tuple[dict[str, Any], tuple[Operand | None, ...]]:
    """Attributes and inputs of the Split that makes the same parts as Slices or Gathers of one value."""
    source, part = dims_of(inputs[0]), outputs[0].dims
    axis = attributes.get("axis", 0)
    if len(source) == len(part):
        axis = next(i for i, (s, p) in enumerate(zip(source, part, strict=True)) if s.full != p.full)
    gathered = len(source) != len(part)
    sizes = [1 if gathered else round(o.dims[axis].full) for o in outputs]
    lengths = Operand("", (Extent.constant(len(sizes)),), 8, "INT64", True, sizes)
    return {"axis": axis}, (inputs[0], lengths)


def _family(node: ir.Node, attributes: Mapping[str, Any], inputs: Sequence[Operand | None]) -> str:
    kind = node.op_type
    if kind in ("Conv", "ConvTranspose"):
        group = int(attributes.get("group", 1))
        return "depthwise" if group > 1 and group == round(dims_of(inputs[0])[1].full) else "conv"
    if kind in ("Gemm", "MatMul"):
        return kind.lower()
    if kind in RECURRENT:
        return "recurrent"
    if kind.endswith("Pool") or kind.startswith("Reduce"):
        return "pool"
    if kind.endswith("Normalization") or kind in ("Softmax", "LogSoftmax", "LRN"):
        return "norm"
    if kind in ACTIVATIONS or kind in (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Erf",
        "Exp",
        "Where",
        "PRelu",
    ):
        return "elementwise"
    return "other"
