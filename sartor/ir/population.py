"""Plans as arrays: what exists under each of them, and how long every axis is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sartor.ir.extents import Extent
from sartor.ir.quantities import Quantity, whole

Fractions = Mapping[str, Any]
"""Kept fraction per group name, each a scalar or an array `[plans]`; 1.0 where absent."""
Removed = Mapping[str, Any]
"""Whether a block is removed, per block name, each a bool or a bool array `[plans]`; False where absent."""


@dataclasses.dataclass(frozen=True)
class Presence:
    """When something exists: none of `blocks` is removed and, if `instead_of` is not empty, one of it is."""

    blocks: tuple[str, ...] = ()
    instead_of: tuple[str, ...] = ()


class Population:
    """Arrays of one set of plans, each extent and each presence computed once."""

    def __init__(self, fractions: Fractions, removed: Removed):
        self._fractions = {name: np.asarray(value, float) for name, value in fractions.items()}
        self._removed = {name: np.asarray(value, bool) for name, value in removed.items()}
        self.shape = np.broadcast_shapes(
            *(v.shape for v in self._fractions.values()), *(v.shape for v in self._removed.values())
        )
        self._extents: dict[Extent, Any] = {}
        self._present: dict[Any, Any] = {}

    def extent(self, extent: Extent) -> Any:
        """Length of one axis under every plan."""
        if extent not in self._extents:
            self._extents[extent] = whole(extent.evaluate(self._fractions))
        return self._extents[extent]

    def quantity(self, quantity: Quantity) -> Any:
        """A cost under every plan."""
        total: Any = 0.0
        for coefficient, factors in quantity.terms:
            total = total + coefficient * math.prod(self.extent(e) for e in factors)
        return total

    def present(self, when: Presence | tuple[Presence, ...]) -> Any:
        """1.0 where it exists, else 0.0; a tuple exists where any of its members does."""
        if when not in self._present:
            self._present[when] = self._exists(when)
        return self._present[when]

    def _exists(self, when: Presence | tuple[Presence, ...]) -> Any:
        if isinstance(when, tuple):
            gone: Any = 1.0
            for one in when:
                gone = gone * (1.0 - self.present(one))
            return 1.0 - gone
        kept: Any = 1.0
        for name in when.blocks:
            kept = kept * (1.0 - self._removed.get(name, np.False_))
        if when.instead_of:
            none_removed: Any = 1.0
            for name in when.instead_of:
                none_removed = none_removed * (1.0 - self._removed.get(name, np.False_))
            kept = kept * (1.0 - none_removed)
        return kept

    def total(self, parts: Iterable[tuple[Presence | tuple[Presence, ...], Quantity]]) -> np.ndarray:
        """Sum of what exists, an array of the population's shape."""
        result: Any = np.zeros(self.shape)
        for when, quantity in parts:
            result = result + self.present(when) * self.quantity(quantity)
        return result
