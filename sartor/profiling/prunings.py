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
from sartor.ir.batch import fix_signature
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
_FEWEST = 2  # to learn from
_REMOVED = 0.3  # of the blocks, where some are
_LARGEST, _CALL_BYTES = 1 << 30, 512 << 20  # of the network; of the prunings of one request
_LEAST_S = 1.0  # of a request
_LEAST_TOLD = 0.5  # share of a network's time of which it has to be known what it was spent on
_MOST_DOUBT = 0.15  # half width of a latency


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
        MetricUnavailableError: the target does not tell the times of the kernels of this network, or the network is too
            large or too slow for that.
        BackendError: it cannot run the reference kernel.
    """
    if (size := program.serialised_bytes()) > _LARGEST:
        raise MetricUnavailableError(f"The network has {size} bytes, too many to be sent a dozen times.")
    records = Records(journal, clock)
    empty = timer([empty_model()], InsideEffort(profile_s=0.0))[0]
    records.add("call", ratio=None if empty.latency is None else empty.latency.ratio)
    plans = random_plans(program, analysis, blocks, levels, seed)
    narrowed = {member.initializer for group in analysis.groups for member in group.members}
    keep = sorted(set(program.initializers) - narrowed) if analysis.keep else []
    most = _MOST if analysis.groups or blocks else 0
    ratios: list[tuple[Plan, float]] = []
    begun, sent, tried, count = records.spent_s, 0, 0, min(_FIRST, most)
    while count > 0 or not sent:
        new = _models(itertools.islice(plans, count), program, analysis)
        # The whole network once more with every request: all others are shares of it.
        models = [_serialized(program), *(model for _, model in new)]
        names = [f"whole {tried}", *(f"pruning {tried + number}" for number in range(len(new)))]
        found = timer(models, InsideEffort(limit_s=max(seconds - records.spent_s, _LEAST_S)))
        results = [
            network_result(name, "fit", model, inside, rules, keep)
            for name, model, inside in zip(names, models, found, strict=True)
        ]
        if not sent:
            _require_kernels(results[0])
        for inside in found:
            records.saw(inside.reference_s)
        records.add("networks", results=results)
        whole = results[0].get("ratio")
        for (plan, _), result in zip(new, results[1:], strict=True):
            if whole is not None and "ratio" in result and result["half_width"] <= _MOST_DOUBT:
                ratios.append((plan, result["ratio"] / whole))
        tried, sent = tried + len(new), sent + len(models)
        pace = (records.spent_s - begun) / sent
        count = min(int((seconds - records.spent_s) / pace) - 1, most - tried)
    profile = records.profile(target, device, seconds / 60, "prunings" if tried >= most else "minutes")
    if not profile.samples or len(ratios) < min(_FEWEST, most):
        raise MetricUnavailableError(
            f"Of {tried} prunings {len(ratios)} could be timed in {seconds:g} s, which says too little of others."
        )
    return Prunings(profile, tuple(ratios))


def _require_kernels(whole: Mapping[str, Any]) -> None:
    """Refuse what a target tells of a network, if it is too little of its time."""
    if "ratio" not in whole:
        raise MetricUnavailableError(f"The network could not be timed: {whole['reason']}.")
    told = sum(one["ratio"] for one in whole["observed"])
    if told < _LEAST_TOLD * whole["sum"] or not told:
        raise MetricUnavailableError(
            "The target does not tell the times of the kernels inside this network, or not which nodes they compute."
        )


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
        made.append((plan, _serialized(apply_plan(program, plan, analysis))))
        if sum(len(model) for _, model in made) > _CALL_BYTES:
            break
    return made


def _serialized(program: Program) -> bytes:
    """With the batch that it is for: a symbolic one would be read as another."""
    return fix_signature(program.clone()).to_bytes()
