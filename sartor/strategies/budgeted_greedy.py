"""`budgeted-greedy`: the cheapest loss per predicted saving, one step after the other, until the budget holds.

Widths and blocks compete in one list. A step lowers one group to its next level on the target's channel
grid, or removes one residual block; all candidate steps are priced in one vectorised call. The step with
the largest saving per importance lost is taken. A step that is predicted to be slower is never taken.

Steps are coarse, so that few are needed; behind the last one, groups are widened again by fine steps of the grid,
the most important first, as long as the limits hold. What time does not fall for is not cut. Where no group can be
widened, one is for the width of another, as long as importance is won by it: a narrow network has few plans that are
near a limit, and greedy steps seldom end at one of them.

The importance of units is put on one scale for all groups as LAMP does: a unit's score divided by the sum
of the scores of its group that are not smaller, so that the last units of a layer cost 1 each and no layer
collapses. Reference: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.errors import UsageError
from sartor.ir.channels import ChannelAnalysis, ChannelGroup
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.workload import Workload
from sartor.strategies.importance import Importance

Price = Callable[
    [Mapping[str, np.ndarray], Mapping[str, np.ndarray], Mapping[str, float]], Mapping[str, np.ndarray]
]
"""(kept fraction by group, removed by block, limits), arrays `[plans]` → predicted quantity by budget key.

A quantity that is a maximum over many places comes with a second one, called `KEY EXCESS`: what stands above
the limit, summed over the places. A single step seldom lowers the maximum, but it lowers this.
"""
EXCESS = "excess"

_LOOK_AHEAD = 3  # levels
_MOST_EXCHANGES, _MOST_PAIRS = 50, 256
_SAME = 1.0001  # of a latency: no slower
_HOPEFUL = 1.01  # of a limit, for the sum of two steps
_FEWEST_SHARE = 0.125  # a group keeps at least this share of its units: wider cuts ruin recovery


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision of the search: what was changed, and what was predicted after it."""

    change: str
    predicted: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Decision:
    """A plan, the steps that led to it, and whether all limits are predicted to hold."""

    plan: Plan
    steps: tuple[Step, ...]
    predicted: Mapping[str, float]
    feasible: bool


@dataclasses.dataclass(frozen=True)
class State:
    """Where the search stands: kept units by group, and removed blocks."""

    kept: Mapping[str, int]
    removed: frozenset[str]

    def at(self, name: str, count: int) -> State:
        """The same with another width of one group."""
        return State({**self.kept, name: count}, self.removed)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A step that could be taken, and the importance of what it removes or gives back; of a fine one, its group."""

    change: str
    importance: float
    state: State
    group: str = ""
    count: int = 0


class BudgetedGreedy:
    """See the module docstring.

    Args:
        analysis: channel groups.
        blocks: removable residual blocks.
        importance: of units and blocks.
        workload: built with the analysis' extents.
        price: predicts the budget's quantities for a population of plans.
        grid: channel step of the target for a group.
    """

    def __init__(
        self,
        analysis: ChannelAnalysis,
        blocks: Sequence[Any],
        importance: Importance,
        workload: Workload,
        price: Price,
        grid: Callable[[ChannelGroup], int],
    ):
        self.analysis, self.workload, self.price = analysis, workload, price
        self.blocks = [b for b in blocks if b.removable]
        self.levels = {g.name: levels(g, grid(g)) for g in analysis.groups}
        self.fine = {g.name: levels(g, grid(g), most=g.size) for g in analysis.groups}
        self.importance = importance
        self.cost: dict[str, np.ndarray] = {}
        for group in analysis.groups:
            scores = importance.groups[group.name]
            self.cost[group.name] = np.concatenate([[0.0], np.cumsum(lamp(scores))])
        self.block_cost = self._block_costs(importance)

    def _block_costs(self, importance: Importance) -> dict[str, float]:
        """A block costs what its inner widths would, weighted by its importance among blocks."""
        scores = {b.name: max(importance.blocks.get(b.name, 0.0), 0.0) for b in self.blocks}
        mean = float(np.mean(list(scores.values()))) if scores else 0.0
        inside: dict[str, float] = {b.name: 0.0 for b in self.blocks}
        for block in self.blocks:
            nodes = set(block.nodes)
            for group in self.analysis.groups:
                producers = {m.initializer for m in group.members if m.role == "producer"}
                if producers and all(self._read_only_by(p, nodes) for p in producers):
                    inside[block.name] += float(self.cost[group.name][-1])
        return {
            name: max(inside[name], 1.0) * (score / mean if mean > 0 else 1.0) + 1e-9
            for name, score in scores.items()
        }

    def _gone(self, removed: frozenset[str]) -> set[str]:
        """Groups that go as a whole with removed blocks."""
        nodes = {node for block in self.blocks if block.name in removed for node in block.nodes}
        found = set()
        for group in self.analysis.groups:
            producers = {m.initializer for m in group.members if m.role == "producer"}
            if nodes and producers and all(self._read_only_by(p, nodes) for p in producers):
                found.add(group.name)
        return found

    def _read_only_by(self, initializer: str, nodes: set[str]) -> bool:
        pending = list(self.analysis.program.initializers[initializer].uses())
        while pending:
            node, _ = pending.pop()
            if node.name in nodes:
                continue
            if node.op_type != "Transpose":
                return False
            pending.extend(node.outputs[0].uses())
        return True

    # ---- search ----------------------------------------------------------------------------
    def search(self, limits: Mapping[str, float]) -> Decision:
        """Narrow until every predicted quantity is within its limit, or no step helps.

        Args:
            limits: absolute limit by budget key, in the units of `price`.
        """
        state = State({g.name: g.size for g in self.analysis.groups}, frozenset())
        steps: list[Step] = []
        current = self._price_all([state], limits)[0]
        while any(current[key] > limit for key, limit in limits.items()):
            candidates = self._candidates(state)
            if not candidates:
                break
            priced = self._price_all([c.state for c in candidates], limits)
            best = self._choose(candidates, priced, current, limits)
            if best is None:
                break
            state, current = candidates[best].state, priced[best]
            steps.append(Step(candidates[best].change, dict(current)))
        feasible = all(current[key] <= limit for key, limit in limits.items())
        if feasible and steps:
            state, current = self._fill(state, current, steps, limits)
            for _ in range(_MOST_EXCHANGES):
                found = self._exchange(state, current, limits)
                if found is None:
                    break
                steps.append(found[0])
                state, current = self._fill(found[1], dict(found[0].predicted), steps, limits)
        return Decision(self._plan(state), tuple(steps), current, feasible)

    def _candidates(self, state: State) -> list[_Candidate]:
        """The next coarse steps down: time may fall at the second or third only."""
        found: list[_Candidate] = []
        for name, counts in self.levels.items():
            now = state.kept[name]
            for count in itertools.islice((c for c in counts if c < now), _LOOK_AHEAD):
                lost = self._lost(name, now, count)
                found.append(_Candidate(f"{name}: {now} → {count}", lost, state.at(name, count)))
        for block in self.blocks:
            if block.name not in state.removed:
                without = State(state.kept, state.removed | {block.name})
                found.append(_Candidate(f"remove {block.name}", self.block_cost[block.name], without))
        return found

    def _lost(self, name: str, more: int, fewer: int) -> float:
        """Importance of the units of a group between two widths."""
        size, cost = self.levels[name][0], self.cost[name]
        return float(cost[size - fewer] - cost[size - more])

    def _fill(
        self, state: State, current: dict[str, float], steps: list[Step], limits: Mapping[str, float]
    ) -> tuple[State, dict[str, float]]:
        """Widen groups again by fine steps while the limits hold: most importance for the least of them."""
        while True:
            candidates = self._wider(state)
            if not candidates:
                return state, current
            priced = self._price_all([c.state for c in candidates], limits)
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
        gone, found = self._gone(state.removed), []
        for name, counts in self.fine.items():
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
        singles = self._price_all([c.state for c in (*lost, *won)], limits) if lost and won else []
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
        priced = self._price_all(states, limits) if states else []
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

    def _price_all(self, states: Sequence[State], limits: Mapping[str, float]) -> list[dict[str, float]]:
        fractions = {
            name: np.array([state.kept[name] / counts[0] for state in states])
            for name, counts in self.levels.items()
        }
        removed = {b.name: np.array([b.name in state.removed for state in states]) for b in self.blocks}
        priced = self.price(fractions, removed, limits)
        return [{key: float(values[i]) for key, values in priced.items()} for i in range(len(states))]

    def _plan(self, state: State) -> Plan:
        groups = {}
        gone = self._gone(state.removed)
        for group in self.analysis.groups:
            if group.name in gone:
                continue
            count = state.kept[group.name]
            if count < group.size:
                keep = group.keep_best(self.importance.groups[group.name], count)
                if len(keep) < group.size:
                    groups[group.name] = GroupPlan(group.size, keep)
        names = tuple(b.name for b in self.blocks if b.name in state.removed)
        return Plan(self.analysis.program.source.sha256, groups, names, {"strategy": "budgeted-greedy"})


def _saving(key: str, limit: float, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """What a step brings towards one limit, as a share of it; nothing once that holds."""
    excess, summed = max(before[key] - limit, 0.0), f"{key} {EXCESS}"
    if excess > 0 and before.get(summed, 0.0) > 0:
        return (1.0 - after[summed] / before[summed]) * excess / limit
    if excess > 0:
        return min(before[key] - after[key], excess * 1.5) / limit
    return 0.0


def levels(group: ChannelGroup, grid: int, most: int = 16) -> list[int]:
    """About `most` kept unit counts from full to fewest, on the target's channel grid.

    A group of no more channels than the grid goes in steps of 4 channels (the least that keeps the vector
    path of the runtimes), and of no more than 4 in single units.
    """
    channels = group.size * group.granularity
    step = grid if channels > grid else 4 if channels > 4 else 1
    units = max(1, step // math.gcd(step, group.granularity))
    units = max(units, math.ceil(group.size / most / units) * units)
    fewest = max(1, min(units, group.size), math.ceil(group.size * _FEWEST_SHARE))
    counts = range((group.size - 1) // units * units, 0, -units)
    return [group.size, *(c for c in counts if c >= fewest)]


def floor(
    groups: Iterable[ChannelGroup], blocks: Iterable[Any], grid: Callable[[ChannelGroup], int], price: Price
) -> Mapping[str, float]:
    """Quantities of the smallest plan this strategy makes, with and without its removable `blocks`."""
    fewest = {g.name: levels(g, grid(g))[-1] / g.size for g in groups}
    fractions = {name: np.array([share, share]) for name, share in fewest.items()}
    priced = price(fractions, {b.name: np.array([True, False]) for b in blocks if b.removable}, {})
    return {key: float(np.min(values)) for key, values in priced.items()}


def lamp(scores: np.ndarray) -> np.ndarray:
    """Cost of removing units in ascending order of score: each score over the sum of those not smaller."""
    ascending = np.sort(np.maximum(scores, 0.0))
    if not ascending.any():
        ascending = np.ones_like(ascending)
    rest = np.cumsum(ascending[::-1])[::-1]
    return ascending / np.maximum(rest, 1e-300)


STRATEGIES = ("budgeted-greedy",)


def require_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in STRATEGIES:
        raise UsageError(f"Unknown strategy '{name}'; known: {', '.join(STRATEGIES)}.")
