"""Rules of operators that move data: they do to the label array what the operator does to the data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sartor.ir.channels.labels import Factor, Operand, permute, simplify
from sartor.ir.channels.propagate import Propagation, rule
from sartor.ir.channels.rules import mixes


@rule("Transpose", effect="permutes the axes")
def _transpose(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    perm = ctx.attribute(node, "perm", tuple(reversed(range(rank))))
    ctx.set(node.outputs[0], permute(ctx.labels(node.inputs[0]), {old: new for new, old in enumerate(perm)}))


@rule(
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    effect="exact on the index map: splits and merges label arrays",
)
def _reshape(ctx: Propagation, node: ir.Node) -> None:
    labels = ctx.labels(node.inputs[0])
    if node.op_type == "Reshape" and labels and ctx.entries(node.inputs[1]) is None:
        ctx.refuse(node, "Reshape to a computed shape")
        return
    reason = ctx.reason(node, f"{node.op_type} mixes this axis with others")
    ctx.set(
        node.outputs[0],
        ctx.space.reshape(labels, ctx.shape(node.inputs[0]), ctx.shape(node.outputs[0]), reason),
    )


@rule("Split", effect="splits the label array")
def _split(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axis = ctx.attribute(node, "axis", 0) % rank
    labels = ctx.labels(node.inputs[0])
    start = 0
    for output in node.outputs:
        length = ctx.shape(output)[axis]
        indices = range(start, start + length)
        ctx.set(
            output, ctx.space.select(labels, axis, indices, ctx.reason(node, "the only channel of a split"))
        )
        start += length


@rule("Slice", effect="slices the label array; a stride along a labelled axis is blocked")
def _slice(ctx: Propagation, node: ir.Node) -> None:
    labels, shape = ctx.labels(node.inputs[0]), ctx.shape(node.inputs[0])
    bounds = slice_bounds(ctx, node)
    if bounds is None:
        ctx.refuse(node, "Slice with computed bounds")
        return
    for axis, (start, stop, step) in bounds.items():
        indices = range(shape[axis])[slice(start, stop if stop >= 0 or step > 0 else None, step)]
        if len(indices) == shape[axis] and step == 1:
            continue
        if step != 1:
            labels = ctx.space.block_axes(labels, [axis], ctx.reason(node, f"Slice with step {step}"))
        else:
            labels = ctx.space.select(labels, axis, indices, ctx.reason(node, "the only channel of a slice"))
    ctx.set(node.outputs[0], labels)


def slice_bounds(ctx: Propagation, node: ir.Node) -> dict[int, tuple[int, int, int]] | None:
    """Normalised `(start, stop, step)` per sliced axis; None when a bound is computed."""
    shape = ctx.shape(node.inputs[0])
    lists = [ctx.entries(v) if v is not None else None for v in node.inputs[1:]]
    starts, ends = lists[0], lists[1]
    if (
        starts is None
        or ends is None
        or any(v is not None and e is None for v, e in zip(node.inputs[3:], lists[2:], strict=True))
    ):
        return None
    axes = (lists[2] if len(lists) > 2 else None) or list(range(len(starts)))
    steps = (lists[3] if len(lists) > 3 else None) or [1] * len(starts)
    if None in [*starts, *ends, *axes, *steps]:
        return None
    result = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % len(shape)  # type: ignore[operator]
        first, last, stride = slice(start, end, step).indices(shape[axis])
        result[axis] = (first, last, stride)
    return result


@rule("Gather", effect="gathers the label array by constant indices")
def _gather(ctx: Propagation, node: ir.Node) -> None:
    data, indices = node.inputs[0], ctx.constant(node.inputs[1])
    shape = ctx.shape(data)
    axis = ctx.attribute(node, "axis", 0) % len(shape)
    labels = ctx.labels(data)
    extra = len(ctx.shape(node.inputs[1]))
    ctx.space.block_labels(ctx.labels(node.inputs[1]) if indices is None else (), mixes(ctx, node))
    if indices is None or indices.ndim > 1:
        labels = ctx.space.block_axes(labels, [axis], ctx.reason(node, "Gather selects along this axis"))
        if ctx.is_parameter(data) and indices is None:
            ctx.produced.extend(f.atoms for f in labels)
    else:
        flat = np.where(indices < 0, indices + shape[axis], indices).ravel()
        labels = ctx.space.select(labels, axis, flat, ctx.reason(node, "the only channel of a Gather"))
    shift = {a: a if a <= axis else a + extra - 1 for a in range(len(shape))}
    if extra == 0:
        labels = tuple(f for f in labels if axis not in f.axes)
    ctx.set(node.outputs[0], permute(labels, shift))


@rule("Concat", effect="concatenates the label arrays; parts without labels cannot be removed")
def _concat(ctx: Propagation, node: ir.Node) -> None:
    lists = [ctx.entries(v) for v in node.inputs]
    types = ctx.program.types()
    if types.get(node.outputs[0].name or "") in (ir.DataType.INT64, ir.DataType.INT32) and all(
        e is not None for e in lists
    ):
        ctx.set_entries(node.outputs[0], [e for entries in lists for e in entries or []])
        return
    shape = ctx.shape(node.outputs[0])
    axis = ctx.attribute(node, "axis") % len(shape)
    reason = ctx.reason(node, "concatenated along it with values that no weight makes")
    parts = [(ctx.labels(v), ctx.shape(v)) for v in node.inputs if v is not None]
    cluster = _cluster(axis, [f for labels, _ in parts for f in labels])
    result: list[Factor] = []
    if cluster:
        axes = tuple(cluster)
        arrays = [ctx.space.joint(labels, axes, part, reason) for labels, part in parts]
        position = axes.index(axis)
        for array, (_, part) in zip(arrays, parts, strict=True):
            if part[axis] == 1:  # the part cannot vanish
                ctx.space.block(array, reason)
        result.extend(simplify(Factor(axes, np.concatenate(arrays, axis=position))))
    rest = [
        Operand(
            tuple(f for f in labels if axis not in f.axes and not set(f.axes) & set(cluster)),
            *_others(part, axis),
        )
        for labels, part in parts
    ]
    remaining, _ = ctx.space.combine(rest, frozenset(), reason)
    result.extend(Factor(letters, atoms) for letters, atoms in remaining.items())
    ctx.set(node.outputs[0], tuple(sorted(result, key=lambda f: f.axes)))


def _cluster(axis: int, factors: list[Factor]) -> list[int]:
    """Axes that share a factor with `axis`, directly or through others; none when it carries no labels."""
    found: set[int] = set()
    joined = {axis}
    while joined != found:
        found = joined
        joined = found.union(*(f.axes for f in factors if found & set(f.axes)))
    return sorted(found) if any(axis in f.axes for f in factors) else []


def _others(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Letters and shape of an operand of Concat, its concatenated axis set to 1 (it ties nothing)."""
    return tuple(range(len(shape))), tuple(1 if a == axis else d for a, d in enumerate(shape))


@rule("Pad", effect="adds constant atoms that can be removed but never kept alone")
def _pad(ctx: Propagation, node: ir.Node) -> None:
    shape = ctx.shape(node.inputs[0])
    pads = ctx.entries(node.inputs[1])
    axes = ctx.entries(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    labels = ctx.labels(node.inputs[0])
    if pads is None or None in pads or (axes is not None and None in axes):
        ctx.refuse(node, "Pad with computed amounts")
        return
    order = [int(a) % len(shape) for a in axes or [] if a is not None] if axes else list(range(len(shape)))
    for i, axis in enumerate(order):
        before, after = int(pads[i] or 0), int(pads[i + len(order)] or 0)
        if not before and not after:
            continue
        one_axis = all(f.axes == (axis,) for f in labels if axis in f.axes)
        if ctx.attribute(node, "mode", "constant") != "constant" or before < 0 or after < 0 or not one_axis:
            labels = ctx.space.block_axes(labels, [axis], ctx.reason(node, "Pad along this axis"))
            continue
        labels = tuple(
            Factor(f.axes, np.concatenate([ctx.space.fresh(before), f.atoms, ctx.space.fresh(after)]))
            if f.axes == (axis,)
            else f
            for f in labels
        )
    ctx.set(node.outputs[0], labels)


@rule("Expand", effect="repeats axes of size 1, which stay free")
def _expand(ctx: Propagation, node: ir.Node) -> None:
    labels = ctx.labels(node.inputs[0])
    if labels and ctx.entries(node.inputs[1]) is None:
        ctx.refuse(node, "Expand to a computed shape")
        return
    shift = len(ctx.shape(node.outputs[0])) - len(ctx.shape(node.inputs[0]))
    ctx.set(node.outputs[0], permute(labels, {a: a + shift for a in range(len(ctx.shape(node.inputs[0])))}))


@rule("Tile", effect="repeats the label array")
def _tile(ctx: Propagation, node: ir.Node) -> None:
    repeats = ctx.entries(node.inputs[1])
    labels = ctx.labels(node.inputs[0])
    if repeats is None or None in repeats:
        ctx.refuse(node, "Tile by computed repeats")
        return
    tiled = tuple(Factor(f.axes, np.tile(f.atoms, [int(repeats[a] or 1) for a in f.axes])) for f in labels)
    ctx.set(node.outputs[0], tiled)


@rule("Shape", effect="gives the batch size; reading a labelled axis blocks it")
def _shape(ctx: Propagation, node: ir.Node) -> None:
    shape = ctx.shape(node.inputs[0])
    start, end, _ = slice(ctx.attribute(node, "start", 0), ctx.attribute(node, "end", None)).indices(
        len(shape)
    )
    ctx.space.block_axes(
        ctx.labels(node.inputs[0]), range(start, end), ctx.reason(node, "its size is read by Shape")
    )
    ctx.set_entries(node.outputs[0], [None] * max(0, end - start))


@rule("DepthToSpace", effect="channels in multiples of the squared block size")
def _depth_to_space(ctx: Propagation, node: ir.Node) -> None:
    old, new = ctx.shape(node.inputs[0]), ctx.shape(node.outputs[0])
    square = old[1] // new[1]
    inner_first = ctx.attribute(node, "mode", "DCR") == "CRD"
    split = (old[0], new[1], square, *old[2:]) if inner_first else (old[0], square, new[1], *old[2:])
    reason = ctx.reason(node, "DepthToSpace moves this axis into space")
    labels = ctx.space.reshape(ctx.labels(node.inputs[0]), old, split, reason)
    labels = ctx.space.block_axes(labels, [2 if inner_first else 1, 3, 4], reason)
    ctx.set(node.outputs[0], permute(labels, {0: 0, 1 if inner_first else 2: 1}))


@rule("SpaceToDepth", effect="repeats the channel labels once per pixel of a block")
def _space_to_depth(ctx: Propagation, node: ir.Node) -> None:
    old, new = ctx.shape(node.inputs[0]), ctx.shape(node.outputs[0])
    reason = ctx.reason(node, "SpaceToDepth moves this axis into channels")
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), [2, 3], reason)
    repeats = new[1] // old[1]
    tiled = [Factor(f.axes, np.tile(f.atoms, [repeats if a == 1 else 1 for a in f.axes])) for f in labels]
    ctx.set(node.outputs[0], tuple(tiled))


@rule("ConstantOfShape", "Range", "Constant", effect="makes values without channels")
def _source(ctx: Propagation, node: ir.Node) -> None:
    for value in node.inputs:
        if value is not None:
            ctx.space.block_labels(
                ctx.labels(value), ctx.reason(node, f"{node.op_type} reads a labelled value")
            )
