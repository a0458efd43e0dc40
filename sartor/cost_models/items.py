"""A workload bound to the tiers of a profile: kernels that cost the same are one item, with its surface."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.profile import Company
from sartor.cost_models.signatures import Signature, signature_of
from sartor.cost_models.surface import Surface
from sartor.cost_models.tiers import Tiers
from sartor.ir.kernels import Kernel
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.layout import Layout
from sartor.ir.population import Population, Presence
from sartor.ir.quantities import Quantity
from sartor.ir.workload import Workload, presence


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """Kernels that cost the same under every plan, except for when they exist.

    Attributes:
        kernels: in execution order.
        signature: None where no sample can stand for it.
        surface: its times; None without a signature.
        company: in the whole network, with all of its twins.
    """

    kernels: tuple[Kernel, ...]
    signature: Signature | None
    surface: Surface | None
    company: Company

    @property
    def kernel(self) -> Kernel:
        """Any of them."""
        return self.kernels[0]

    @property
    def when(self) -> tuple[Presence, ...]:
        """When each of them exists."""
        return tuple(presence(kernel) for kernel in self.kernels)

    def seconds(self, plans: Population, tiers: Tiers, crowd: Any = 0.0) -> tuple[Any, Any]:
        """Seconds of one of them and their standard deviation, `[states]` or `[plans, states]`.

        Args:
            plans: what they are priced under.
            tiers: what prices.
            crowd: of `crowds`, of this item.
        """
        if self.surface is None or self.signature is None:
            moved = plans.quantity(self.kernel.bytes_read) + plans.quantity(self.kernel.bytes_written)
            macs, moved = (np.asarray(v, float)[..., None] for v in (plans.quantity(self.kernel.macs), moved))
            seconds, sd = tiers.rates.seconds(
                self.kernel.family, macs, moved, tiers.periods, self.company.alike
            )
            return seconds, seconds * sd
        return self.surface.interpolate([plans.quantity(v) for v in self.signature.variables], crowd)


def bind(workload: Workload, tiers: Tiers) -> tuple[Item, ...]:
    """The items of a workload. Asks the models; a plan asks the surfaces only."""
    counts = Counter((kernel.family, kernel.op_type) for kernel in workload.kernels)
    merged: dict[Any, tuple[Signature | None, list[Kernel]]] = {}
    most: Counter[Any] = Counter()
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        key: Any = (signature.key, signature.variables, kernel.family) if signature else kernel.name
        merged.setdefault(key, (signature, []))[1].append(kernel)
        most[_kin(signature)] += 1
    items = []
    for signature, kernels in merged.values():
        kernel = kernels[0]
        twins = 1 if signature is None else most[_kin(signature)]
        company = Company(counts[kernel.family, kernel.op_type], twins)
        items.append(_item(tuple(kernels), signature, company, tiers))
    return tuple(items)


def bind_late(layout: Layout, kernel: Kernel, tiers: Tiers) -> Item:
    """The item of a kernel that only some plans have."""
    alike = max(layout.usual[kernel.op_type], 1)  # one that only some plans need, nothing else may need
    return _item((kernel,), signature_of(kernel), Company(alike), tiers)


def places_of(items: Sequence[Item]) -> dict[str, int]:
    """Which item the kernel of a name is of."""
    return {kernel.name: place for place, item in enumerate(items) for kernel in item.kernels}


def _item(kernels: tuple[Kernel, ...], signature: Signature | None, company: Company, tiers: Tiers) -> Item:
    surface = None
    if signature is not None:
        surface = tiers.surface(signature, [bool(v.groups) for v in signature.variables], company)
    return Item(kernels, signature, surface, company)


# ---- twins ---------------------------------------------------------------------------------------
_HALF = 0.5  # sizes are whole numbers


def crowds(items: Sequence[Item], plans: Population) -> list[Any]:
    """How near each item is to having all of its twins: the logarithm of those it has over that of the most.

    Twins are kernels of one spec whose sizes are the same before pruning, and under the plan. Ones that only come to
    be the same are not looked for.

    Returns:
        Per item a number from 0 (none) to 1 (all), or an array `[plans]`.
    """
    families: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        if item.company.twins > 1:
            families.setdefault(_kin(item.signature), []).append(place)
    found: list[Any] = [0.0] * len(items)
    for places in families.values():
        there = [sum(plans.present(when) for when in items[place].when) for place in places]
        sizes = [[plans.quantity(v) for v in _variables(items[place])] for place in places]
        counts = list(there)
        for (i, mine), (j, theirs) in itertools.combinations(enumerate(sizes), 2):
            same: Any = 1.0
            for one, other in zip(mine, theirs, strict=True):
                same = same * (np.abs(one - other) < _HALF)
            counts[i], counts[j] = counts[i] + same * there[j], counts[j] + same * there[i]
        for place, count in zip(places, counts, strict=True):
            found[place] = np.log(np.maximum(count, 1.0)) / math.log(items[place].company.twins)
    return found


def _kin(signature: Signature | None) -> Any:
    """What twins have in common before any plan."""
    return None if signature is None else (signature.key, tuple(v.full for v in signature.variables))


def _variables(item: Item) -> Sequence[Quantity]:
    return () if item.signature is None else item.signature.variables


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """Seconds of a population before the law.

    Attributes:
        seconds: by term of the law.
        variances: of the sum of the kernels of a family, seconds squared, errors of single kernels only.
        shares: of the states of the caches that kernels are priced in, `[states]` or `[plans, states]`; None where
            there still is a time of every state, in a last axis, and nothing has been settled.
    """

    seconds: dict[str, Any]
    variances: dict[str, Any]
    shares: np.ndarray | None = None

    def settled(self, shares: np.ndarray) -> Terms:
        """With the caches in a known state."""
        seconds, variances = (
            {name: (shares * values).sum(-1) for name, values in parts.items()}
            for parts in (self.seconds, self.variances)
        )
        return Terms(seconds, variances, shares)


def of_layout(layout: Layout, plans: Population, tiers: Tiers) -> Iterator[tuple[Kernel, Any]]:
    """As `Layout.kernels`, without copies where none were timed: kernels that were timed alone need none."""
    for kernel, count in layout.kernels(plans):
        if tiers.prices_layout or kernel.family != LAYOUT:
            yield kernel, np.asarray(count, float)[..., None]


def terms(items: tuple[Item, ...], layout: Layout, plans: Population, tiers: Tiers, call_s: float) -> Terms:
    """Add up a population, in every state of the caches."""
    seconds: dict[str, Any] = {"call": np.full(len(tiers.periods), call_s)}
    variances: dict[str, Any] = {}
    near = crowds(items, plans)
    counted = [
        (item, np.asarray(sum(plans.present(when) for when in item.when), float)[..., None], crowd)
        for item, crowd in zip(items, near, strict=True)
    ]
    places = places_of(items)
    for kernel, count in of_layout(layout, plans, tiers):
        place = places.get(kernel.name)
        if place is None:
            counted.append((bind_late(layout, kernel, tiers), count, 0.0))
        else:  # one less of what the workload lists, at the price that it has above
            counted.append((items[place], count, near[place]))
    for item, count, crowd in counted:
        one, sd = item.seconds(plans, tiers, crowd)
        family = item.kernel.family
        seconds[family] = seconds.get(family, 0.0) + count * one
        variances[family] = variances.get(family, 0.0) + np.square(count * sd)
    return Terms(seconds, variances)


# ---- the state of the caches ---------------------------------------------------------------------
_ROUNDS = 8


def shares_at(period_s: Any, periods: np.ndarray) -> np.ndarray:
    """How much of each of some states there is in a period: of the two nearest, by its logarithm.

    Args:
        period_s: seconds, a scalar or an array.
        periods: of the states, ascending.

    Returns:
        `[…, states]`, each row adding up to 1.
    """
    if len(periods) == 1:
        return np.ones((*np.shape(period_s), 1))
    knots = np.log(periods)
    step = knots[1] - knots[0]  # they are spaced evenly
    place = np.clip((np.log(np.maximum(period_s, 1e-12)) - knots[0]) / step, 0.0, len(knots) - 1.0)
    return np.maximum(0.0, 1.0 - np.abs(np.asarray(place)[..., None] - np.arange(len(knots))))


def settled_shares(latency_s: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """Shares of the states in which networks run again and again: the period is what they then take.

    Args:
        latency_s: in every state, `[…, states]`.
        periods: of the states.
    """
    shares = shares_at(latency_s[..., len(periods) // 2], periods)
    for _ in range(_ROUNDS):  # a longer period makes little longer, so that this contracts quickly
        shares = shares_at((shares * latency_s).sum(-1), periods)
    return shares
