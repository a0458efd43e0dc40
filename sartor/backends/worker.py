"""The subprocess behind `process.call`: `python -m sartor.backends.worker`.

Backends run here and nowhere near the caller's process: a crash, a hang or a changed floating-point
mode ends with this process. It ends with the caller's process, too, even where that is killed.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sartor import backends
from sartor.backends import host
from sartor.backends.arrays import load_arrays, save_arrays
from sartor.backends.inputs import random_inputs
from sartor.backends.kernel_timing import time_kernels
from sartor.backends.model_timing import time_inside
from sartor.backends.precision import as_lowered
from sartor.backends.protocol import Artifact, Backend, Session, TargetOptions
from sartor.backends.rounds import Round, run_rounds
from sartor.backends.serving import Command, Send, serve

__all__ = ["COMMANDS", "Command", "Send", "serve"]

_WARM_UP_S = 0.2
_FEWEST_INNER = 3
_MOST_INNER = 100_000
_REFERENCE_SIZE = 192  # a matrix product of about 0.2 ms on one core
_BATCH = 32  # models held at once by `time_models`
_VISIT_KERNEL_S = 0.006


def measure(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Interleaved rounds over artifacts. See `sartor.backends.measure.measure`."""
    gc.disable()  # a collection inside a timed run would be an outlier of ours
    backend = backends.get(request["backend"])
    options = TargetOptions.from_dict(request["options"])
    artifacts = [Artifact.from_dict(a["artifact"], Path(a["folder"])) for a in request["artifacts"]]
    load_before = host.load_average()
    subjects = _Subjects(backend, artifacts, options, request)
    warm = [_warm_up(run, request["warm_up_runs"]) for run in subjects.runners]
    inner = [_inner_runs(seconds, request["visit_s"]) for seconds, _ in warm]
    durations: list[list[float]] = [[] for _ in artifacts]

    def visit(index: int) -> float:
        samples = _time_runs(subjects.runners[index], inner[index])
        durations[index].extend(samples)
        return statistics.median(samples)

    def after_round(done: Round) -> None:
        send({"event": "round", "order": done.order, "visits_s": done.visits_s})
        subjects.maybe_reload()

    rounds, ended_by = run_rounds(
        visit,
        len(artifacts),
        min_rounds=request["min_rounds"],
        max_rounds=request["max_rounds"],
        time_limit_s=request["rounds_limit_s"],
        target_half_width=request["target_half_width"],
        seed=request["seed"],
        clock=time.monotonic,
        on_round=after_round,
    )
    return {
        "rounds": [{"order": r.order, "visits_s": r.visits_s} for r in rounds],
        "ended_by": ended_by,
        "latencies": [
            {"median": q[1], "p10": q[0], "p90": q[2]}
            for q in (np.quantile(samples, [0.1, 0.5, 0.9]).tolist() for samples in durations)
        ],
        "conditions": {
            **host.conditions(),
            "load_average": {"before": load_before, "after": host.load_average()},
            "runtime": backend.capabilities().version,
            "session": [dict(session.settings) for session in subjects.sessions],
            "warm_up_runs": [runs for _, runs in warm],
            "inner_runs": inner,
            "discarded_runs_per_visit": 1,
            "loads": subjects.loads,
        },
    }


class _Subjects:
    """The artifacts under measurement, loaded anew between rounds.

    Where a session's weights and buffers happen to lie in memory moves its speed by some tenths of a
    percent, for as long as it lives. One load per artifact would turn that accident into a bias that
    no number of rounds shows; reloading turns it into noise between rounds, which the interval covers.
    """

    def __init__(
        self,
        backend: Backend,
        artifacts: Sequence[Artifact],
        options: TargetOptions,
        request: Mapping[str, Any],
    ):
        self._backend = backend
        self._artifacts = artifacts
        self._options = options
        self._request = request
        self._generator = random.Random(request["seed"])
        self._padding: list[bytearray] = []
        self.loads = 0
        self._load()

    def maybe_reload(self) -> None:
        """Reload when the rounds since the last load took at least as long as that load."""
        if time.monotonic() - self._loaded_at >= self._load_s:
            self._load()

    def _load(self) -> None:
        started = time.monotonic()
        self.sessions: list[Any] = [None] * len(self._artifacts)
        self.runners: list[Any] = [None] * len(self._artifacts)
        # A random order and random gaps: else the allocator hands out the same places again.
        self._padding.clear()
        for index in self._generator.sample(range(len(self._artifacts)), len(self._artifacts)):
            self._padding.extend(bytearray(self._generator.randrange(1, 1 << 16)) for _ in range(8))
            artifact = self._artifacts[index]
            shapes = {**artifact.shapes, **self._options.shapes}
            options = as_lowered(artifact, dataclasses.replace(self._options, shapes=shapes))
            session = self._backend.load(artifact, options)
            self.sessions[index] = session
            self.runners[index] = _prepare(session, _inputs(session, shapes, self._request))
        for run in self.runners if self.loads else ():
            _warm_up(run, 1, at_least_s=0.005)
        self.loads += 1
        self._loaded_at = time.monotonic()
        self._load_s = self._loaded_at - started


def time_models(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Minimum-like time of many small models. See `sartor.backends.measure.time_models`."""
    gc.disable()
    backend = backends.get(request["backend"])
    options = TargetOptions.from_dict(request["options"])
    deadline = time.monotonic() + request["models_limit_s"]
    reference = _reference_kernel()
    _warm_up(reference, 20)
    generator = random.Random(request["seed"])
    todo: list[tuple[int, str]] = [(int(i), path) for i, path in request["models"]]
    for start in range(0, len(todo), _BATCH):
        batch: dict[int, tuple[Callable[[], object], int]] = {}
        for index, path in todo[start : start + _BATCH]:
            if time.monotonic() >= deadline:
                send({"event": "failed", "index": index, "reason": "the time limit was reached"})
                continue
            send({"event": "starting", "index": index})  # if it crashes here, this one is to blame
            try:
                session = backend.compile(Path(path).read_bytes(), options)
                run = _prepare(session, _inputs(session, options.shapes, request))
                seconds, _ = _warm_up(run, 2, at_least_s=0.002)
            except Exception as error:
                send({"event": "failed", "index": index, "reason": f"{type(error).__name__}: {error}"})
                continue
            batch[index] = (run, _inner_runs(seconds, _VISIT_KERNEL_S))
        samples: dict[int, list[tuple[float, float]]] = {index: [] for index in batch}
        for _ in range(request["repeats"]):
            order = list(batch)
            generator.shuffle(order)
            for index in order:
                run, inner = batch[index]
                beside = min(_time_runs(reference, 4))
                samples[index].append((float(np.quantile(_time_runs(run, inner), 0.1)), beside))
            if time.monotonic() >= deadline:
                break
        for index, pairs in samples.items():
            send({"event": "timed", "index": index, "samples": pairs})
    return {"conditions": {**host.conditions(), "runtime": backend.capabilities().version}}


def profile(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Kernel times of one artifact."""
    backend = backends.get(request["backend"])
    artifact = Artifact.from_dict(request["artifact"], Path(request["folder"]))
    options = TargetOptions.from_dict(request["options"])
    shapes = {**artifact.shapes, **options.shapes}
    options = TargetOptions.from_dict({**options.to_dict(), "shapes": shapes})
    kernels = backend.profile(artifact, options, request["runs"])
    return {"kernels": [kernel.to_dict() for kernel in kernels]}


_loaded: dict[str, Session] = {}
"""Sessions of this process, by artifact folder."""


def run(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """One inference of an artifact, which is loaded at the first. See `sartor.backends.isolation.Session`."""
    folder = request["folder"]
    if folder not in _loaded:
        artifact = Artifact.from_dict(request["artifact"], Path(folder))
        options = TargetOptions.from_dict(request["options"])
        _loaded[folder] = backends.get(request["backend"]).load(artifact, options)
    save_arrays(Path(request["outputs"]), _loaded[folder].run(load_arrays(Path(request["inputs"]))))
    return {}


def lower(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """One program to an artifact. See `sartor.backends.isolation.lower`."""
    from sartor.ir import transport

    program = transport.read(Path(request["program"]))
    options = TargetOptions.from_dict(request["options"])
    backends.get(request["backend"]).lower(program, Path(request["folder"]), options)
    return {}


COMMANDS: Mapping[str, Command] = {
    "lower": lower,
    "run": run,
    "measure": measure,
    "time_models": time_models,
    "time_kernels": time_kernels,
    "time_inside": time_inside,
    "profile": profile,
}


def _inputs(
    session: Session, shapes: Mapping[str, tuple[int, ...]], request: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    if request.get("inputs"):
        return load_arrays(Path(request["inputs"]))
    return random_inputs(session.inputs, shapes, request["seed"])


def _prepare(session: Session, inputs: dict[str, np.ndarray]) -> Callable[[], object]:
    session.run(inputs)  # checks names, types and shapes before anything is timed
    return session.prepare(inputs)


def _warm_up(run: Callable[[], object], runs: int, at_least_s: float = _WARM_UP_S) -> tuple[float, int]:
    """Run at least `runs` times and `at_least_s`; returns the median of the later half, and the count."""
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < runs or time.perf_counter() - started < at_least_s:
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[len(samples) // 2 :]), len(samples)


def _inner_runs(seconds: float, visit_s: float) -> int:
    fewest = _FEWEST_INNER if seconds < 0.5 else 1
    return max(fewest, min(_MOST_INNER, round(visit_s / max(seconds, 1e-7))))


def _time_runs(run: Callable[[], object], runs: int) -> list[float]:
    run()  # discarded: the other artifact's weights are in the caches
    samples = [0] * runs
    clock = time.perf_counter_ns
    for index in range(runs):
        begin = clock()
        run()
        samples[index] = clock() - begin
    return [sample * 1e-9 for sample in samples]


def _reference_kernel() -> Callable[[], object]:
    matrix = np.random.default_rng(0).standard_normal((_REFERENCE_SIZE, _REFERENCE_SIZE), dtype=np.float32)
    out = np.empty_like(matrix)
    return lambda: np.matmul(matrix, matrix, out=out)


if __name__ == "__main__":
    serve(COMMANDS)
