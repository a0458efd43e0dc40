"""A workload bound to the tiers of a profile: kernels that cost the same are one item, with its surface."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from sartor.cost_models.signatures import Signature, signature_of
from sartor.cost_models.surface import Surface
from sartor.cost_models.tiers import Tiers
from sartor.ir.kernels import Kernel
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.layout import Layout
from sartor.ir.population import Population, Presence
from sartor.ir.workload import Workload, presence


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """Kernels that cost the same under every plan, except for when they exist.

    Attributes:
        kernels: in execution order.
        signature: None where no sample can stand for it.
        surface: its times; None without a signature.
        alike: as `Sample.alike`, in the whole network.
    """

    kernels: tuple[Kernel, ...]
    signature: Signature | None
    surface: Surface | None
    alike: int

    @property
    def kernel(self) -> Kernel:
        """Any of them."""
        return self.kernels[0]

    @property
    def when(self) -> tuple[Presence, ...]:
        """When each of them exists."""
        return tuple(presence(kernel) for kernel in self.kernels)

    def seconds(self, plans: Population, tiers: Tiers) -> tuple[Any, Any]:
        """Seconds of one of them and their standard deviation, `[states]` or `[plans, states]`."""
        if self.surface is None or self.signature is None:
            moved = plans.quantity(self.kernel.bytes_read) + plans.quantity(self.kernel.bytes_written)
            macs, moved = (np.asarray(v, float)[..., None] for v in (plans.quantity(self.kernel.macs), moved))
            seconds, sd = tiers.rates.seconds(self.kernel.family, macs, moved, tiers.periods, self.alike)
            return seconds, seconds * sd
        return self.surface.interpolate([plans.quantity(v) for v in self.signature.variables])


def bind(workload: Workload, tiers: Tiers) -> tuple[Item, ...]:
    """The items of a workload. Asks the models; a plan asks the surfaces only."""
    merged: dict[Any, Item] = {}
    counts = Counter((kernel.family, kernel.op_type) for kernel in workload.kernels)
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        key: Any = (signature.key, signature.variables, kernel.family) if signature else kernel.name
        known = merged.get(key)
        if known is not None:
            merged[key] = dataclasses.replace(known, kernels=(*known.kernels, kernel))
        else:
            merged[key] = _item(kernel, signature, counts[kernel.family, kernel.op_type], tiers)
    return tuple(merged.values())


def bind_late(layout: Layout, kernel: Kernel, tiers: Tiers) -> Item:
    """The item of a kernel that only some plans have."""
    alike = max(layout.usual[kernel.op_type], 1)  # one that only some plans need, nothing else may need
    return _item(kernel, signature_of(kernel), alike, tiers)


def _item(kernel: Kernel, signature: Signature | None, alike: int, tiers: Tiers) -> Item:
    surface = None
    if signature is not None:
        surface = tiers.surface(signature, [bool(v.groups) for v in signature.variables], alike)
    return Item((kernel,), signature, surface, alike)


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
    counted = [
        (item, np.asarray(sum(plans.present(when) for when in item.when), float)[..., None]) for item in items
    ]
    counted += [
        (bind_late(layout, kernel, tiers), count) for kernel, count in of_layout(layout, plans, tiers)
    ]
    for item, count in counted:
        one, sd = item.seconds(plans, tiers)
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
