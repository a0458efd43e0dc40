"""Constraints on canonical nodes that ONNX's shape inference does not check, or only in part.

One constraint is one function `(context, node) -> problem`; the empty string means that it holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from sartor.ir import canonicalize as table
from sartor.ir.cleanup import array_of
from sartor.ir.program import DIALECT_DOMAIN, Program

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Context:
    """The program under test and its shapes at the reference shapes."""

    program: Program
    shapes: Mapping[str, Shape]

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Shape of `value`, or None if it is absent."""
        return None if value is None else self.shapes.get(value.name or "")


Constraint = Callable[[Context, ir.Node], str]


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return f"'{value.name}'" if value is not None else f"input {index}"


def _inputs(context: Context, node: ir.Node) -> list[Shape | None]:
    return [context.shape(i) for i in node.inputs]


def conv(context: Context, node: ir.Node) -> str:
    """Channels of data, weight, groups and bias agree."""
    x, w, *rest = _inputs(context, node)
    if x is None or w is None:
        return ""
    if len(x) != len(w) or len(x) < 3:
        return (
            f"its data has rank {len(x)} and its weight {_name(node, 1)} rank {len(w)}; they must be equal."
        )
    group = node.attributes.get_int("group", 1)
    transposed = node.op_type == "ConvTranspose"
    expected = w[0] if transposed else w[1] * group
    if x[1] != expected:
        spelled = f"{w[0]}" if transposed else f"{w[1]} per group in {group} groups"
        return (
            f"its data {_name(node, 0)} has {x[1]} channels, its weight {_name(node, 1)} expects {spelled}. "
            "Prune "
            "both together."
        )
    made = w[1] * group if transposed else w[0]
    if (w[0] if transposed else made) % group:
        return f"{made} channels are not divisible into {group} groups."
    if rest and rest[0] is not None and rest[0] != (made,):
        return f"its bias {_name(node, 2)} has shape {list(rest[0])}; expected [{made}]."
    kernel = node.attributes.get_ints("kernel_shape", w[2:])
    if tuple(kernel) != w[2:]:
        return f"kernel_shape {list(kernel)} does not fit its weight {_name(node, 1)} of shape {list(w)}."
    return ""


def channel_parameters(context: Context, node: ir.Node) -> str:
    """Scale, bias and statistics of a normalisation have one element per channel."""
    x, *parameters = _inputs(context, node)
    if x is None:
        return ""
    for index, shape in enumerate(parameters, start=1):
        if shape is not None and shape != (x[1],):
            return (
                f"{_name(node, index)} has shape {list(shape)}, but its data {_name(node, 0)} has {x[1]} "
                "channels. "
                "Slice it with them."
            )
    groups = node.attributes.get_int("num_groups", 1)
    return f"{x[1]} channels are not divisible into {groups} groups." if x[1] % groups else ""


def layer_norm(context: Context, node: ir.Node) -> str:
    """Scale and bias fit the normalised axes."""
    x, *parameters = _inputs(context, node)
    if x is None:
        return ""
    normalised = x[node.attributes.get_int("axis", -1) % len(x) :]
    for index, shape in enumerate(parameters, start=1):
        if shape is not None and not _broadcasts_to(shape, normalised):
            return (
                f"{_name(node, index)} has shape {list(shape)}; the normalised axes are {list(normalised)}."
            )
    return ""


def gemm(context: Context, node: ir.Node) -> str:
    """Contracted dimensions are equal and C broadcasts."""
    a, b, *rest = _inputs(context, node)
    if a is None or b is None:
        return ""
    if len(a) != 2 or len(b) != 2:
        return f"its operands have ranks {len(a)} and {len(b)}; Gemm needs matrices."
    a = a[::-1] if node.attributes.get_int("transA", 0) else a
    b = b[::-1] if node.attributes.get_int("transB", 0) else b
    if a[1] != b[0]:
        return (
            f"{_name(node, 0)} has {a[1]} features, its weight {_name(node, 1)} expects {b[0]}. "
            "Prune both together."
        )
    if rest and rest[0] is not None and not _broadcasts_to(rest[0], (a[0], b[1])):
        return f"its bias {_name(node, 2)} has shape {list(rest[0])}; the result is {[a[0], b[1]]}."
    return ""


def matmul(context: Context, node: ir.Node) -> str:
    """Contracted dimensions are equal and the others broadcast."""
    a, b = _inputs(context, node)
    if a is None or b is None:
        return ""
    if not a or not b:
        return "an operand is a scalar; MatMul needs at least one axis."
    inner = b[0] if len(b) == 1 else b[-2]
    if a[-1] != inner:
        return (
            f"{_name(node, 0)} has {a[-1]} features, {_name(node, 1)} expects {inner}. Prune both together."
        )
    if not _compatible(a[:-2], b[:-2]):
        return f"leading axes {list(a[:-2])} and {list(b[:-2])} do not broadcast."
    return ""


def elementwise(context: Context, node: ir.Node) -> str:
    """Operands broadcast to one shape."""
    known = [(i, s) for i, s in enumerate(_inputs(context, node)) if s is not None]
    for position, (index, shape) in enumerate(known):
        for other, against in known[:position]:
            if not _compatible(shape, against):
                return (
                    f"{_name(node, other)} has shape {list(against)} and {_name(node, index)} has "
                    f"{list(shape)}; they do "
                    "not broadcast. Both belong to one channel group; prune them together."
                )
    if node.op_type == "PRelu" and len(known) == 2 and not _broadcasts_to(known[1][1], known[0][1]):
        return (
            f"its slope {_name(node, 1)} of shape {list(known[1][1])} does not fit data {list(known[0][1])}."
        )
    return ""


def reshape(context: Context, node: ir.Node) -> str:
    """The target holds exactly as many elements as the data."""
    x, target = context.shape(node.inputs[0]), array_of(node, 1)
    result = context.shape(node.outputs[0])
    if x is None or target is None:
        return ""
    dims = [int(d) for d in target]
    if not node.attributes.get_int("allowzero", 0):
        if any(d == 0 and axis >= len(x) for axis, d in enumerate(dims)):
            return f"target {dims} copies an axis that its data {list(x)} does not have."
        dims = [x[axis] if d == 0 else d for axis, d in enumerate(dims)]
    fixed = math.prod(d for d in dims if d != -1)
    total = math.prod(x)
    if dims.count(-1) > 1 or (total % fixed if -1 in dims and fixed else -1 not in dims and total != fixed):
        return (
            f"its data {_name(node, 0)} of shape {list(x)} has {total} elements; its target {dims} does not "
            "fit. Recompute the target."
        )
    if result is not None and math.prod(result) != total:
        return f"it makes shape {list(result)} from {list(x)}; the numbers of elements differ."
    return ""


def expand(context: Context, node: ir.Node) -> str:
    """The data broadcasts against the target."""
    x, target = context.shape(node.inputs[0]), array_of(node, 1)
    if x is None or target is None or _compatible(x, tuple(int(d) for d in target)):
        return ""
    return f"its data of shape {list(x)} does not broadcast to {target.tolist()}."


def concat(context: Context, node: ir.Node) -> str:
    """All inputs agree on every axis but the concatenated one."""
    shapes = [s for s in _inputs(context, node) if s is not None]
    if not shapes:
        return ""
    axis = node.attributes.get_int("axis", 0) % max(len(shapes[0]), 1)
    for index, shape in enumerate(shapes):
        if len(shape) != len(shapes[0]) or any(
            a != b for i, (a, b) in enumerate(zip(shape, shapes[0], strict=True)) if i != axis
        ):
            return (
                f"input 0 has shape {list(shapes[0])} and input {index} {list(shape)}; only axis {axis} may "
                "differ."
            )
    result = context.shape(node.outputs[0])
    if (
        result is not None
        and len(shapes) == len(node.inputs)
        and result[axis] != sum(s[axis] for s in shapes)
    ):
        return (
            f"its parts have {[s[axis] for s in shapes]} positions on axis {axis}, its result {result[axis]}."
        )
    return ""


def split(context: Context, node: ir.Node) -> str:
    """The parts add up to the whole."""
    x, sizes = context.shape(node.inputs[0]), array_of(node, 1)
    if x is None or sizes is None:
        return ""
    axis = node.attributes.get_int("axis", 0) % len(x)
    if len(sizes) != len(node.outputs) or int(sizes.sum()) != x[axis]:
        return f"its data has {x[axis]} positions on axis {axis}, its parts are {sizes.tolist()}."
    return ""


def gather(context: Context, node: ir.Node) -> str:
    """Constant indices lie inside the data."""
    x, indices = context.shape(node.inputs[0]), array_of(node, 1)
    if x is None or indices is None or not indices.size:
        return ""
    axis = node.attributes.get_int("axis", 0) % len(x)
    low, high = int(indices.min()), int(indices.max())
    if low < -x[axis] or high >= x[axis]:
        return f"indices reach from {low} to {high}, its data has {x[axis]} positions on axis {axis}."
    return ""


def slice_(context: Context, node: ir.Node) -> str:
    """Starts lie inside the data: ONNX clamps silently, which hides a stale bound."""
    x = context.shape(node.inputs[0])
    starts, axes = array_of(node, 1), array_of(node, 3)
    if x is None or starts is None or axes is None:
        return ""
    for start, axis in zip(starts, axes, strict=True):
        size = x[int(axis)]
        if int(start) > size or (0 in (context.shape(node.outputs[0]) or ())):
            return f"it starts at {int(start)} on axis {int(axis)} of {size} positions, or selects nothing."
    return ""


def blocks_of_channels(context: Context, node: ir.Node) -> str:
    """DepthToSpace needs whole blocks of channels; SpaceToDepth whole blocks of pixels."""
    x = context.shape(node.inputs[0])
    block = node.attributes.get_int("blocksize", 1)
    if x is None:
        return ""
    if node.op_type == "DepthToSpace" and x[1] % (block * block):
        return f"{x[1]} channels are not divisible by {block}²."
    if node.op_type == "SpaceToDepth" and (x[2] % block or x[3] % block):
        return f"its data {list(x)} is not divisible into blocks of {block}."
    return ""


def not_empty(context: Context, node: ir.Node) -> str:
    """A canonical program computes no empty tensor."""
    for output in node.outputs:
        shape = context.shape(output)
        if shape is not None and 0 in shape:
            return f"its result '{output.name}' of shape {list(shape)} is empty."
    return ""


def _compatible(a: Shape, b: Shape) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def _broadcasts_to(shape: Shape, target: Shape) -> bool:
    return len(shape) <= len(target) and all(
        x in (1, y) for x, y in zip(shape[::-1], target[::-1], strict=False)
    )


def channel_gate(context: Context, node: ir.Node) -> str:
    """The gate has one element per channel."""
    x, gate = _inputs(context, node)
    if x is None or gate is None or gate == x[1:2]:
        return ""
    return f"its gate {_name(node, 1)} has shape {list(gate)}, its data {_name(node, 0)} has {x[1]} channels."


_BY_OPERATOR: tuple[tuple[tuple[str, ...], Constraint], ...] = (
    (tuple(sorted(table.CANONICAL_OPS - {"Shape"})), not_empty),
    (("Conv", "ConvTranspose"), conv),
    (("BatchNormalization", "InstanceNormalization", "GroupNormalization"), channel_parameters),
    (("LayerNormalization",), layer_norm),
    (("Gemm",), gemm),
    (("MatMul",), matmul),
    (tuple(sorted(table.ELEMENTWISE_BROADCAST)), elementwise),
    (("Reshape",), reshape),
    (("Expand",), expand),
    (("Concat",), concat),
    (("Split",), split),
    (("Gather",), gather),
    (("Slice",), slice_),
    (("DepthToSpace", "SpaceToDepth"), blocks_of_channels),
)

CONSTRAINTS: dict[tuple[str, str], tuple[Constraint, ...]] = {
    (DIALECT_DOMAIN, "ChannelGate"): (channel_gate,)
}
"""Constraints by operator domain and type, in the order they are checked."""
for _names, _constraint in _BY_OPERATOR:
    for _op in _names:
        CONSTRAINTS["", _op] = (*CONSTRAINTS.get(("", _op), ()), _constraint)
