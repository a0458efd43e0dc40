"""Dimensions as expressions of channel-group sizes, so that plans are priced without touching weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Extent:
    """Length of one axis: a sum of segments, each scaled by the kept fraction of some groups.

    `terms` holds `(length, group_names)`; the extent is `Σ length · Π kept[g] / size[g]`. An axis that
    no group touches is one term with no groups.
    """

    terms: tuple[tuple[float, tuple[str, ...]], ...]

    @staticmethod
    def constant(length: int) -> Extent:
        """An extent that no plan changes."""
        return Extent(((float(length), ()),))

    @property
    def full(self) -> float:
        """The length before any pruning."""
        return sum(length for length, _ in self.terms)

    @property
    def groups(self) -> frozenset[str]:
        """Names of the groups this extent depends on."""
        return frozenset(name for _, names in self.terms for name in names)

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """Length under a plan or a population of plans.

        Args:
            fractions: kept fraction per group name (1.0 where absent), scalars or arrays `[plans]`.
        """
        total: np.ndarray | float = 0.0
        for length, names in self.terms:
            value: np.ndarray | float = length
            for name in names:
                value = value * fractions.get(name, 1.0)
            total = total + value
        return total


@dataclasses.dataclass(frozen=True)
class Ratio(Extent):
    """One length in units of another: how many groups a convolution has left.

    Attributes:
        over: the numerator.
        under: the denominator. `terms` holds the value before pruning, and the groups of both.
    """

    over: Extent = Extent(())
    under: Extent = Extent(())

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """See `Extent.evaluate`."""
        under = self.under.evaluate(fractions)
        return self.over.evaluate(fractions) / np.where(np.asarray(under) > 0, under, 1.0)


def quotient(over: Extent, under: Extent) -> Extent:
    """`over / under`; a plain extent where the groups of `under` cancel, or where `under` is constant."""
    if len(under.terms) == 1:
        length, names = under.terms[0]
        if length and all(set(names) <= set(own) for _, own in over.terms):
            return Extent(tuple((of / length, _without(own, names)) for of, own in over.terms))
    if over == under:
        return Extent.constant(1)
    full = over.full / under.full if under.full else 0.0
    return Ratio(((full, tuple(sorted(over.groups | under.groups))),), over, under)


def _without(names: tuple[str, ...], gone: tuple[str, ...]) -> tuple[str, ...]:
    left = list(names)
    for name in gone:
        left.remove(name)
    return tuple(left)
