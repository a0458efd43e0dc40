"""From sums of kernel times to the latency of a whole network, and how far off that is.

Kernels timed alone do not add up to a network: layouts stay blocked between kernels, caches are warm.
`latency = offset + Σ scale[family] · seconds[family]`, where the scales are drawn towards one common
scale and the offset towards zero as long as few whole-network measurements are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NOISE = 0.03  # relative error of one whole-network measurement
_SPREAD = 0.3  # how far one family's scale is expected to lie from the common one
_OFFSET = 0.05  # expected offset as a share of the first measurement
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student, by degrees of freedom


@dataclasses.dataclass(frozen=True)
class Observation:
    """One measured network: summed kernel seconds per family, and what the whole took."""

    seconds: Mapping[str, float]
    latency_s: float


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients of the law; families without an own scale use `scale`."""

    scale: float = 1.0
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    offset_s: float = 0.0

    def predict(self, seconds: Mapping[str, Any]) -> Any:
        """Latency from seconds per family, each a scalar or an array `[plans]`."""
        total: Any = self.offset_s
        for family, value in seconds.items():
            total = total + self.scale_of(family) * value
        return total

    def scale_of(self, family: str) -> float:
        """Factor for the kernels of one family."""
        return self.scales.get(family, self.scale)


def fit_law(observations: Sequence[Observation]) -> Law:
    """Ridge regression on relative errors; with one observation, a single exact scale."""
    if not observations:
        return Law()
    sums = np.array([sum(o.seconds.values()) / o.latency_s for o in observations])
    scale = float(sums.sum() / (sums**2).sum())  # least relative squares of scale · sum = latency
    if len(observations) == 1:
        return Law(scale)
    families = sorted({f for o in observations for f in o.seconds})
    latencies = np.array([o.latency_s for o in observations])
    rows = np.array([[o.seconds.get(f, 0.0) for f in families] + [1.0] for o in observations])
    rows = rows / latencies[:, None] / _NOISE
    target = np.full(len(observations), 1.0 / _NOISE)
    prior = np.diag([1 / (_SPREAD * scale)] * len(families) + [1 / (_OFFSET * latencies[0])])
    centre = np.array([1 / _SPREAD] * len(families) + [0.0])
    solution, *_ = np.linalg.lstsq(np.vstack([rows, prior]), np.concatenate([target, centre]), rcond=None)
    # A negative scale or offset would make more channels cheaper or nothing take negative time.
    scales = {f: float(max(s, 0.2 * scale)) for f, s in zip(families, solution, strict=False)}
    return Law(scale, scales, float(max(solution[-1], 0.0)))


def relative_half_width(observations: Sequence[Observation]) -> float | None:
    """95 % half width of a prediction as a share of it, from leave-one-out errors.

    None with fewer than two observations: a law that was fitted exactly says nothing about its error.
    """
    if len(observations) < 2:
        return None
    errors = []
    for index, left_out in enumerate(observations):
        rest = [o for i, o in enumerate(observations) if i != index]
        errors.append(float(fit_law(rest).predict(left_out.seconds)) / left_out.latency_s - 1.0)
    freedom = min(len(observations) - 1, len(_T95))
    return float(_T95[freedom - 1] * np.sqrt(np.mean(np.square(errors))))
