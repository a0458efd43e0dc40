"""What is cut, one change at a time, what it saves, and in which order the cuts are scored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.ir.blocks import Block
from sartor.ir.channels import ChannelAnalysis, ChannelGroup
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import Program
from sartor.ir.workload import Workload, build_workload

COSTS = ("macs", "parameters", "weight_bytes")


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """One change to the network that is scored alone.

    Attributes:
        kind: `group` or `block`.
        name: of the group or block.
        ratio: share of the group's units that was to go; None for a block.
        plan: what is done.
        saved: what the whole network loses, by `COSTS`.
    """

    kind: str
    name: str
    ratio: float | None
    plan: Plan
    saved: Mapping[str, int]

    @property
    def label(self) -> dict[str, Any]:
        """Kind, name and, of a group, the ratio."""
        own = {"kind": self.kind, "name": self.name}
        return own if self.ratio is None else {**own, "ratio": self.ratio}


@dataclasses.dataclass(frozen=True)
class Uncut:
    """A ratio at which a group stays whole, and why."""

    name: str
    ratio: float
    reason: str


class Cuts:
    """Every group at every ratio, and every removable block.

    Args:
        program: canonical program.
        analysis: its channel groups.
        blocks: residual blocks that can be removed.
        scores: importance per unit, by group; the least important go first.
        ratios: shares of units to remove, ascending, each inside (0, 1).

    Attributes:
        rounds: the order of scoring. The first has the middle ratio of all groups, and all blocks, so that a study
            that is stopped early has seen all of the network; then the middles of the ratios that are left. In a round
            what saves most comes first.
        uncut: groups too small for a ratio.
        costs: of the whole network, by `COSTS`.
    """

    def __init__(
        self,
        program: Program,
        analysis: ChannelAnalysis,
        blocks: Sequence[Block],
        scores: Mapping[str, np.ndarray],
        ratios: Sequence[float],
    ):
        self._analysis, self._sha256 = analysis, program.source.sha256
        self._workload: Workload = build_workload(program, analysis.extents, blocks)
        self.costs = self._priced(Plan(self._sha256))
        self.uncut: list[Uncut] = []
        self.rounds: list[list[Cut]] = []
        for ratio in by_halving(ratios):
            self.rounds.append([])
            for group in analysis.groups:
                self._add(group, scores[group.name], ratio)
        self.rounds[0] += [
            self._cut("block", block.name, None, Plan(self._sha256, blocks=(block.name,))) for block in blocks
        ]
        for cuts in self.rounds:
            cuts.sort(key=lambda cut: -cut.saved["macs"])  # stable: of equal ones the first in the network

    def __iter__(self) -> Iterator[Cut]:
        return (cut for cuts in self.rounds for cut in cuts)

    def _add(self, group: ChannelGroup, scores: np.ndarray, ratio: float) -> None:
        removed = math.floor(group.size * ratio + 1e-9)  # as many as prune-channels{ratio} removes
        keep = group.keep_best(scores, group.size - removed)
        if len(keep) == group.size:
            units = "1 unit" if group.size == 1 else f"{group.size} units"
            self.uncut.append(Uncut(group.name, ratio, f"{units} cannot lose {100 * ratio:g} %"))
            return
        plan = Plan(self._sha256, {group.name: GroupPlan(group.size, keep)})
        self.rounds[-1].append(self._cut("group", group.name, ratio, plan))

    def _cut(self, kind: str, name: str, ratio: float | None, plan: Plan) -> Cut:
        left = self._priced(plan)
        return Cut(kind, name, ratio, plan, {key: self.costs[key] - left[key] for key in COSTS})

    def _priced(self, plan: Plan) -> dict[str, int]:
        removed = dict.fromkeys(plan.blocks, True)
        priced = self._workload.evaluate(self._analysis.fractions(plan), removed)
        return {key: round(float(getattr(priced, key))) for key in COSTS}


def by_halving(values: Sequence[float]) -> list[float]:
    """The middle one first, then the middles of both halves, and so on: early ones are spread over all."""
    found: list[float] = []
    parts = [list(values)]
    while parts:
        part = parts.pop(0)
        if part:
            middle = len(part) // 2
            found.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return found
