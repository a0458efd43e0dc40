"""Runs in the worker: the latency of whole models, and of their kernels as the target's own profiler tells them.

Inside a model a kernel finds its activations where the one before has left them, in the runtime's own layout, and its
weights where the others have left room for them. A profiler slows every kernel down by about the same time, which
the latency and the sum of the kernels tell together. One model after another, in quiet moments, between runs of a
reference.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor import backends
from sartor.backends import host
from sartor.backends.inputs import random_inputs
from sartor.backends.kernel_timing import reference_s, undisturbed, warmed
from sartor.backends.protocol import Backend, TargetOptions
from sartor.backends.quiet import Quiet
from sartor.backends.serving import Send

_MOST_RUNS = 200
_LONG_S = 0.02
"""Of a model that takes so long, a visit is one run: quiet moments are short."""
_MOST_TRIES = 4  # visits for every one that shall be quiet
_FEWEST_PROFILED, _MOST_PROFILED = 8, 240
_FEWEST_RUNS = 16  # of a model, visits and those under the profiler together
_WARM_S = 0.12
_SETTLE_S = 0.02  # of runs before a visit: the reference's data are in the caches

Run = Callable[[], object]


def time_inside(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Latency and kernel times of many models. See `sartor.profiling.inside.ModelTimer`."""
    gc.disable()
    pinned = host.pin(int(request["threads"])) if request["pin"] else ()
    backend = backends.get(request["backend"])
    options = TargetOptions.from_dict(request["options"])
    run = _reference(backend, Path(request["reference"]).read_bytes(), options, request["seed"])
    quiet = Quiet(lambda: reference_s(run), request["level_s"])
    if not request["level_s"]:
        quiet.learn()
    deadline = time.monotonic() + request["limit_s"]
    for index, path in request["models"]:
        if time.monotonic() >= deadline:
            send({"event": "failed", "index": index, "reason": "the time limit was reached"})
            continue
        send({"event": "starting", "index": index})  # if it crashes here, this one is to blame
        try:
            found = _timed(backend, path, options, quiet, request, deadline)
        except Exception as error:
            send({"event": "failed", "index": index, "reason": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        send({"event": "timed", "index": index, **found})
    conditions = {**host.conditions(), "runtime": backend.capabilities().version, "pinned": list(pinned)}
    return {"conditions": conditions, "level_s": quiet.level_s}


def _reference(backend: Backend, model: bytes, options: TargetOptions, seed: int) -> Run:
    session = backend.compile(model, options)
    inputs = random_inputs(session.inputs, options.shapes, seed)
    session.run(inputs)
    once = session.prepare(inputs)
    return lambda: (session, once())  # what `prepare` gave may not keep the session alive


def _timed(
    backend: Backend,
    path: str,
    options: TargetOptions,
    quiet: Quiet,
    request: Mapping[str, Any],
    deadline: float,
) -> dict[str, Any]:
    from sartor.ir.load import load  # not with the worker, which limits what requests may import

    program = load(path)
    options = dataclasses.replace(options, shapes=dict(program.input_shapes))
    with tempfile.TemporaryDirectory(prefix="sartor-inside-") as folder:
        artifact = backend.lower(program, Path(folder) / "model", options)
        session = backend.load(artifact, options)
        inputs = random_inputs(session.inputs, options.shapes, request["seed"])
        session.run(inputs)  # checks names, types and shapes before anything is timed
        once = session.prepare(inputs)
        alone = request["threads"] == 1
        seconds = warmed(once, alone, _WARM_S)
        if seconds * _FEWEST_RUNS > deadline - time.monotonic():
            raise TimeoutError(
                f"an inference takes {seconds:.2g} s, too long for what is left of the time limit"
            )
        half = max(1, request["visits"] // 2)
        visits = _visits(once, seconds, quiet, half, request["visit_s"], alone)
        runs = min(_MOST_PROFILED, max(_FEWEST_PROFILED, round(request["profile_s"] / seconds)))
        before = quiet.wait()
        kernels = backend.profile(artifact, options, runs) if request["profile_s"] else []
        after = quiet.look()
        visits += _visits(once, seconds, quiet, half, request["visit_s"], alone)
    return {
        "visits": visits,
        "level_s": quiet.level_s,
        "kernels": [kernel.to_dict() for kernel in kernels],
        "before_s": before,
        "after_s": after,
    }


def _visits(
    once: Run, seconds: float, quiet: Quiet, count: int, visit_s: float, alone: bool
) -> list[list[float]]:
    """`[own, reference before, reference after]` per visit; own is the median of its undisturbed runs."""
    runs = min(_MOST_RUNS, max(1 if seconds > _LONG_S else 2, round(visit_s / max(seconds, 1e-7))))
    found: list[list[float]] = []
    good = 0
    while good < count and len(found) < _MOST_TRIES * count:
        before = quiet.wait()
        settled = time.monotonic() + _SETTLE_S
        once()  # discarded: between two runs of the model shall be nothing but itself
        while time.monotonic() < settled:
            once()
        taken = [undisturbed(once, alone) for _ in range(runs)]
        clean = [s for s, disturbed in taken if not disturbed] or [s for s, _ in taken]
        after = quiet.look()
        found.append([statistics.median(clean), before, after])
        good += quiet.now(before) and quiet.now(after)
    return found
