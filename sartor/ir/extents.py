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
