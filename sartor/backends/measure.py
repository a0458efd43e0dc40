"""Measuring: interleaved comparison, many small models, and kernel profiles, each in a subprocess."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import process
from sartor.backends.arrays import save_arrays
from sartor.backends.many_models import ModelTimes, time_models
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.rounds import CONFIDENCE, Round, median_interval, ratios
from sartor.errors import MetricUnavailableError, UsageError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LatencyStats", "Measurement", "ModelTimes", "Ratio", "measure", "profile", "time_models"]

_START_S = 300.0  # importing the vendor, loading and compiling, warm-up; beside the rounds' own limit


@dataclasses.dataclass(frozen=True)
class LatencyStats:
    """Quantiles of one artifact's inference time over all inner runs, seconds."""

    median: float
    p10: float
    p90: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Latency ratio to the baseline.

    Attributes:
        latency: median of the rounds' ratios.
        latency_ci95: distribution-free 95 % interval of that median; see `rounds.median_interval`.
    """

    latency: float
    latency_ci95: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One interleaved measurement and everything needed to judge it.

    Attributes:
        target: backend, version, threads, precision, shapes.
        conditions: machine, load, runtime, settings, warm-ups, inner runs.
        latencies: per artifact, the baseline first.
        ratios: per artifact after the first.
        rounds: raw.
        ended_by: `interval`, `time_limit` or `max_rounds`.
    """

    target: Mapping[str, Any]
    conditions: Mapping[str, Any]
    latencies: tuple[LatencyStats, ...]
    ratios: tuple[Ratio, ...]
    rounds: tuple[Round, ...]
    ended_by: str

    @property
    def baseline(self) -> LatencyStats:
        """Latency of the first artifact."""
        return self.latencies[0]

    @property
    def candidate(self) -> LatencyStats:
        """Latency of the second artifact. Raises MetricUnavailableError when there is none."""
        self._require_candidate()
        return self.latencies[1]

    @property
    def ratio(self) -> Ratio:
        """Ratio of the second artifact to the first. Raises MetricUnavailableError when there is none."""
        self._require_candidate()
        return self.ratios[0]

    def _require_candidate(self) -> None:
        if not self.ratios:
            raise MetricUnavailableError(
                "This measurement has one artifact, so it has no ratio; measure two to compare them."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, schema `sartor.measure/1`.

        One artifact has no `candidate` and no `ratio`; the third and later ones are in `others`, each
        with its `latency_s` and `ratio`.
        """
        document: dict[str, Any] = {
            "schema": "sartor.measure/1",
            "target": dict(self.target),
            "conditions": dict(self.conditions),
            "baseline": {"latency_s": dataclasses.asdict(self.baseline)},
        }
        entries = [
            {"latency_s": dataclasses.asdict(latency), "ratio": _ratio_to_dict(ratio)}
            for latency, ratio in zip(self.latencies[1:], self.ratios, strict=True)
        ]
        if entries:
            document["candidate"] = {"latency_s": entries[0]["latency_s"]}
            document["ratio"] = entries[0]["ratio"]
        if entries[1:]:
            document["others"] = entries[1:]
        document["rounds"] = [self._round_to_dict(r) for r in self.rounds]
        document["ended_by"] = self.ended_by
        return document

    def _round_to_dict(self, done: Round) -> dict[str, Any]:
        labels = ["baseline", "candidate", *(f"other{i}" for i in range(len(self.latencies) - 2))]
        entry: dict[str, Any] = {
            "order": [labels[i] for i in done.order],
            "visits_s": list(done.visits_s),
        }
        for index in range(len(self.latencies)):
            entry[f"{labels[index]}_s"] = done.seconds(index)
        return entry


def measure(
    backend_name: str,
    artifacts: Sequence[Artifact],
    options: TargetOptions | None = None,
    *,
    min_rounds: int = 12,
    max_rounds: int = 200,
    time_limit_s: float = 60.0,
    target_half_width: float = 0.02,
    visit_s: float = 0.06,
    warm_up_runs: int = 5,
    seed: int = 0,
    inputs: Mapping[str, np.ndarray] | None = None,
    memory_limit_bytes: int | None = None,
    on_round: Callable[[Round], None] = lambda _: None,
) -> Measurement:
    """Measure artifacts against the first of them, interleaved, in a fresh subprocess.

    Inputs and outputs are bound before the clock starts. One visit runs an artifact for about
    `visit_s` and gives the median of its inner runs; one round visits every artifact twice in
    mirrored order; the ratio of a round is candidate over baseline; the result is the median over
    rounds with a 95 % interval. Denormals are flushed to zero for all artifacts alike: random or
    freshly pruned weights produce them, and they slow arithmetic by an order of magnitude that has
    nothing to do with the network's structure.

    Args:
        backend_name: registered backend.
        artifacts: lowered by that backend; the first is the baseline.
        options: threads, precision, and shapes instead of the artifacts' reference shapes. An artifact that was
            lowered for another precision runs in its own.
        min_rounds: never fewer, unless the time is over.
        max_rounds: never more.
        time_limit_s: for the rounds together; at least `rounds.FEWEST_ROUNDS` are always made.
        target_half_width: of the interval, as a share of the ratio, at which measuring ends.
        visit_s: length of one visit, seconds.
        warm_up_runs: at least, per artifact; and at least 0.2 s.
        seed: of the order of visits and of the random inputs.
        inputs: arrays by name instead of random ones, for networks whose work depends on the data.
        memory_limit_bytes: address space of the subprocess.
        on_round: called after each round, for progress.

    Raises:
        UsageError: no artifact, options that the backend refuses.
        BackendError: the backend failed, crashed, or did not finish.
    """
    if not artifacts:
        raise UsageError("No artifact to measure; pass at least one.")
    options = dataclasses.replace(options or TargetOptions(), flush_denormals=True)
    request = {
        "command": "measure",
        "backend": backend_name,
        "options": options.to_dict(),
        "artifacts": [{"artifact": a.to_dict(), "folder": str(a.folder.resolve())} for a in artifacts],
        "min_rounds": min_rounds,
        "max_rounds": max(max_rounds, min_rounds),
        "rounds_limit_s": time_limit_s,
        "target_half_width": target_half_width,
        "visit_s": visit_s,
        "warm_up_runs": warm_up_runs,
        "seed": seed,
    }

    def forward(message: dict[str, Any]) -> None:
        on_round(_round(message))

    with tempfile.TemporaryDirectory(prefix="sartor-measure-") as folder:
        if inputs is not None:
            given = Path(folder) / "inputs.npz"
            save_arrays(given, inputs)
            request["inputs"] = str(given)
        answer = process.call(
            request,
            threads=options.threads,
            time_limit_s=_START_S + 4 * time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
            on_event=forward,
        )
    rounds = tuple(_round(r) for r in answer["rounds"])
    return Measurement(
        target={
            "name": backend_name,
            "version": answer["conditions"]["runtime"],
            "threads": options.threads,
            "precision": options.precision,
            "shapes": {n: list(s) for n, s in {**artifacts[0].shapes, **options.shapes}.items()},
        },
        conditions={
            **answer["conditions"],
            "inputs": "given" if inputs is not None else "random",
            "seed": seed,
            "visit_s": visit_s,
            "target_half_width": target_half_width,
            "time_limit_s": time_limit_s,
            "statistic": "median over rounds of candidate_s / baseline_s; order-statistic 95 % interval",
        },
        latencies=tuple(LatencyStats(**stats) for stats in answer["latencies"]),
        ratios=tuple(_ratio(rounds, index) for index in range(1, len(artifacts))),
        rounds=rounds,
        ended_by=answer["ended_by"],
    )


def profile(
    backend_name: str,
    artifact: Artifact,
    options: TargetOptions | None = None,
    *,
    runs: int = 30,
    time_limit_s: float = 300.0,
) -> list[KernelTime]:
    """Time per kernel of one artifact, in a fresh subprocess.

    Raises:
        UsageError: options that the backend refuses.
        BackendError: the backend failed, crashed, or did not finish.
    """
    options = dataclasses.replace(options or TargetOptions(), flush_denormals=True)
    request = {
        "command": "profile",
        "backend": backend_name,
        "options": options.to_dict(),
        "artifact": artifact.to_dict(),
        "folder": str(artifact.folder.resolve()),
        "runs": runs,
    }
    answer = process.call(request, threads=options.threads, time_limit_s=time_limit_s)
    return [KernelTime.from_dict(kernel) for kernel in answer["kernels"]]


def _ratio(rounds: Sequence[Round], index: int) -> Ratio:
    samples = ratios(rounds, index)
    return Ratio(statistics.median(samples), median_interval(samples, CONFIDENCE))


def _ratio_to_dict(ratio: Ratio) -> dict[str, Any]:
    return {"latency": ratio.latency, "latency_ci95": list(ratio.latency_ci95)}


def _round(message: Mapping[str, Any]) -> Round:
    return Round(tuple(message["order"]), tuple(message["visits_s"]))
