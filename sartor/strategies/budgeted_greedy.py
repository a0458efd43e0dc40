"""`budgeted-greedy`: the cheapest loss per predicted saving, one step after the other, until the budget holds.

Widths and blocks compete in one list. A step lowers one group to its next level on the target's channel
grid, or removes one residual block; all candidate steps are priced in one vectorised call. The step with
the largest saving per importance lost is taken. A step that is predicted to be slower is never taken.

The importance of units is put on one scale for all groups as LAMP does: a unit's score divided by the sum
of the scores of its group that are not smaller, so that the last units of a layer cost 1 each and no layer
collapses. Reference: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
"""

from __future__ import annotations

import dataclasses
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
        kept = {g.name: 0 for g in self.analysis.groups}  # position in `levels`
        removed: set[str] = set()
        steps: list[Step] = []
        now = self._price_all([(kept, removed)], limits)
        current = {key: float(values[0]) for key, values in now.items()}
        while any(current[key] > limit for key, limit in limits.items()):
            candidates = self._candidates(kept, removed)
            if not candidates:
                break
            priced = self._price_all([(k, r) for _, _, k, r in candidates], limits)
            best = self._choose(candidates, priced, current, limits)
            if best is None:
                break
            change, _, kept, removed = candidates[best]
            current = {key: float(values[best]) for key, values in priced.items()}
            steps.append(Step(change, dict(current)))
        feasible = all(current[key] <= limit for key, limit in limits.items())
        return Decision(self._plan(kept, removed), tuple(steps), current, feasible)

    def _candidates(
        self, kept: dict[str, int], removed: set[str]
    ) -> list[tuple[str, float, dict[str, int], set[str]]]:
        result: list[tuple[str, float, dict[str, int], set[str]]] = []
        for name, found in self.levels.items():
            at = kept[name]
            if at + 1 < len(found):
                size = found[0]
                lost = self.cost[name][size - found[at + 1]] - self.cost[name][size - found[at]]
                result.append(
                    (f"{name}: {found[at]} → {found[at + 1]}", float(lost), {**kept, name: at + 1}, removed)
                )
        for block in self.blocks:
            if block.name not in removed:
                result.append(
                    (f"remove {block.name}", self.block_cost[block.name], kept, removed | {block.name})
                )
        return result

    def _choose(
        self,
        candidates: Sequence[tuple[str, float, dict[str, int], set[str]]],
        priced: Mapping[str, np.ndarray],
        current: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> int | None:
        saving = np.zeros(len(candidates))
        for key, limit in limits.items():
            excess, summed = max(current[key] - limit, 0.0), f"{key} {EXCESS}"
            if excess > 0 and current.get(summed, 0.0) > 0:
                saving += (1.0 - priced[summed] / current[summed]) * excess / limit
            elif excess > 0:
                saving += np.minimum(current[key] - priced[key], excess * 1.5) / limit
        lost = np.array([c[1] for c in candidates])
        score = np.where(saving > 0, saving / np.maximum(lost, 1e-12), -np.inf)
        if "latency" in priced:
            score[priced["latency"] > current["latency"] * 1.0001] = -np.inf
        best = int(np.argmax(score))
        return best if np.isfinite(score[best]) else None

    def _price_all(
        self, states: Sequence[tuple[dict[str, int], set[str]]], limits: Mapping[str, float]
    ) -> Mapping[str, np.ndarray]:
        fractions = {
            name: np.array([found[k[name]] / found[0] for k, _ in states])
            for name, found in self.levels.items()
        }
        removed = {b.name: np.array([b.name in r for _, r in states]) for b in self.blocks}
        return self.price(fractions, removed, limits)

    def _plan(self, kept: Mapping[str, int], removed: set[str]) -> Plan:
        groups = {}
        gone = {node for b in self.blocks if b.name in removed for node in b.nodes}
        for group in self.analysis.groups:
            producers = {m.initializer for m in group.members if m.role == "producer"}
            if gone and producers and all(self._read_only_by(p, gone) for p in producers):
                continue  # the whole group goes with a removed block
            count = self.levels[group.name][kept[group.name]]
            if count < group.size:
                keep = group.keep_best(self.importance.groups[group.name], count)
                if len(keep) < group.size:
                    groups[group.name] = GroupPlan(group.size, keep)
        names = tuple(b.name for b in self.blocks if b.name in removed)
        return Plan(self.analysis.program.source.sha256, groups, names, {"strategy": "budgeted-greedy"})


def levels(group: ChannelGroup, grid: int) -> list[int]:
    """Kept unit counts from full to fewest, on the target's channel grid.

    A group of no more channels than the grid goes in steps of 4 channels (the least that keeps the vector
    path of the runtimes), and of no more than 4 in single units.
    """
    channels = group.size * group.granularity
    step = grid if channels > grid else 4 if channels > 4 else 1
    units = max(1, step // math.gcd(step, group.granularity))
    units = max(units, math.ceil(group.size / 16 / units) * units)  # at most about 16 levels
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
