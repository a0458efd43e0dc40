"""What a builder has measured so far, in a journal, and the profile that it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample
from sartor.journal import Journal
from sartor.profiling.design import Point

SENTENCE = (
    "each kernel alone in one model, visits of a few ms between runs of a reference convolution in the same runtime; "
    "p10 of a visit over the mean of the reference before and after it; visits beside a changing reference and far "
    "ones dropped; median, repeated until the 95 % interval is narrow; cold: caches overwritten, inputs read again, "
    "one run, the faster half of the visits; call and layout conversions subtracted"
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
        """Kernels that were tried."""
        for result in self._results("design", "refine"):
            yield Point(result["spec"], tuple(result["at"]), result["family"])

    @property
    def reference_s(self) -> float:
        """Seconds of the reference, on whose scale all times are: what it takes on a good day of this run."""
        seen = [s for record in self._journal.records for s in record.get("references_s", ())]
        return float(np.quantile(seen, 0.1)) if seen else 1.0

    def _results(self, *stages: str) -> Iterator[dict[str, Any]]:
        for stage in stages:
            for record in self.batches(stage):
                yield from record["results"]

    def profile(
        self, target: Mapping[str, Any], device: Mapping[str, Any], minutes: float, ended_by: str
    ) -> DeviceProfile:
        """Everything so far, without models."""
        scale = self.reference_s
        kernels, whole = [*self._results("design", "refine")], [*self._results("networks")]
        boundary = self.find("boundary")
        call = boundary["ratios"][0] if boundary else None
        conditions: Mapping[str, Any] = next((r["conditions"] for r in reversed(self.batches("design"))), {})
        return DeviceProfile(
            target=target,
            device={**device, "clocks": {**device.get("clocks", {}), "reference_s": scale}},
            protocol={
                "sentence": SENTENCE,
                "reference": "Conv 3x3, 48 to 48 channels on 28 x 28, Relu",
                "reference_s": scale,
                "statistic": "p10 of a visit; median of visits; Student's 95 % interval",
                "visits": sum(int(r.get("visits", 0)) for r in kernels),
                "kernels": sum("ratio" in r for r in kernels),
                "networks": sum("ratio" in r for r in whole),
                "minutes": minutes,
                "spent_s": round(self.spent_s, 1),
                "ended_by": ended_by,
                "pinned": conditions.get("pinned", []),
            },
            call_s=(call or 0.0) * scale,
            samples=tuple(_sample(r, scale) for r in kernels if "ratio" in r),
            failures=tuple(
                {"spec": r["spec"], "at": r["at"], "reason": r["reason"]} for r in kernels if "reason" in r
            ),
            networks=tuple(_network(r, scale) for r in whole if "ratio" in r),
        )


def _sample(result: Mapping[str, Any], scale: float) -> Sample:
    extra = result["cold_extra"]
    return Sample(
        spec=result["spec"],
        at=tuple(map(float, result["at"])),
        family=result["family"],
        warm_s=result["ratio"] * scale,
        cold_s=None if extra is None else (result["ratio"] + extra) * scale,
        half_width=result["half_width"],
        role=result["role"],
    )


def _network(result: Mapping[str, Any], scale: float) -> NetworkTime:
    latency = result["ratio"] * scale
    half = result["half_width"]
    return NetworkTime(
        name=result["name"],
        kernels=tuple((spec, tuple(map(float, at)), count) for spec, at, count in result["kernels"]),
        weight_bytes=result["weight_bytes"],
        latency_s=latency,
        ci95=(latency / (1 + half), latency * (1 + half)),
        role=result["role"],
    )
