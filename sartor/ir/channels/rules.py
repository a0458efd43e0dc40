"""One small rule per operator: what it does to labels. The table also generates the documentation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sartor.ir.branches import is_flat, selectors
from sartor.ir.channels.labels import Factor, Labels, Operand, Reason, permute
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


@rule("If", effect="both branches see the labels outside them; what they give is tied atom by atom")
def _if(ctx: Propagation, node: ir.Node) -> None:
    if not is_flat(node):
        ctx.refuse(node, "If with constants in its branches, or names that they share")
        return
    for index, output in enumerate(node.outputs):
        shape = ctx.shape(output)
        values = [identity.inputs[0] for identity in selectors(node, index)]
        if any(v is None or ctx.shape(v) != shape for v in values):
            for value in values:
                reason = ctx.reason(node, "If with branches of different shapes")
                ctx.space.block_labels(ctx.labels(value) if value is not None else (), reason)
            continue
        axes = tuple(range(len(shape)))
        ctx.set(output, ctx.product(node, [(v, axes) for v in values if v is not None], axes))


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
    labels = ctx.space.mix(ctx.product(node, operands, tuple(range(rank))), mixed, mixes(ctx, node))
    ctx.set(node.outputs[0], labels)
    for output in node.outputs[1:]:  # the statistics of LayerNormalization have size 1 along the mixed axes
        ctx.set(output, ctx.space.without(labels, mixed))


@rule(
    "GroupNormalization", effect="whole groups may be removed, channels within a group not; parameters join"
)
def _group_norm(ctx: Propagation, node: ir.Node) -> None:
    shape = ctx.shape(node.inputs[0])
    rank, groups = len(shape), ctx.attribute(node, "num_groups", 1)
    operands = [(node.inputs[0], tuple(range(rank)))] + [(v, (1,)) for v in node.inputs[1:3]]
    labels = ctx.product(node, operands, tuple(range(rank)))
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    reason = mixes(ctx, node)
    inner = ctx.space.reshape(labels, shape, split, reason)
    rows = ctx.space.block_axes(ctx.space.mix(inner, [2], reason), range(3, rank + 1), reason)
    for factor in ctx.space.without(rows, [2]):
        if factor.axes == (1,):
            ctx.group_rows[node.name or ""] = factor.atoms
    ctx.set(node.outputs[0], ctx.space.block_axes(labels, range(2, rank), reason))


def mixes(ctx: Propagation, node: ir.Node) -> Reason:
    """The reason of every operator that mixes values along a labelled axis without weights."""
    return ctx.reason(node, f"{node.op_type} mixes values along this axis without weights")


@rule("LRN", "MeanVarianceNormalization", effect="blocks every axis it mixes")
def _local_norm(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axes = [1] if node.op_type == "LRN" else [a % rank for a in ctx.attribute(node, "axes", (0, 2, 3))]
    ctx.set(node.outputs[0], ctx.space.mix(ctx.labels(node.inputs[0]), axes, mixes(ctx, node)))


@rule("Softmax", "LogSoftmax", "LpNormalization", effect="blocks its axis, passes the others")
def _share(ctx: Propagation, node: ir.Node) -> None:
    axis = ctx.attribute(node, "axis", -1) % len(ctx.shape(node.inputs[0]))
    ctx.set(node.outputs[0], ctx.space.mix(ctx.labels(node.inputs[0]), [axis], mixes(ctx, node)))


@rule("Hardmax", "CumSum", effect="blocks its axis, passes the others")
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
        node.outputs[0], ctx.space.block_axes(ctx.labels(node.inputs[0]), [axis % rank], mixes(ctx, node))
    )


@rule("TopK", "ArgMax", "ArgMin", effect="blocks its axis, passes the others")
def _pick(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    axis = ctx.attribute(node, "axis", -1 if node.op_type == "TopK" else 0) % rank
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), [axis], mixes(ctx, node))
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
    labels = ctx.space.mix(ctx.labels(node.inputs[0]), axes, mixes(ctx, node))
    labels = ctx.space.without(labels, axes)
    ctx.set(node.outputs[0], labels if ctx.attribute(node, "keepdims", 1) else _without(labels, axes))


def _without(labels: Labels, removed: list[int]) -> Labels:
    """Labels after dropping axes that carry none."""
    top = max((a for f in labels for a in f.axes), default=-1) + 1
    return permute(labels, {a: a - sum(r < a for r in removed) for a in range(top)})


@rule(*_POOL, effect="pass through; labelled spatial axes are blocked")
def _pool(ctx: Propagation, node: ir.Node) -> None:
    rank = len(ctx.shape(node.inputs[0]))
    labels = ctx.space.block_axes(ctx.labels(node.inputs[0]), range(2, rank), mixes(ctx, node))
    for output in node.outputs:
        ctx.set(output, labels)


@rule("Resize", "GridSample", "Upsample", effect="pass through axes of unchanged size; others are blocked")
def _resize(ctx: Propagation, node: ir.Node) -> None:
    old, new = ctx.shape(node.inputs[0]), ctx.shape(node.outputs[0])
    mixed = [a for a in range(len(old)) if a >= 2 or old[a] != new[a]]
    for value in node.inputs[1:]:
        if value is not None and not ctx.is_parameter(value):
            ctx.space.block_labels(ctx.labels(value), mixes(ctx, node))
    ctx.set(node.outputs[0], ctx.space.block_axes(ctx.labels(node.inputs[0]), mixed, mixes(ctx, node)))


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


@rule("GRU", "LSTM", "RNN", effect="the input size is contracted; hidden sizes, steps and batch stay")
def _recurrent(ctx: Propagation, node: ir.Node) -> None:
    steps, batch, directions, gates, size = range(5)
    operands = [(node.inputs[0], (steps, batch, size)), (node.inputs[1], (directions, gates, size))]
    labels = ctx.product(node, operands, (steps, batch, directions, gates), frozenset([size]))
    text = f"the hidden size of {node.op_type} is not cut: every step reads what the one before made"
    ctx.space.block_labels(labels, ctx.reason(node, text))
    for value in node.inputs[2:]:
        if value is not None:
            ctx.space.block_labels(ctx.labels(value), ctx.reason(node, text))


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
            ctx.space.block_axes(ctx.labels(value), axes, mixes(ctx, node))
    ctx.set(node.outputs[0], ctx.product(node, operands, tuple(map(ord, result)), frozenset(summed)))


@rule(
    "Conv", effect="contracted weight axis is tied to the input, axis 0 makes labels; groups tie both sides"
)
def _conv(ctx: Propagation, node: ir.Node) -> None:
    groups = ctx.attribute(node, "group", 1)
    shape = ctx.shape(node.inputs[1])
    labels = ctx.labels(node.inputs[1], axes=(0, 1))
    weight = ctx.space.reshape(
        ctx.space.block_axes(labels, range(2, len(shape)), mixes(ctx, node)),
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
        ctx.space.block_axes(labels, range(2, len(shape)), mixes(ctx, node)),
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
    data = ctx.space.block_axes(ctx.labels(node.inputs[0]), spatial, mixes(ctx, node))
    split = (old[0], groups, old[1] // groups, *old[2:])
    data = ctx.space.reshape(data, old, split, reason)
    x = Operand(data, (0, _ROWS, _INSIDE, *(a for a in spatial)), split)
    meets = ctx.reason(node, "meets values that no weight makes, such as a graph input")
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
