"""Whether a profile still holds on this machine: a few of its kernels are timed again, in the same way."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.backends import host
from sartor.backends.protocol import TargetOptions
from sartor.cost_models.profile import DeviceProfile, Sample
from sartor.cost_models.tiers import Tiers
from sartor.errors import BackendError, UsageError
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.profiling.design import Point
from sartor.profiling.inside import InsideEffort, Insider, ModelTimer
from sartor.profiling.inside_samples import alike_among, carrier_model, of_carrier

SAMPLES = 48
TOLERANCE = 0.10
"""A family whose kernels take this much more or less than the profile says, by their median, has changed."""
_PRECISE = 0.05  # samples with a wider interval say little
_FEWEST, _CARRIED = 3, 32  # of one family; of one carrier
_LEAST_S = 10e-6  # of a kernel: what the profiler adds to a shorter one matters too much
_KNOWN = 1.1
"""A period so much shorter or longer than those of a family's samples is still one that the law of waiting knows."""
_SLOWER = 0.15  # of the reference itself: other clocks, another machine


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        changes: sentences, each a reason why the profile no longer holds.
        notes: differences that need not matter.
        families: per family the median of time now over time then, its interval, and how many kernels.
        reference_s: the reference kernel, now.
    """

    changes: tuple[str, ...]
    notes: tuple[str, ...]
    families: Mapping[str, tuple[float, float, float, int]]
    reference_s: float

    @property
    def holds(self) -> bool:
        """Nothing that matters has changed."""
        return not self.changes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        families = {
            name: {"ratio": ratio, "ci95": [low, high], "kernels": count}
            for name, (ratio, low, high, count) in self.families.items()
        }
        return {
            "holds": self.holds,
            "changes": list(self.changes),
            "notes": list(self.notes),
            "families": families,
            "reference_s": self.reference_s,
        }


def check_profile(profile: DeviceProfile, timer: Insider | None = None, *, seed: int = 0) -> Check:
    """Compare target and machine, then times.

    Args:
        profile: as it was built.
        timer: instead of the profile's target, for tests.
        seed: of the choice of kernels.

    Raises:
        UsageError: the profile has no samples, too few at periods that can be had again, or its target is not
            installed.
        BackendError: the target cannot run even a convolution.
    """
    from sartor import backends

    chosen = _chosen(profile, seed)
    if not chosen:
        raise UsageError(
            "The profile has no samples that could be timed again; build it with 'sartor profile'."
        )
    target = profile.target
    backend = backends.get(target["name"])
    changes, notes = _facts(profile, backend.capabilities().version)
    options = TargetOptions(threads=int(target["threads"]), precision=target["precision"])
    own = None
    if timer is None:
        pin = bool(target.get("settings", {}).get("pinned", True))
        own = timer = ModelTimer(target["name"], options, pin=pin, seed=seed)
    try:
        ratios, unknown, reference_s = _again(chosen, timer, profile)
    finally:
        if own is not None:
            own.close()
    families = {name: _median(found) for name, found in sorted(ratios.items()) if len(found) >= _FEWEST}
    if untold := sorted(unknown - set(families)):
        notes.append(
            f"nothing is said of {', '.join(repr(name) for name in untold)}: seen only inside networks that took "
            "other times than the models in which a check times them"
        )
    then = float(profile.protocol["reference_s"])
    change = reference_s / then - 1
    if abs(change) > _SLOWER:
        changes.append(
            f"the reference kernel takes {_percent(change)} than then ({reference_s * 1e6:.0f} us, then "
            f"{then * 1e6:.0f} us): the clock, or the machine, is another"
        )
    for name, (ratio, low, high, count) in families.items():
        if abs(math.log(ratio)) > math.log1p(TOLERANCE) and not low <= 1.0 <= high:
            changes.append(
                f"kernels of family '{name}' take {_percent(ratio - 1)} than then ({count} timed again)"
            )
    if not families and not changes:
        raise UsageError(
            "Whether the profile holds cannot be told: too few of its kernels were seen inside networks that took "
            "about as long as the models in which a check times them. Build it with more '--minutes'."
        )
    return Check(tuple(changes), tuple(notes), families, reference_s)


def _facts(profile: DeviceProfile, version: str) -> tuple[list[str], list[str]]:
    """What differs in words: reasons, and what need not matter."""
    changes, notes = [], []
    if version != profile.target["version"]:
        changes.append(f"'{profile.target['name']}' is version {version}, then {profile.target['version']}")
    now = host.device()
    for key, what in (
        ("cpu", "the processor is"),
        ("isa", "its instruction sets are"),
        ("caches", "its caches are"),
    ):
        if key in profile.device and now[key] != profile.device[key]:
            changes.append(f"{what} {now[key]}, then {profile.device[key]}")
    for key in ("cores", "memory_bytes", "platform"):
        if key in profile.device and now[key] != profile.device[key]:
            notes.append(f"{key} {now[key]}, then {profile.device[key]}")
    then = profile.device.get("clocks", {}).get("governor")
    if then is not None and now["clocks"]["governor"] != then:
        notes.append(f"clock governor '{now['clocks']['governor']}', then '{then}'")
    return changes, notes


def _chosen(profile: DeviceProfile, seed: int) -> list[Sample]:
    """Well-known samples, the same number of every family where there are enough."""
    by_family: dict[str, list[Sample]] = {}
    for sample in profile.samples:
        carriers_have_it = sample.family != LAYOUT and not sample.spec.get("turned")
        if sample.half_width <= _PRECISE and carriers_have_it and sample.seconds >= _LEAST_S:
            by_family.setdefault(sample.family, []).append(sample)
    rng = random.Random(seed)
    each = max(_FEWEST, SAMPLES // max(len(by_family), 1))
    chosen = [
        sample
        for _, samples in sorted(by_family.items())
        for sample in rng.sample(samples, min(each, len(samples)))
    ]
    rng.shuffle(chosen)
    return chosen


def _again(
    chosen: Sequence[Sample], timer: Insider, profile: DeviceProfile
) -> tuple[dict[str, list[float]], set[str], float]:
    """Times now over times then by family, families that would need a guess, and the reference's seconds.

    Then and now kernels wait for weights that the rest of their model displaced, as long as its period makes them;
    what the law says of that beyond the periods that a family was seen at is no more than a guess.
    """
    carriers = _carriers(chosen)
    points = [[Point(sample.spec, sample.at, sample.family) for sample in one] for one in carriers]
    effort = InsideEffort(visits=2, profile_s=1.0)
    timed = timer([carrier_model(one) for one in points], effort)
    known = [one for one in timed if one.latency is not None]
    if not known:
        raise BackendError(f"None of the profile's kernels could be timed: {timed[0].reason}.")
    then_s, overhead_s = (float(profile.protocol[key]) for key in ("reference_s", "profiler_s"))
    periods: dict[str, list[float]] = {}
    for sample in profile.samples:
        periods.setdefault(sample.family, []).append(sample.period_s)
    again: list[tuple[Sample, Sample]] = []
    unknown: set[str] = set()
    for samples, of_samples, inside in zip(carriers, points, timed, strict=True):
        if inside.latency is None:
            continue
        period_s = inside.latency.ratio * then_s
        alike = alike_among(of_samples)
        for sample, time_and_rows in zip(samples, of_carrier(of_samples, inside.kernels), strict=True):
            if time_and_rows is None:
                continue
            known_s = periods[sample.family]
            if not min(known_s) / _KNOWN <= period_s <= max(known_s) * _KNOWN:
                unknown.add(sample.family)
            else:
                own = max(time_and_rows[0] * then_s - time_and_rows[1] * overhead_s, 1e-9)
                others = alike[sample.family, sample.spec["op"]]
                now = dataclasses.replace(
                    sample, seconds=own, period_s=period_s, alike=others, twins=1, network="", carried=True
                )
                again.append((sample, now))
    tiers = Tiers.of(profile)
    said = [tiers.many([pair[i] for pair in again]).seconds for i in (0, 1)]
    found: dict[str, list[float]] = {}
    for (then, now), before, after in zip(again, *said, strict=True):
        found.setdefault(then.family, []).append((now.seconds / after) / (then.seconds / before))
    if not found and not unknown:
        raise BackendError("None of the profile's kernels could be timed; look at 'sartor targets'.")
    return found, unknown, statistics.median(one.reference_s for one in known)


def _carriers(chosen: Sequence[Sample]) -> list[list[Sample]]:
    """Kernels that are timed side by side, at most as many as take what their models took then.

    (A longer wait than any sample knows would be the law's guess, not the machine's change.)
    """
    found: list[list[Sample]] = []
    spent = most = 0.0
    for sample in sorted(
        chosen, key=lambda sample: sample.period_s
    ):  # stable: kernels stay in their chance order
        if not found or spent + sample.seconds > most or len(found[-1]) == _CARRIED:
            found.append([])
            spent, most = 0.0, sample.period_s
        found[-1].append(sample)
        spent += sample.seconds
    return found


def _median(ratios: Sequence[float]) -> tuple[float, float, float, int]:
    """Median and a 95 % interval of it, from the median deviation."""
    logs = [math.log(max(r, 1e-9)) for r in ratios]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    half = 1.96 * 1.2533 * spread / math.sqrt(len(logs))  # sqrt(pi / 2): a median's error beside a mean's
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs)


def _percent(change: float) -> str:
    return f"{abs(change):.0%} {'longer' if change > 0 else 'less'}"
