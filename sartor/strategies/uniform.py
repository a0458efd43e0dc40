"""`uniform`: one share of units for all layers, the largest within the limits. The baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sartor.errors import UsageError
from sartor.strategies.dimensions import widest
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State


@dataclasses.dataclass(frozen=True)
class Uniform(Strategy):
    """Every channel group keeps the same share of its units, the most important ones."""

    name: ClassVar[str] = "uniform"

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        if not space.uniform_groups:
            raise UsageError(
                "Strategy 'uniform' narrows channels, but no group of this network can be narrowed."
            )
        return lambda limits: self._search(space, limits)

    def _search(self, space: Space, limits: Mapping[str, float]) -> Decision:
        return space.decision(widest(space, limits), limits, self.name)

    def smallest(self, space: Space) -> Sequence[State]:
        """See `Strategy.smallest`."""
        return [space.scaled(space.widths[0])]
