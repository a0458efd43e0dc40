"""Which positions of its inputs an operator reads for some positions of its output, along one axis.

Everything is counted in positions of the whole map, as half-open intervals. A window that begins at `o S - p` and spans
`D (F - 1) + 1` positions reads `[lo S - p, (hi - 1) S - p + D (F - 1) + 1)` for outputs `[lo, hi)`, clipped to the map;
what is clipped is the padding of that tile, so that there is padding at the true borders only (METHODS.md, NeuLens).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol


class Untileable(Exception):
    """Why an operator cannot be computed tile by tile, to be read behind its name."""


@dataclasses.dataclass(frozen=True, order=True)
class Span:
    """Positions `[low, high)` of an axis."""

    low: int
    high: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.high - self.low

    def hull(self, other: Span | None) -> Span:
        """The smallest span with both."""
        if other is None:
            return self
        return Span(min(self.low, other.low), max(self.high, other.high))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an operator reads for a span of its output, and what it then makes.

    Attributes:
        read: positions of the input.
        made: positions of the output that it makes of them, at least those that were asked for.
        before: padding in front of `read`, or positions that a transposed convolution crops there.
        after: the same behind.
        extra: positions that a transposed convolution adds behind.
    """

    read: Span
    made: Span
    before: int = 0
    after: int = 0
    extra: int = 0


class Relation(Protocol):
    """How positions of one axis of an input and of an output belong together."""

    def reading(self, wanted: Span, length: int) -> Reading:
        """For positions of the output, what is read of an input of so many positions.

        Raises:
            Untileable: there is nothing to read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """Position by position."""

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        return Reading(wanted, wanted)


@dataclasses.dataclass(frozen=True)
class Window:
    """Convolutions and pools.

    Attributes:
        stride: positions between windows.
        extent: positions that a window spans, dilation included.
        before: padding in front of the whole map.
    """

    stride: int
    extent: int
    before: int

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        low = wanted.low * self.stride - self.before
        high = (wanted.high - 1) * self.stride - self.before + self.extent
        read = Span(max(low, 0), min(high, length))
        if read.length < 1:
            raise Untileable("has tiles that lie in its padding alone")
        return Reading(read, wanted, read.low - low, high - read.high)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """Transposed convolutions: input `i` adds to outputs `i S - p` and the `extent - 1` after it.

    Attributes:
        stride: positions between what neighbouring inputs add to.
        extent: positions that one input adds to, dilation included.
        before: positions that are cropped in front of the whole map.
    """

    stride: int
    extent: int
    before: int

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        first, last = wanted.low + self.before, wanted.high - 1 + self.before  # not cropped
        low = min(-(-(first - self.extent + 1) // self.stride), first // self.stride)
        low = min(max(low, 0), length - 1)
        high = max(min(last // self.stride + 1, length), low + 1)
        end = (high - 1) * self.stride + self.extent
        after = end - (last + 1)
        return Reading(Span(low, high), wanted, first - low * self.stride, max(after, 0), max(-after, 0))


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """Every position becomes `factor`, of itself and of `halo` neighbours on both sides."""

    factor: int
    halo: int = 0

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        low = max(wanted.low // self.factor - self.halo, 0)
        high = min((wanted.high - 1) // self.factor + 1 + self.halo, length)
        return Reading(Span(low, high), Span(low * self.factor, high * self.factor))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """`factor` positions become one."""

    factor: int

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        return Reading(Span(wanted.low * self.factor, wanted.high * self.factor), wanted)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Positions from `start` on, every `step`th.

    Attributes:
        start: the first one.
        step: positive.
    """

    start: int
    step: int = 1

    def reading(self, wanted: Span, length: int) -> Reading:
        """See `Relation.reading`."""
        low, high = self.start + wanted.low * self.step, self.start + (wanted.high - 1) * self.step + 1
        return Reading(Span(low, high), wanted)


def partition(length: int, count: int) -> list[Span]:
    """`count` parts of an axis, as even as they go."""
    bounds = [length * i // count for i in range(count + 1)]
    return [Span(low, high) for low, high in itertools.pairwise(bounds)]
