"""Batch rules of the operators that move data: what they do to the axis, they do to the label."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sartor.ir.batch_state import Label, State, axis_of, label_of, mark, only, refuse, shrink
from sartor.ir.cleanup import array_of, replace
from sartor.ir.normalise import fill_defaults, set_operand

INT64_MAX = 2**63 - 1


def _reshape_candidates(
    source: tuple[int, ...], label: Label, target: tuple[int, ...], size: int
) -> list[Label]:
    """Where the batch can be after a row-major reshape, the most plausible reading first."""
    before = math.prod(source[: label.axis]) * label.outer
    found = []
    prefix = 1
    for axis, length in enumerate(target):
        if before % prefix == 0:
            outer = before // prefix
            if outer * size <= length and length % (outer * size) == 0:
                found.append(Label(axis, outer, length // (outer * size)))
        prefix *= length
    unchanged = [f for f in found if f == label and source[label.axis] == target[f.axis]]
    pure = [f for f in found if f.pure]
    merged_less = sorted(found, key=lambda f: (f.axis != label.axis, f.outer * f.inner))
    return list(dict.fromkeys([*unchanged, *pure, *merged_less]))


def reshape(state: State, node: ir.Node) -> None:
    """A row-major reshape keeps the batch digit; where size 1 hides it, alternatives are tried."""
    label = only(state, node)
    source, target = state.shape(node.inputs[0]), state.shape(node.outputs[0])
    if 0 in target:
        raise refuse(node, "an empty tensor")
    candidates = _reshape_candidates(source, label, target, state.size)
    if not candidates:
        raise refuse(node, f"reshapes {list(source)} to {list(target)} across the batch")
    result = state.choose(candidates)
    if node.op_type == "Reshape":
        spelled = list(target)
        same = result == label and source[label.axis] == target[result.axis]
        spelled[result.axis] = 0 if same and label.pure else -1
        set_operand(state.graph, node, 1, np.asarray(spelled, np.int64))
    elif node.op_type == "Flatten":
        cut = node.attributes.get_int("axis", 1) % (len(source) + 1)
        if result.axis != (0 if label.axis < cut else 1):
            raise refuse(node, "flattens across the batch")
    elif target[result.axis] != source[label.axis]:
        raise refuse(node, "changes the batch axis")
    mark(state, node, result)


def transpose(state: State, node: ir.Node) -> None:
    """The batch moves with its axis."""
    label = only(state, node)
    permutation = node.attributes["perm"].as_ints()
    mark(state, node, label.at(list(permutation).index(label.axis)))


def squeeze(state: State, node: ir.Node) -> None:
    """Axes before the batch disappear; the batch itself may not."""
    label = only(state, node)
    axes = array_of(node, 1)
    rank = len(state.shape(node.inputs[0]))
    if axes is None or label.axis in (squeezed := {int(a) % rank for a in axes}):
        raise refuse(node, "removes the batch axis")
    mark(state, node, label.at(label.axis - sum(1 for a in squeezed if a < label.axis)))


def unsqueeze(state: State, node: ir.Node) -> None:
    """New axes shift the batch."""
    label = only(state, node)
    axes = array_of(node, 1)
    rank = len(state.shape(node.outputs[0]))
    if axes is None:
        raise refuse(node, "its axes are computed")
    new = {int(a) % rank for a in axes}
    kept = [axis for axis in range(rank) if axis not in new]
    mark(state, node, label.at(kept[label.axis]))


def expand(state: State, node: ir.Node) -> None:
    """The batch axis is spelled 1: it broadcasts to any length."""
    label = only(state, node)
    source, target = state.shape(node.inputs[0]), list(state.shape(node.outputs[0]))
    axis = label.axis + len(target) - len(source)
    if target[axis] != source[label.axis]:
        raise refuse(node, "repeats the batch axis")
    target[axis] = 1
    set_operand(state.graph, node, 1, np.asarray(target, np.int64))
    mark(state, node, label.at(axis))


def expand_independent(state: State, node: ir.Node) -> None:
    """An Expand or Tile of a batch-independent value to the static batch becomes the idiom."""
    if state.size == 1:
        return
    source, target = state.shape(node.inputs[0]), list(state.shape(node.outputs[0]))
    padded = (1,) * (len(target) - len(source)) + tuple(source)
    axis = next(
        (a for a, (s, t) in enumerate(zip(padded, target, strict=True)) if s == 1 and t == state.size), None
    )
    if axis is None:
        return
    # What the source has already is spelled 1, so that the result is the same when it is made again.
    dims = [1 if s == t else t for s, t in zip(padded, target, strict=True)]
    if node.op_type == "Tile":
        if any(s != 1 for s, d in zip(padded, dims, strict=True) if d != 1):
            raise refuse(node, "repeats a batch-independent value along the batch")
        new = ir.node("Expand", [node.inputs[0], None], num_outputs=1, name=node.name)
        replace(state.graph, node, new)
        node = new
    node.replace_input_with(1, state.batch_shape(node.name or "", dims[:axis], dims[axis + 1 :], node))
    label = Label(axis)
    mark(state, node, label)


def concat(state: State, node: ir.Node) -> None:
    """Along another axis; batch-independent inputs are expanded by the idiom."""
    labels = {label for value in node.inputs if value is not None and (label := state.labels.get(value))}
    if len(labels) != 1:
        raise refuse(node, f"its inputs carry the batch differently ({sorted(labels, key=str)})")
    label = labels.pop()
    rank = len(state.shape(node.outputs[0]))
    if node.attributes["axis"].as_int() % rank == label.axis:
        raise refuse(node, "concatenates along the batch axis")
    for index, value in enumerate(node.inputs):
        if value is None or value in state.labels:
            continue
        if state.shape(value)[label.axis] != 1:
            shrink(state, node, index, label.axis, label)
        state.expand(node, index, label, rank)
    mark(state, node, label)


def split(state: State, node: ir.Node) -> None:
    """Along another axis."""
    label = only(state, node)
    if axis_of(state, node, 0) == label.axis:
        raise refuse(node, "splits the batch axis")
    mark(state, node, label)


def slice_(state: State, node: ir.Node) -> None:
    """Along other axes; a slice of the whole batch is spelled without its length."""
    label = only(state, node)
    starts, ends, axes, steps = (array_of(node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None or axes is None or steps is None:
        raise refuse(node, "its bounds are computed")
    shape = state.shape(node.inputs[0])
    for position, axis in enumerate(int(a) % len(shape) for a in axes):
        if axis != label.axis:
            continue
        whole = state.shape(node.outputs[0])[axis] == shape[axis] and steps[position] == 1
        if not whole:
            raise refuse(node, "slices the batch axis")
        ends = ends.copy().astype(np.int64)
        ends[position] = INT64_MAX
        starts = starts.copy().astype(np.int64)
        starts[position] = 0
        set_operand(state.graph, node, 1, starts)
        set_operand(state.graph, node, 2, ends)
    mark(state, node, label)


def gather(state: State, node: ir.Node) -> None:
    """From another axis, or by indices that carry the batch."""
    data, indices = label_of(state, node, 0), label_of(state, node, 1)
    axis = axis_of(state, node, 0)
    if data is not None and indices is not None:
        raise refuse(node, "both its data and its indices carry the batch")
    if indices is not None:
        mark(state, node, indices.at(indices.axis + axis))
        return
    assert data is not None
    if data.axis == axis:
        raise refuse(node, "gathers along the batch axis")
    rank = len(state.shape(node.inputs[1]))
    mark(state, node, data if data.axis < axis else data.at(data.axis + rank - 1))


def pad(state: State, node: ir.Node) -> None:
    """Along other axes."""
    label = only(state, node)
    pads = array_of(node, 1)
    rank = len(state.shape(node.inputs[0]))
    if pads is None or pads[label.axis] or pads[rank + label.axis]:
        raise refuse(node, "pads the batch axis")
    mark(state, node, label)


def tile(state: State, node: ir.Node) -> None:
    """Along other axes."""
    label = only(state, node)
    repeats = array_of(node, 1)
    if repeats is None or repeats[label.axis] != 1:
        raise refuse(node, "repeats the batch axis")
    mark(state, node, label)


def trilu(state: State, node: ir.Node) -> None:
    """Over the last two axes, which may not hold the batch."""
    label = only(state, node)
    if label.axis >= len(state.shape(node.inputs[0])) - 2:
        raise refuse(node, "masks along the batch axis")
    mark(state, node, label)


def resize(state: State, node: ir.Node) -> None:
    """Along other axes; sizes are spelled for these only."""
    label = only(state, node)
    sizes = array_of(node, 3)
    shape = state.shape(node.inputs[0])
    axes = list(node.attributes.get_ints("axes", range(len(shape))))
    axes = [a % len(shape) for a in axes]
    if state.shape(node.outputs[0])[label.axis] != shape[label.axis]:
        raise refuse(node, "resizes the batch axis")
    if sizes is not None and label.axis in axes:
        kept = [i for i, a in enumerate(axes) if state.shape(node.outputs[0])[a] != shape[a]]
        if not kept:
            kept = [i for i, a in enumerate(axes) if a != label.axis]
        node.attributes.add(ir.AttrInt64s("axes", [axes[i] for i in kept]))
        fill_defaults(node)
        set_operand(state.graph, node, 3, np.asarray([sizes[i] for i in kept], np.int64))
    mark(state, node, label)
