"""Times of whole models, visited in turn, in units of a reference kernel of the same runtime."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sartor.backends import process
from sartor.backends.protocol import TargetOptions
from sartor.backends.quiet import level
from sartor.backends.visits import QUANTILE, Summary, Visit, summarise
from sartor.cost_models.samples import sample_model
from sartor.errors import BackendError, UsageError

BATCH = 32
"""Models that are held, and visited, together."""
_START_S = 120.0
MOST_RESTARTS = 10


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a batch is timed.

    Attributes:
        half_width: of a time's 95 % interval, as a share of it, that is good enough.
        fewest: visits of each model, at least.
        most: visits of each model, at most.
        visit_s: length of a visit, seconds.
        settle_s: of runs before it that do not count, at least one: another model's data are in the caches.
        quantile: of the runs of one visit.
        warm_s: of runs of a model before its first visit, at least; more, until it becomes no faster. 0: two runs.
        limit_s: no round of visits starts after it.
    """

    half_width: float = 0.02
    fewest: int = 3
    most: int = 8
    visit_s: float = 0.004
    settle_s: float = 0.0
    quantile: float = QUANTILE
    warm_s: float = 0.0
    limit_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is known of one model after a batch.

    Attributes:
        warm: time in units of the reference; None where it failed.
        reason: why it failed.
    """

    warm: Summary | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Times of one batch.

    Attributes:
        times: per model.
        reference_s: the reference in quiet moments; NaN where nothing was timed.
        conditions: machine, runtime, processors pinned to.
    """

    times: tuple[Timed, ...]
    reference_s: float
    conditions: Mapping[str, Any]


@functools.cache
def reference_model() -> bytes:
    """A 3x3 convolution with Relu, 48 channels on 28 x 28: about 0.3 ms on one core with AVX-512."""
    spec = {
        "op": "Conv",
        "dtype": "FLOAT",
        "batch": 1,
        "spatial": [28, 28],
        "out": [28, 28],
        "attributes": {"strides": [1, 1], "dilations": [1, 1], "pads": [1] * 4, "kernel_shape": [3, 3]},
        "group": 1,
        "epilogue": [["Relu", {}]],
    }
    return sample_model(spec, (48, 48))


class TimingProcess:
    """A subprocess that times models on a target, started when it is first asked and again after a crash.

    Args:
        backend_name: registered backend.
        options: threads and precision.
        pin: keep the subprocess on as many of the least busy processors as there are threads.
        seed: of inputs, and of the order of visits.
    """

    def __init__(
        self, backend_name: str, options: TargetOptions | None = None, *, pin: bool = True, seed: int = 0
    ):
        self._backend = backend_name
        self._options = dataclasses.replace(options or TargetOptions(), flush_denormals=True)
        self._pin, self._seed = pin, seed
        self._worker: process.Worker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subprocess."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def ask(
        self, command: str, on_event: Callable[[dict[str, Any]], None], *, limit_s: float, **request: Any
    ) -> dict[str, Any]:
        """One request about the target; `limit_s` is what the worker itself keeps.

        Raises:
            BackendError: the subprocess did not survive it.
        """
        threads = self._options.threads
        if self._worker is None:
            self._worker = process.Worker(threads=threads)
        about = {
            "command": command,
            "backend": self._backend,
            "options": self._options.to_dict(),
            "threads": threads,
            "pin": self._pin,
            "seed": self._seed,
            "limit_s": limit_s,
        }
        return self._worker.ask({**about, **request}, time_limit_s=_START_S + 3 * limit_s, on_event=on_event)


class KernelTimer(TimingProcess):
    """Times models side by side: between any two visits the reference kernel runs in the same runtime."""

    def __call__(self, models: Sequence[bytes], effort: Effort) -> Batch:
        """Time a batch of serialized models.

        Raises:
            UsageError: more than `BATCH` models, or options that the backend refuses.
            BackendError: the subprocess does not start, or cannot run even the reference kernel.
        """
        if len(models) > BATCH:
            raise UsageError(f"{len(models)} models are more than the {BATCH} of a batch; split them.")
        with tempfile.TemporaryDirectory(prefix="sartor-kernels-") as folder:
            everything = [reference_model(), *models]
            paths = [Path(folder) / f"{number}.onnx" for number in range(len(everything))]
            for path, model in zip(paths, everything, strict=True):
                path.write_bytes(model)
            return self._batch([[n - 1, str(path)] for n, path in enumerate(paths)], len(models), effort)

    def _batch(self, entries: list[list[Any]], count: int, effort: Effort) -> Batch:
        failed: dict[int, str] = {}
        for _ in range(MOST_RESTARTS + 1):
            starting: list[int] = []
            timed: dict[int, list[Visit]] = {}
            collect = functools.partial(_collect, starting=starting, timed=timed, failed=failed)
            todo = [entry for entry in entries if entry[0] not in failed]
            try:
                answer = self.ask("time_kernels", collect, models=todo, **dataclasses.asdict(effort))
            except BackendError as error:
                self.close()
                if not starting or starting[0] < 0:
                    raise
                failed[starting[0]] = str(error)
                continue
            if answer.get("reference_failed"):
                raise BackendError(
                    f"Target '{self._backend}' cannot run the reference kernel, a 3x3 convolution: "
                    f"{failed.get(-1, 'no reason given')}."
                )
            return _batch(timed, failed, count, answer["conditions"])
        raise BackendError(
            f"{MOST_RESTARTS + 1} models of one batch ended the subprocess of '{self._backend}', the last of them "
            f"with: {failed[starting[0]]}."
        )


def _collect(
    message: dict[str, Any], *, starting: list[int], timed: dict[int, list[Visit]], failed: dict[int, str]
) -> None:
    if message["event"] == "starting":
        starting[:] = [message["index"]]
    elif message["event"] == "loaded":
        starting.clear()
    elif message["event"] == "failed":
        failed[message["index"]] = message["reason"]
    else:
        timed[message["index"]] = [Visit(*map(float, v)) for v in message["visits"]]


def _batch(
    timed: Mapping[int, list[Visit]], failed: Mapping[int, str], count: int, conditions: Mapping[str, Any]
) -> Batch:
    references = [s for visits in timed.values() for v in visits for s in (v.before_s, v.after_s)]
    reference_s = level(references) if references else math.nan
    times = [
        Timed(summarise(timed[index], reference_s))
        if timed.get(index)
        else Timed(None, failed.get(index, "it was not reached"))
        for index in range(count)
    ]
    return Batch(tuple(times), reference_s, conditions)
