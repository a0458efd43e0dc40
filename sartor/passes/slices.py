"""Which outputs and inputs of a layer are left, found by its weights alone.

Narrowing keeps names and takes slices, so that the weights of a narrowed layer are found again, bit by bit, in the
original's. What was trained, folded or quantized since is not found, and must not be compared with the original.
"""

from __future__ import annotations

import numpy as np

_OTHER = "its weights are not a part of the original's; let this pass come right after pruning"
_VOTERS = 256
"""Rows that say which column is which; most weights of one row would do."""


def kept_slices(whole: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray] | str:
    """Rows and columns of `whole` that `part` is made of, in its order; or why they are not known.

    Args:
        whole: weight before, `[out, in, taps]`.
        part: weight after, `[fewer out, fewer in, taps]`, of the same type.
    """
    if whole.dtype != part.dtype or whole.shape[2:] != part.shape[2:]:
        return _OTHER
    if any(left > there for left, there in zip(part.shape, whole.shape, strict=True)):
        return _OTHER
    marks = _marks(whole), _marks(part)
    columns = _columns(*marks)
    if isinstance(columns, str):
        return columns
    rows = _rows(marks[0][:, columns], marks[1])
    if isinstance(rows, str):
        return rows
    if not np.array_equal(_bits(whole[rows][:, columns]), _bits(part)):
        return _OTHER
    return rows, columns


def _bits(weight: np.ndarray) -> np.ndarray:
    """Weights as integers: 0.0 and −0.0 differ, and NaN equals itself."""
    return np.ascontiguousarray(weight).view(f"u{weight.dtype.itemsize}")


def _marks(weight: np.ndarray) -> np.ndarray:
    """A number for the taps of every output and input, `[out, in]`; equal taps have equal numbers."""
    taps = _bits(weight).astype(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, taps.shape[2], dtype=np.uint64) | np.uint64(1)
    found: np.ndarray = (taps * factors).sum(axis=2, dtype=np.uint64)
    return found


def _columns(whole: np.ndarray, part: np.ndarray) -> np.ndarray | str:
    """Columns by vote: every number that `whole` has once says where it is from."""
    if part.shape[1] == whole.shape[1]:
        return np.arange(whole.shape[1])
    values, first, count = np.unique(whole, return_index=True, return_counts=True)
    once, place = values[count == 1], first[count == 1] % whole.shape[1]
    chosen = np.unique(np.linspace(0, len(part) - 1, min(len(part), _VOTERS)).astype(int))
    columns = []
    for column in part[chosen].T:
        at = np.minimum(np.searchsorted(once, column), max(len(once) - 1, 0))
        votes = place[at[once[at] == column]] if len(once) else place
        if not len(votes):
            return (
                "its inputs cannot be told apart by its weights" if np.isin(column, values).any() else _OTHER
            )
        columns.append(int(np.bincount(votes).argmax()))
    return np.asarray(columns)


def _rows(whole: np.ndarray, part: np.ndarray) -> np.ndarray | str:
    """Rows by what they hold; equal rows only where all of them are left."""
    if len(part) == len(whole):
        return np.arange(len(whole))
    places: dict[bytes, list[int]] = {}
    for row, numbers in enumerate(whole):
        places.setdefault(numbers.tobytes(), []).append(row)
    asked: dict[bytes, int] = {}
    rows = []
    for numbers in part:
        key = numbers.tobytes()
        number = asked.get(key, 0)
        asked[key] = number + 1
        if number >= len(places.get(key, ())):
            return _OTHER
        rows.append(places[key][number])
    if any(count != len(places[key]) for key, count in asked.items()):
        return "its outputs cannot be told apart by its weights"
    return np.asarray(rows)
