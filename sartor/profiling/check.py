"""Whether a profile still holds on this machine: a few of its networks are timed again, in the same way."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.backends import host
from sartor.backends.protocol import TargetOptions
from sartor.cost_models.profile import DeviceProfile, NetworkTime
from sartor.cost_models.signatures import key_of
from sartor.errors import BackendError, UsageError
from sartor.ir.fusion_rules import FusionRules
from sartor.profiling import networks
from sartor.profiling.build import fusion_rules
from sartor.profiling.inside import InsideEffort, Insider, ModelTimer
from sartor.profiling.records import best_look, look_of, network_result, sample_of

WHOLE = "whole networks"
TOLERANCE = 0.10
"""A family that certainly takes this much more or less than the profile says has changed."""
_NETWORKS = 24
_FEWEST = 3  # networks with kernels of one family
_LEAST_S = 10e-6  # of a kernel: what the profiler adds to a shorter one matters too much
_SLOWER = 0.15  # of the reference itself: other clocks, another machine


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        changes: sentences, each a reason why the profile no longer holds.
        notes: differences that need not matter.
        families: per family of kernels, and of whole networks, the median of time now over time then, its interval,
            and how many networks told it.
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
            name: {"ratio": ratio, "ci95": [low, high], "networks": count}
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
        seed: of the choice of networks.

    Raises:
        UsageError: too few networks of the profile can be generated again, or its target is not installed.
        BackendError: the target cannot run even a convolution.
    """
    from sartor import backends

    target = profile.target
    backend = backends.get(target["name"])
    chosen = _chosen(profile, seed)
    if len(chosen) < _FEWEST:
        raise UsageError(
            f"Of the profile's networks {len(chosen)} can be generated again by this version of Sartor, expected at "
            f"least {_FEWEST}; whether it holds cannot be told. Build it again with 'sartor profile'."
        )
    changes, notes = _facts(profile, backend.capabilities().version)
    options = TargetOptions(threads=int(target["threads"]), precision=target["precision"])
    own = None
    if timer is None:
        pin = bool(target.get("settings", {}).get("pinned", True))
        own = timer = ModelTimer(target["name"], options, pin=pin, seed=seed)
    try:
        ratios, reference_s = _again(profile, chosen, timer, fusion_rules(backend))
    finally:
        if own is not None:
            own.close()
    families = {name: _median(found) for name, found in ratios.items() if len(found) >= _FEWEST}
    then = float(profile.protocol["reference_s"])
    change = reference_s / then - 1
    if abs(change) > _SLOWER:
        changes.append(
            f"the reference kernel takes {_percent(change)} than then ({reference_s * 1e6:.0f} us, then "
            f"{then * 1e6:.0f} us): the clock, or the machine, is another"
        )
    for name, (ratio, low, high, count) in families.items():
        what = WHOLE if name == WHOLE else f"kernels of family '{name}'"
        if low > 1 + TOLERANCE or high < 1 / (1 + TOLERANCE):
            changes.append(f"{what} take {_percent(ratio - 1)} than then (in {count} networks timed again)")
        elif abs(math.log(ratio)) > math.log1p(TOLERANCE):
            notes.append(
                f"{what} may take {_percent(ratio - 1)} than then, which {count} networks do not decide"
            )
    if untold := sorted({sample.family for sample in profile.samples} - set(families)):
        few = ", ".join(repr(name) for name in untold)
        notes.append(
            f"nothing is said of {few}: in fewer than {_FEWEST} of the networks that were timed again"
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


def _chosen(profile: DeviceProfile, seed: int) -> list[tuple[NetworkTime, bytes]]:
    """Networks of the profile that are generated as they were then, those with families that few of the others have."""
    families: dict[str, set[str]] = {}
    for sample in profile.samples:
        if sample.seconds >= _LEAST_S:
            families.setdefault(sample.network, set()).add(sample.family)
    left = [network for network in profile.networks if network.name in families]
    random.Random(seed).shuffle(left)
    found: list[tuple[NetworkTime, bytes]] = []
    often = Counter[str]()
    while left and len(found) < _NETWORKS:
        network = max(left, key=lambda one: sum(1 / (1 + often[name]) for name in families[one.name]))
        left.remove(network)
        try:
            model = networks.network(network.name)
        except (UsageError, ValueError):  # a network of the user, or of another version
            continue
        if hashlib.sha256(model).hexdigest() == network.sha256:
            found.append((network, model))
            often.update(families[network.name])
    return found


def _again(
    profile: DeviceProfile, chosen: Sequence[tuple[NetworkTime, bytes]], timer: Insider, rules: FusionRules
) -> tuple[dict[str, list[float]], float]:
    """Times now over times then, one per family and network, and the reference's seconds."""
    models = [model for _, model in chosen]
    # Two looks, minutes apart for a whole profile and a minute here: what disturbs one is not said to be a change.
    looks = [timer(models, effort) for effort in (InsideEffort(), InsideEffort(profile_s=0.0))]
    seen = [one.reference_s for found in looks for one in found if one.latency is not None]
    if not seen:
        raise BackendError(f"None of the profile's networks could be timed: {looks[0][0].reason}.")
    then_s = float(profile.protocol["reference_s"])
    beside = (float(profile.protocol["profiler_s"]) / then_s, profile.call_s / then_s, 0.0)
    known: dict[str, dict[tuple[str, tuple[float, ...]], list[float]]] = {}
    for sample in profile.samples:
        of_network = known.setdefault(sample.network, {})
        of_network.setdefault((key_of(sample.spec), sample.at), []).append(sample.seconds)
    found: dict[str, list[float]] = {}
    for (network, model), insides in zip(chosen, zip(*looks, strict=True), strict=True):
        latencies = [one.latency for one in insides if one.latency is not None]
        if insides[0].latency is None:
            continue
        result = network_result(network.name, network.role, model, insides[0], rules)
        result.update(best_look([look_of(latency) for latency in latencies]))
        found.setdefault(WHOLE, []).append(result["best"] * then_s / network.latency_s)
        of_family: dict[str, list[tuple[float, float]]] = {}
        for kernel in result["observed"]:
            now = sample_of(kernel, network.role, then_s, result, beside)
            then = known.get(network.name, {}).get((key_of(kernel["spec"]), tuple(map(float, kernel["at"]))))
            if now is not None and then and statistics.median(then) >= _LEAST_S:
                of_family.setdefault(now.family, []).append((now.seconds, statistics.median(then)))
        for family, times in of_family.items():
            found.setdefault(family, []).append(sum(now for now, _ in times) / sum(then for _, then in times))
    return dict(sorted(found.items())), statistics.median(seen)


def _median(ratios: Sequence[float]) -> tuple[float, float, float, int]:
    """Median and a 95 % interval of it, from the median deviation."""
    logs = [math.log(max(r, 1e-9)) for r in ratios]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    half = 1.96 * 1.2533 * spread / math.sqrt(len(logs))  # sqrt(pi / 2): a median's error beside a mean's
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs)


def _percent(change: float) -> str:
    return f"{abs(change):.0%} {'longer' if change > 0 else 'less'}"
