"""One rule per operator: the axes of its results at another input size, and which of its constants have to say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sartor.ir import canonicalize as table
from sartor.ir.cleanup import array_of
from sartor.ir.lengths import Axis, Factor, Unscalable, broadcast, reshaped
from sartor.passes.resolution import Axes, Trace

Rule = Callable[[Trace, ir.Node], None]


def _same(trace: Trace, node: ir.Node) -> None:
    trace.mark(node, trace.axes_of(node.inputs[0]))


def _elementwise(trace: Trace, node: ir.Node) -> None:
    """Broadcasting: what depends on the input decides, and constants with an entry per position follow."""
    rank = len(trace.shape(node.outputs[0]))
    trace.mark(node, _broadcast(trace, node, range(len(node.inputs)), rank))


def _broadcast(trace: Trace, node: ir.Node, indices: Sequence[int], rank: int, skip: int = 0) -> Axes:
    """Axes of broadcast operands without the last `skip`; constants are rewritten for them."""
    operands = [(i, trace.axes_of(node.inputs[i])) for i in indices if node.inputs[i] is not None]
    constant = {i for i, _ in operands if array_of(node, i) is not None}
    result = []
    for axis in range(rank - skip):
        # aligned at the right; an operand of a smaller rank has no such axis
        here = {i: axes[axis - rank + len(axes)] for i, axes in operands if axis - rank + len(axes) >= 0}
        deciding = [a for i, a in here.items() if i not in constant and (a.now, a.then) != (1, 1)]
        result.append(broadcast(deciding or list(here.values())))
    for index, axes in operands:
        own = result[max(rank - len(axes), 0) :]
        pairs = zip(own, axes[: len(axes) - skip], strict=True)
        if index in constant and any(wanted.scaled and axis.now != 1 for wanted, axis in pairs):
            trace.retable(node, index, [*own, *axes[len(axes) - skip :]])
    return tuple(result)


def _windows(trace: Trace, node: ir.Node) -> None:
    """Convolutions and pools. A pool over the whole map stays one."""
    axes = trace.axes_of(node.inputs[0])
    outputs = trace.shape(node.outputs[0])
    attributes = node.attributes
    spatial = len(axes) - 2
    kernel = list(attributes.get_ints("kernel_shape", ()) or trace.shape(node.inputs[1])[2:])
    strides = attributes.get_ints("strides", ()) or [1] * spatial
    dilations = attributes.get_ints("dilations", ()) or [1] * spatial
    pads = attributes.get_ints("pads", ()) or [0] * (2 * spatial)
    if (attributes.get_string("auto_pad", "NOTSET") or "NOTSET") != "NOTSET":
        raise Unscalable("pads by itself (auto_pad)")
    pool = node.op_type not in ("Conv", "ConvTranspose")
    result = [*axes[:1], Axis.of(outputs[1])]
    for i, axis in enumerate(axes[2:]):
        now = outputs[2 + i]
        if not axis.scaled:
            result.append(Axis.of(now))
            continue
        if pool and kernel[i] == axis.now and now == 1 and not pads[i] and not pads[i + spatial]:
            kernel[i] = axis.then
            result.append(Axis.of(1))
            continue
        span = dilations[i] * (kernel[i] - 1) + 1
        padded = axis.then + pads[i] + pads[i + spatial]
        if node.op_type == "ConvTranspose":
            extra = (attributes.get_ints("output_padding", ()) or [0] * spatial)[i]
            then = (axis.then - 1) * strides[i] + extra + span - pads[i] - pads[i + spatial]
        elif attributes.get_int("ceil_mode", 0):
            then = math.ceil((padded - span) / strides[i]) + 1
            then -= (then - 1) * strides[i] >= axis.then + pads[i]  # a window that would begin in the padding
        else:
            then = (padded - span) // strides[i] + 1
        if then < 1 or padded < span:
            raise Unscalable(f"has a kernel of {span} positions, of which a map of {padded} has too few")
        result.append(Axis.of(now, then))
    if attributes.get("output_shape") is not None:
        raise Unscalable("fixes the size of its result")
    if pool:
        trace.rewriter.set_attribute(node, "kernel_shape", kernel)
    trace.mark(node, result)


def _global_pool(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    trace.mark(node, [*axes[:2], *[Axis.of(1)] * (len(axes) - 2)])


def _blocks(trace: Trace, node: ir.Node) -> None:
    """DepthToSpace and SpaceToDepth."""
    axes, outputs = trace.axes_of(node.inputs[0]), trace.shape(node.outputs[0])
    size = node.attributes.get_int("blocksize")
    result = [axes[0], Axis.of(outputs[1])]
    for axis, now in zip(axes[2:], outputs[2:], strict=True):
        if node.op_type == "SpaceToDepth" and axis.then % size:
            raise Unscalable(f"makes blocks of {size} of a map of {axis.then}")
        then = axis.then * size if node.op_type == "DepthToSpace" else axis.then // size
        result.append(Axis.of(now, then))
    trace.mark(node, result)


def _reduce(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    if node.op_type in ("ArgMax", "ArgMin"):
        reduced = {node.attributes.get_int("axis", 0) % len(axes)}
    else:
        reduced = {axis % len(axes) for axis in trace.constant(node, 1)} or set(range(len(axes)))
    keep = node.attributes.get_int("keepdims", 1)
    trace.mark(
        node, [Axis.of(1) if i in reduced else a for i, a in enumerate(axes) if keep or i not in reduced]
    )


def _normalised(trace: Trace, node: ir.Node) -> None:
    """Norms with weights per position of the normalized axes."""
    axes = trace.axes_of(node.inputs[0])
    first = node.attributes.get_int("axis", -1) % len(axes)
    if any(axis.scaled for axis in axes[first:]):
        raise Unscalable("has weights for every position of the map")
    trace.mark(node, axes)


def _gemm(trace: Trace, node: ir.Node) -> None:
    left, right = trace.axes_of(node.inputs[0]), trace.axes_of(node.inputs[1])
    rows, inner = left[::-1] if node.attributes.get_int("transA", 0) else left
    columns = right[0 if node.attributes.get_int("transB", 0) else 1]
    if inner.scaled or any(axis.scaled for axis in right):
        raise Unscalable(f"has weights for {inner.now} features, which would become {inner.then}")
    trace.mark(node, [rows, columns])


def _matmul(trace: Trace, node: ir.Node) -> None:
    left, right = trace.axes_of(node.inputs[0]), trace.axes_of(node.inputs[1])
    if len(left) < 2 or len(right) < 2:
        raise Unscalable("multiplies a vector")
    if left[-1].then != right[-2].then:
        raise Unscalable(f"has weights for {left[-1].now} features, which would become {left[-1].then}")
    rank = len(trace.shape(node.outputs[0]))
    batch = _broadcast(trace, node, (0, 1), rank, skip=2)
    trace.mark(node, [*batch, left[-2], right[-1]])


def _einsum(trace: Trace, node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise Unscalable(f"has the equation '{equation}', with an ellipsis or without a result")
    letters: dict[str, list[Axis]] = {}
    for term, value in zip(left.split(","), node.inputs, strict=True):
        for letter, axis in zip(term, trace.axes_of(value), strict=True):
            letters.setdefault(letter, []).append(axis)
    found = {letter: broadcast(axes) for letter, axes in letters.items()}
    trace.mark(node, [found[letter] for letter in right])


# ---- movement ------------------------------------------------------------------------------------
def _reshape(trace: Trace, node: ir.Node) -> None:
    source, outputs = trace.axes_of(node.inputs[0]), trace.shape(node.outputs[0])
    result = reshaped(source, outputs)
    trace.mark(node, result)
    if node.op_type == "Reshape":
        entries = trace.constant(node, 1)
        # 0 copies the axis of the same index, and -1 is what is left: right at any size where they were right at one
        new = [e if e < 1 else axis.then for e, axis in zip(entries, result, strict=True)]
        if any(
            e == 0 and axis.then != source[i].then
            for i, (e, axis) in enumerate(zip(entries, result, strict=True))
        ):
            raise Unscalable("copies an axis that would have another length")
        trace.rewrite(node, 1, new)


def _transpose(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    trace.mark(node, [axes[i] for i in node.attributes["perm"].as_ints()])


def _squeeze(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    gone = {axis % len(axes) for axis in trace.constant(node, 1)}
    if any(axes[axis].then != 1 for axis in gone):
        raise Unscalable("drops an axis that would have more than one position")
    trace.mark(node, [axis for i, axis in enumerate(axes) if i not in gone])


def _unsqueeze(trace: Trace, node: ir.Node) -> None:
    axes = iter(trace.axes_of(node.inputs[0]))
    rank = len(trace.shape(node.outputs[0]))
    new = {axis % rank for axis in trace.constant(node, 1)}
    trace.mark(node, [Axis.of(1) if i in new else next(axes) for i in range(rank)])


def _concat(trace: Trace, node: ir.Node) -> None:
    operands = [trace.axes_of(value) for value in node.inputs]
    rank = len(operands[0])
    along = node.attributes.get_int("axis", 0) % rank
    whole = Axis(tuple(part for axes in operands for part in axes[along].parts))
    others = (broadcast([axes[i] for axes in operands]) if i != along else whole for i in range(rank))
    trace.mark(node, list(others))


def _split(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    along = node.attributes.get_int("axis", 0) % len(axes)
    lengths = [trace.shape(output)[along] for output in node.outputs]
    if not axes[along].scaled:
        trace.mark(node, *[[*axes[:along], Axis.of(n), *axes[along + 1 :]] for n in lengths])
        return
    pieces, start = [], 0
    for length in lengths:
        pieces.append(_between(axes[along], start, start + length))
        start += length
    trace.mark(node, *[[*axes[:along], piece, *axes[along + 1 :]] for piece in pieces])
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        trace.rewrite(node, 1, [piece.then for piece in pieces])
    elif len({piece.then for piece in pieces}) > 1:
        raise Unscalable("splits into equal parts what would have unequal ones")


def _between(axis: Axis, start: int, end: int) -> Axis:
    """The parts of an axis from a position to another.

    Raises:
        Unscalable: they do not begin and end with parts.
    """
    found, position = [], 0
    for part in axis.parts:
        length = Axis((part,)).now
        if position >= start and position + length <= end:
            found.append(part)
        position += length
    if Axis(tuple(found)).now != end - start:
        raise Unscalable(
            f"cuts positions {start} to {end} out of {axis.now}, which mean nothing at another size"
        )
    return Axis(tuple(found))


def _slice(trace: Trace, node: ir.Node) -> None:
    axes = list(trace.axes_of(node.inputs[0]))
    starts, ends = trace.constant(node, 1), trace.constant(node, 2)
    along = [axis % len(axes) for axis in trace.constant(node, 3)] or list(range(len(starts)))
    steps = trace.constant(node, 4) or [1] * len(starts)
    for i, (axis, step) in enumerate(zip(along, steps, strict=True)):
        own = axes[axis]
        first, last, _ = slice(starts[i], ends[i], step).indices(own.now)
        if not own.scaled:
            axes[axis] = Axis.of(len(range(first, last, step)))
        elif step > 1 and last == own.now and first < step:  # every so many positions: at any size
            axes[axis] = Axis.of(len(range(first, last, step)), len(range(first, own.then, step)))
            ends[i] = own.then
        elif step == 1:
            part = _between(own, first, last)
            ahead = _between(own, 0, first).then if first else 0
            axes[axis], starts[i], ends[i] = part, ahead, ahead + part.then
        else:
            raise Unscalable(
                f"takes positions {first} to {last} by {step}, which mean nothing at another size"
            )
    trace.mark(node, axes)
    trace.rewrite(node, 1, starts)
    trace.rewrite(node, 2, ends)


def _gather(trace: Trace, node: ir.Node) -> None:
    data, indices = trace.axes_of(node.inputs[0]), trace.axes_of(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(data)
    if data[axis].scaled:
        chosen = array_of(node, 1)
        fixed = 0  # leading positions that stay, such as class tokens
        for part in data[axis].parts:
            if any(factor.now != factor.then for factor in part):
                break
            fixed += math.prod(factor.now for factor in part)
        if chosen is None or chosen.size == 0 or chosen.min() < 0 or chosen.max() >= fixed:
            raise Unscalable("picks positions by their number, which mean nothing at another size")
    trace.mark(node, [*data[:axis], *indices, *data[axis + 1 :]])


def _expand(trace: Trace, node: ir.Node) -> None:
    axes, outputs = trace.axes_of(node.inputs[0]), trace.shape(node.outputs[0])
    entries = trace.constant(node, 1)
    lead = len(outputs) - len(axes)
    result = [
        Axis.of(now) if i < lead or axes[i - lead].now == 1 else axes[i - lead]
        for i, now in enumerate(outputs)
    ]
    trace.mark(node, result)
    tail = result[len(result) - len(entries) :]
    trace.rewrite(node, 1, [1 if e == 1 else axis.then for e, axis in zip(entries, tail, strict=True)])


def _tile(trace: Trace, node: ir.Node) -> None:
    axes, repeats = trace.axes_of(node.inputs[0]), trace.constant(node, 1)
    trace.mark(node, [Axis(axis.parts * n) for axis, n in zip(axes, repeats, strict=True)])


def _pad(trace: Trace, node: ir.Node) -> None:
    axes = list(trace.axes_of(node.inputs[0]))
    pads = trace.constant(node, 1)
    along = [axis % len(axes) for axis in trace.constant(node, 3)] or list(range(len(axes)))
    for i, axis in enumerate(along):
        around = (pads[i], pads[i + len(along)])
        if min(around) < 0 and axes[axis].scaled:
            raise Unscalable("crops by negative pads")
        before, after = (((Factor(n, n),),) if n else () for n in around)
        axes[axis] = (
            Axis((*before, *axes[axis].parts, *after))
            if min(around) >= 0
            else Axis.of(axes[axis].now + sum(around))
        )
    trace.mark(node, axes)


def _resize(trace: Trace, node: ir.Node) -> None:
    axes, outputs = trace.axes_of(node.inputs[0]), trace.shape(node.outputs[0])
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Unscalable("crops by a region of interest")
    along = [a % len(axes) for a in node.attributes.get_ints("axes", ()) or range(len(axes))]
    result = list(axes)
    sizes = trace.constant(node, 3)
    if sizes:
        for i, axis in enumerate(along):
            if axes[axis].scaled:
                # the same enlargement, as far as whole positions allow; who reads it beside another map checks it
                sizes[i] = max(1, round(axes[axis].then * outputs[axis] / axes[axis].now))
            result[axis] = Axis.of(outputs[axis], sizes[i])
        trace.rewrite(node, 3, sizes)
    else:
        scales = array_of(node, 2)
        if scales is None:
            raise Unscalable("computes its scales")
        for i, axis in enumerate(along):
            if axes[axis].scaled:
                then = math.floor(axes[axis].then * float(np.float32(scales[i])))
                result[axis] = Axis.of(outputs[axis], then)
            elif outputs[axis] != axes[axis].now:
                result[axis] = Axis.of(outputs[axis])
    trace.mark(node, result)


def _shape(trace: Trace, node: ir.Node) -> None:
    axes = trace.axes_of(node.inputs[0])
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(axes))
    if any(axis.scaled for axis in axes[start:end]):
        raise Unscalable("asks for the size of the map")
    trace.mark(node, [Axis.of(n) for n in trace.shape(node.outputs[0])])


RULES: dict[str, Rule] = {
    **dict.fromkeys(table.ELEMENTWISE_UNARY, _same),
    **dict.fromkeys(table.ELEMENTWISE_BROADCAST, _elementwise),
    **dict.fromkeys(table.REDUCTIONS, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduce),
    **dict.fromkeys(("AveragePool", "Conv", "ConvTranspose", "LpPool", "MaxPool"), _windows),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
    **dict.fromkeys(
        (
            *("BatchNormalization", "DequantizeLinear", "GroupNormalization", "InstanceNormalization", "LRN"),
            *("LpNormalization", "QuantizeLinear", "CumSum", "Hardmax", "LogSoftmax", "Softmax"),
        ),
        _same,
    ),
    "LayerNormalization": _normalised,
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
