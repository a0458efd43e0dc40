"""Costs as sums of products of extents, evaluated for one plan or for a whole population of plans."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.ir.extents import Extent

Term = tuple[float, tuple[Extent, ...]]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A cost as a sum of `coefficient · Π extents`; constants are folded into the coefficient."""

    terms: tuple[Term, ...] = ()

    @staticmethod
    def product(coefficient: float, dims: Sequence[Extent]) -> Quantity:
        """`coefficient · Π dims`."""
        varying = []
        for extent in dims:
            if extent.varies:
                varying.append(extent)
            else:
                coefficient *= extent.full
        return Quantity(((float(coefficient), tuple(varying)),))

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(self.terms + other.terms)

    @property
    def full(self) -> float:
        """The value before any pruning."""
        return sum(c * math.prod(e.full for e in factors) for c, factors in self.terms)

    @property
    def varies(self) -> bool:
        """Whether anything changes it: a plan, the size of the input, the batch."""
        return any(extent.varies for _, factors in self.terms for extent in factors)

    def at(self, size: int, batch: int) -> Quantity:
        """The same cost with the input's size and the batch fixed."""
        products = (Quantity.product(c, [e.at(size, batch) for e in factors]) for c, factors in self.terms)
        return sum(products, Quantity())

    @property
    def groups(self) -> frozenset[str]:
        """Names of the groups it depends on."""
        return frozenset(g for _, factors in self.terms for extent in factors for g in extent.groups)

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """The value under a plan (scalars) or a population (arrays `[plans]`)."""
        total: np.ndarray | float = 0.0
        for coefficient, factors in self.terms:
            value: np.ndarray | float = coefficient
            for extent in factors:
                value = value * whole(extent.evaluate(fractions))
            total = total + value
        return total


def whole(value: np.ndarray | float) -> np.ndarray | float:
    """Snap to the integer that rounding errors missed; real fractions of a channel stay as they are."""
    nearest = np.rint(value)
    return np.where(np.abs(value - nearest) <= 1e-6 * np.maximum(1.0, np.abs(nearest)), nearest, value)


@dataclasses.dataclass(frozen=True)
class Largest(Extent):
    """The largest of several costs, as a factor of a product; which one that is depends on the plan.

    Attributes:
        options: the costs; `terms` holds their largest value before pruning, and the groups of them all.
    """

    options: tuple[Quantity, ...] = ()

    @property
    def varies(self) -> bool:
        """See `Extent.varies`."""
        return any(quantity.varies for quantity in self.options)

    def at(self, size: int, batch: int) -> Extent:
        """See `Extent.at`."""
        options = tuple(quantity.at(size, batch) for quantity in self.options)
        return Largest(((max(q.full for q in options), tuple(sorted(self.groups))),), options)

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """See `Extent.evaluate`."""
        values = [quantity.evaluate(fractions) for quantity in self.options]
        return functools.reduce(np.maximum, values)


def largest(options: Sequence[Quantity]) -> Quantity:
    """The largest of several costs: an `If` costs what its dearer branch costs; 0 of none."""
    options = tuple(dict.fromkeys(options))
    groups = tuple(sorted({name for quantity in options for name in quantity.groups}))
    full = max((quantity.full for quantity in options), default=0.0)
    if len(options) == 1:
        return options[0]
    if not any(quantity.varies for quantity in options):
        return Quantity(((full, ()),))
    return Quantity(((1.0, (Largest(((full, groups),), options),)),))
