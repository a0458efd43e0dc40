"""Makes tasks of what a fit asks, and what it asked for of their results."""

from __future__ import annotations

import collections
import dataclasses
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.ir.files import file_sha256
from sartor.tasks.task import Result, Runner, Task

if TYPE_CHECKING:
    import numpy as np

    from sartor.backends.many_models import ModelTimes
    from sartor.backends.measure import Measurement
    from sartor.backends.protocol import Artifact, TargetOptions
    from sartor.profiling.inside import Inside, InsideEffort

Batch = tuple[dict[str, "np.ndarray"], "np.ndarray | None"]


def measure_task(
    target: str,
    artifacts: Sequence[Artifact],
    options: TargetOptions,
    *,
    time_limit_s: float,
    target_half_width: float,
    seed: int,
) -> Task:
    """An interleaved measurement of `artifacts`, the first of which is the baseline; see `backends.measure`."""
    labels = [f"artifact{index}" for index in range(len(artifacts))]
    return Task(
        "measure",
        {
            "target": target,
            "options": options.to_dict(),
            "artifacts": [artifact.to_dict() for artifact in artifacts],
            "time_limit_s": time_limit_s,
            "target_half_width": target_half_width,
            "seed": seed,
        },
        {label: dict(artifact.sha256) for label, artifact in zip(labels, artifacts, strict=True)},
        {label: artifact.folder for label, artifact in zip(labels, artifacts, strict=True)},
    )


def measurement(result: Result) -> Measurement:
    """What a `measure` task measured."""
    from sartor.backends.measure import LatencyStats, Measurement, Ratio
    from sartor.backends.rounds import Round

    value = result.value
    return Measurement(
        target=value["target"],
        conditions=value["conditions"],
        latencies=tuple(LatencyStats(**stats) for stats in value["latencies"]),
        ratios=tuple(Ratio(r["latency"], tuple(r["latency_ci95"])) for r in value["ratios"]),
        rounds=tuple(Round(tuple(r["order"]), tuple(r["visits_s"])) for r in value["rounds"]),
        ended_by=value["ended_by"],
    )


def time_models_task(
    target: str, models: Sequence[bytes], options: TargetOptions, folder: Path, *, repeats: int, seed: int = 0
) -> Task:
    """Times of many small ONNX models, see `backends.many_models`; they are written to `folder`."""
    for index, model in enumerate(models):
        (folder / f"{index}.onnx").write_bytes(model)
    payload = {
        "target": target,
        "options": options.to_dict(),
        "models": len(models),
        "repeats": repeats,
        "seed": seed,
    }
    return Task("time-models", payload, {"models": _hashes(folder)}, {"models": folder})


def model_times(result: Result) -> ModelTimes:
    """What a `time-models` task timed."""
    from sartor.backends.many_models import ModelTimes

    value = dict(result.value)
    for key in ("seconds", "failures"):  # JSON has no numbers as keys
        value[key] = {int(index): entry for index, entry in value[key].items()}
    return ModelTimes(**value)


def time_inside_task(
    target: str, models: Sequence[bytes], options: TargetOptions, folder: Path, effort: InsideEffort
) -> Task:
    """Latency of ONNX models and of the kernels inside them, see `profiling.inside`; they are written to `folder`."""
    for index, model in enumerate(models):
        (folder / f"{index}.onnx").write_bytes(model)
    payload = {
        "target": target,
        "options": options.to_dict(),
        "models": len(models),
        "effort": dataclasses.asdict(effort),
    }
    return Task("time-inside", payload, {"models": _hashes(folder)}, {"models": folder})


def insides(result: Result) -> list[Inside]:
    """What a `time-inside` task timed."""
    from sartor.profiling.inside import Inside

    return [Inside.from_dict(entry) for entry in result.value["models"]]


class Predictions:
    """Batches of a split, and beside each of them what an artifact answers.

    The split goes out in pieces of about `runner.chunk_bytes`, so that it is never in memory as a whole and several
    devices share it. Labels stay here, and so does a metric: it is the user's code, and no task carries code.

    Args:
        runner: where the artifact runs.
        artifact: lowered for the target that it names.
        options: how it runs.
        split: re-iterable of `(inputs, labels)`.
        shapes: of inputs that the artifact takes at another size than the split has them.
    """

    def __init__(
        self,
        runner: Runner,
        artifact: Artifact,
        options: TargetOptions,
        split: Iterable[Batch],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self._runner, self._artifact, self._options, self._split = runner, artifact, options, split
        self._shapes = dict(shapes or {})
        self._outputs: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[Batch]:
        with tempfile.TemporaryDirectory(prefix="sartor-score-") as scratch:
            waiting: collections.deque[tuple[Path, list[Batch]]] = collections.deque()
            for result in self._runner.run_all(self._tasks(Path(scratch), waiting)):
                folder, batches = waiting.popleft()
                for path in folder.iterdir():
                    path.unlink()
                for index, batch in enumerate(batches):
                    self._outputs = _arrays(result.files[_name(index)])
                    yield batch

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs for the batch that iteration has just given."""
        return self._outputs

    def _tasks(self, scratch: Path, waiting: collections.deque[tuple[Path, list[Batch]]]) -> Iterator[Task]:
        from sartor.backends.arrays import save_arrays
        from sartor.images import at_shapes

        for number, batches in enumerate(_chunks(self._split, self._runner.chunk_bytes)):
            folder = scratch / str(number)
            folder.mkdir()
            for index, (inputs, _) in enumerate(batches):
                save_arrays(folder / _name(index), at_shapes(inputs, self._shapes))
            waiting.append((folder, batches))
            yield self._task(folder, len(batches))

    def _task(self, folder: Path, batches: int) -> Task:
        return Task(
            "score",
            {
                "target": self._artifact.target,
                "options": self._options.to_dict(),
                "artifact": self._artifact.to_dict(),
                "batches": batches,
            },
            {"artifact": dict(self._artifact.sha256), "inputs": _hashes(folder)},
            {"artifact": self._artifact.folder, "inputs": folder},
        )


def _chunks(split: Iterable[Batch], chunk_bytes: int) -> Iterator[list[Batch]]:
    """Runs of batches, copied: a source may fill the same array anew for each of them."""
    held: list[Batch] = []
    size = 0
    for inputs, labels in split:
        copied = {name: array.copy() for name, array in inputs.items()}
        held.append((copied, None if labels is None else labels.copy()))
        size += sum(array.nbytes for array in copied.values())
        if size >= chunk_bytes:
            yield held
            held, size = [], 0
    if held:
        yield held


def _name(index: int) -> str:
    return f"{index}.npz"


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    from sartor.backends.arrays import load_arrays

    return load_arrays(io.BytesIO(content))


def measurement_to_dict(measured: Measurement) -> dict[str, Any]:
    """A measurement as plain data, which `measurement` reads."""
    return {
        "target": dict(measured.target),
        "conditions": dict(measured.conditions),
        "latencies": [dataclasses.asdict(stats) for stats in measured.latencies],
        "ratios": [dataclasses.asdict(ratio) for ratio in measured.ratios],
        "rounds": [{"order": list(r.order), "visits_s": list(r.visits_s)} for r in measured.rounds],
        "ended_by": measured.ended_by,
    }
