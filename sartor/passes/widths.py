"""What a plan leaves and adds along every labelled axis: which old position each new one is a copy of."""

from __future__ import annotations

import dataclasses

import numpy as np

from sartor.errors import InternalError
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.channels.labels import Factor
from sartor.ir.plan import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Positions of an axis after a plan.

    Attributes:
        old: for each new position the old one.
        copy: by widened group, for each new position the number of its copy of the unit; 0 for the first, and
            where there is no unit of the group.
    """

    old: np.ndarray
    copy: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Widened:
    """A group of which units are copied: how often each of them is there."""

    name: str
    unit_of: np.ndarray  # per atom, -1 for none
    times: np.ndarray  # per unit


class Widths:
    """Positions after a plan, by label arrays.

    A unit that is copied is copied with everything of it that lies together: a run of positions (a head's features,
    the pixels behind a flattened channel) is followed by the whole run again. So where an axis is split or joined, as
    Reshape does, the copies still are whole.

    Args:
        analysis: of the program before.
        plan: narrowed and widened groups count.

    Raises:
        PlanError: the plan does not fit the program.
    """

    def __init__(self, analysis: ChannelAnalysis, plan: Plan):
        self.alive = analysis.alive_atoms(plan)
        self.widened = []
        for name, widening in sorted(plan.widened.items()):
            group = analysis.sized(name, widening.size)
            times = 1 + np.bincount(np.asarray(widening.copies), minlength=group.size)
            self.widened.append(Widened(name, analysis.units_of_atoms(group), times))
        self._lines: dict[tuple[int, int], Order | None] = {}

    @property
    def unchanged(self) -> bool:
        """Whether nothing is left out and nothing is added."""
        return bool(self.alive.all()) and not self.widened

    def order(self, factor: Factor, position: int) -> Order | None:
        """Positions along one axis of a factor, by its position in it; None where nothing changes.

        Raises:
            InternalError: a joint factor would become ragged.
        """
        key = (id(factor.atoms), position)
        if key not in self._lines:
            self._lines[key] = self._order(factor, position)
        return self._lines[key]

    def rows(self, rows: np.ndarray, children: np.ndarray | None) -> int:
        """How many groups of a grouped operator there are.

        Args:
            rows: one atom per group.
            children: the atoms that each of them stands for; None where it stands for itself.
        """
        parts = rows[:, None] if children is None else children.reshape(len(rows), -1)
        times = self.alive[parts].any(axis=1).astype(np.int64)
        for one in self.widened:
            units = one.unit_of[parts]
            whole = (units == units[:, :1]).all(axis=1) & (units[:, 0] >= 0)
            times[whole] *= one.times[units[whole, 0]]
        return int(times.sum())

    def _order(self, factor: Factor, position: int) -> Order | None:
        alive = self.alive[factor.atoms]
        others = tuple(axis for axis in range(alive.ndim) if axis != position)
        if not alive.all():
            _require_rectangular(alive)
        line = alive.any(axis=others)
        old = np.arange(len(line))[line]
        copies: dict[str, np.ndarray] = {}
        for one in self.widened:
            units = self._units(one, factor, position)
            if units is None or (one.times[units[units >= 0]] == 1).all():
                continue
            runs = np.cumsum(np.concatenate([[True], units[1:] != units[:-1]]))
            index, number = _repeated(runs[old], np.where(units >= 0, one.times[units], 1)[old])
            old = old[index]
            copies = {name: copy[index] for name, copy in copies.items()}
            copies[one.name] = number
        unchanged = len(old) == len(line) and bool((old == np.arange(len(line))).all())
        return None if unchanged else Order(old, copies)

    def _units(self, one: Widened, factor: Factor, position: int) -> np.ndarray | None:
        """Units along one axis of a factor, or None where they lie along another one.

        Raises:
            InternalError: copies would be no whole slices.
        """
        units = one.unit_of[factor.atoms]
        if (units < 0).all() or (one.times[units[units >= 0]] == 1).all():
            return None
        along = [
            axis
            for axis in range(units.ndim)
            if all((units == units.take([0], other)).all() for other in range(units.ndim) if other != axis)
        ]
        if len(along) != 1:
            raise InternalError(f"Copies of units of '{one.name}' would be no whole slices of a value.")
        return (
            np.moveaxis(units, along[0], 0).reshape(units.shape[along[0]], -1)[:, 0]
            if along == [position]
            else None
        )


def _require_rectangular(alive: np.ndarray) -> None:
    lines = [alive.any(axis=tuple(j for j in range(alive.ndim) if j != i)) for i in range(alive.ndim)]
    whole = np.ones((), dtype=bool)
    for line in lines:
        whole = np.multiply.outer(whole, line)
    if (whole != alive).any():
        raise InternalError("The plan leaves a value ragged.")


def _repeated(runs: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices that repeat every run as often as `times` says of its positions, and the number of each copy."""
    starts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]]))
    index, number = [], []
    for start, end in zip(starts, [*starts[1:], len(runs)], strict=True):
        count = int(times[start])
        index.append(np.tile(np.arange(start, end), count))
        number.append(np.repeat(np.arange(count), end - start))
    return np.concatenate(index), np.concatenate(number)
