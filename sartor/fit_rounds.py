"""Cutting in rounds: the same widths in the end, by units that are chosen anew after every training.

What least matters in a network that was just trained is not what least mattered in the original. Reference: Molchanov
et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017, section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import GroupPlan, Plan
from sartor.passes.prune import apply_plan
from sartor.unit_scores import unit_scores_of

if TYPE_CHECKING:
    from sartor.ir.program import Program
    from sartor.journal import Journal
    from sartor.strategies.importance import Importance
    from sartor.workbench import Workbench


def rounds_of(plan: Plan, count: int) -> int:
    """Rounds that a plan is carried out in: one where there is nothing to divide, or more than can be divided."""
    divisible = plan.groups or plan.blocks
    return count if divisible and not (plan.widened or plan.deepened or plan.replacements) else 1


class Rounds:
    """A plan's groups and blocks, divided among rounds; the least important blocks go first.

    A group is cut little by little if it is a group of the same units after every round: where the removal of a
    block, or of heads, makes another of it, it is cut as a whole in the first round, as the plan says.

    Args:
        bench: model and data.
        analysis: channel groups of the original.
        blocks: its residual blocks.
        journal: of the run, which keeps what was chosen.
        plan: what there is in the end.
        count: of rounds, at least 2.
    """

    def __init__(
        self,
        bench: Workbench,
        analysis: ChannelAnalysis,
        blocks: Sequence[Any],
        journal: Journal,
        plan: Plan,
        count: int,
    ):
        self._bench, self._analysis, self._journal = bench, analysis, journal
        self._plan, self._count = plan, count
        self._names = {block.name for block in blocks}
        known = journal.find("rounds")
        if known is None:
            scores = self._scores(bench.program, analysis, {}).blocks if plan.blocks else {}
            order = sorted(plan.blocks, key=lambda name: scores.get(name, 0.0))
            known = journal.append("rounds", blocks=order)
        self._order: list[str] = known["blocks"]
        self._at_once = self._others()

    def cut(self, number: int, current: Program, done: Plan) -> tuple[Plan, Program]:
        """What is done after a round, and the network: of what the last round trained, the units that matter most.

        Args:
            number: of the round, from 1.
            current: what the last round left.
            done: the plan that led there from the original.
        """
        analysis = channel_groups(current, self._bench.options.keep)
        before = {
            name: done.groups[name].keep if name in done.groups else tuple(range(group.size))
            for name, group in self._plan.groups.items()
        }
        known = self._journal.find("round", number=number)
        if known is None:
            known = self._journal.append(
                "round", number=number, keep=self._chosen(number, current, analysis, before)
            )
        keep = {name: tuple(places) for name, places in known["keep"].items()}
        blocks = self._gone(number)
        step = Plan(
            current.source.sha256,
            {name: GroupPlan(len(before[name]), places) for name, places in keep.items()},
            tuple(name for name in blocks if name not in done.blocks),
            sizes=self._plan.sizes if number == 1 else {},
        )
        groups = {
            name: GroupPlan(self._plan.groups[name].size, tuple(before[name][i] for i in places))
            for name, places in keep.items()
        }
        after = dataclasses.replace(self._plan, groups={**done.groups, **groups}, blocks=blocks)
        return after, apply_plan(current, step, analysis)

    def _chosen(
        self,
        number: int,
        current: Program,
        analysis: ChannelAnalysis,
        before: Mapping[str, Sequence[int]],
    ) -> dict[str, list[int]]:
        """By group that is cut in a round, the places of the units that stay, among those that there are."""
        found = {}
        scores = self._scores(current, analysis, self._plan.sizes if number > 1 else {}).groups
        for name, count in self._widths(number, self._at_once).items():
            if name in self._at_once and number == 1:
                found[name] = list(self._plan.groups[name].keep)
            elif count < len(before[name]):
                found[name] = list(analysis.group(name).keep_best(scores[name], count))
        return found

    def _scores(
        self, program: Program, analysis: ChannelAnalysis, shapes: Mapping[str, tuple[int, ...]]
    ) -> Importance:
        blocks = [block for block in residual_blocks(program) if block.name in self._names]
        return unit_scores_of(self._bench, program, analysis, blocks, shapes)[0]

    def _widths(self, number: int, at_once: set[str]) -> dict[str, int]:
        """Units after a round, by group that is narrower in the end."""
        found = {}
        for name, group in self._plan.groups.items():
            share = 1.0 if name in at_once else number / self._count
            found[name] = group.size - round((group.size - len(group.keep)) * share)
        return found

    def _gone(self, number: int) -> tuple[str, ...]:
        gone = self._order[: round(len(self._order) * number / self._count)]
        return tuple(name for name in self._plan.blocks if name in gone)

    def _others(self) -> set[str]:
        """Groups that are not the same groups after every round."""
        found: set[str] = set()
        while True:
            more: set[str] = set()
            for number in range(1, self._count):
                widths = self._widths(number, found)
                program = apply_plan(self._bench.program, self._like(number, widths), self._analysis)
                left = {g.name: g.size for g in channel_groups(program, self._bench.options.keep).groups}
                more |= {name for name, width in widths.items() if left.get(name) != width}
            if more <= found:
                return found
            found |= more

    def _like(self, number: int, widths: Mapping[str, int]) -> Plan:
        """A plan that leaves so many units of each group after a round, whichever they are."""
        groups = {}
        for name, group in self._plan.groups.items():
            rest = [unit for unit in range(group.size) if unit not in set(group.keep)]
            keep = sorted([*group.keep, *rest[: widths[name] - len(group.keep)]])
            if len(keep) < group.size:
                groups[name] = GroupPlan(group.size, tuple(keep))
        return dataclasses.replace(self._plan, groups=groups, blocks=self._gone(number))
