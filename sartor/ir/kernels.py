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

from sartor.errors import InternalError
from sartor.ir.bodies import body_graphs, read_values
from sartor.ir.extents import Extent, quotient
from sartor.ir.fusion import Fused, Group, constant_nodes, json_attributes, partition
from sartor.ir.fusion_rules import ACTIVATIONS, CONTRACTIONS, GENERIC, FusionRules
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity, largest
from sartor.ir.subgraphs import body_shapes

RECURRENT = frozenset({"RNN", "LSTM", "GRU"})
FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant"})
"""Operators that change only metadata."""
_ARITHMETIC = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Log", "Erf"}
    | {"Where", "PRelu", "Min", "Max", "Cast"}
)
_PARTS = frozenset({"Slice", "Gather"})
_FREE_INTEGER_ELEMENTS = 64  # shape arithmetic: a few integers cost nothing beside any kernel
_KEEP_VALUE_ELEMENTS = 64  # constants that decide what a node does (bounds, axes, scales), not weights


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor that a kernel reads or writes.

    Attributes:
        dims: one extent per axis.
        item_bytes: bytes per element (0.5 for 4-bit types).
        dtype: ONNX type name, e.g. `FLOAT`.
        stored: True for an initializer.
        value: contents of a small constant as nested lists, else None.
    """

    name: str
    dims: tuple[Extent, ...]
    item_bytes: float
    dtype: str
    stored: bool = False
    value: Any = None

    @property
    def bytes(self) -> Quantity:
        """Size in bytes."""
        return Quantity.product(self.item_bytes, self.dims)

    def at(self, size: int, batch: int) -> Operand:
        """The same with the input's size and the batch fixed."""
        return dataclasses.replace(self, dims=tuple(e.at(size, batch) for e in self.dims))


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


class Tensors:
    """Operands of a program's values, from the reference shapes and the analysed extents."""

    def __init__(
        self,
        program: Program,
        extents: Mapping[str, tuple[Extent, ...]] | None,
        folded: frozenset[str] = frozenset(),
    ):
        """Of one program; `folded` names values that are computed once, when the model is loaded."""
        self._program, self._folded = program, folded
        self._shapes, self._types = program.shapes(), program.types()
        self._extents = extents or {}
        self._cache: dict[str, Operand] = {}
        self._inner: dict[str, tuple[tuple[int, ...], ir.DataType]] | None = None

    def __getitem__(self, value: ir.Value) -> Operand:
        name = value.name or ""
        if name not in self._cache:
            self._cache[name] = self._make(value, name)
        return self._cache[name]

    def _make(self, value: ir.Value, name: str) -> Operand:
        shape = self._shapes.get(name)
        if shape is None:
            raise InternalError(
                f"Value '{name}' has no inferred shape; only main-graph values can be priced."
            )
        dims = self._extents.get(name)
        if dims is None:
            dims = tuple(Extent.constant(d) for d in shape)
        elif len(dims) != len(shape) or any(abs(e.full - d) > 1e-6 for e, d in zip(dims, shape, strict=True)):
            raise InternalError(
                f"Extents of value '{name}' are {[e.full for e in dims]} before pruning, "
                f"but its shape is {list(shape)}; the channel analysis does not belong to this program."
            )
        dtype = self._types.get(name, ir.DataType.FLOAT)
        stored = name in self._program.initializers
        constant = None
        decides = not dtype.is_floating_point() or not shape or (len(shape) == 1 and shape[0] <= 8)
        fixed = math.prod(shape) <= _KEEP_VALUE_ELEMENTS and not any(e.varies for e in dims)
        if stored and decides and fixed:
            constant = self._program.initializer_array(name).tolist()
        return Operand(
            name, tuple(dims), dtype.itemsize, dtype.name, stored or name in self._folded, constant
        )

    def body_macs(self, node: ir.Node) -> Quantity:
        """MACs inside the bodies of a control-flow node: an If's dearest branch, a Loop's body once."""
        return largest([sum(map(self._inner_macs, body), Quantity()) for body in body_graphs(node)])

    def _inner_macs(self, node: ir.Node) -> Quantity:
        if body_graphs(node):
            return self.body_macs(node)
        if node.op_type not in CONTRACTIONS | RECURRENT:
            return Quantity()
        inputs = [None if v is None else self.inner(v) for v in node.inputs]
        return macs(node.op_type, json_attributes(node), inputs, self.inner(node.outputs[0]))

    def inner(self, value: ir.Value) -> Operand:
        """A value that may belong to a body."""
        name = value.name or ""
        if name in self._shapes:
            return self[value]
        if self._inner is None:
            self._inner = body_shapes(self._program)
        shape, dtype = self._inner[name]
        dims = self._extents.get(name) or tuple(Extent.constant(d) for d in shape)
        return Operand(name, dims, dtype.itemsize, dtype.name)


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
    source, part = _dims(inputs[0]), outputs[0].dims
    axis = attributes.get("axis", 0)
    if len(source) == len(part):
        axis = next(i for i, (s, p) in enumerate(zip(source, part, strict=True)) if s.full != p.full)
    gathered = len(source) != len(part)
    sizes = [1 if gathered else round(o.dims[axis].full) for o in outputs]
    lengths = Operand("", (Extent.constant(len(sizes)),), 8, "INT64", True, sizes)
    return {"axis": axis}, (inputs[0], lengths)


def channels_per_group(op_type: str, inputs: Sequence[Operand | None], output: Operand) -> dict[str, Extent]:
    """`groups`, `in_per_group` and `out_per_group` of a convolution as functions of a plan.

    The weight says how many channels one group has; how many groups there are follows from the channels: a plan may
    narrow every group or remove whole ones.
    """
    x, w = _dims(inputs[0]), _dims(inputs[1])
    if op_type == "Conv":
        groups = quotient(x[1], w[1])
        return {"groups": groups, "in_per_group": w[1], "out_per_group": quotient(output.dims[1], groups)}
    groups = quotient(output.dims[1], w[1])
    return {"groups": groups, "in_per_group": quotient(x[1], groups), "out_per_group": w[1]}


def macs(
    op_type: str, attributes: Mapping[str, Any], inputs: Sequence[Operand | None], output: Operand
) -> Quantity:
    """Multiply-accumulates of one node; zero for everything that is not a contraction.

    Biases, activations and poolings are not counted. ConvTranspose counts every product, also those
    that its pads crop away.
    """
    if op_type == "Conv":
        return Quantity.product(1, (*output.dims, *_dims(inputs[1])[1:]))
    if op_type == "ConvTranspose":
        return Quantity.product(1, (*_dims(inputs[0]), *_dims(inputs[1])[1:]))
    if op_type == "Gemm":
        return Quantity.product(1, (*output.dims, _dims(inputs[0])[0 if attributes.get("transA") else 1]))
    if op_type == "MatMul":
        return Quantity.product(1, (*output.dims, _dims(inputs[0])[-1]))
    if op_type in RECURRENT:
        sequence = _dims(inputs[0])  # [T, N, I], or [N, T, I] with layout 1: the product is the same
        steps = (sequence[0], sequence[1])
        return Quantity.product(1, steps + _dims(inputs[1])) + Quantity.product(1, steps + _dims(inputs[2]))
    return Quantity()


def _dims(operand: Operand | None) -> tuple[Extent, ...]:
    if operand is None:
        raise InternalError("A contraction lacks a required input; verify the program first.")
    return operand.dims


def _family(node: ir.Node, attributes: Mapping[str, Any], inputs: Sequence[Operand | None]) -> str:
    kind = node.op_type
    if kind in ("Conv", "ConvTranspose"):
        group = int(attributes.get("group", 1))
        return "depthwise" if group > 1 and group == round(_dims(inputs[0])[1].full) else "conv"
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


def convolution_attributes(
    attributes: Mapping[str, Any], inputs: Sequence[Operand | None], output: Operand
) -> dict[str, Any]:
    """All defaults of a convolution filled in and `auto_pad` resolved, so that equal ones compare equal."""
    kernel = [round(e.full) for e in _dims(inputs[1])[2:]]
    rank = len(kernel)
    filled: dict[str, Any] = {
        "strides": [1] * rank,
        "dilations": [1] * rank,
        "pads": [0] * (2 * rank),
        "group": 1,
        **attributes,
        "kernel_shape": kernel,
    }
    mode = filled.pop("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") and "output_padding" not in filled:
        source, target = _dims(inputs[0])[2:], output.dims[2:]
        strides, dilations = filled["strides"], filled["dilations"]
        totals = [
            max(0, (round(t.full) - 1) * s + d * (k - 1) + 1 - round(i.full))
            for t, s, d, k, i in zip(target, strides, dilations, kernel, source, strict=True)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        filled["pads"] = small + large if mode == "SAME_UPPER" else large + small
    return filled
