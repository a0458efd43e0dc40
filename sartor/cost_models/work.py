"""Work of a kernel from its signature and its sizes: multiply-accumulates, and the bytes that it moves.

Every contraction is a matrix product per group, as if a convolution's windows were laid out as rows:
`macs = groups · rows · columns · channels · taps`. What a signature does not hold is not counted: the
parameters of a BatchNormalization (it folds into the weights) and the bounds of a Clip. One bias is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.signatures import Signature
from sartor.errors import InternalError
from sartor.ir.operands import RECURRENT

_PACKED = {"INT4": 0.5, "UINT4": 0.5, "FLOAT4E2M1": 0.5}
_ITEM_BYTES = {
    **_PACKED,
    **{name: 1.0 for name in ("INT8", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E5M2")},
    **{name: 2.0 for name in ("FLOAT16", "BFLOAT16", "INT16", "UINT16")},
    **{name: 4.0 for name in ("FLOAT", "INT32", "UINT32")},
    **{name: 8.0 for name in ("DOUBLE", "INT64", "UINT64", "COMPLEX64")},
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one execution of a kernel amounts to; every field is an array of the shape of the sizes.

    Attributes:
        macs: multiply-accumulates (1 MAC = 2 FLOP); 0 for a kernel that only moves data.
        weight_bytes: stored operands, one bias included.
        read: bytes of activations read, a residual included.
        written: bytes of activations written.
        groups: independent products: groups of a convolution, matrices of a batch, steps of a sequence.
        rows: positions of one product: batch · height · width, or rows of the left matrix.
        columns: output channels of one group.
        channels: input channels of one group.
        taps: positions of the window; 1 for products.
    """

    macs: np.ndarray
    weight_bytes: np.ndarray
    read: np.ndarray
    written: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    channels: np.ndarray
    taps: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """All bytes: weights, and activations read and written."""
        return self.weight_bytes + self.read + self.written

    def times(self, batches: float) -> Work:
        """The same kernel on `batches` times as many inputs: everything grows but its weights."""
        grown = {name: getattr(self, name) * batches for name in ("macs", "read", "written", "rows")}
        return dataclasses.replace(self, **grown)


def work(signature: Signature, sizes: Sequence[Any]) -> Work:
    """Work of a kernel.

    Args:
        signature: of the kernel.
        sizes: one array (or number) per variable of the signature, all of one shape.

    Raises:
        InternalError: not one size per variable.
    """
    return work_of_spec(signature.spec, sizes)


def work_of_spec(spec: Mapping[str, Any], sizes: Sequence[Any]) -> Work:
    """As `work`, from `Signature.spec`, which is what a profile's samples carry."""
    arrays = [np.asarray(size, float) for size in sizes]
    try:
        if "inputs" in spec:
            (moved,) = arrays
            return _movement(spec, moved)
        if spec["op"] in RECURRENT:
            return _recurrent(spec, *arrays)
        if spec["op"] in ("Conv", "ConvTranspose"):
            return _convolution(spec, arrays)
        return _product(spec, arrays)
    except (TypeError, ValueError, StopIteration) as error:
        raise InternalError(
            f"A kernel '{spec.get('op')}' does not have {len(arrays)} variables as its signature is written "
            f"({error}); pass one size per variable, in the order of the signature."
        ) from error


def item_bytes(dtype: str) -> float:
    """Bytes per element of an ONNX type name; 4 for types that are not listed (strings, sequences)."""
    return _ITEM_BYTES.get(dtype, 4.0)


def _of(item: float, shape: tuple[int, ...], **parts: Any) -> Work:
    """Work of a contraction; `weights`, `read` and `written` are given in elements."""
    product = {name: np.asarray(parts[name], float) for name in _PRODUCT}
    macs = math.prod(product.values(), start=np.ones(shape))
    sizes = {"weight_bytes": "weights", "read": "read", "written": "written"}
    moved = {name: item * np.asarray(parts[source], float) for name, source in sizes.items()}
    arrays = {"macs": macs, **moved, **product}
    return Work(**{name: np.broadcast_to(value, shape) for name, value in arrays.items()})


_PRODUCT = ("groups", "rows", "columns", "channels", "taps")


def _residuals(spec: Mapping[str, Any]) -> int:
    return sum(op == "Add" for op, _ in spec.get("epilogue", ()))


def _convolution(spec: Mapping[str, Any], sizes: Sequence[np.ndarray]) -> Work:
    if "multiplier" in spec:
        (groups,) = sizes
        c_in, c_out = groups, groups * spec["multiplier"]
    else:
        groups, inner, outer = (np.asarray(1.0), *sizes) if spec["group"] == 1 else sizes
        c_in, c_out = groups * inner, groups * outer
    taps = math.prod(spec["attributes"]["kernel_shape"])
    source, target = (spec["batch"] * math.prod(spec[name]) for name in ("spatial", "out"))
    written = target * c_out
    return _of(
        item_bytes(spec["dtype"]),
        np.broadcast_shapes(*(size.shape for size in sizes)),
        groups=groups,
        rows=source if spec["op"] == "ConvTranspose" else target,
        columns=c_out / groups,
        channels=c_in / groups,
        taps=taps,
        weights=c_in * c_out / groups * taps + c_out,
        read=source * c_in + _residuals(spec) * written,
        written=written,
    )


def _product(spec: Mapping[str, Any], sizes: Sequence[np.ndarray]) -> Work:
    shape = np.broadcast_shapes(*(size.shape for size in sizes))
    item = item_bytes(spec["dtype"])
    if "rows" in spec:
        k, n = sizes
        m = math.prod(spec["rows"])
        parts = {"groups": 1, "rows": m, "columns": n, "channels": k, "taps": 1}
        read = m * k + _residuals(spec) * m * n
        return _of(item, shape, **parts, weights=k * n + n, read=read, written=m * n)
    given = iter(sizes)
    batch, m, k, n = (
        next(given) if spec[r] == "*" else np.asarray(float(spec[r])) for r in "batch m k n".split()
    )
    left, right, written = batch * m * k, (1.0 if spec["shared"] else batch) * k * n, batch * m * n
    stored = [
        side if is_stored else 0.0 for side, is_stored in zip((left, right), spec["stored"], strict=True)
    ]
    return _of(
        item,
        shape,
        groups=batch,
        rows=m,
        columns=n,
        channels=k,
        taps=1,
        weights=sum(stored),
        read=left + right - sum(stored) + _residuals(spec) * written,
        written=written,
    )


def _recurrent(spec: Mapping[str, Any], inner: np.ndarray, hidden: np.ndarray) -> Work:
    steps, batch, directions = spec["steps"], spec["batch"], spec["directions"]
    rows = spec["gates"] * hidden
    return _of(
        item_bytes(spec["dtype"]),
        np.broadcast_shapes(inner.shape, hidden.shape),
        groups=steps * directions,
        rows=batch,
        columns=rows,
        channels=inner + hidden,
        taps=1,
        weights=directions * rows * (inner + hidden + 2),
        read=steps * batch * inner,
        written=steps * batch * directions * hidden,
    )


def unit_length(spec: Mapping[str, Any], moved: np.ndarray) -> np.ndarray:
    """Length of the unit that the dims of a kernel that moves data are multiples of, from the bytes that it moves."""
    return _unit([term for terms in _parts(spec).values() for term in terms], np.asarray(moved, float))


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """What the bytes of a kernel that moves data are of: channels, or whatever its unit is.

    Where no dimension is in units, the channels are the bytes.

    Attributes:
        spec: of the kernel.
        multiple: channels of one unit; where several axes are in units, of the widest.
        of_maps: whether they are the second axis of a feature map, for which runtimes have layouts of their own.
    """

    spec: Mapping[str, Any]
    multiple: int = 1
    of_maps: bool = False

    @staticmethod
    def of(spec: Mapping[str, Any]) -> Units:
        """Of a kernel that moves data."""
        shapes = [entry["dims"] for entry in spec["inputs"] if entry is not None] + list(spec["outputs"])
        maps = [dims[1] for dims in shapes if len(dims) == 4 and isinstance(dims[1], str)]
        widths = maps or [d for dims in shapes for d in dims if isinstance(d, str)]
        return Units(spec, max((int(width[:-1] or 1) for width in widths), default=1), bool(maps))

    @functools.cached_property
    def _terms(self) -> _Terms:
        terms = [term for parts in _parts(self.spec).values() for term in parts]
        return terms if any(power for _, power in terms) else [(1.0, 1)]

    def channels_of(self, moved: np.ndarray) -> np.ndarray:
        """Channels, from bytes; whole numbers but for what plans of several groups leave."""
        return np.round(self.multiple * _unit(self._terms, np.asarray(moved, float)), 6)

    def bytes_of(self, channels: np.ndarray) -> np.ndarray:
        """Inverse of `channels_of`."""
        return _evaluate(self._terms, np.asarray(channels, float) / self.multiple)


def _movement(spec: Mapping[str, Any], moved: np.ndarray) -> Work:
    """Parts of the bytes that the operands are of, at the length of the unit that the total says."""
    parts = _parts(spec)
    unit = _unit([term for terms in parts.values() for term in terms], moved)
    values = {name: _evaluate(terms, unit) for name, terms in parts.items()}
    total = sum(values.values())
    scale = np.where(total > 0, moved / np.where(total > 0, total, 1.0), 0.0)
    zero, one = np.zeros(moved.shape), np.ones(moved.shape)
    return Work(
        macs=zero,
        **{name: value * scale for name, value in values.items()},
        groups=one,
        rows=moved,
        columns=one,
        channels=one,
        taps=one,
    )


def _parts(spec: Mapping[str, Any]) -> dict[str, _Terms]:
    parts: dict[str, _Terms] = {"weight_bytes": [], "read": [], "written": []}
    seen: set[int] = set()
    for entry in spec["inputs"]:
        if entry is not None and entry["slot"] not in seen:
            seen.add(entry["slot"])
            parts["weight_bytes" if entry["stored"] else "read"].append(_term(entry["dims"], entry["dtype"]))
    for dims, dtype in zip(spec["outputs"], spec["output_dtypes"], strict=True):
        parts["written"].append(_term(dims, dtype))
    parts["read"] += parts["written"][:1] * _residuals(spec)
    return parts


_Terms = list[tuple[float, int]]
"""Bytes as coefficients of powers of the unit."""


def _term(dims: Sequence[int | str], dtype: str) -> tuple[float, int]:
    varying = [d for d in dims if isinstance(d, str)]
    fixed = math.prod(d for d in dims if not isinstance(d, str))
    multiples = math.prod(int(d[:-1] or 1) for d in varying)
    return item_bytes(dtype) * fixed * multiples, len(varying)


def _evaluate(terms: _Terms, unit: np.ndarray) -> np.ndarray:
    return sum((c * unit**power for c, power in terms), np.zeros(unit.shape))


def _unit(terms: _Terms, moved: np.ndarray) -> np.ndarray:
    """The length at which these terms add up to `moved`; 1 where nothing varies."""
    degree = max((power for _, power in terms), default=0)
    if not degree:
        return np.ones(moved.shape)
    fixed = sum(c for c, power in terms if not power)
    rest = np.maximum(moved - fixed, 0.0)
    highest = sum(c for c, power in terms if power == degree)
    unit = (rest / highest) ** (1.0 / degree)  # not below the root: from there, Newton's steps only fall
    for _ in range(_NEWTON_STEPS if any(0 < power < degree for _, power in terms) else 0):
        slope = sum((c * power * unit ** (power - 1) for c, power in terms if power), np.zeros(moved.shape))
        step = (_evaluate(terms, unit) - moved) / np.where(slope > 0, slope, 1.0)
        unit = np.maximum(unit - step, 0.0)
    return unit


_NEWTON_STEPS = 20
