"""The subprocess that is timed: `python -m sartor.bench.process`. One target's sessions, and their runs."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor import backends
from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.backends.worker import COMMANDS, Send, serve

_runners: dict[str, Callable[[], object]] = {}


def load(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Load an artifact under a key, with its inputs bound, in place of any other of that key."""
    gc.disable()  # a collection inside a timed run would be an outlier of ours
    artifact = Artifact.from_dict(request["artifact"], Path(request["folder"]))
    options = TargetOptions.from_dict(request["options"])
    shapes = {**artifact.shapes, **options.shapes}
    backend = backends.get(request["backend"])
    _runners.pop(request["key"], None)
    session = backend.load(artifact, dataclasses.replace(options, shapes=shapes))
    inputs = random_inputs(session.inputs, shapes, request["seed"])
    session.run(inputs)  # checks names, types and shapes before anything is timed
    _runners[request["key"]] = session.prepare(inputs)
    return {"settings": {str(k): str(v) for k, v in session.settings.items()}}


def unload(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Forget a key."""
    _runners.pop(request["key"], None)
    gc.collect()
    return {}


def runs(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Warm up, then time runs one by one, until there are enough or the time is over."""
    run = _runners[request["key"]]
    limit, fewest = request["runs_limit_s"], request["fewest"]
    begun = time.perf_counter()
    warmed = 0
    while warmed < request["warm_up_runs"] and (warmed == 0 or time.perf_counter() - begun < limit / 4):
        run()
        warmed += 1
    samples: list[float] = []
    clock = time.perf_counter_ns
    while len(samples) < request["runs"] and (len(samples) < fewest or time.perf_counter() - begun < limit):
        start = clock()
        run()
        samples.append((clock() - start) * 1e-9)
    return {"samples": samples, "warm_up_runs": warmed}


if __name__ == "__main__":
    serve({"lower": COMMANDS["lower"], "load": load, "unload": unload, "runs": runs})
