"""Does one task where this process runs. The vendor's code runs in subprocesses of it, as everywhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.backends.protocol import Artifact, TargetOptions
from sartor.tasks.requests import measurement_to_dict
from sartor.tasks.task import Result

Roots = Mapping[str, Path]


def perform(kind: str, payload: Mapping[str, Any], roots: Roots) -> Result:
    """Do a task.

    Args:
        kind: see `task.KINDS`.
        payload: of the task.
        roots: per folder label, where its files are.

    Raises:
        SartorError: from the backend, or about what it was given.
    """
    return _KINDS[kind](payload, roots)


def _measure(payload: Mapping[str, Any], roots: Roots) -> Result:
    from sartor.backends.measure import measure

    artifacts = [
        Artifact.from_dict(entry, roots[f"artifact{index}"])
        for index, entry in enumerate(payload["artifacts"])
    ]
    measured = measure(
        payload["target"],
        artifacts,
        TargetOptions.from_dict(payload["options"]),
        time_limit_s=payload["time_limit_s"],
        target_half_width=payload["target_half_width"],
        seed=payload["seed"],
    )
    return Result(measurement_to_dict(measured))


def _score(payload: Mapping[str, Any], roots: Roots) -> Result:
    from sartor.backends import isolation
    from sartor.backends.arrays import load_arrays, save_arrays

    artifact = Artifact.from_dict(payload["artifact"], roots["artifact"])
    options = TargetOptions.from_dict(payload["options"])
    files: dict[str, bytes] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sartor-outputs-") as folder,
        isolation.Session(artifact, options) as session,
    ):
        outputs = Path(folder) / "outputs.npz"
        for name in (f"{index}.npz" for index in range(payload["batches"])):
            save_arrays(outputs, session.run(load_arrays(roots["inputs"] / name)))
            files[name] = outputs.read_bytes()
    return Result({}, files)


def _time_models(payload: Mapping[str, Any], roots: Roots) -> Result:
    from sartor.backends.measure import time_models

    models = [roots["models"] / f"{index}.onnx" for index in range(payload["models"])]
    options = TargetOptions.from_dict(payload["options"])
    times = time_models(payload["target"], models, options, repeats=payload["repeats"], seed=payload["seed"])
    return Result(
        {
            "seconds": {str(index): value for index, value in times.seconds.items()},
            "failures": {str(index): reason for index, reason in times.failures.items()},
            "reference_s": times.reference_s,
            "conditions": dict(times.conditions),
            "total": times.total,
        }
    )


def _time_inside(payload: Mapping[str, Any], roots: Roots) -> Result:
    from sartor.profiling.inside import InsideEffort, ModelTimer

    models = [(roots["models"] / f"{index}.onnx").read_bytes() for index in range(payload["models"])]
    with ModelTimer(payload["target"], TargetOptions.from_dict(payload["options"])) as timer:
        found = timer(models, InsideEffort(**payload["effort"]))
        conditions = dict(timer.conditions)
    return Result({"models": [inside.to_dict() for inside in found], "conditions": conditions})


_KINDS: Mapping[str, Callable[[Mapping[str, Any], Roots], Result]] = {
    "measure": _measure,
    "score": _score,
    "time-models": _time_models,
    "time-inside": _time_inside,
}
