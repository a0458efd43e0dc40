"""What every cost model answers, and how an answer says what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sartor.cost_models.profile import ALONE, Company, Sample
from sartor.errors import MetricUnavailableError
from sartor.ir.population import Fractions, Removed
from sartor.ir.workload import Workload

if TYPE_CHECKING:
    from sartor.cost_models.signatures import Signature


CONFIDENCE = 0.90
"""Of every interval of a prediction. Intervals of measurements say 95 % themselves."""


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Share of one kernel in an estimate.

    Attributes:
        name: leading node of the kernel.
        op_type: operator of the leading node.
        latency_s: predicted seconds, calibration included.
        method: `interpolated`, `extrapolated`, `learned` or `roofline`.
        interval: of `latency_s`, at `CONFIDENCE`; None where the error is not known.
        bound: what the time goes into: `compute`, `bandwidth`, `launch`, or empty where that is not known.
    """

    name: str
    op_type: str
    latency_s: float
    method: str
    interval: tuple[float, float] | None = None
    bound: str = ""


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """An answer of a cost model for one plan.

    A metric that the model does not know is absent: reading it raises, it is never 0 and never None.

    Attributes:
        method: how the numbers came about, for people.
        metrics: value per metric name, units in the names (`latency_s`, `macs`, `weight_bytes`…).
        intervals: 90 % interval per metric name, where the model knows its error; of a measurement, 95 %.
        kernels: breakdown of the latency; it sums to `latency_s` minus what belongs to no kernel.
        unmodelled: kernels, or effects, that the model does not describe.
    """

    method: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    kernels: tuple[KernelCost, ...] = ()
    unmodelled: tuple[str, ...] = ()

    def read(self, metric: str) -> float:
        """The value of `metric`.

        Raises:
            MetricUnavailableError: the model does not know it.
        """
        if metric not in self.metrics:
            raise MetricUnavailableError(
                f"Metric '{metric}' is not part of this estimate by '{self.method}', which knows "
                f"{sorted(self.metrics)}; ask a model that provides it."
            )
        return self.metrics[metric]

    def read_interval(self, metric: str) -> tuple[float, float]:
        """The 90 % interval of `metric`.

        Raises:
            MetricUnavailableError: the model does not know its error.
        """
        if metric not in self.intervals:
            raise MetricUnavailableError(
                f"The error of metric '{metric}' is not known to '{self.method}'; "
                "calibrate the model with at least two whole-model measurements first."
            )
        return self.intervals[metric]

    def knows(self, metric: str) -> bool:
        """Whether `read(metric)` returns."""
        return metric in self.metrics

    @property
    def latency_s(self) -> float:
        """Predicted latency of one inference in seconds."""
        return self.read("latency_s")

    @property
    def interval(self) -> tuple[float, float]:
        """90 % interval of `latency_s` in seconds."""
        return self.read_interval("latency_s")


@runtime_checkable
class CostModel(Protocol):
    """Prices plans of a workload without touching weights."""

    @property
    def method(self) -> str:
        """One line for people: what the numbers are based on."""
        ...

    def estimate(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> CostEstimate:
        """Price one plan, with a breakdown per kernel."""
        ...

    def estimate_batch(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> np.ndarray:
        """Latency in seconds of a population of plans, an array `[plans]`."""
        ...


@runtime_checkable
class KernelModel(Protocol):
    """Predicts the time of single kernels: one tier of the escalation. Models are values; `update` gives a new one."""

    @property
    def tier(self) -> str:
        """`measured`, `learned` or `roofline`."""
        ...

    def knows(self, signature: Signature) -> bool:
        """Whether `predict` answers for it."""
        ...

    def predict(
        self, signature: Signature, sizes: Sequence[np.ndarray], period_s: Any = 0.0, company: Company = ALONE
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds, and the standard deviation of their logarithm.

        Args:
            signature: of a kernel.
            sizes: one array per variable of the signature, all of one shape.
            period_s: as `Sample.period_s`, a number or an array of that shape.
            company: of each, likewise.

        Returns:
            Two arrays of that shape.
        """
        ...

    def update(self, samples: Sequence[Sample]) -> KernelModel:
        """A model that has learned from these samples, too."""
        ...

    def save(self) -> dict[str, Any]:
        """JSON-ready form; a static method `load` of the class is its inverse."""
        ...
