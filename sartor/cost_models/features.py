"""What a learned model sees of a kernel: one row of numbers per (signature, sizes).

Sizes enter as logarithms, because times are products; what steps with the width of a register or of a
block enters as alignment and as the share that rounding up wastes. Groups, and the channels of one group,
are features of their own: two convolutions of equal work but other groups are different kernels.

A size relative to a cache of the machine differs from the size itself by a constant, which a decision tree
does not see; `working_set` and `weight_bytes` therefore stand for both. What others have displaced from the
caches since a kernel last ran is seen in how long ago that was, the period, and of its code in how long ago a kernel of
the same operator ran, the pause. Where a runtime generates code for every shape, kernels that are the same share
theirs, and find it warmer (on OpenVINO, twelve equal depthwise convolutions take 7 to 9 % less than twelve that
differ): hence `log_twins`. Kernels without weights see the pause only: what they read has just been made, and in
long networks maps are large, which trees would take for the same.

In a carrier a kernel does not find what it finds in a network: maps come in the layout that a carrier makes them in,
and no two kernels share their code. Trees see which of the two a sample comes from, and predict networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.profile import ALONE, Company
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
    *("width", "stride", "dilation", "padding", "residuals", "activations", "relu", "gated"),
    *("transposed", "stored"),
    *("height", "out_width", "window_width", "blocks", "blocks_left", "columns_left", "way"),
    *("log_windows", "log_period", "log_pause", "log_twins", "carried"),
)
MOVEMENT = (
    *("log_bytes", "log_read", "log_written", "log_taps", "stride", "operands", "stored", "outputs"),
    *("rank", "log_count_of_rows", "last", "smallest", "item_bytes", "align", "epilogue"),
    *("log_second", "align_second", "whole_blocks", "log_rest", "align_rest", "log_run"),
    *("axes_moved", "turned", "log_pieces", "log_pause", "log_twins", "carried"),
)
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Exp", "Where", "PRelu"})
_CHEAP = {"Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "ThresholdedRelu"}
COSTLY = ACTIVATIONS - _CHEAP | {"Silu", "Softmax"}
"""Activations that are work themselves: exponentials and the like; a Softmax is one where attention is one kernel."""
_MOST_ALIGNMENT = 5
_BLOCKS_AT_ONCE = 4  # output blocks that one pass over the input makes


def names_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the columns of `features`."""
    return MOVEMENT if is_movement(spec) else CONTRACTION


def is_movement(spec: Mapping[str, Any]) -> bool:
    """Whether the one variable of a kernel is the bytes that it moves."""
    return "inputs" in spec


def features(
    spec: Mapping[str, Any],
    sizes: Sequence[Any],
    period_s: Any = 0.0,
    company: Company = ALONE,
    carried: Any = False,
) -> np.ndarray:
    """Features of one kernel at many sizes.

    Args:
        spec: `Signature.spec`.
        sizes: one array per variable of the signature, all of one shape.
        period_s: as `Sample.period_s`, a number or an array of that shape.
        company: of each; numbers or arrays of that shape.
        carried: as `Sample.carried`, likewise.

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
    alike, twins, carried = map(np.ravel, (company.alike, company.twins, carried))
    columns += [_log(1e6 * period / alike), _log(twins), carried]
    # A kernel may have no variable at all, and still many periods.
    rows = max(len(a) for a in (*arrays, period, alike, twins, carried))
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
        epilogue.count("Relu"),  # made where the sums are; others may be a pass over what was written
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
    *("vector", "matrix", "axis", "axes"),
)


def ways_of(spec: Mapping[str, Any], found: Work) -> np.ndarray:
    """How runtimes on CPUs compute a convolution of these sizes, a product with a stored matrix, a transposition, or a
    normalization behind one; "" for the rest.

    A product of one row reads every weight once and computes nothing beside it; its time says nothing of more rows.

    Args:
        spec: of the kernel.
        found: its work.
    """
    if "rows" in spec:
        return np.full(found.macs.shape, "vector" if math.prod(spec["rows"]) == 1 else "matrix")
    if spec["op"] == "Transpose":
        return np.full(found.macs.shape, "axes" if _axes_moved(spec) > 1 else "axis")
    if spec.get("turned"):
        return np.full(found.macs.shape, "turned")
    if is_movement(spec) or spec["op"] not in ("Conv", "ConvTranspose"):
        return np.full(found.macs.shape, "")
    blocked = convolves_blocked(found.groups, found.channels, found.columns)
    window = "window" if found.taps.max(initial=1) > 1 else "point"
    # read as they are, by kernels of their own
    image = (found.channels < BLOCK) & (found.groups == 1) & ("multiplier" not in spec)
    kinds = np.where(image, "image", np.where(blocked, "blocked", "unblocked"))
    return np.char.add(kinds, f" {window}")


def _lengths(spec: Mapping[str, Any], found: Work) -> tuple[list[list[Any]], list[Any]]:
    """Dimensions of the operands of a kernel that moves data as they are, and those of the largest one."""
    unit = np.rint(unit_length(spec, found.rows))

    def lengths(dims: Sequence[int | str]) -> list[Any]:
        return [float(d[:-1] or 1) * unit if isinstance(d, str) else float(d) for d in dims]

    shapes = [o["dims"] for o in spec["inputs"] if o is not None]
    return [lengths(dims) for dims in shapes], lengths(max(shapes, key=_extent, default=()))


def pieces_of(spec: Mapping[str, Any], found: Work) -> Any:
    """Stretches of memory that a kernel which moves data begins one by one; 1 where it is all of it.

    Rows of a normalization, results of a reduction, what a Transpose does not take apart, and what a vector is added to
    or multiplied with.
    """
    shapes, first = _lengths(spec, found)
    op = str(spec["op"])
    if op == "Transpose":
        return math.prod(first) / np.maximum(_run(spec, first), 1.0)
    if op in _BY_ROWS:
        return np.asarray(math.prod(first[:-1]))
    if op.startswith("Reduce"):
        axes = next(
            (o["value"] for o in spec["inputs"][1:] if o is not None and "value" in o), range(len(first))
        )
        return np.asarray(
            math.prod(n for i, n in enumerate(first) if i not in {a % len(first) for a in axes})
        )
    if op in _ELEMENTWISE and len(shapes) > 1:
        shortest = functools.reduce(np.minimum, (_stretch(shape, first) for shape in shapes))
        return math.prod(first) / np.maximum(shortest, 1.0)
    return np.asarray(1.0)


_BY_ROWS = frozenset({"LayerNormalization", "Softmax", "LogSoftmax"})


def _stretch(shape: Sequence[Any], whole: Sequence[Any]) -> Any:
    """Numbers in a row that are taken from an operand as they stand there, or of which it gives one for all."""
    padded = [1.0] * (len(whole) - len(shape)) + list(shape)
    own: Any = 1.0
    repeats = bool(padded) and np.all(np.asarray(padded[-1]) == 1)
    for mine, length in zip(reversed(padded), reversed(whole), strict=True):
        if np.all(np.asarray(mine) == (1.0 if repeats else length)):
            own = own * length
        else:
            break
    return own


def _movement(spec: Mapping[str, Any], found: Work) -> list[Any]:
    """By lengths as they are: whether a dimension is one that plans change, no kernel knows."""
    operands = [o for o in spec["inputs"] if o is not None]
    attributes = spec.get("attributes", {})
    shapes, first = _lengths(spec, found)
    counts = [math.prod(shape) for shape in shapes]
    smallest = functools.reduce(np.minimum, counts, np.inf)
    most = functools.reduce(np.maximum, counts, 1.0)
    last, second = (np.asarray(first[i] if len(first) > i else 0.0) for i in (-1, 1)) if first else (0.0, 0.0)
    rest = np.asarray(math.prod(first[2:]))
    item = 4.0 if not operands else item_bytes(operands[0]["dtype"])
    return [
        *map(_log, (found.moved, found.read, found.written)),
        _log(math.prod(attributes.get("kernel_shape", [1]))),
        math.prod(attributes.get("strides", [1])),
        len(operands),
        sum(o["stored"] for o in operands),
        spec.get("output_count", 1),
        len(first),
        _log(math.prod(first[:-1])),
        last,
        np.log(np.clip(smallest / most, 1e-12, 1.0)),
        item,
        alignment(last),
        len(spec.get("epilogue", ())),
        _log(second),
        alignment(second),
        np.asarray(second) % BLOCK == 0,  # poolings of whole blocks stay in the blocked layout
        _log(rest),
        alignment(rest),
        _log(_run(spec, first)),
        _axes_moved(spec),
        bool(spec.get("turned")),
        _log(pieces_of(spec, found)),
    ]


def _axes_moved(spec: Mapping[str, Any]) -> int:
    """Axes that a Transpose takes out and puts in elsewhere; runtimes have code of their own for one."""
    perm = spec.get("attributes", {}).get("perm", ())
    longest: list[int] = []  # rising row of axes that stay, by where it ends
    for place, axis in enumerate(perm):
        longest.append(1 + max((longest[i] for i in range(place) if perm[i] < axis), default=0))
    return len(perm) - max(longest, default=0)


def _run(spec: Mapping[str, Any], lengths: Sequence[Any]) -> Any:
    """Numbers that a Transpose moves without taking them apart: its last axes, as far as they stay where they are."""
    perm = spec.get("attributes", {}).get("perm", ())
    length: Any = 1.0
    for axis in reversed(range(len(perm))):
        if perm[axis] != axis or axis >= len(lengths):
            break
        length = length * lengths[axis]
    return length
