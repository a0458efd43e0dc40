"""Runs in the worker: times of many models that are held together, a reference between them, pinned where possible."""

from __future__ import annotations

import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor import backends
from sartor.backends import host
from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import TargetOptions
from sartor.backends.serving import Send
from sartor.backends.visits import visit_all

_REFERENCE_RUNS = 3
_FEWEST_RUNS, _MOST_RUNS = 2, 300
_WARM_RUNS, _WARMEST_S = 3, 0.5
"""A model that was just loaded is slower by a tenth to a half (seen: for 0.05 to 0.5 s of runs)."""
_BLOCK_S, _STILL = 0.04, 0.98  # it is not warm yet if a block of runs takes less than this of the one before

Run = Callable[[], object]


class _Subject:
    """One compiled model with its inputs."""

    def __init__(self, backend: Any, model: bytes, options: TargetOptions, seed: int):
        session = backend.compile(model, options)
        inputs = random_inputs(session.inputs, options.shapes, seed)
        session.run(inputs)  # checks names, types and shapes before anything is timed
        self.run: Run = session.prepare(inputs)
        self._kept = (session, inputs)  # what `prepare` gave may not keep them alive

    def warm_up(self, visit_s: float, warm_s: float, alone: bool) -> None:
        """Run until the first runs' allocations are over, and choose how many runs a visit has."""
        if warm_s:
            seconds = warmed(self.run, alone, warm_s)
        else:
            seconds = min(_seconds(self.run) for _ in range(2))
        wanted = round(visit_s / max(seconds, 1e-7))
        self.runs = max(_FEWEST_RUNS if seconds < 0.5 else 1, min(_MOST_RUNS, wanted))

    def visit(self, settle_s: float, quantile: float, alone: bool) -> float:
        """One visit; `alone`: one thread computes."""
        settled = time.monotonic() + settle_s
        self.run()  # discarded: another model's data are in the caches
        while time.monotonic() < settled:
            self.run()
        taken = [undisturbed(self.run, alone) for _ in range(self.runs)]
        clean = [seconds for seconds, disturbed in taken if not disturbed]
        return float(np.quantile(clean or [seconds for seconds, _ in taken], quantile))


def time_kernels(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Visits of many models. See `sartor.profiling.timing.KernelTimer`.

    Of the models in `request["models"]`, index -1 is the reference.
    """
    gc.disable()
    pinned = host.pin(int(request["threads"])) if request["pin"] else ()
    backend = backends.get(request["backend"])
    options = TargetOptions.from_dict(request["options"])
    begun = time.monotonic()
    deadline = begun + request["limit_s"]
    subjects: dict[int, _Subject] = {}
    for index, path in request["models"]:
        if subjects and time.monotonic() >= deadline:
            send({"event": "failed", "index": index, "reason": "the time limit was reached"})
            continue
        send({"event": "starting", "index": index})  # if it crashes here, this one is to blame
        try:
            subject = _Subject(backend, Path(path).read_bytes(), options, request["seed"])
            subject.warm_up(request["visit_s"], request["warm_s"], request["threads"] == 1)
        except Exception as error:
            send({"event": "failed", "index": index, "reason": f"{type(error).__name__}: {error}"})
            continue
        subjects[index] = subject
    send({"event": "loaded"})
    reference = subjects.pop(-1, None)
    if reference is None:
        return {"conditions": {}, "reference_failed": True}
    loaded = time.monotonic()
    how = (float(request["settle_s"]), float(request["quantile"]), request["threads"] == 1)
    visits = visit_all(
        {i: functools.partial(subject.visit, *how) for i, subject in subjects.items()},
        lambda: reference_s(reference.run),
        half_width=request["half_width"],
        fewest=request["fewest"],
        most=request["most"],
        deadline=deadline,
        clock=time.monotonic,
        seed=request["seed"],
    )
    for index, found in visits.items():
        entries = [[v.own_s, v.before_s, v.after_s] for v in found]
        send({"event": "timed", "index": index, "visits": entries})
    spent = {"loading_s": round(loaded - begun, 3), "visits_s": round(time.monotonic() - loaded, 3)}
    runtime = backend.capabilities().version
    return {"conditions": {**host.conditions(), "runtime": runtime, "pinned": list(pinned), **spent}}


def reference_s(run: Run) -> float:
    """Seconds of the reference, the fastest of a few runs."""
    run()
    return min(_seconds(run) for _ in range(_REFERENCE_RUNS))


def undisturbed(run: Run, alone: bool) -> tuple[float, bool]:
    """Seconds of a run, and whether other processes had the processor meanwhile and that could not be taken out.

    Where one thread computes and the scheduler has interrupted it, the time that it computed is known.
    """
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    computed = time.process_time_ns()
    seconds = _seconds(run)
    computed = time.process_time_ns() - computed
    if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches:
        return seconds, False
    return (min(seconds, computed * 1e-9), False) if alone else (seconds, True)


def warmed(run: Run, alone: bool, least_s: float) -> float:
    """Seconds of a run of a model, after so many that it becomes no faster."""
    begun, before = time.monotonic(), 0.0
    while True:
        block = time.monotonic()
        taken: list[float] = []
        while len(taken) < _WARM_RUNS or time.monotonic() < block + _BLOCK_S:
            taken.append(undisturbed(run, alone)[0])
        seconds, spent = statistics.median(taken), time.monotonic() - begun
        if spent >= _WARMEST_S or (spent >= least_s and seconds >= _STILL * before):
            return seconds
        before = seconds


def _seconds(run: Run) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) * 1e-9
