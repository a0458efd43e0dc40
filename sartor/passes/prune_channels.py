"""Removes the least important units of every channel group."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sartor.ir.channels import ChannelAnalysis, ChannelGroup, channel_groups
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import Program
from sartor.passes.base import CRITERIA, Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.prune import rewrite
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the same fraction of every channel group, least important units first.

    Becomes: a program whose weights, constants and attributes have the kept indices only.
    Ensures: equal to MASKED, the original with zeros in the consumers' slices (see `sartor.passes.masked`),
    unless `approximate` groups were asked for and found; the plan says so then.
    Refuses when: a group would lose its last unit, or an axis is blocked (see `sartor inspect`).
    """

    name: ClassVar[str] = "prune-channels"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING

    ratio: float = option(
        help="fraction of every group to remove, rounded down; one unit stays", minimum=0.0, maximum=1.0
    )
    criterion: str = option("random", help=f"what ranks units: {CRITERIA}")
    seed: int = option(0, help="of criterion random", minimum=0)
    grid: int = option(
        1, help="keep multiples of this many parameter indices where a group is larger", minimum=1
    )
    approximate: bool = option(
        False, help="also groups that a norm or reduction mixes: not exact, without a MASKED form"
    )

    def plan(self, program: Program, context: Context) -> Any:
        """Rank units and keep the best of each group. See `Pass.plan`."""
        analysis = channel_groups(program, context.keep, self.approximate)
        scores = self._scores(program, analysis, context)
        groups, refusals = {}, []
        for group in analysis.groups:
            removed = self._removed(group)
            keep = group.keep_best(scores[group.name], group.size - removed)
            if len(keep) < group.size:
                groups[group.name] = GroupPlan(group.size, keep)
            elif self.ratio > 0:
                refusals.append(Refusal(group.name, f"{group.size} units cannot lose {self.ratio:.0%}"))
        refusals += [Refusal(b.value, f"{b.reason} {b.source}".strip()) for b in analysis.blocked]
        notes: dict[str, Any] = {"pass": str(self)}
        mixed = {group.name: group.mixed for group in analysis.groups if group.mixed and group.name in groups}
        if mixed:
            notes["approximate"] = mixed
        named_otherwise = any(group.mixed for group in analysis.groups)
        plan = Plan(program.source.sha256, groups, (), notes, approximate=named_otherwise)
        return Planned(plan, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Narrow mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)

    def _removed(self, group: ChannelGroup) -> int:
        removed = math.floor(group.size * self.ratio + 1e-9)
        step = self.grid // math.gcd(self.grid, group.granularity)
        kept = group.size - removed
        if step > 1 and group.size > step:
            kept = min(group.size, math.ceil(kept / step) * step)
        return min(group.size - kept, group.size - 1)

    def _scores(
        self, program: Program, analysis: ChannelAnalysis, context: Context
    ) -> Mapping[str, np.ndarray]:
        if self.criterion == "random":
            return {
                g.name: np.random.default_rng([self.seed, zlib.crc32(g.name.encode())]).random(g.size)
                for g in analysis.groups
            }
        scored = context.importance(self.criterion, program, analysis, (), context)
        result: Mapping[str, np.ndarray] = scored.groups
        return result
