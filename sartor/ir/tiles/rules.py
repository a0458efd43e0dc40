"""One rule per operator: which of its axes are those of the map, and how their positions belong together.

What is local has a rule: a position of the result depends on positions nearby. What looks at the whole map, or puts its
positions elsewhere, is refused with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sartor.ir import canonicalize as table
from sartor.ir.cleanup import array_of
from sartor.ir.tiles.place import Axes, Local, Operand, Place
from sartor.ir.tiles.spans import Cut, Enlarged, Gathered, Relation, Same, Transposed, Untileable, Window

Rule = Callable[[Place], Local]


def local(place: Place) -> Local:
    """How a node can be computed tile by tile.

    Raises:
        Untileable: it cannot.
    """
    rule = None if place.node.domain else RULES.get(place.node.op_type)
    if rule is None:
        raise Untileable(REASONS.get(place.node.op_type, "is not known to be local"))
    return rule(place)


def _one(place: Place, relations: Sequence[Relation], axes: Axes | None = None) -> Local:
    """A node whose first input alone has the map, and whose results have it at the same axes unless others are said."""
    place.first_alone()
    own = place.map_axes
    return Local({0: Operand(own, tuple(relations))}, own if axes is None else axes)


def _same(place: Place) -> Local:
    return _one(place, [Same()] * len(place.map_axes))


def _elementwise(place: Place) -> Local:
    """Broadcasting from the right."""
    rank = len(place.shape(place.node.outputs[0]))
    found: dict[int, Axes] = {}
    for index, value in enumerate(place.node.inputs):
        if value is not None and value.name in place.axes:
            shift = rank - len(place.shape(value))
            found[index] = tuple(axis + shift for axis in place.axes[value.name])
    if len(set(found.values())) != 1:
        raise Untileable("reads maps that lie along different axes")
    axes = next(iter(found.values()))
    operands = {}
    for index, value in enumerate(place.node.inputs):
        if value is None:
            continue
        shape = place.shape(value)
        shift = rank - len(shape)
        own = tuple(a - shift if a >= shift and shape[a - shift] != 1 else None for a in axes)
        if any(axis is not None for axis in own):
            operands[index] = Operand(own, (Same(),) * len(axes))
    return Local(operands, axes)


def _quantize(place: Place) -> Local:
    scale = place.shape(place.node.inputs[1])
    rank = len(place.shape(place.node.inputs[0]))
    if len(scale) > 1 or (
        math.prod(scale) > 1 and place.node.attributes.get_int("axis", 1) % rank in place.map_axes
    ):
        raise Untileable("has a scale per position of the map")
    return _same(place)


def _batch_norm(place: Place) -> Local:
    if 1 in place.map_axes or place.node.attributes.get_int("training_mode", 0):
        raise Untileable("takes statistics of the map")
    return _same(place)


def _along(place: Place) -> Local:
    """What looks along one axis."""
    rank = len(place.shape(place.node.inputs[0]))
    default = 1 if place.node.op_type == "LRN" else -1
    axis = 1 if place.node.op_type == "LRN" else place.node.attributes.get_int("axis", default)
    if axis % rank in place.map_axes:
        raise Untileable("looks along the map")
    return _same(place)


def _layer_norm(place: Place) -> Local:
    rank = len(place.shape(place.node.inputs[0]))
    if any(axis >= place.node.attributes.get_int("axis", -1) % rank for axis in place.map_axes):
        raise Untileable("takes statistics of the map")
    return _same(place)


def _reduce(place: Place) -> Local:
    rank = len(place.shape(place.node.inputs[0]))
    if place.node.op_type in ("ArgMax", "ArgMin"):
        reduced = {place.node.attributes.get_int("axis", 0) % rank}
    else:
        reduced = {axis % rank for axis in place.constant(1) or range(rank)}
    if reduced & set(place.map_axes):
        raise Untileable("takes all of the map together")
    keep = place.node.attributes.get_int("keepdims", 1)
    axes = tuple(a if keep else a - sum(r < a for r in reduced) for a in place.map_axes)
    return _one(place, [Same()] * len(axes), axes)


def _matmul(place: Place) -> Local:
    """Weights for the last axis, as of layers that read maps with their channels last."""
    rank = len(place.shape(place.node.inputs[0]))
    if rank - 1 in place.map_axes or len(place.shape(place.node.inputs[1])) != 2:
        raise Untileable("multiplies along the map")
    return _same(place)


# ---- windows -------------------------------------------------------------------------------------
def _taps(place: Place, name: str, default: int) -> dict[int, int]:
    """An attribute with an entry per spatial axis, by axis."""
    count = len(place.shape(place.node.inputs[0])) - 2
    given = place.node.attributes.get_ints(name, ()) or [default] * count
    return {axis + 2: int(n) for axis, n in enumerate(given)}


def _windows(place: Place) -> Local:
    node = place.node
    if (node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET") != "NOTSET":
        raise Untileable("pads by itself (auto_pad)")
    if len(node.outputs) > 1 and any(output.uses() for output in node.outputs[1:]):
        raise Untileable("says at which positions of the map it found its results")
    if any(axis < 2 for axis in place.map_axes):
        raise Untileable("takes the axes of the map for samples or channels")
    if node.attributes.get("output_shape") is not None:
        raise Untileable("fixes the size of its result")
    kernel = _taps(place, "kernel_shape", 0)
    if not node.attributes.get_ints("kernel_shape", ()):
        kernel = {axis + 2: n for axis, n in enumerate(place.shape(node.inputs[1])[2:])}
    strides, dilations = _taps(place, "strides", 1), _taps(place, "dilations", 1)
    pads = list(node.attributes.get_ints("pads", ()) or [0] * (2 * len(kernel)))
    relations: list[Relation] = []
    for axis in place.map_axes:
        stride, extent = strides[axis], dilations[axis] * (kernel[axis] - 1) + 1
        before, behind = pads[axis - 2], pads[axis - 2 + len(kernel)]
        if node.op_type == "ConvTranspose":
            relations.append(Transposed(stride, extent, before))
            continue
        length, count = (place.shape(v)[axis] for v in (node.inputs[0], node.outputs[0]))
        end = (count - 1) * stride - before + extent
        if node.attributes.get_int("count_include_pad", 0) and end > length + behind:
            raise Untileable("counts some of what is behind the map (ceil_mode with count_include_pad)")
        relations.append(Window(stride, extent, before))
    return _one(place, relations)


def _blocks(place: Place) -> Local:
    if tuple(place.map_axes) != tuple(range(4 - len(place.map_axes), 4)):
        raise Untileable("takes the axes of the map for samples or channels")
    size = place.node.attributes.get_int("blocksize")
    kind = Enlarged if place.node.op_type == "DepthToSpace" else Gathered
    return _one(place, [kind(size)] * len(place.map_axes))


_HALOS = {"nearest": 1, "linear": 1, "cubic": 2}


def _resize(place: Place) -> Local:
    attributes = place.node.attributes
    mode = attributes.get_string("mode", "nearest") or "nearest"
    where = attributes.get_string("coordinate_transformation_mode", "half_pixel") or "half_pixel"
    if where not in ("half_pixel", "pytorch_half_pixel", "asymmetric") or mode not in _HALOS:
        raise Untileable(f"resizes in a way that depends on the size of the map ({where})")
    if attributes.get_int("antialias", 0) or attributes.get_int("exclude_outside", 0):
        raise Untileable("weighs positions by what lies behind the border")
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") not in (None, "stretch"):
        raise Untileable("chooses its own size")
    before, after = place.shape(place.node.inputs[0]), place.shape(place.node.outputs[0])
    relations: list[Relation] = []
    for axis in place.map_axes:
        factor, rest = divmod(after[axis], before[axis])
        if rest or not factor or not _scaled_by(place, axis, factor):
            raise Untileable("resizes by another factor than a whole one")
        relations.append(Same() if factor == 1 else Enlarged(factor, _HALOS[mode]))
    return _one(place, relations)


def _scaled_by(place: Place, axis: int, factor: int) -> bool:
    """Whether Resize has just this factor and not one that is rounded to it."""
    scales = array_of(place.node, 2)
    if scales is None or not scales.size:
        return True
    rank = len(place.shape(place.node.inputs[0]))
    along = [a % rank for a in place.node.attributes.get_ints("axes", ()) or range(rank)]
    return axis not in along or float(scales[along.index(axis)]) == factor


# ---- movement ------------------------------------------------------------------------------------
def _concat(place: Place) -> Local:
    rank = len(place.shape(place.node.outputs[0]))
    axes = {place.axes[v.name] for v in place.node.inputs if v is not None and v.name in place.axes}
    if len(axes) != 1:
        raise Untileable("reads maps that lie along different axes")
    own = next(iter(axes))
    if place.node.attributes.get_int("axis", 0) % rank in own:
        raise Untileable("puts maps one behind the other")
    return Local({i: Operand(own, (Same(),) * len(own)) for i in range(len(place.node.inputs))}, own)


def _split(place: Place) -> Local:
    rank = len(place.shape(place.node.inputs[0]))
    if place.node.attributes.get_int("axis", 0) % rank in place.map_axes:
        raise Untileable("cuts the map")
    return _same(place)


def slice_bounds(place: Place) -> dict[int, tuple[int, int, int]]:
    """Start, end and step by axis of a Slice, in positions that there are.

    Raises:
        Untileable: they are computed.
    """
    shape = place.shape(place.node.inputs[0])
    starts, ends = place.constant(1) or [], place.constant(2) or []
    axes = place.constant(3) or list(range(len(starts)))
    steps = place.constant(4) or [1] * len(starts)
    found = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        first, last, by = slice(start, end, step).indices(shape[axis % len(shape)])
        found[axis % len(shape)] = (first, last, by)
    return found


def _slice(place: Place) -> Local:
    bounds = slice_bounds(place)
    relations: list[Relation] = []
    for axis in place.map_axes:
        start, _, step = bounds.get(axis, (0, 0, 1))
        if step < 1:
            raise Untileable("turns the map around")
        relations.append(Cut(start, step))
    return _one(place, relations)


def pad_widths(place: Place) -> dict[int, tuple[int, int]]:
    """Positions that a Pad adds in front and behind, by axis.

    Raises:
        Untileable: they are computed.
    """
    rank = len(place.shape(place.node.inputs[0]))
    pads = place.constant(1) or []
    axes = place.constant(3) or list(range(rank))
    return {axis % rank: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}


def _pad(place: Place) -> Local:
    mode = place.node.attributes.get_string("mode", "constant")
    if mode not in ("constant", "edge"):
        raise Untileable(f"pads with what lies inside of the map (mode {mode})")
    widths = pad_widths(place)
    if any(min(widths.get(axis, (0, 0))) < 0 for axis in place.map_axes):
        raise Untileable("crops by negative pads")
    return _one(place, [Window(1, 1, widths.get(axis, (0, 0))[0]) for axis in place.map_axes])


def _transpose(place: Place) -> Local:
    order = [int(axis) for axis in place.node.attributes["perm"].as_ints()]
    return _one(place, [Same()] * len(place.map_axes), tuple(order.index(axis) for axis in place.map_axes))


def _squeeze(place: Place) -> Local:
    rank = len(place.shape(place.node.inputs[0]))
    gone = {axis % rank for axis in place.constant(1) or range(rank)}
    if gone & set(place.map_axes):
        raise Untileable("drops an axis of the map")
    return _one(
        place,
        [Same()] * len(place.map_axes),
        tuple(axis - sum(g < axis for g in gone) for axis in place.map_axes),
    )


def _unsqueeze(place: Place) -> Local:
    rank = len(place.shape(place.node.outputs[0]))
    new = {axis % rank for axis in place.constant(1) or ()}
    kept = [axis for axis in range(rank) if axis not in new]
    return _one(place, [Same()] * len(place.map_axes), tuple(kept[axis] for axis in place.map_axes))


RULES: dict[str, Rule] = {
    **dict.fromkeys(table.ELEMENTWISE_UNARY, _same),
    **dict.fromkeys(table.ELEMENTWISE_BROADCAST, _elementwise),
    **dict.fromkeys(table.REDUCTIONS, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduce),
    **dict.fromkeys(("AveragePool", "Conv", "ConvTranspose", "LpPool", "MaxPool"), _windows),
    **dict.fromkeys(("CumSum", "Hardmax", "LRN", "LogSoftmax", "LpNormalization", "Softmax"), _along),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantize),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
REASONS = {
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), "takes all of the map together"),
    **dict.fromkeys(
        ("GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization"),
        "takes statistics of the map",
    ),
    **dict.fromkeys(("Flatten", "Reshape"), "puts positions of the map into another order"),
    **dict.fromkeys(("Gemm", "Einsum"), "multiplies along the map"),
}
