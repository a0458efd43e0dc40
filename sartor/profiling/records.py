"""What a builder has measured so far, in a journal, and the profile that it makes."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.backends.quiet import level
from sartor.backends.visits import Summary
from sartor.cost_models.fitting import alike_in, twins_of
from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample
from sartor.ir.fusion_rules import FusionRules
from sartor.journal import Journal
from sartor.profiling.design import Point
from sartor.profiling.inside import Inside
from sartor.profiling.inside_samples import describe
from sartor.versions import versions

SENTENCE = (
    "kernels and copies inside models, as the target's own profiler tells them, and how many there are of their "
    "operator: generated networks, and carriers in which drawn kernels stand side by side; medians "
    "over at least eight inferences, or the fastest of them, "
    "over the mean of a reference convolution in the same runtime before and after, in moments in which that is "
    "near the fastest that is no luck; the profiler's own part of a kernel, known from what whole networks take "
    "without it, is subtracted. Models: when they are warm, lower quartiles of visits in such moments, each the median "
    "of its runs, and of two looks; those at networks are minutes apart, and more where they contradict each other"
)


class Records:
    """Times in units of the reference, by stage.

    Args:
        journal: of the run; what it holds counts as done.
        clock: monotonic seconds.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic):
        self._journal, self._clock = journal, clock
        self._before_s = sum(float(r.get("spent_s", 0.0)) for r in journal.records)
        self._begun = self._last = clock()
        self._references: list[float] = []

    @property
    def spent_s(self) -> float:
        """Seconds of measuring, those of earlier runs included."""
        return self._before_s + self._clock() - self._begun

    def saw(self, reference_s: float) -> None:
        """Note how fast the reference was, for the next record."""
        if reference_s > 0:
            self._references.append(reference_s)

    def add(self, stage: str, **fields: Any) -> dict[str, Any]:
        """Write a record, with the time since the last one."""
        now = self._clock()
        spent, self._last = now - self._last, now
        references, self._references = self._references, []
        return self._journal.append(stage, spent_s=round(spent, 3), references_s=references, **fields)

    def find(self, stage: str) -> dict[str, Any] | None:
        """The latest record of a stage."""
        return self._journal.find(stage)

    def batches(self, stage: str) -> list[dict[str, Any]]:
        """All records of a stage."""
        return [record for record in self._journal.records if record["kind"] == stage]

    def next(self, stage: str) -> int:
        """Number of the next batch of a stage."""
        return len(self.batches(stage))

    def points(self) -> Iterator[Point]:
        """Kernels that were drawn."""
        for result in self._results("design", "refine"):
            yield Point(result["spec"], tuple(result["at"]), result["family"])

    @property
    def reference_s(self) -> float:
        """Seconds of the reference, on whose scale all times are: what it takes in quiet moments of this run."""
        seen = [s for record in self._journal.records for s in record.get("references_s", ())]
        return level(seen) if seen else 1.0

    def _results(self, *stages: str) -> Iterator[dict[str, Any]]:
        for stage in stages:
            for record in self.batches(stage):
                yield from record["results"]

    def _looks(self) -> dict[str, list[dict[str, Any]]]:
        """All looks at each network."""
        found: dict[str, list[dict[str, Any]]] = {}
        for result in self._results("networks", "anchors", "again", "doubted"):
            if "ratio" in result:
                found.setdefault(result["name"], []).append(result)
        return found

    def doubted(self) -> list[str]:
        """Networks that were looked at more than once, and no two looks agree; not those that never will."""
        return [
            name
            for name, looks in self._looks().items()
            if 1 < len(looks) < _MOST_LOOKS
            and all(
                b > _ALIKE * a for a, b in itertools.pairwise(sorted(float(look["ratio"]) for look in looks))
            )
        ]

    def profile(
        self, target: Mapping[str, Any], device: Mapping[str, Any], minutes: float, ended_by: str
    ) -> DeviceProfile:
        """Everything so far, without models."""
        scale = self.reference_s
        drawn, whole = [*self._results("design", "refine")], [*self._results("networks")]
        timed = [r for r in whole if "ratio" in r]
        looks = self._looks()
        timed = [{**n, **best_look(looks[n["name"]])} for n in timed]
        known = self.find("call")
        call = float(known["ratio"] or 0.0) if known else 0.0
        overhead = _overhead(timed, call)
        models = timed or [r["model"] for r in drawn if "ratio" in r]
        doubt = statistics.median(m["half_width"] for m in models) if models else 0.0
        beside = (overhead, call, doubt)
        inside = [(kernel, network) for network in timed for kernel in network["observed"]]
        conditions: Mapping[str, Any] = next(
            (r["conditions"] for r in reversed(self.batches("networks")) if "conditions" in r), {}
        )
        samples = [
            *(sample_of(r, r["role"], scale, r["model"], beside) for r in drawn if "ratio" in r),
            *(sample_of(k, n["role"], scale, n, beside) for k, n in inside),
        ]
        return DeviceProfile(
            target=target,
            device={**device, "clocks": {**device.get("clocks", {}), "reference_s": scale}},
            protocol={
                "sentence": SENTENCE,
                "reference": "Conv 3x3, 48 to 48 channels on 28 x 28, Relu",
                "reference_s": scale,
                "statistic": "median of inferences; lower quartile of visits; Student's 95 % interval",
                "profiler_s": overhead * scale,
                "kernels": sum(s is not None for s in samples),
                "networks": len(timed),
                "minutes": minutes,
                "spent_s": round(self.spent_s, 1),
                "ended_by": ended_by,
                "versions": versions(str(target.get("name", ""))),
                "pinned": conditions.get("pinned", []),
            },
            call_s=call * scale,
            samples=tuple(s for s in samples if s is not None),
            failures=tuple(
                {"spec": r["spec"], "at": r["at"], "reason": r["reason"]} for r in drawn if "reason" in r
            ),
            networks=tuple(_network(r, scale) for r in timed),
        )


_NOISE, _RESOLUTION = 0.03, 3e-7  # half width of a kernel's interval: a share, and seconds
_LEAST_OWN = 0.1  # of what the profiler says of a kernel, whatever its own part is


def _overhead(networks: Sequence[Mapping[str, Any]], call: float) -> float:
    """What a profiler adds to a kernel, in units of the reference: `latency = call + kernels - overhead · count`.

    Least squares of the relative error over networks, without those that lie far off; not below zero, and nothing where
    there are too few networks.
    """
    if len(networks) < _FEWEST_NETWORKS:
        return 0.0
    latency = np.array([n["ratio"] for n in networks])
    beyond = (np.array([n["sum"] for n in networks]) + call - latency) / latency
    count = np.array([float(n["rows"]) for n in networks]) / latency
    keep = np.ones(len(networks), bool)
    found = 0.0
    for _ in range(3):
        found = float(count[keep] @ beyond[keep] / (count[keep] @ count[keep]))
        error = np.abs(count * found - beyond)
        keep = error <= 3 * 1.4826 * np.median(error) + 1e-9
    return max(found, 0.0)


_FEWEST_NETWORKS = 4
_MOST_SCALED, _MOST_APART = 1.3, 3.0
_OTHER_STATE = 1 / 1.2
"""A model that takes less than this of the sum of its kernels: they were timed in another state of the machine, which
does not slow all of them down alike (seen: a product with 100 MB of weights, twice as long)."""
_SCATTER = 0.03  # of a latency against the sum of its kernels
_ALIKE, _MOST_LOOKS = 1.04, 4
"""How near two looks are that agree; looks at a network that are enough, if they do not."""


def sample_of(
    result: Mapping[str, Any],
    role: str,
    scale: float,
    model: Mapping[str, Any],
    beside: tuple[float, float, float],
) -> Sample | None:
    """One kernel without the profiler's own part, on the scale of its model's latency, which more runs say better.

    Args:
        result: of the kernel.
        role: of the sample.
        scale: seconds of the reference.
        model: `ratio`, `sum` and `rows` of the model that it ran in; `best` of the looks at it, and its `half_width`;
            its `name`, if it is a network.
        beside: the profiler's part of a kernel in models at large, an empty call, and how well models are known.
    """
    typical, call, doubt = beside
    # Where kernels are short, what a profiler writes down displaces more of the caches beside what they take.
    # A model tells how much that is the better, the more of its time it is.
    own_part = (model["sum"] + call - model["ratio"]) / model["rows"]
    share = (model["rows"] * typical / model["ratio"]) ** 2
    overhead = (share * own_part + _SCATTER**2 * typical) / (share + _SCATTER**2)
    overhead = min(max(overhead, typical / _MOST_APART), typical * _MOST_APART)
    latency = model["best"]
    factor = (latency - call) / max(model["sum"] - overhead * model["rows"], 1e-9)
    if factor < _OTHER_STATE:
        return None
    own = max(result["ratio"] - result["rows"] * overhead, _LEAST_OWN * result["ratio"])
    own_s = own * scale * min(max(factor, 1 / _MOST_SCALED), _MOST_SCALED)
    # The interval of four visits is itself known within a factor of three.
    model_half_width = math.sqrt(model["half_width"] * doubt)
    return Sample(
        spec=result["spec"],
        at=tuple(map(float, result["at"])),
        family=result["family"],
        seconds=own_s,
        half_width=min(1.0, math.hypot(_NOISE, _RESOLUTION / own_s, model_half_width)),
        role=role,
        period_s=latency * scale,
        alike=result["alike"],
        twins=result["twins"],
        network=model.get("name", ""),
        carried="name" not in model,
    )


def look_of(latency: Summary) -> dict[str, float]:
    """What is written down of one look at a model."""
    return {"ratio": latency.ratio, "half_width": min(latency.half_width, 1.0)}


def best_look(looks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The lower quartile of the looks at a model, of up to four the fastest; and its half width.

    What disturbs a time makes it longer, and two that were disturbed may agree: only for many looks is luck likelier.
    """
    if not looks:
        return {"best": math.nan, "half_width": 1.0}
    ordered = sorted(looks, key=lambda look: float(look["ratio"]))
    best = ordered[(len(ordered) - 1) // 4]
    ratios = [float(look["ratio"]) for look in ordered[ordered.index(best) :]]
    agreeing = [ratio for ratio in ratios if ratio <= _ALIKE * ratios[0]]
    nearest = agreeing[-1] if len(agreeing) > 1 else ratios[min(1, len(ratios) - 1)]
    half = math.hypot(float(best["half_width"]), math.log(nearest / ratios[0]) / 2) / math.sqrt(len(agreeing))
    return {"best": ratios[0], "half_width": min(half, 1.0)}


def network_result(
    name: str, role: str, model: bytes, inside: Inside, rules: FusionRules, keep: Sequence[str] = ()
) -> dict[str, Any]:
    """What is written down of a network and of the kernels inside it.

    Args:
        name: equal names, equal networks.
        role: as of a sample.
        model: serialized ONNX.
        inside: what was timed of it.
        rules: what the target runs as one kernel.
        keep: names of parameters that no plan narrows, beside those that none can.
    """
    if inside.latency is None:
        return {"name": name, "reason": inside.reason}
    described = describe(model, inside.kernels, rules, keep)
    alike = alike_in((signature.spec, sizes, count) for signature, sizes, count in described.kernels)
    often = Counter({(signature.key, sizes): count for signature, sizes, count in described.kernels})
    return {
        "name": name,
        "sha256": hashlib.sha256(model).hexdigest(),
        **look_of(inside.latency),
        "kernels": [[signature.spec, list(sizes), count] for signature, sizes, count in described.kernels],
        "observed": [
            {
                "spec": one.signature.spec,
                "family": one.signature.family,
                "at": list(one.sizes),
                "ratio": one.ratio,
                "rows": one.rows,
                "alike": max(alike[one.signature.family, one.signature.spec["op"]], 1),
                "twins": twins_of(one.signature.family, max(often[one.signature.key, one.sizes], 1)),
            }
            for one in described.observed
            if one.ratio > 0
        ],
        "rows": described.rows,
        "sum": described.ratio,
        "role": role,
    }


def _network(result: Mapping[str, Any], scale: float) -> NetworkTime:
    latency, half = result["best"] * scale, result["half_width"]
    return NetworkTime(
        name=result["name"],
        kernels=tuple((spec, tuple(map(float, at)), count) for spec, at, count in result["kernels"]),
        latency_s=latency,
        ci95=(latency / (1 + half), latency * (1 + half)),
        role=result["role"],
        sha256=result["sha256"],
    )
