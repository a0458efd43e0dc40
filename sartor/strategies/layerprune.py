"""`layerprune`: whole residual blocks go, the least important first, until the limits hold; widths stay.

Blocks are ranked once: one shot is nearly as good as iterating. Reference: S. Elkerdawy et al., "To filter prune, or
to layer prune, that is the question", ACCV 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sartor.errors import UsageError
from sartor.passes.base import CRITERIA
from sartor.passes.options import option
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, Step, within


@dataclasses.dataclass(frozen=True)
class LayerPrune(Strategy):
    """Residual blocks are removed in the order of a filter criterion, averaged over their filters."""

    name: ClassVar[str] = "layerprune"

    criterion: str = option(
        "", help=f"what ranks blocks: {CRITERIA}; without, gradients of gates where there are data, else l2"
    )

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        if not space.blocks:
            raise UsageError(
                "Strategy 'layerprune' removes residual blocks, but this network has none that can be removed; "
                "'sartor inspect' says why. Use another strategy."
            )
        scores = space.judge.layer_scores(self.criterion) if self.criterion else space.importance.blocks
        order = sorted((b.name for b in space.blocks), key=lambda name: (scores.get(name, 0.0), name))
        return lambda limits: self._search(space, order, limits)

    def _search(self, space: Space, order: Sequence[str], limits: Mapping[str, float]) -> Decision:
        start = space.start()
        states = [
            dataclasses.replace(start, removed=frozenset(order[:count])) for count in range(len(order) + 1)
        ]
        priced = space.priced(states, limits)
        count = next((i for i, one in enumerate(priced) if within(one, limits)), len(order))
        steps = [Step(f"remove {name}", priced[i + 1]) for i, name in enumerate(order[:count])]
        return space.decision(states[count], limits, self.name, steps)

    def smallest(self, space: Space) -> Sequence[State]:
        """See `Strategy.smallest`."""
        return [space.smallest(widths=False, sizes=False)]
