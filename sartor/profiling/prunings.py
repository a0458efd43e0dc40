"""A small profile of one network: its kernels, timed inside the network itself and inside random prunings of it.

Inside the network a kernel runs in the layout and from the caches that it will have in every plan; timed alone it has
neither. What is asked is only how this network's kernels depend on its own widths, so a dozen prunings say what a
profile of the machine needs hundreds of networks for.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.profile import DeviceProfile
from sartor.cost_models.samples import empty_model
from sartor.errors import MetricUnavailableError
from sartor.ir.channels import ChannelAnalysis, ChannelGroup
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import Program
from sartor.journal import Journal
from sartor.passes.prune import apply_plan
from sartor.profiling.inside import InsideEffort, Insider
from sartor.profiling.records import Records, network_result

_STRATA = 4
"""Of so many prunings in a row, every group has one in each quarter of its levels."""
_FIRST, _MOST = 3, 24  # prunings in the first request; in all
_WHOLE = "whole"
_REMOVED = 0.3  # of the blocks, where some are
_CALL_BYTES = 256 << 20  # serialized models of one request


@dataclasses.dataclass(frozen=True)
class Prunings:
    """What was timed of one network.

    Attributes:
        profile: samples only, nothing fitted.
        ratios: of each pruning, its latency as a share of the whole network's.
    """

    profile: DeviceProfile
    ratios: tuple[tuple[Plan, float], ...]


def sample_prunings(
    program: Program,
    analysis: ChannelAnalysis,
    blocks: Sequence[str],
    timer: Insider,
    journal: Journal,
    *,
    levels: Callable[[ChannelGroup], Sequence[int]],
    rules: FusionRules,
    target: Mapping[str, Any],
    device: Mapping[str, Any],
    seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Prunings:
    """Samples of the kernels of one network, in widths that a search may choose.

    Args:
        program: the network.
        analysis: its channel groups.
        blocks: its residual blocks that may go.
        timer: times serialized models and the kernels inside them, on the target with the options in `target`.
        journal: an empty one, for what was timed.
        levels: how many units a group may keep.
        rules: what the target runs as one kernel.
        target: as in `DeviceProfile`.
        device: as in `DeviceProfile`.
        seconds: time limit. The model that is timed when it ends is finished.
        seed: of the widths.
        clock: monotonic seconds.

    Raises:
        MetricUnavailableError: the target does not tell the times of the kernels of this network.
    """
    records = Records(journal, clock)
    empty = timer([empty_model()], InsideEffort())[0]
    records.add("call", ratio=None if empty.latency is None else empty.latency.ratio)
    plans = random_plans(program, analysis, blocks, levels, seed)
    tried: list[Plan] = []
    most = _MOST if analysis.groups or blocks else 0
    count, begun = min(_FIRST, most), records.spent_s
    while count > 0 or not records.batches("networks"):
        new = _models(itertools.islice(plans, count), program, analysis)
        # The whole network once more with every request: all others are shares of it.
        models = [program.to_bytes(), *(model for _, model in new)]
        names = [_WHOLE, *(str(len(tried) + number) for number in range(len(new)))]
        found = timer(models, InsideEffort(limit_s=max(seconds - records.spent_s, 0.0)))
        for inside in found:
            records.saw(inside.reference_s)
        results = [
            network_result(name, "fit", model, inside, rules)
            for name, model, inside in zip(names, models, found, strict=True)
        ]
        if not tried and not results[0].get("observed"):
            reason = results[0].get("reason") or "it does not say which nodes its kernels compute"
            raise MetricUnavailableError(
                f"The times of the kernels inside this network are not known: {reason}."
            )
        records.add("networks", results=results)
        tried += [plan for plan, _ in new]
        pace = (records.spent_s - begun) / (len(tried) + 1)
        count = min(int((seconds - records.spent_s) / pace), most - len(tried))
    profile = records.profile(target, device, seconds / 60, "minutes")
    latency = {network.name: network.latency_s for network in profile.networks}
    ratios = [(plan, latency[str(n)] / latency[_WHOLE]) for n, plan in enumerate(tried) if str(n) in latency]
    return Prunings(profile, tuple(ratios))


def random_plans(
    program: Program,
    analysis: ChannelAnalysis,
    blocks: Sequence[str],
    levels: Callable[[ChannelGroup], Sequence[int]],
    seed: int = 0,
) -> Iterator[Plan]:
    """Plans without end: every group at one of its levels, independently of the others and all over its range.

    Every second plan removes some blocks, too: what stands before and behind them then meets other neighbours.
    """
    generator = np.random.default_rng(seed)
    choices = {group.name: sorted(levels(group)) for group in analysis.groups}
    while True:
        strata = {name: generator.permutation(_STRATA) for name in choices}
        for number in range(_STRATA):
            groups = {}
            for group in analysis.groups:
                place = (strata[group.name][number] + generator.random()) / _STRATA
                count = choices[group.name][int(place * len(choices[group.name]))]
                keep = group.keep_best(np.zeros(group.size), count)
                if len(keep) < group.size:
                    groups[group.name] = GroupPlan(group.size, keep)
            removed = tuple(name for name in blocks if number % 2 and generator.random() < _REMOVED)
            yield Plan(program.source.sha256, groups, removed)


def _models(plans: Iterable[Plan], program: Program, analysis: ChannelAnalysis) -> list[tuple[Plan, bytes]]:
    """Plans and the models they make; fewer than were asked for where they are large."""
    made: list[tuple[Plan, bytes]] = []
    for plan in plans:
        made.append((plan, apply_plan(program, plan, analysis).to_bytes()))
        if sum(len(model) for _, model in made) > _CALL_BYTES:
            break
    return made
