"""`auto`: another strategy, chosen by what limits the network on its target, with the reason in a sentence.

Filters shorten what is bound by arithmetic and memory; where calls bound it, as at batch 1 on parallel devices, only
whole layers help, and those help anywhere. Guidelines: METHODS.md, 001, chapter 8. Which of the two a network is, its
own predictions say: what half the width saves in latency against what it saves in MACs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from sartor.passes.options import option
from sartor.strategies.budgeted_greedy import BudgetedGreedy
from sartor.strategies.hacscale import HacScale
from sartor.strategies.layerprune import LayerPrune
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, within


@dataclasses.dataclass(frozen=True)
class Auto(Strategy):
    """Chooses among the strategies and says why."""

    name: ClassVar[str] = "auto"
    grows: ClassVar[bool] = True

    bound: float = option(
        0.5,
        help="share of what half the width saves in MACs below which latency does not follow widths",
        minimum=0.0,
    )

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        chosen: list[Search] = []

        def search(limits: Mapping[str, float]) -> Decision:
            if not chosen:
                strategy, why = self.choice(space, limits)
                space.notes.append(f"strategy {strategy.name}: {why}")
                chosen.append(strategy.prepare(space))
            return chosen[0](limits)

        return search

    def choice(self, space: Space, limits: Mapping[str, float]) -> tuple[Strategy, str]:
        """The strategy for some limits, and why."""
        start = space.start()
        if within(space.priced([start], limits)[0], limits):
            return (
                HacScale(),
                "the limits are above what the network costs, so it grows where it matters most",
            )
        greedy = BudgetedGreedy()
        if "latency" not in limits:
            return greedy, "no latency is limited, and channels are what MACs, bytes and memory are made of"
        if not space.blocks:
            return greedy, "there is no block that can be removed, so channels have to go"
        if not space.uniform_groups:
            return LayerPrune(), "no channel can go, so blocks have to"
        everywhere = dataclasses.replace(start, removed=frozenset(space.ranked_blocks))
        blocks, narrow = (
            within(one, limits)
            for one in space.priced([everywhere, space.smallest(blocks=False, sizes=False)], limits)
        )
        if not narrow and blocks:
            return LayerPrune(), "even the narrowest network is above the limits, and removing blocks is not"
        follows = elasticity(space)
        if follows < self.bound and blocks:
            return LayerPrune(), (
                f"half the width saves {follows:.0%} as much time as MACs: calls bound it, and blocks take them along"
            )
        return greedy, (
            f"half the width saves {follows:.0%} as much time as MACs, so channels pay, and blocks go where they pay "
            "more"
        )


def elasticity(space: Space) -> float:
    """Share of latency that half the width saves, over the share of MACs."""
    states = [space.start(), space.scaled(0.5)]
    before, after = (one["latency"] for one in space.priced(states, {}))
    macs = [one["macs"] for one in space.static(states)]
    saved = 1.0 - macs[1] / macs[0] if macs[0] else 0.0
    return (1.0 - after / before) / saved if saved > 0 and math.isfinite(before) else 0.0
