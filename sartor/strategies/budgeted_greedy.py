"""`budgeted-greedy`: the cheapest loss per predicted saving, one step after the other, until the budget holds.

Widths and blocks compete in one list. A step lowers one group to its next level on the target's channel
grid, or removes one residual block; all candidate steps are priced in one vectorised call. The step with
the largest saving per importance lost is taken. A step that is predicted to be slower is never taken.

Steps are coarse, so that few are needed; behind the last one, groups are widened again by fine steps of the grid,
the most important first, as long as the limits hold. What time does not fall for is not cut. Where no group can be
widened, one is for the width of another, as long as importance is won by it: a narrow network has few plans that are
near a limit, and greedy steps seldom end at one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import EXCESS, Decision, Space, State, Step

_LOOK_AHEAD = 3  # levels
_MOST_EXCHANGES, _MOST_PAIRS = 50, 256
_SAME = 1.0001  # of a latency: no slower
_HOPEFUL = 1.01  # of a limit, for the sum of two steps


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A step that could be taken, and the importance of what it removes or gives back; of a fine one, its group."""

    change: str
    importance: float
    state: State
    group: str = ""
    count: int = 0


@dataclasses.dataclass(frozen=True)
class BudgetedGreedy(Strategy):
    """Widths and blocks, step by step, by importance lost per predicted saving."""

    name: ClassVar[str] = "budgeted-greedy"

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        return Greedy(space).search


class Greedy:
    """The search of `budgeted-greedy`, and the last steps of others; see the module docstring.

    Args:
        space: where to search.
        strategy: for the notes of plans.
    """

    def __init__(self, space: Space, strategy: str = BudgetedGreedy.name):
        self.space, self.strategy = space, strategy

    # ---- search ----------------------------------------------------------------------------
    def search(self, limits: Mapping[str, float]) -> Decision:
        """Narrow until every predicted quantity is within its limit, or no step helps.

        Args:
            limits: absolute limit by budget key, in the units of `price`.
        """
        state = self.space.start()
        steps: list[Step] = []
        current = self.space.priced([state], limits)[0]
        while any(current[key] > limit for key, limit in limits.items()):
            candidates = self._candidates(state)
            if not candidates:
                break
            priced = self.space.priced([c.state for c in candidates], limits)
            best = self._choose(candidates, priced, current, limits)
            if best is None:
                break
            state, current = candidates[best].state, priced[best]
            steps.append(Step(candidates[best].change, dict(current)))
        feasible = all(current[key] <= limit for key, limit in limits.items())
        if feasible and steps:
            state, current = self.fill(state, current, steps, limits)
            for _ in range(_MOST_EXCHANGES):
                found = self._exchange(state, current, limits)
                if found is None:
                    break
                steps.append(found[0])
                state, current = self.fill(found[1], dict(found[0].predicted), steps, limits)
        return Decision(self.space.plan(state, self.strategy), tuple(steps), current, feasible)

    def _candidates(self, state: State) -> list[_Candidate]:
        """The next coarse steps down: time may fall at the second or third only."""
        found: list[_Candidate] = []
        for name, counts in self.space.levels.items():
            now = state.kept[name]
            for count in itertools.islice((c for c in counts if c < now), _LOOK_AHEAD):
                lost = self._lost(name, now, count)
                found.append(_Candidate(f"{name}: {now} → {count}", lost, state.at(name, count)))
        for block in self.space.blocks:
            if block.name not in state.removed:
                without = dataclasses.replace(state, removed=state.removed | {block.name})
                found.append(_Candidate(f"remove {block.name}", self.space.block_cost[block.name], without))
        return found

    def _lost(self, name: str, more: int, fewer: int) -> float:
        """Importance of the units of a group between two widths."""
        size, cost = self.space.levels[name][0], self.space.cost[name]
        return float(cost[size - fewer] - cost[size - more])

    def fill(
        self, state: State, current: dict[str, float], steps: list[Step], limits: Mapping[str, float]
    ) -> tuple[State, dict[str, float]]:
        """Widen groups again by fine steps while the limits hold: most importance for the least of them."""
        while True:
            candidates = self._wider(state)
            if not candidates:
                return state, current
            priced = self.space.priced([c.state for c in candidates], limits)
            scores = [
                c.importance / max(self._used(current, after, limits), 1e-9)
                if all(after[key] <= limit for key, limit in limits.items())
                else -math.inf
                for c, after in zip(candidates, priced, strict=True)
            ]
            best = int(np.argmax(scores))
            if scores[best] == -math.inf:
                return state, current
            state, current = candidates[best].state, priced[best]
            steps.append(Step(candidates[best].change, dict(current)))

    def _wider(self, state: State) -> list[_Candidate]:
        """The next fine steps up, some levels ahead: the next one may be dearer than the one behind it."""
        return self._fine_steps(state, lambda counts, now: [c for c in reversed(counts) if c > now])

    def _narrower(self, state: State) -> list[_Candidate]:
        """The next fine steps down."""
        return self._fine_steps(state, lambda counts, now: [c for c in counts if c < now])

    def _fine_steps(
        self, state: State, ahead: Callable[[Sequence[int], int], Sequence[int]]
    ) -> list[_Candidate]:
        gone, found = self.space.gone(state.removed), []
        for name, counts in self.space.fine.items():
            now = state.kept[name]
            for count in () if name in gone else ahead(counts, now)[:_LOOK_AHEAD]:
                change = self._lost(name, max(now, count), min(now, count))
                found.append(
                    _Candidate(f"{name}: {now} → {count}", change, state.at(name, count), name, count)
                )
        return found

    def _exchange(
        self, state: State, current: Mapping[str, float], limits: Mapping[str, float]
    ) -> tuple[Step, State] | None:
        """Widen one group for the width of another: of the pairs within the limits, what wins most importance.

        What a pair costs is nearly what its two steps cost by themselves; those that promise most are priced.
        """
        lost, won = self._narrower(state), self._wider(state)
        singles = self.space.priced([c.state for c in (*lost, *won)], limits) if lost and won else []
        gains = np.array([c.importance for c in won]) - np.array([c.importance for c in lost])[:, None]
        hopeful = gains > 1e-9
        hopeful &= np.array([c.group for c in won]) != np.array([c.group for c in lost])[:, None]
        for key, limit in limits.items() if singles else ():
            alone = np.array([after[key] for after in singles])
            both = alone[: len(lost), None] + alone[len(lost) :] - current[key]
            hopeful &= both <= limit * _HOPEFUL
        order = np.argsort(-np.where(hopeful, gains, -np.inf), axis=None, kind="stable")
        order = order[: min(hopeful.sum(), _MOST_PAIRS)]
        pairs = [(lost[i // len(won)], won[i % len(won)]) for i in order]
        states = [narrower.state.at(wider.group, wider.count) for narrower, wider in pairs]
        priced = self.space.priced(states, limits) if states else []
        unlimited = set(current) & {"latency"} - set(limits)
        for (narrower, wider), both, after in zip(pairs, states, priced, strict=True):
            slower = any(after[key] > current[key] * _SAME for key in unlimited)
            if not slower and all(after[key] <= limit for key, limit in limits.items()):
                return Step(f"{narrower.change}, {wider.change}", after), both
        return None

    def _used(
        self, before: Mapping[str, float], after: Mapping[str, float], limits: Mapping[str, float]
    ) -> float:
        return sum(max(after[key] - before[key], 0.0) / limit for key, limit in limits.items() if limit > 0)

    def _choose(
        self,
        candidates: Sequence[_Candidate],
        priced: Sequence[Mapping[str, float]],
        current: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> int | None:
        best, best_score = None, 0.0
        for index, (candidate, after) in enumerate(zip(candidates, priced, strict=True)):
            if "latency" in after and after["latency"] > current["latency"] * _SAME:
                continue
            saving = sum(_saving(key, limit, current, after) for key, limit in limits.items())
            score = saving / max(candidate.importance, 1e-12)
            if score > best_score:
                best, best_score = index, score
        return best


def _saving(key: str, limit: float, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """What a step brings towards one limit, as a share of it; nothing once that holds."""
    excess, summed = max(before[key] - limit, 0.0), f"{key} {EXCESS}"
    if excess > 0 and before.get(summed, 0.0) > 0:
        return (1.0 - after[summed] / before[summed]) * excess / limit
    if excess > 0:
        return min(before[key] - after[key], excess * 1.5) / limit
    return 0.0
