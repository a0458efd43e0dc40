"""`nsga2`: widths of all groups, blocks and the input size, free of each other, by NSGA-II for cost and loss.

Individuals near the limits are judged; those far beyond them are not, and lose to any that is nearer. What the best
one leaves of the limits is filled by the last steps of `budgeted-greedy`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.errors import UsageError
from sartor.passes.options import option
from sartor.strategies.budgeted_greedy import Greedy
from sartor.strategies.evolution import evolve
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, Step, over

_NEAR, _UNKNOWN = 0.05, 1e30
_FIRST = 8


@dataclasses.dataclass(frozen=True)
class Nsga2(Strategy):
    """Every width, block and the input size by NSGA-II; objectives are cost and the loss before training."""

    name: ClassVar[str] = "nsga2"
    needs_data: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    generations: int = option(10, help="of the search", minimum=1, maximum=1000)
    population: int = option(20, help="of the search", minimum=4, maximum=1000)
    levels: int = option(8, help="widths of a group to choose from", minimum=2, maximum=64)

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        if not (space.uniform_groups or space.blocks or len(space.sizes) > 1):
            raise UsageError(
                "Nothing of this network can be narrowed, removed or resized; 'sartor inspect' says why."
            )
        return _Evolution(space, self).search


class _Evolution:
    """Everything that was judged so far, of which each search takes the best that its limits allow."""

    def __init__(self, space: Space, options: Nsga2):
        self.space, self.options = space, options
        self.counts = {g.name: self._counts(g.name) for g in space.uniform_groups}
        self.genes: dict[str, tuple[float, float] | int] = {
            **{name: len(counts) for name, counts in self.counts.items() if len(counts) > 1},
            **{f"block {block.name}": 2 for block in space.blocks},
        }
        if len(space.sizes) > 1:
            self.genes["inputs"] = len(space.sizes)
        self.judged: dict[tuple[tuple[str, float], ...], tuple[State, float]] = {}

    def _counts(self, name: str) -> list[int]:
        fine = self.space.fine[name]
        places = np.unique(np.linspace(0, len(fine) - 1, self.options.levels).round().astype(int))
        return [fine[int(place)] for place in places]

    def state(self, genes: Mapping[str, float]) -> State:
        """Genes count from 0, the original."""
        kept = {name: self.counts[name][int(genes[name])] for name in self.counts if name in genes}
        removed = frozenset(b.name for b in self.space.blocks if genes[f"block {b.name}"])
        return State({**self.space.start().kept, **kept}, removed, int(genes.get("inputs", 0)))

    def search(self, limits: Mapping[str, float]) -> Decision:
        found = self._best(limits)
        if found is None:
            self._evolve(limits)
            found = self._best(limits)
        if found is None:
            smallest = self.space.smallest()
            return self.space.decision(smallest, limits, self.options.name)
        steps: list[Step] = []
        current = self.space.priced([found], limits)[0]
        found, _ = Greedy(self.space, self.options.name).fill(found, current, steps, limits)
        return self.space.decision(found, limits, self.options.name, steps)

    def _best(self, limits: Mapping[str, float]) -> State | None:
        """The state of least loss within the limits."""
        if not self.judged:
            return None
        states = [state for state, _ in self.judged.values()]
        priced = self.space.priced(states, limits)
        fitting = [
            (loss, index)
            for index, ((_, loss), one) in enumerate(zip(self.judged.values(), priced, strict=True))
            if not over(one, limits)
        ]
        return states[min(fitting)[1]] if fitting else None

    def _evolve(self, limits: Mapping[str, float]) -> None:
        def rate(population: Sequence[Mapping[str, float]]) -> list[tuple[list[float], float]]:
            states = [self.state(genes) for genes in population]
            rated = []
            for genes, state, one in zip(population, states, self.space.priced(states, limits), strict=True):
                missed = over(one, limits)
                cost = sum(one[key] / limit for key, limit in limits.items())
                rated.append(([cost, self._loss(genes, state) if missed <= _NEAR else _UNKNOWN], missed))
            return rated

        evolve(
            self.genes,
            rate,
            population=self.options.population,
            generations=self.options.generations,
            objectives=2,
            seed=self.space.seed,
            first=self._first(limits),
        )

    def _loss(self, genes: Mapping[str, float], state: State) -> float:
        key = tuple(sorted(genes.items()))
        if key not in self.judged:
            loss = self.space.judge.loss(self.space.plan(state, self.options.name))
            self.judged[key] = state, loss
        return self.judged[key][1]

    def _first(self, limits: Mapping[str, float]) -> list[dict[str, float]]:
        """Uniform networks around the limits, of which random ones would have few."""
        last = {name: space - 1 for name, space in self.genes.items() if isinstance(space, int)}
        found: list[tuple[float, int, dict[str, float]]] = []
        for share in np.linspace(0.0, 1.0, 4 * _FIRST):
            genes = {name: round(share * most) if name in self.counts else 0 for name, most in last.items()}
            missed = over(self.space.priced([self.state(genes)], limits)[0], limits)
            found.append((missed, -len(found), genes))
        nearest = sorted(found, key=lambda one: one[:2])[:_FIRST]
        return [genes for _, _, genes in nearest]
