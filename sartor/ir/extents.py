"""Dimensions as expressions of channel-group sizes, so that plans are priced without touching weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

SIZE, BATCH = "<size>", "<batch>"
"""Beside the kept fractions: which of the declared input sizes, an index, and how many samples. No group has such a
name."""
_PART = "\n"  # no group has such a name, either


def part(group: str, number: int) -> str:
    """Name of some of a group's units: those that one axis is made of where a Split has parted them."""
    return f"{group}{_PART}{number}"


def group_of(name: str) -> str:
    """The group that a name in the terms of an extent belongs to: its own, or that of a part."""
    return name.partition(_PART)[0]


@dataclasses.dataclass(frozen=True)
class Extent:
    """Length of one axis: a sum of segments, each scaled by the kept fraction of some groups.

    `terms` holds `(length, names)`, the names being those of groups or of parts of them; the extent is
    `Σ length · Π kept[g] / size[g]`. An axis that no group touches is one term with no groups.
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
        return frozenset(group_of(name) for _, names in self.terms for name in names)

    @property
    def varies(self) -> bool:
        """Whether anything changes it: a plan, the size of the input, the batch."""
        return bool(self.groups)

    def at(self, size: int, batch: int) -> Extent:
        """The same length with the input's size and the batch fixed."""
        return self

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """Length under a plan or a population of plans.

        Args:
            fractions: kept fraction per group name (1.0 where absent), scalars or arrays `[plans]`. A part that is
                not among them keeps what its group does.
        """
        total: np.ndarray | float = 0.0
        for length, names in self.terms:
            value: np.ndarray | float = length
            for name in names:
                value = (
                    value * fractions[name]
                    if name in fractions
                    else value * fractions.get(group_of(name), 1.0)
                )
            total = total + value
        return total


@dataclasses.dataclass(frozen=True)
class Sized(Extent):
    """A length that depends on the size of the input or on the batch.

    Attributes:
        lengths: per declared size `(fixed, per_sample)`: before pruning the length is
            `fixed + per_sample · batch`. A plan shortens it by the share by which it shortens `terms`, which hold the
            length at the reference shapes.
    """

    lengths: tuple[tuple[float, float], ...] = ()

    @property
    def varies(self) -> bool:
        """See `Extent.varies`."""
        return True

    def at(self, size: int, batch: int) -> Extent:
        """See `Extent.at`."""
        fixed, per_sample = self.lengths[size]
        share = (fixed + per_sample * batch) / self.full
        return Extent(tuple((float(_whole(length * share)), names) for length, names in self.terms))

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """See `Extent.evaluate`; without a size and a batch, the length at the reference shapes."""
        pruned = super().evaluate(fractions)
        if SIZE not in fractions:
            return pruned
        size = np.asarray(fractions[SIZE], np.int64)
        fixed, per_sample = np.asarray(self.lengths).T
        return pruned * ((fixed[size] + per_sample[size] * fractions[BATCH]) / self.full)


def _whole(value: float) -> float:
    return float(round(value)) if abs(value - round(value)) < 1e-6 * max(1.0, abs(value)) else value


@dataclasses.dataclass(frozen=True)
class Ratio(Extent):
    """One length in units of another: how many groups a convolution has left.

    Attributes:
        over: the numerator.
        under: the denominator. `terms` holds the value before pruning, and the groups of both.
    """

    over: Extent = Extent(())
    under: Extent = Extent(())

    @property
    def varies(self) -> bool:
        """See `Extent.varies`."""
        return self.over.varies or self.under.varies

    def at(self, size: int, batch: int) -> Extent:
        """See `Extent.at`."""
        return quotient(self.over.at(size, batch), self.under.at(size, batch))

    def evaluate(self, fractions: Mapping[str, np.ndarray | float]) -> np.ndarray | float:
        """See `Extent.evaluate`."""
        under = self.under.evaluate(fractions)
        return self.over.evaluate(fractions) / np.where(np.asarray(under) > 0, under, 1.0)


def quotient(over: Extent, under: Extent) -> Extent:
    """`over / under`; a plain extent where the groups of `under` cancel, or where `under` is constant."""
    if len(under.terms) == 1 and not any(isinstance(e, (Sized, Ratio)) for e in (over, under)):
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
