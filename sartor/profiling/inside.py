"""Latency of models and of the kernels inside them, in units of a reference kernel of the same runtime."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.backends.protocol import KernelTime
from sartor.backends.visits import Summary, Visit, summarise
from sartor.errors import BackendError
from sartor.profiling.timing import MOST_RESTARTS, TimingProcess, reference_model


@dataclasses.dataclass(frozen=True)
class InsideEffort:
    """How long a model is timed.

    Attributes:
        visits: of the model in quiet moments, half of them before its profile, half after.
        visit_s: length of a visit, seconds.
        profile_s: of inferences under the profiler, seconds; 0: latency only.
        limit_s: no model is begun after it.
    """

    visits: int = 4
    visit_s: float = 0.04
    profile_s: float = 0.25
    limit_s: float = 120.0


@dataclasses.dataclass(frozen=True)
class Inside:
    """What is known of one model.

    Attributes:
        latency: in units of the reference; None where it failed.
        kernels: as executed; `median_s` in units of the reference.
        reference_s: the reference around it.
        reason: why it failed.
    """

    latency: Summary | None
    kernels: tuple[KernelTime, ...] = ()
    reference_s: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: an interval that is not known has no number."""
        latency = None if self.latency is None else dataclasses.asdict(self.latency)
        if latency is not None and math.isinf(latency["half_width"]):
            latency["half_width"] = None
        return {
            "latency": latency,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "reference_s": self.reference_s,
            "reason": self.reason,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Inside:
        """Inverse of `to_dict`."""
        latency = data["latency"]
        if latency is not None:
            half_width = math.inf if latency["half_width"] is None else latency["half_width"]
            latency = Summary(**{**latency, "half_width": half_width})
        kernels = tuple(KernelTime.from_dict(kernel) for kernel in data["kernels"])
        return Inside(latency, kernels, data["reference_s"], data["reason"])


Insider = Callable[[Sequence[bytes], InsideEffort], list[Inside]]
"""Times serialized models one after another."""


class ModelTimer(TimingProcess):
    """Times models one after another, and the kernels inside them; the target tells the times of its kernels.

    Attributes:
        conditions: machine, runtime and processors of the last request.
    """

    conditions: Mapping[str, Any] = types.MappingProxyType({})
    _level_s = 0.0  # of the reference

    def __call__(self, models: Sequence[bytes], effort: InsideEffort) -> list[Inside]:
        """Time models.

        Raises:
            UsageError: options that the backend refuses.
            BackendError: the subprocess does not start, or cannot run the reference kernel.
        """
        found: dict[int, Inside] = {}
        with tempfile.TemporaryDirectory(prefix="sartor-models-") as folder:
            reference = Path(folder) / "reference.onnx"
            reference.write_bytes(reference_model())
            paths = [Path(folder) / f"{number}.onnx" for number in range(len(models))]
            for path, model in zip(paths, models, strict=True):
                path.write_bytes(model)
            end = time.monotonic() + effort.limit_s
            for _ in range(MOST_RESTARTS + 1):
                left = dataclasses.replace(effort, limit_s=max(end - time.monotonic(), 0.0))
                todo = [[i, str(path)] for i, path in enumerate(paths) if i not in found]
                if not todo:
                    break
                self._ask(todo, str(reference), left, found)
        missing = Inside(None, reason="the subprocess ended too often")
        return [found.get(number, missing) for number in range(len(models))]

    def _ask(
        self, todo: list[list[Any]], reference: str, effort: InsideEffort, found: dict[int, Inside]
    ) -> None:
        starting: list[int] = []

        def collect(message: dict[str, Any]) -> None:
            if message["event"] == "starting":
                starting[:] = [message["index"]]
            elif message["event"] == "failed":
                found[message["index"]] = Inside(None, reason=message["reason"])
            else:
                found[message["index"]] = _inside(message)

        try:
            request = {**dataclasses.asdict(effort), "level_s": self._level_s}
            answer = self.ask("time_inside", collect, reference=reference, models=todo, **request)
            self.conditions, self._level_s = answer["conditions"], answer["level_s"]
        except BackendError as error:
            self.close()
            if not starting or starting[0] in found:
                raise
            found[starting[0]] = Inside(None, reason=str(error))


def _inside(message: Mapping[str, Any]) -> Inside:
    visits = [Visit(*map(float, v)) for v in message["visits"]]
    around = (float(message["before_s"]) + float(message["after_s"])) / 2
    kernels = [KernelTime.from_dict(k) for k in message["kernels"]]
    scaled = tuple(dataclasses.replace(k, median_s=k.median_s / around) for k in kernels)
    return Inside(summarise(visits, message["level_s"]), scaled, around)
