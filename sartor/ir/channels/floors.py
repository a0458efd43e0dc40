"""Which units must not all go, so that no axis becomes empty although every group keeps a unit.

A Slice, Split or Gather may see part of a group only, or parts of several groups. An axis lives while one
of its positions lives, and a position lives while its unit lives in every group it belongs to. One segment
of the axis is chosen, the positions that share their groups. If its units are all combinations of some
units of each group, one of those must stay in each; otherwise the units of one position are pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

Lookup = Callable[[int, np.ndarray], np.ndarray]


def floors(
    arrays: Iterable[tuple[np.ndarray, list[int]]], lookup: Lookup, sizes: Mapping[int, int]
) -> dict[int, list[np.ndarray]]:
    """Sets of units, by unit-set number, of which at least one must stay.

    Args:
        arrays: class ids along an axis (or over a joint factor), with the unit sets they belong to.
        lookup: units of classes in one set, −1 where a class cannot be removed by it.
        sizes: number of removable units by unit-set number.
    """
    found: dict[int, dict[bytes, np.ndarray]] = {}
    for classes, numbers in arrays:
        units = np.stack([lookup(number, classes) for number in numbers], axis=1)
        for position, kept in _demands(np.unique(units, axis=0), [sizes[n] for n in numbers]):
            found.setdefault(numbers[position], {}).setdefault(kept.tobytes(), kept)
    return {number: list(sets.values()) for number, sets in found.items()}


def _demands(units: np.ndarray, sizes: list[int]) -> list[tuple[int, np.ndarray]]:
    """Columns and the units of which one must stay, for the distinct rows `units` of one axis."""
    member = units >= 0
    if not member.any(axis=1).all():
        return []  # a position that nothing removes
    choices: list[list[tuple[int, np.ndarray]]] = []
    for pattern in np.unique(member, axis=0):
        rows = units[(member == pattern).all(axis=1)]
        columns = np.flatnonzero(pattern)
        sets = [np.unique(rows[:, c]) for c in columns]
        if len(rows) < np.prod([s.size for s in sets]):
            sets = [rows[0, c : c + 1] for c in columns]
        choices.append([(int(c), s) for c, s in zip(columns, sets, strict=True) if s.size < sizes[int(c)]])
    return min(choices, key=lambda c: (len(c), -sum(s.size for _, s in c)))
