"""`auto`: another strategy, chosen by what limits the network on its target and by a trial, with the reason.

Filters shorten what is bound by arithmetic and memory; where calls bound it, as at batch 1 on parallel devices, only
whole layers help, and those help anywhere. Guidelines: METHODS.md, 001, chapter 8. Which of the two a network is, its
own predictions say: what half the width saves in latency against what it saves in MACs. With data, what comes into
question is tried: candidates are judged as recovery would begin with them, and the best two are recovered for a part
of the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from sartor.passes.options import option
from sartor.strategies.adaptscale import AdaptScale
from sartor.strategies.budgeted_greedy import BudgetedGreedy
from sartor.strategies.compound_shrink import CompoundShrink
from sartor.strategies.hacscale import HacScale
from sartor.strategies.layerprune import LayerPrune
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, within
from sartor.strategies.uniform import Uniform

_FINALISTS = 2


@dataclasses.dataclass(frozen=True)
class Auto(Strategy):
    """Chooses among the strategies and says why."""

    name: ClassVar[str] = "auto"
    grows: ClassVar[bool] = True

    resizes: ClassVar[bool] = True

    bound: float = option(
        0.5,
        help="share of what half the width saves in MACs below which latency does not follow widths",
        minimum=0.0,
    )
    trial: float = option(
        0.5,
        help="share of recovery's time that each of the two best is trained for; 0: nothing is tried",
        minimum=0.0,
        maximum=1.0,
    )

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        chosen: list[Search] = []

        def search(limits: Mapping[str, float]) -> Decision:
            if not chosen:
                chosen.append(self._chosen(space, limits))
            return chosen[0](limits)

        return search

    def _chosen(self, space: Space, limits: Mapping[str, float]) -> Search:
        candidates, why = self.candidates(space, limits)
        tries = self.trial > 0 and space.judges
        grows = within(space.priced([space.start()], limits)[0], limits)
        searches = [
            one.prepare(space if grows else space.shrinking()) for one in candidates[: None if tries else 1]
        ]
        plans = [search(limits) for search in searches]
        tried = [
            (one.name, search, decision.plan)
            for one, search, decision in zip(candidates, searches, plans, strict=False)
            if decision.feasible
        ]
        if len(tried) < 2:
            name, search = tried[0][:2] if tried else (candidates[0].name, searches[0])
            space.notes.append(f"strategy {name}: {why}")
            return search
        losses = [space.judge.loss(plan) for _, _, plan in tried]
        order = np.argsort(losses, kind="stable")
        scores = {int(i): space.judge.prospect(tried[i][2], self.trial) for i in order[:_FINALISTS]}
        best = max(scores, key=lambda i: scores[i])  # of equal ones that of less loss
        judged = ", ".join(f"{tried[i][0]} {losses[i]:.3g}" for i in order)
        told = ", ".join(f"{tried[i][0]} {score:.1%}" for i, score in scores.items())
        space.notes.append(f"strategy {tried[best][0]}: {why}; losses are {judged}; trials end at {told}")
        return tried[best][1]

    def candidates(self, space: Space, limits: Mapping[str, float]) -> tuple[list[Strategy], str]:
        """What comes into question for some limits, the first choice first, and why."""
        start = space.start()
        if within(space.priced([start], limits)[0], limits):
            return [
                HacScale()
            ], "the limits are above what the network costs, so it grows where it matters most"
        greedy: Strategy = BudgetedGreedy()
        even: Strategy = Uniform()
        resized: list[Strategy] = []
        if space.judges and space.uniform_groups:
            resized.append(HacScale())
        if len(space.shrinking().sizes) > 1:
            resized += [CompoundShrink(), AdaptScale()] if space.judges else [AdaptScale()]
        everywhere = dataclasses.replace(start, removed=frozenset(space.ranked_blocks))
        blocks, narrow = (
            within(one, limits)
            for one in space.priced([everywhere, space.smallest(blocks=False, sizes=False)], limits)
        )
        layers: list[Strategy] = [LayerPrune()] if space.blocks and blocks else []
        if not space.uniform_groups:
            return [*layers, *resized] or [LayerPrune()], "no channel can go, so blocks have to"
        if "latency" not in limits:
            why = "no latency is limited, and channels are what MACs, bytes and memory are made of"
            return [greedy, even, *layers, *resized], why
        if layers and not narrow:
            why = "even the narrowest network is above the limits, and removing blocks is not"
            return [*layers, greedy, even, *resized], why
        follows = elasticity(space)
        said = f"half the width saves {follows:.0%} as much time as MACs"
        if layers and follows < self.bound:
            return [*layers, greedy, even, *resized], f"{said}: calls bound it, and blocks take them along"
        return [
            greedy,
            even,
            *layers,
            *resized,
        ], f"{said}, so channels pay, and blocks go where they pay more"


def elasticity(space: Space) -> float:
    """Share of latency that half the width saves, over the share of MACs."""
    states = [space.start(), space.scaled(0.5)]
    before, after = (one["latency"] for one in space.priced(states, {}))
    macs = [one["macs"] for one in space.static(states)]
    saved = 1.0 - macs[1] / macs[0] if macs[0] else 0.0
    return (1.0 - after / before) / saved if saved > 0 and math.isfinite(before) else 0.0
