"""One small rule per operator: what it does to labels. The table also generates the documentation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sartor.ir.channels.labels import Factor, Labels, Operand, Reason, permute, simplify
from sartor.ir.channels.propagate import Propagation, rule

_PASS_THROUGH = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor
Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid
Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu""".split()
_ELEMENTWISE = """Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean
Min Mod Mul Or PRelu Pow Sub Sum Where Xor""".split()
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare""".split()
_POOL = "AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool".split()
_ROWS, _INSIDE, _COLUMNS = 1000, 1001, 1002  # letters for group, channel in group, output in group


@rule(*_PASS_THROUGH, effect="pass through")
def _pass_through(ctx: Propagation, node: ir.Node) -> None:
    ctx.set(node.outputs[0], ctx.labels(node.inputs[0]))


@rule(*_ELEMENTWISE, effect="align by broadcasting, tie atom by atom; a size-1 axis constrains nothing")
def _elementwise(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.outputs[0]))
    operands = []
    for value in node.inputs:
        if value is not None:
            size = len(ctx.shape(value))
            operands.append((value, tuple(range(rank - size, rank))))
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(range(rank))))


@rule("BatchNormalization", effect="parameters join axis 1")
def _batch_norm(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    operands = [(node.inputs[0], tuple(range(rank)))] + [(v, (1,)) for v in node.inputs[1:5]]
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(range(rank))))


@rule("QuantizeLinear", "DequantizeLinear", effect="pass through; scales and zero points join their axis")
def _quantize(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    parameters = [v for v in node.inputs[1:] if v is not None]
    if any(len(ctx.shape(v)) > 1 for v in parameters):
        ctx.refuse(node, f"{node.op_type} in blocks")
        return
    axis = ctx.attribute(node, "axis", 1) % max(rank, 1)
    operands = [(node.inputs[0], tuple(range(rank)))]
    operands += [(v, (axis,)) for v in parameters if len(ctx.shape(v)) == 1]
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(range(rank))))


@rule("sartor:ChannelGate", effect="the gate joins axis 1")
def _channel_gate(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    operands = [(node.inputs[0], tuple(range(rank))), (node.inputs[1], (1,))]
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(range(rank))))


@rule("LayerNormalization", "RMSNormalization", effect="blocks the normalised axes; parameters join")
def _layer_norm(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axis = ctx.attribute(node, "axis", -1) % rank
    _normalise(ctx, node, range(axis, rank), tuple(range(axis, rank)))


@rule("InstanceNormalization", effect="blocks the spatial axes; parameters join axis 1")
def _instance_norm(ctx: Propagation, node: ir.Node) -> None:
    _normalise(ctx, node, range(2, len(ctx.shape(node.inputs[0]))), (1,))


def _normalise(ctx: Propagation, node: ir.Node, mixed: range, parameters: tuple[int, ...]) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    operands = [(node.inputs[0], tuple(range(rank)))]
    for value in node.inputs[1:]:
        if value is not None and len(ctx.shape(value)) <= len(parameters):
            operands.append((value, parameters[len(parameters) - len(ctx.shape(value)) :]))
    labels = ctx.space.block_axes(ctx.product(node, operands, tuple(range(rank))), mixed, _mixes(ctx, node))
    for output in node.outputs:  # the statistics of LayerNormalization have size 1 along the mixed axes
        ctx.set(output, labels)


@rule(
    "GroupNormalization", effect="whole groups may be removed, channels within a group not; parameters join"
)
def _group_norm(ctx: Propagation, node: ir.Node) -> None:
    shape = ctx.shape(node.inputs[0])
    rank, groups = len(shape), ctx.attribute(node, "num_groups", 1)
    operands = [(node.inputs[0], tuple(range(rank)))] + [(v, (1,)) for v in node.inputs[1:3]]
    labels = ctx.product(node, operands, tuple(range(rank)))
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    reason = _mixes(ctx, node)
    inner = ctx.space.reshape(labels, shape, split, reason)
    rows = ctx.space.block_axes(inner, [2, *range(3, rank + 1)], reason)
    for factor in rows:
        if factor.axes == (1,):
            ctx.group_rows[node.name or ""] = factor.atoms
    ctx.set(node.outputs[0], ctx.space.block_axes(labels, range(2, rank), reason))


def _mixes(ctx: Propagation, node: ir.Node) -> Reason:
    return ctx.reason(node, f"{node.op_type} mixes values along this axis without weights")


@rule("LRN", "MeanVarianceNormalization", effect="blocks every axis it mixes")
def _local_norm(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axes = [1] if node.op_type == "LRN" else [a % rank for a in ctx.attribute(node, "axes", (0, 2, 3))]
    ctx.set(node.outputs[0], ctx.space.block_axes(ctx.labels(node.inputs[0]), axes, _mixes(ctx, node)))


@rule(
    "Softmax",
    "LogSoftmax",
    "Hardmax",
    "CumSum",
    "LpNormalization",
    effect="blocks its axis, passes the others",
)
def _along_axis(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axis = ctx.attribute(node, "axis", -1)
    if node.op_type == "CumSum":
        given = ctx.entries(node.inputs[1])
        if given is None or given[0] is None:
            ctx.refuse(node, "CumSum along a computed axis")
            return
        axis = given[0]
    ctx.set(
        node.outputs[0], ctx.space.block_axes(ctx.labels(node.inputs[0]), [axis % rank], _mixes(ctx, node))
    )


@rule("TopK", "ArgMax", "ArgMin", effect="blocks its axis, passes the others")
def _pick(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axis = ctx.attribute(node, "axis", -1 if node.op_type == "TopK" else 0) % rank
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), [axis], _mixes(ctx, node))
    if node.op_type != "TopK" and not ctx.attribute(node, "keepdims", 1):
        labels = _without(labels, [axis])
    for output in node.outputs:
        ctx.set(output, labels)


@rule(*_REDUCE, effect="blocks the reduced axes, passes the others")
def _reduce(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    given = ctx.entries(node.inputs[1]) if len(node.inputs) > 1 else None
    if len(node.inputs) > 1 and node.inputs[1] is not None and (given is None or None in given):
        ctx.refuse(node, f"{node.op_type} over computed axes")
        return
    if not given and ctx.attribute(node, "noop_with_empty_axes", 0):
        ctx.set(node.outputs[0], ctx.labels(node.inputs[0]))
        return
    axes = [int(a) % rank for a in given if a is not None] if given else list(range(rank))
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), axes, _mixes(ctx, node))
    ctx.set(node.outputs[0], labels if ctx.attribute(node, "keepdims", 1) else _without(labels, axes))


def _without(labels: Labels, removed: list[int]) -> Labels:
    """Labels after dropping axes that carry none."""
    top = max((a for f in labels for a in f.axes), default=-1) + 1
    return permute(labels, {a: a - sum(r < a for r in removed) for a in range(top)})


@rule(*_POOL, effect="pass through; labelled spatial axes are blocked")
def _pool(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), range(2, rank), _mixes(ctx, node))
    for output in node.outputs:
        ctx.set(output, labels)


@rule("Resize", "GridSample", "Upsample", effect="pass through axes of unchanged size; others are blocked")
def _resize(ctx: Propagation, node: ir.Node) -> None:
    old, new = ctx.shape(node.inputs[0]), ctx.shape(node.outputs[0])
    mixed = [a for a in range(len(old)) if a >= 2 or old[a] != new[a]]
    for value in node.inputs[1:]:
        if value is not None and not ctx.is_parameter(value):
            ctx.space.block_labels(ctx.labels(value), _mixes(ctx, node))
    ctx.set(node.outputs[0], ctx.space.block_axes(ctx.labels(node.inputs[0]), mixed, _mixes(ctx, node)))


# ---- contractions ----------------------------------------------------------------------------


@rule("MatMul", effect="contracted axes are tied, batch axes are tied, the rest flow")
def _matmul(ctx: Propagation, node: ir.Node) -> None:
    left, right = node.inputs[0], node.inputs[1]
    a, b = len(ctx.shape(left)), len(ctx.shape(right))
    batch = max(a, b, 2) - 2
    m, k, n = batch, batch + 1, batch + 2
    left_letters = (k,) if a == 1 else (*range(batch - (a - 2), batch), m, k)
    right_letters = (k,) if b == 1 else (*range(batch - (b - 2), batch), k, n)
    output = (*range(batch), *([m] if a > 1 else []), *([n] if b > 1 else []))
    labels = ctx.product(node, [(left, left_letters), (right, right_letters)], output, frozenset([k]))
    ctx.set(node.outputs[0], labels)


@rule("Gemm", effect="contracted axes are tied, the other weight axis makes labels, the bias joins them")
def _gemm(ctx: Propagation, node: ir.Node) -> None:
    a = (1, 0) if ctx.attribute(node, "transA", 0) else (0, 1)
    b = (2, 1) if ctx.attribute(node, "transB", 0) else (1, 2)
    labels = ctx.product(node, [(node.inputs[0], a), (node.inputs[1], b)], (0, 2), frozenset([1]))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        rank = len(ctx.shape(bias))
        result = Operand(labels, (0, 1), ctx.shape(node.outputs[0]))
        labels = ctx.product(node, [result, (bias, tuple(range(2 - rank, 2)))], (0, 1))
    ctx.set(node.outputs[0], labels)


@rule("Einsum", effect="as its equation says: summed letters are contracted, the rest flow")
def _einsum(ctx: Propagation, node: ir.Node) -> None:
    equation = ctx.attribute(node, "equation").replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if "." in equation or not arrow or any(len(set(t)) != len(t) for t in terms):
        ctx.refuse(node, f"Einsum equation '{equation}' with ellipsis, diagonal or implicit output")
        return
    operands = [(v, tuple(map(ord, t))) for v, t in zip(node.inputs, terms, strict=True) if v is not None]
    summed = {ord(letter) for letter in inputs if letter.isalpha()} - set(map(ord, result))
    alone = {s for s in summed if sum(chr(s) in t for t in terms) == 1}
    for value, letters in operands:
        axes = [i for i, letter in enumerate(letters) if letter in alone]
        if axes:
            ctx.space.block_axes(ctx.labels(value), axes, _mixes(ctx, node))
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(map(ord, result)), frozenset(summed)))


@rule(
    "Conv", effect="contracted weight axis is tied to the input, axis 0 makes labels; groups tie both sides"
)
def _conv(ctx: Propagation, node: ir.Node) -> None:
    groups = ctx.attribute(node, "group", 1)
    shape = ctx.shape(node.inputs[1])
    labels = ctx.labels(node.inputs[1], axes=(0, 1))
    weight = ctx.space.reshape(
        ctx.space.block_axes(labels, range(2, len(shape)), _mixes(ctx, node)),
        shape,
        (groups, shape[0] // groups, *shape[1:]),
        ctx.reason(node, "grouped weights"),
    )
    letters = (_ROWS, _COLUMNS, _INSIDE, *range(2000, 1998 + len(shape)))
    operand = Operand(weight, letters, (groups, shape[0] // groups, *shape[1:]))
    _convolve(ctx, node, groups, operand, shape[0])


@rule("ConvTranspose", effect="as Conv, with the weight axes swapped")
def _conv_transpose(ctx: Propagation, node: ir.Node) -> None:
    groups = ctx.attribute(node, "group", 1)
    shape = ctx.shape(node.inputs[1])
    labels = ctx.labels(node.inputs[1], axes=(0, 1))
    weight = ctx.space.reshape(
        ctx.space.block_axes(labels, range(2, len(shape)), _mixes(ctx, node)),
        shape,
        (groups, shape[0] // groups, *shape[1:]),
        ctx.reason(node, "grouped weights"),
    )
    letters = (_ROWS, _INSIDE, _COLUMNS, *range(2000, 1998 + len(shape)))
    operand = Operand(weight, letters, (groups, shape[0] // groups, *shape[1:]))
    _convolve(ctx, node, groups, operand, shape[1] * groups)


def _convolve(ctx: Propagation, node: ir.Node, groups: int, weight: Operand, channels: int) -> None:
    """Shared by both convolutions: virtual (group, channel in group) axes on both sides."""
    old = ctx.shape(node.inputs[0])
    rank = len(old)
    reason = ctx.reason(node, "grouped convolution")
    spatial = range(2, rank)
    data = ctx.space.block_axes(ctx.labels(node.inputs[0]), spatial, _mixes(ctx, node))
    split = (old[0], groups, old[1] // groups, *old[2:])
    data = ctx.space.reshape(data, old, split, reason)
    x = Operand(data, (0, _ROWS, _INSIDE, *(a for a in spatial)), split)
    meets = ctx.reason(node, "meets an axis that carries no channels")
    summed = frozenset([_INSIDE, *weight.letters[3:]])
    remaining, parts = ctx.space.combine([x, weight], summed, meets)
    ctx.record(node, [node.inputs[0], node.inputs[1]], [x.letters, weight.letters], parts, summed)
    for factor in parts[0]:
        if _ROWS in factor.axes and groups > 1:
            ctx.group_rows[node.name or ""] = ctx.space.project(factor, (_ROWS,))
    position = {0: 0, _ROWS: 1, _COLUMNS: 2}
    factors = []
    for letters, atoms in remaining.items():
        order = sorted(range(len(letters)), key=lambda i: position[letters[i]])
        factors.append(Factor(tuple(position[letters[i]] for i in order), np.transpose(atoms, order)))
    new = ctx.shape(node.outputs[0])
    grouped = (new[0], groups, channels // groups, *new[2:])
    labels = ctx.space.reshape(tuple(sorted(factors, key=lambda f: f.axes)), grouped, new, reason)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        result = Operand(labels, tuple(range(rank)), new)
        labels = ctx.product(node, [result, (bias, (1,))], tuple(range(rank)))
    ctx.set(node.outputs[0], labels)


# ---- data movement ---------------------------------------------------------------------------


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
        indices = np.arange(start, start + length)
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
        indices = np.arange(shape[axis])[slice(start, stop if stop >= 0 or step > 0 else None, step)]
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
    ctx.space.block_labels(ctx.labels(node.inputs[1]) if indices is None else (), _mixes(ctx, node))
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
    reason = ctx.reason(node, "concatenated with an axis that carries no channels")
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
