"""Prices populations of plans by looking tables up: nothing of a model is evaluated per plan.

Bound once to a ladder and a workload. What a kernel takes depends on the kept units of one or two groups, as a
rule, so its times over all of them are a table, and the tables of kernels that depend on the same groups are
added up before any plan is priced. Tables of two large groups stay on the knots of the kernel's surface, where
four entries are interpolated with weights that are tables, too. Every entry has a time per state of the caches. What a
kernel gains by its twins has tables of its own, which are asked for the plans that leave it some.
Equal to `Ladder.estimate_batch`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.items import Item, bind_late, crowds, of_layout, places_of, settled_shares
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.law import Law
from sartor.cost_models.surface import Weights, gathered
from sartor.errors import PlanError, UsageError
from sartor.ir.kernels import Kernel
from sartor.ir.plan import Plan
from sartor.ir.population import Population, Presence
from sartor.ir.quantities import Quantity
from sartor.ir.workload import Workload

_MOST_CELLS = 1 << 16


@dataclasses.dataclass(frozen=True)
class PlanBatch:
    """Plans as columns.

    Attributes:
        kept: kept units, integers `[plans, groups]`.
        removed: removed blocks, bool `[plans, blocks]`.
    """

    kept: np.ndarray
    removed: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Dense:
    """Sums over all kept units of at most two groups: `[units + 1 per group, states]`."""

    columns: tuple[int, ...]
    table: np.ndarray

    def rows(self, kept: np.ndarray, *_: Any) -> np.ndarray:
        return self.table[tuple(kept[c] for c in self.columns)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Knotted:
    """One kernel of two large groups: its surface, with the weights of an axis per kept unit of its group."""

    columns: tuple[int, ...]
    weights: tuple[Weights, ...]
    seconds: np.ndarray

    def rows(self, kept: np.ndarray, *_: Any) -> np.ndarray:
        at = [kept[c] for c in self.columns]
        chosen = [tuple(part[k] for part in w) for w, k in zip(self.weights, at, strict=True)]
        return gathered(self.seconds, chosen)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, eq=False)
class _Direct:
    """A kernel of more groups: evaluated as the ladder does."""

    item: Item
    ladder: Ladder
    scale: float
    number: int | None = None

    def rows(self, _: Any, plans: Population, crowds: Sequence[Any]) -> np.ndarray:
        crowd = 0.0 if self.number is None else crowds[self.number]
        return self.scale * _seconds(self.item, plans, self.ladder, crowd)


@dataclasses.dataclass(frozen=True, eq=False)
class _Gain:
    """What a kernel gains by its twins: that of all of them, times how near it is to having them."""

    number: int
    whole: _Dense | _Knotted

    def rows(self, kept: np.ndarray, _: Any, crowds: Sequence[Any]) -> np.ndarray:
        crowd = np.broadcast_to(crowds[self.number], kept.shape[1])
        some = np.flatnonzero(crowd)
        if not len(some):
            return np.zeros(1)
        gained = crowd[some, None] * self.whole.rows(kept[:, some])
        found = np.zeros((kept.shape[1], gained.shape[1]))
        found[some] = gained
        return found


_Part = _Dense | _Knotted | _Direct | _Gain


class Pricer:
    """See the module docstring.

    A ladder that is calibrated changes what its pricer says: the tables are then added up again.
    """

    def __init__(
        self,
        ladder: Ladder,
        workload: Workload,
        sizes: Mapping[str, int],
        *,
        size: int | None = None,
        batch: int | None = None,
    ):
        """Fill the tables.

        Args:
            ladder: what prices.
            workload: whose plans.
            sizes: units before pruning per group, as in a plan. Groups that price nothing may be in it.
            size: which of the workload's declared input sizes; every one has tables of its own.
            batch: samples of one inference.

        Raises:
            UsageError: a group of the workload has no size.
            PlanError: the workload does not have that input size or batch.
        """
        workload = workload.at(size, batch)
        missing = sorted(workload.groups - set(sizes))
        if missing:
            raise UsageError(
                f"The sizes of groups {missing} are needed to price this workload; pass all of them."
            )
        self.ladder, self.workload = ladder, workload
        self.groups = tuple(sorted(sizes))
        self.sizes = {name: int(sizes[name]) for name in self.groups}
        self._column = {name: i for i, name in enumerate(self.groups)}
        self._full = np.array([self.sizes[name] for name in self.groups], np.intp)
        self._items = ladder.items(workload)
        self._places = places_of(self._items)
        self._of_layout = workload.layout.varying
        self._states = len(ladder.tiers.periods)
        self._raw: dict[int | str, tuple[np.ndarray, np.ndarray]] = {}
        self._law: Law | None = None
        self._bind()

    # ---- plans -----------------------------------------------------------------------------
    def batch(self, plans: Sequence[Plan]) -> PlanBatch:
        """Plans as columns.

        Raises:
            PlanError: a plan names a block or a group that is not in the workload, or another size of a group.
        """
        blocks = {name: i for i, name in enumerate(self.workload.blocks)}
        removed = np.zeros((len(plans), len(blocks)), bool)
        for number, plan in enumerate(plans):
            for block in plan.blocks:
                if block not in blocks:
                    self.workload.check_removed({block: True})
                removed[number, blocks[block]] = True
        # One pass without a line of Python per group: this is most of what pricing a plan costs.
        chained = itertools.chain.from_iterable
        columns = np.fromiter(
            map(self._column.get, chained(p.groups for p in plans), itertools.repeat(-1)), np.intp
        )
        units = np.fromiter((len(g.keep) for p in plans for g in p.groups.values()), np.intp)
        sizes = np.fromiter((g.size for p in plans for g in p.groups.values()), np.intp)
        self._check(plans, columns, sizes)
        rows = np.repeat(np.arange(len(plans)), [len(p.groups) for p in plans])
        kept = np.tile(self._full, (len(plans), 1))
        kept[rows, columns] = units
        return PlanBatch(kept, removed)

    def _check(self, plans: Sequence[Plan], columns: np.ndarray, sizes: np.ndarray) -> None:
        wrong = np.flatnonzero((columns < 0) | (self._full[columns] != sizes))
        if not len(wrong):
            return
        named = [(name, g.size) for plan in plans for name, g in plan.groups.items()]
        name, size = named[wrong[0]]
        raise PlanError(
            f"A plan gives group '{name}' {size} units, and this workload {self.sizes.get(name, 'no such group')}; "
            "price it with the model that it was made for."
        )

    def fractions(self, fractions: Mapping[str, Any], removed: Mapping[str, Any] | None = None) -> PlanBatch:
        """Plans as columns, from kept fractions and removed blocks as `Workload.evaluate` takes them."""
        removed = removed or {}
        self.workload.check_removed(removed)
        shape = np.broadcast_shapes(*(np.shape(v) for v in (*fractions.values(), *removed.values())), (1,))
        kept = np.empty((*shape, len(self.groups)), np.intp)
        for number, name in enumerate(self.groups):
            kept[:, number] = np.rint(np.asarray(fractions.get(name, 1.0)) * self.sizes[name])
        gone = np.zeros((*shape, len(self.workload.blocks)), bool)
        for number, name in enumerate(self.workload.blocks):
            gone[:, number] = removed.get(name, False)
        return PlanBatch(kept, gone)

    # ---- pricing ---------------------------------------------------------------------------
    def estimate_batch(self, plans: PlanBatch | Sequence[Plan]) -> np.ndarray:
        """Latency in seconds, `[plans]`.

        Raises:
            PlanError: a plan is not of this workload, or keeps none or more than all units of a group.
        """
        batch = plans if isinstance(plans, PlanBatch) else self.batch(plans)
        if self.ladder.law is not self._law:
            self._bind()
        kept = np.ascontiguousarray(batch.kept.T)
        self._check_units(kept)
        removed = dict(zip(self.workload.blocks, batch.removed.T, strict=True))
        plain = Population(self._as_fractions(kept), removed)
        gone = Population({}, removed)
        near = crowds(self._items, plain)
        total = np.zeros((len(batch.kept), self._states))
        for when, parts in self._parts.items():
            mine = sum((part.rows(kept, plain, near) for part in parts), np.zeros(total.shape))
            if when:
                count: Any = sum(gone.present(one) for one in when)
                mine = mine * np.broadcast_to(count, len(total))[:, None]
            total += mine
        for kernel, count in of_layout(self.workload.layout, plain, self.ladder.tiers):
            for part in self._late(kernel):
                total += count * part.rows(kept, plain, near)
        latency = total + self.ladder.constant_s
        return np.asarray((settled_shares(latency, self.ladder.tiers.periods) * latency).sum(-1))

    def _check_units(self, kept: np.ndarray) -> None:
        most = self._full[:, None]
        wrong = np.argwhere((kept < 1) | (kept > most))
        if len(wrong):
            row, plan = wrong[0]
            name = self.groups[row]
            raise PlanError(
                f"Plan {plan} keeps {kept[row, plan]} units of group '{name}', which has {self.sizes[name]}; at least "
                "one stays, and no more than there are."
            )

    def _as_fractions(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        if not self._direct:
            return {}
        return {name: kept[self._column[name]] / self.sizes[name] for name in self._direct}

    # ---- tables ----------------------------------------------------------------------------
    def _bind(self) -> None:
        """Add up the tables under the ladder's current law."""
        self._law = self.ladder.law
        dense: dict[tuple[tuple[Presence, ...], tuple[int, ...]], np.ndarray] = {}
        parts: dict[tuple[Presence, ...], list[_Part]] = {}
        self._of_plans: dict[str, tuple[_Part, ...]] = {}
        self._direct: set[str] = set(self._of_layout)
        for number, item in enumerate(self._items):
            always = all(not when.blocks and not when.instead_of for when in item.when)
            when, times = ((), len(item.when)) if always else (item.when, 1)
            scale = self._law.scale_of(item.kernel.family)
            together = always and len(item.kernels) == item.company.twins  # under every plan
            for part in self._parts_of(number, item, scale, times, together):
                if isinstance(part, _Dense):
                    key = when, part.columns
                    dense[key] = dense[key] + part.table if key in dense else part.table
                else:
                    parts.setdefault(when, []).append(part)
        for (when, columns), table in dense.items():
            parts.setdefault(when, []).append(_Dense(columns, table))
        self._parts = {when: tuple(found) for when, found in parts.items()}

    def _late(self, kernel: Kernel) -> tuple[_Part, ...]:
        """A kernel of which some plans have one more, or one less: its tables are made when the first of them comes."""
        if kernel.name not in self._of_plans:
            place = self._places.get(kernel.name)
            item = (
                bind_late(self.workload.layout, kernel, self.ladder.tiers)
                if place is None
                else self._items[place]
            )
            scale = self.ladder.law.scale_of(kernel.family)
            found = self._parts_of(kernel.name if place is None else place, item, scale)
            self._of_plans[kernel.name] = tuple(found)
        return self._of_plans[kernel.name]

    def _parts_of(
        self, number: int | str, item: Item, scale: float, times: int = 1, together: bool = False
    ) -> list[_Part]:
        """What prices an item so many times; `together` if its kernels have all of their twins under every plan."""
        whole = self._looked_up(number, item, times * scale, 1, int(together))
        place = number if isinstance(number, int) else None
        if whole is None:
            self._direct |= _groups(item)
            return [_Direct(item, self.ladder, scale, place)] * times
        gain = None if together or place is None else self._looked_up(number, item, times * scale, 0, 1)
        if gain is None or place is None:
            return [whole]
        self._direct |= _groups(item)
        return [whole, _Gain(place, gain)]

    def _looked_up(
        self, number: int | str, item: Item, factor: float, alone: int, gain: int
    ) -> _Dense | _Knotted | None:
        """Times of one kernel from tables, a factor times what it takes alone, or what it gains, or both.

        None where it depends on more groups, and, of its gain alone, where it has none.
        """
        columns = self._columns(item)
        if not alone and (item.surface is None or item.surface.gain is None):
            return None
        if self._fits(columns):
            one, less = self._table(number, item, columns)
            return _Dense(columns, factor * (alone * one + gain * less))
        return self._knotted(item, factor, alone, gain)

    def _columns(self, item: Item) -> tuple[int, ...]:
        return tuple(sorted(self._column[name] for name in _groups(item)))

    def _fits(self, columns: tuple[int, ...]) -> bool:
        cells = int(np.prod([self.sizes[self.groups[c]] + 1 for c in columns], dtype=np.int64))
        return len(columns) <= 2 and cells <= _MOST_CELLS

    def _table(
        self, number: int | str, item: Item, columns: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of one kernel before the law, over all kept units of its groups, in every state; and its gain."""
        if number not in self._raw:
            names = [self.groups[c] for c in columns]
            # A group never keeps nothing; the entry is there so that kept units are the index.
            mesh = np.meshgrid(*(np.maximum(np.arange(self.sizes[n] + 1), 1) for n in names), indexing="ij")
            plans = Population({n: m.ravel() / self.sizes[n] for n, m in zip(names, mesh, strict=True)}, {})
            shape = (*(self.sizes[n] + 1 for n in names), self._states)
            one, all_there = (
                _seconds(item, plans, self.ladder, crowd).reshape(shape) for crowd in (0.0, 1.0)
            )
            self._raw[number] = (one, all_there - one)
        return self._raw[number]

    def _knotted(self, item: Item, factor: float, alone: int, gain: int) -> _Knotted | None:
        """A kernel of which each of two variables depends on a group of its own; None for others."""
        if item.signature is None or item.surface is None:
            return None
        variables = item.signature.variables
        varying = [i for i, v in enumerate(variables) if v.groups]
        owners = [tuple(variables[i].groups) for i in varying]
        if len(varying) != 2 or any(len(o) != 1 for o in owners) or owners[0] == owners[1]:
            return None
        names = [o[0] for o in owners]
        weights = []
        for place, variable in enumerate(variables):
            axis = item.surface.axes[place]
            if place in varying:
                weights.append(axis.weights(_over_units(variable, names[varying.index(place)], self.sizes)))
        seconds = alone * item.surface.alone
        if gain and item.surface.gain is not None:
            seconds = seconds + gain * item.surface.gain
        for place in reversed([i for i in range(len(variables)) if i not in varying]):
            seconds = np.take(seconds, 0, place)  # what no plan changes has one knot
        columns = tuple(self._column[n] for n in names)
        return _Knotted(columns, tuple(weights), factor * seconds)


def _over_units(variable: Quantity, name: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Values of a variable over all kept units of the one group that it depends on."""
    plans = Population({name: np.arange(sizes[name] + 1) / sizes[name]}, {})
    return np.asarray(plans.quantity(variable), float)


def _groups(item: Item) -> frozenset[str]:
    if item.signature is not None:
        return frozenset(name for v in item.signature.variables for name in v.groups)
    kernel = item.kernel
    return kernel.macs.groups | kernel.bytes_read.groups | kernel.bytes_written.groups


def _seconds(item: Item, plans: Population, ladder: Ladder, crowd: Any) -> np.ndarray:
    """Seconds of one kernel, `[plans, states]`."""
    seconds, _ = item.seconds(plans, ladder.tiers, crowd)
    return np.broadcast_to(seconds, (*(plans.shape or (1,)), np.shape(seconds)[-1]))
