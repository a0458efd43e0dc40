"""What a learned model sees of a kernel: one row of numbers per (signature, sizes).

Sizes enter as logarithms, because times are products; what steps with the width of a register or of a
block enters as alignment and as the share that rounding up wastes. Groups, and the channels of one group,
are features of their own: two convolutions of equal work but other groups are different kernels.

A size relative to a cache of the machine differs from the size itself by a constant, which a decision tree
does not see; `working_set` and `weight_bytes` therefore stand for both. What others have displaced from the
caches since a kernel last ran is seen in how long ago that was, the period, and of its code in how long ago a kernel of
the same operator ran, the pause. Kernels without weights see the pause only: what they read has just been made, and in
long networks maps are large, which trees would take for the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.work import Work, item_bytes, unit_length, work_of_spec
from sartor.ir.fusion import ACTIVATIONS
from sartor.ir.fusion_layout import BLOCK, convolves_blocked
from sartor.ir.layout import COPIES
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.operands import RECURRENT

CONTRACTION = (
    *("log_macs", "log_weight_bytes", "log_read", "log_written", "log_working_set", "log_intensity"),
    *("log_groups", "log_rows", "log_columns", "log_channels", "log_taps", "log_c_in", "log_c_out"),
    *("align_in", "align_out", "align_columns", "waste_in_8", "waste_out_8", "waste_in_16", "waste_out_16"),
    *("width", "stride", "dilation", "padding", "residuals", "activations", "gated", "transposed", "stored"),
    *("height", "out_width", "window_width", "blocks", "blocks_left", "columns_left", "way"),
    *("log_windows", "log_period", "log_pause"),
)
MOVEMENT = (
    *("log_bytes", "log_read", "log_written", "log_taps", "stride", "operands", "stored", "outputs"),
    *("rank", "log_fixed", "last", "smallest", "item_bytes", "align", "epilogue"),
    *("log_second", "align_second", "whole_blocks", "log_rest", "align_rest", "log_run"),
    *("axes_moved", "log_pause"),
)
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Exp", "Where", "PRelu"})
COSTLY = ACTIVATIONS - {"Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "ThresholdedRelu"} | {"Silu"}
"""Activations that are work themselves: exponentials and the like."""
_MOST_ALIGNMENT = 5
_BLOCKS_AT_ONCE = 4  # output blocks that one pass over the input makes


def names_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the columns of `features`."""
    return MOVEMENT if is_movement(spec) else CONTRACTION


def is_movement(spec: Mapping[str, Any]) -> bool:
    """Whether the one variable of a kernel is the bytes that it moves."""
    return "inputs" in spec


def features(
    spec: Mapping[str, Any], sizes: Sequence[Any], period_s: Any = 0.0, alike: Any = 1
) -> np.ndarray:
    """Features of one kernel at many sizes.

    Args:
        spec: `Signature.spec`.
        sizes: one array per variable of the signature, all of one shape.
        period_s: as `Sample.period_s`, a number or an array of that shape.
        alike: as `Sample.alike`, likewise.

    Returns:
        `[rows, len(names_of(spec))]`, rows being the flattened sizes.

    Raises:
        InternalError: not one size per variable.
    """
    arrays = [np.atleast_1d(np.asarray(s, float)).ravel() for s in sizes]
    found = work_of_spec(spec, arrays)
    period = np.ravel(np.asarray(period_s, float))
    columns = (
        _movement(spec, found) if is_movement(spec) else [*_contraction(spec, found), _log(1e6 * period)]
    )
    columns.append(_log(1e6 * period / np.ravel(alike)))
    # A kernel may have no variable at all, and still many periods.
    rows = max(len(a) for a in (*arrays, period, np.ravel(alike)))
    return np.column_stack([np.broadcast_to(np.asarray(c, float), rows) for c in columns])


def family_of(spec: Mapping[str, Any]) -> str:
    """The family of a kernel, as `sartor.ir.kernels.Kernel` has it, from its spec alone."""
    op = str(spec["op"])
    if op in COPIES:
        return LAYOUT
    if op in ("Conv", "ConvTranspose"):
        return "depthwise" if "multiplier" in spec else "conv"
    if op in ("Gemm", "MatMul"):
        return op.lower()
    if op in RECURRENT:
        return "recurrent"
    if op.endswith("Pool") or op.startswith("Reduce"):
        return "pool"
    if op.endswith("Normalization") or op in ("Softmax", "LogSoftmax", "LRN"):
        return "norm"
    return "elementwise" if op in ACTIVATIONS | _ELEMENTWISE else "other"


def alignment(widths: Any) -> np.ndarray:
    """How often a width is divisible by 2, at most 5 times; of what is no whole number, 0."""
    values = np.asarray(widths, float)
    result = np.zeros(values.shape)
    for power in range(1, _MOST_ALIGNMENT + 1):
        result += np.where(values % 2**power == 0, 1.0, 0.0)
    return result


def _log(value: Any) -> np.ndarray:
    return np.log(np.maximum(value, 1.0))


def _waste(widths: np.ndarray, block: int) -> np.ndarray:
    """Logarithm of what rounding up to whole blocks costs."""
    return np.log(np.ceil(widths / block) * block / np.maximum(widths, 1.0))


def _contraction(spec: Mapping[str, Any], found: Work) -> list[Any]:
    c_in, c_out = found.groups * found.channels, found.groups * found.columns
    attributes = spec.get("attributes", {})
    epilogue = [op for op, _ in spec.get("epilogue", ())]
    blocks = np.ceil(c_out / BLOCK)
    return [
        *map(_log, (found.macs, found.weight_bytes, found.read, found.written, found.moved)),
        np.log(np.maximum(found.macs, 1.0) / np.maximum(found.moved, 1.0)),
        *map(_log, (found.groups, found.rows, found.columns, found.channels, found.taps, c_in, c_out)),
        *map(alignment, (c_in, c_out, found.columns)),
        *(_waste(c, block) for block in (8, 16) for c in (c_in, c_out)),
        spec.get("spatial", [1])[-1],  # rows of a feature map shorter than a register are computed apart
        math.prod(attributes.get("strides", [1])),
        math.prod(attributes.get("dilations", [1])),
        sum(attributes.get("pads", [0])),
        epilogue.count("Add"),
        sum(op not in ("Add", "Bias") for op in epilogue),
        sum(op in COSTLY for op in epilogue),
        spec.get("op") == "ConvTranspose",
        sum(spec.get("stored", [False, True])),
        spec.get("spatial", [1])[0],
        spec.get("out", [1])[-1],
        attributes.get("kernel_shape", [1])[-1],
        blocks,
        blocks % _BLOCKS_AT_ONCE,
        c_out % BLOCK,
        _ways(spec, found),
        _log(found.groups * found.channels * found.taps * found.rows),  # all windows, laid out as rows
    ]


def _extent(dims: Sequence[int | str]) -> tuple[int, int]:
    """Orders operands by what they hold: in powers of the unit first."""
    units = [d for d in dims if isinstance(d, str)]
    multiples = [int(d[:-1] or 1) for d in units] + [d for d in dims if not isinstance(d, str)]
    return len(units), math.prod(multiples)


def _ways(spec: Mapping[str, Any], found: Work) -> np.ndarray:
    """Numbers of the ways in which runtimes compute a convolution, see `ways_of`."""
    ways = ways_of(spec, found)
    return np.select([ways == w for w in WAYS], range(len(WAYS)), len(WAYS))


WAYS = (
    *(
        "image window",
        "image point",
        "blocked window",
        "blocked point",
        "unblocked window",
        "unblocked point",
    ),
    *("vector", "matrix"),
)


def ways_of(spec: Mapping[str, Any], found: Work) -> np.ndarray:
    """How runtimes on CPUs compute a convolution of these sizes, or a product with a stored matrix; "" for the rest.

    A product of one row reads every weight once and computes nothing beside it; its time says nothing of more rows.

    Args:
        spec: of the kernel.
        found: its work.
    """
    if "rows" in spec:
        return np.full(found.macs.shape, "vector" if math.prod(spec["rows"]) == 1 else "matrix")
    if is_movement(spec) or spec["op"] not in ("Conv", "ConvTranspose"):
        return np.full(found.macs.shape, "")
    blocked = convolves_blocked(found.groups, found.channels, found.columns)
    window = "window" if found.taps.max(initial=1) > 1 else "point"
    image = (found.channels < BLOCK) & (found.groups == 1)  # read as they are, by kernels of their own
    kinds = np.where(image, "image", np.where(blocked, "blocked", "unblocked"))
    return np.char.add(kinds, f" {window}")


def _movement(spec: Mapping[str, Any], found: Work) -> list[Any]:
    operands = [o for o in spec["inputs"] if o is not None]
    attributes = spec.get("attributes", {})
    fixed = [math.prod(d for d in o["dims"] if not isinstance(d, str)) for o in operands]
    first: Sequence[int | str] = max((o["dims"] for o in operands), key=_extent, default=())
    last = first[-1] if first and not isinstance(first[-1], str) else 0
    per_unit = max(fixed, default=1)
    second: Any = first[1] if len(first) > 1 else 0
    if isinstance(second, str):
        second = float(second[:-1] or 1) * np.rint(unit_length(spec, found.rows))
    second = np.asarray(second, float)
    rest = math.prod(d for d in first[2:] if not isinstance(d, str))
    item = 4.0 if not operands else item_bytes(operands[0]["dtype"])
    return [
        *map(_log, (found.moved, found.read, found.written)),
        _log(math.prod(attributes.get("kernel_shape", [1]))),
        math.prod(attributes.get("strides", [1])),
        len(operands),
        sum(o["stored"] for o in operands),
        spec.get("output_count", 1),
        len(first),
        _log(per_unit),
        last,
        math.log(max(min(fixed, default=1), 1) / max(per_unit, 1)),
        item,
        alignment(last),
        len(spec.get("epilogue", ())),
        _log(second),
        alignment(second),
        second % BLOCK == 0,  # poolings of whole blocks stay in the blocked layout
        _log(rest),
        alignment(rest),
        _log(_run(spec, first, found)),
        _axes_moved(spec),
    ]


def _axes_moved(spec: Mapping[str, Any]) -> int:
    """Axes that a Transpose takes out and puts in elsewhere; runtimes have code of their own for one."""
    perm = spec.get("attributes", {}).get("perm", ())
    longest: list[int] = []  # rising row of axes that stay, by where it ends
    for place, axis in enumerate(perm):
        longest.append(1 + max((longest[i] for i in range(place) if perm[i] < axis), default=0))
    return len(perm) - max(longest, default=0)


def _run(spec: Mapping[str, Any], dims: Sequence[int | str], found: Work) -> Any:
    """Numbers that a Transpose moves without taking them apart: its last axes, as far as they stay where they are."""
    perm = spec.get("attributes", {}).get("perm", ())
    length: Any = 1.0
    for axis in reversed(range(len(perm))):
        if perm[axis] != axis or axis >= len(dims):
            break
        dim = dims[axis]
        length = length * (
            float(dim[:-1] or 1) * np.rint(unit_length(spec, found.rows)) if isinstance(dim, str) else dim
        )
    return length
