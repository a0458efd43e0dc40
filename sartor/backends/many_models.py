"""Times of many small models, for kernel tables: one subprocess, drift divided out, failures kept apart."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from sartor.backends import process
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError, MetricUnavailableError

_START_S = 120.0
_MOST_RESTARTS = 10


@dataclasses.dataclass(frozen=True)
class ModelTimes(Sequence[float]):
    """Seconds per model, in the order given.

    Reading the time of a model that failed raises `MetricUnavailableError` with the reason.

    Attributes:
        seconds: by index, only models that were timed.
        failures: reason by index.
        reference_s: what the reference kernel took at its fastest; times are scaled to that speed.
        conditions: machine, runtime, repeats.
        total: models given.
    """

    seconds: Mapping[int, float]
    failures: Mapping[int, str]
    reference_s: float
    conditions: Mapping[str, Any]
    total: int

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.total))]
        if not -self.total <= index < self.total:
            raise IndexError(f"model {index} of {self.total}")
        index %= self.total
        if index not in self.seconds:
            reason = self.failures.get(index, "it was not timed")
            raise MetricUnavailableError(f"Model {index} has no time: {reason}. See `failures`.")
        return self.seconds[index]


def time_models(
    backend_name: str,
    models: Sequence[bytes | Path],
    options: TargetOptions | None = None,
    *,
    repeats: int = 5,
    time_limit_s: float = 300.0,
    seed: int = 0,
) -> ModelTimes:
    """Time many small ONNX models in one subprocess.

    Models are compiled 32 at a time and visited `repeats` times in random order. A visit takes about
    6 ms and gives the 10th percentile of its runs; right before it a fixed matrix product is timed.
    The time of a model is the median over visits of its visit over that product, times the product's
    fastest time: a slow phase of the machine slows both. A model that fails, or that crashes the
    subprocess, is recorded in `failures` and the others go on.

    Args:
        backend_name: registered backend.
        models: serialized ONNX models, or files.
        options: threads, precision, and shapes for symbolic inputs.
        repeats: visits per model.
        time_limit_s: models that are not reached within it are failures with that reason.
        seed: of the order and of the inputs.

    Raises:
        UsageError: options that the backend refuses.
        BackendError: no model can be timed because the subprocess does not start.
    """
    options = dataclasses.replace(options or TargetOptions(), flush_denormals=True)
    samples: dict[int, list[tuple[float, float]]] = {}
    failures: dict[int, str] = {}
    conditions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sartor-models-") as folder:
        todo = [(i, _path(Path(folder), i, model)) for i, model in enumerate(models)]
        restarts = 0
        while todo and not conditions:
            starting: list[int] = []

            def collect(message: dict[str, Any], starting: list[int] = starting) -> None:
                index = message["index"]
                if message["event"] == "starting":
                    starting[:] = [index]
                elif message["event"] == "failed":
                    failures[index] = message["reason"]
                else:
                    samples[index] = [(float(a), float(b)) for a, b in message["samples"]]

            request = {
                "command": "time_models",
                "backend": backend_name,
                "options": options.to_dict(),
                "models": todo,
                "repeats": repeats,
                "models_limit_s": time_limit_s,
                "seed": seed + restarts,
            }
            try:
                answer = process.call(
                    request,
                    threads=options.threads,
                    time_limit_s=_START_S + 2 * time_limit_s,
                    on_event=collect,
                )
                conditions = {**answer["conditions"], "repeats": repeats, "seed": seed}
            except BackendError as error:
                restarts += 1
                if not starting or restarts > _MOST_RESTARTS:
                    raise
                failures[starting[0]] = str(error)
                todo = [(i, path) for i, path in todo if i not in samples and i not in failures]
    reference_s = min((beside for pairs in samples.values() for _, beside in pairs), default=0.0)
    seconds = {
        index: statistics.median(own / beside for own, beside in pairs) * reference_s
        for index, pairs in samples.items()
        if pairs
    }
    return ModelTimes(seconds, failures, reference_s, conditions, len(models))


def _path(folder: Path, index: int, model: bytes | Path) -> str:
    if isinstance(model, Path):
        return str(model.resolve())
    path = folder / f"{index}.onnx"
    path.write_bytes(model)
    return str(path)
