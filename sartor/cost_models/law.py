"""From the times of kernels to the latency of a whole network, and what is not known about that.

    t = call + offset + Σ_family scale · Σ_kernel seconds

Kernels timed alone do not add up to a network: layouts stay blocked between kernels, caches are warm, and the
weights of a large network are not. Every coefficient is a Gaussian: the scales are expected at 1, with an error
that all families share and a smaller one of each family. A measured network makes them sharper, whether it is
one of the profile's or a step of a run; what remains unknown of them is part of every interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FAMILIES = (
    "conv",
    "depthwise",
    "gemm",
    "matmul",
    "recurrent",
    "elementwise",
    "pool",
    "norm",
    "other",
    "layout",
)
TERMS = (*FAMILIES, "call", "offset")
"""`call` multiplies an empty call, `offset` is in seconds."""
_COMMON_SD, _FAMILY_SD, _CALL_SD = 1.0, 0.25, 0.5
_COMMON_INSIDE_SD, _FAMILY_INSIDE_SD = 0.01, 0.02
_OFFSET_SHARE = 0.02  # of the smallest measured network
_FLOOR = 0.2  # of the common scale: no kernel runs in no time, whatever the noise says


@dataclasses.dataclass(frozen=True)
class Observation:
    """One measured network.

    Attributes:
        seconds: predicted seconds by term, before scaling; families and `call`.
        latency_s: what the whole took.
        sd: of its logarithm: noise of the measurement, and of what the law cannot know.
    """

    seconds: Mapping[str, float]
    latency_s: float
    sd: float = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A Gaussian over the coefficients, in the order of `TERMS`.

    Attributes:
        mean: `[terms]`.
        covariance: `[terms, terms]`.
    """

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def prior(*, inside: bool = False) -> Law:
        """Before anything was measured: kernels add up, give or take.

        Args:
            inside: kernels were timed inside models, where they add up to a latency within a few percent.
        """
        mean = np.array([0.0 if t == "offset" else 1.0 for t in TERMS])
        common, family = (_COMMON_INSIDE_SD, _FAMILY_INSIDE_SD) if inside else (_COMMON_SD, _FAMILY_SD)
        own = {"call": _CALL_SD, "offset": 0.0}
        covariance = np.diag([own.get(t, family) ** 2 for t in TERMS])
        scales = mean[:, None] * mean[None, :]
        return Law(mean, covariance + common**2 * scales)

    def with_offset(self, latency_s: float) -> Law:
        """An offset of a share of `latency_s` becomes possible; without, it is 0 for certain."""
        grown = self.covariance.copy()
        grown[-1, -1] += (_OFFSET_SHARE * latency_s) ** 2
        return Law(self.mean, grown)

    def for_network(self, common: float, family: float) -> Law:
        """The law of one more network: its own scales lie around those of all others.

        Args:
            common: standard deviation of what all its kernels have in common, as a share.
            family: of what those of one family have in common.
        """
        scale = self.mean.copy()
        scale[-1] = 0.0
        own = np.diag((family * scale) ** 2)
        return Law(self.mean, self.covariance + common**2 * np.outer(scale, scale) + own)

    def updated(self, observations: Sequence[Observation]) -> Law:
        """With these measurements taken into account; a Kalman step each, so their order is of no account.

        Every observation is a row of relative terms whose sum should be 1.
        """
        mean, covariance = self.mean.copy(), self.covariance.copy()
        for one in observations:
            row = np.array([one.seconds.get(t, 0.0) for t in TERMS[:-1]] + [1.0]) / one.latency_s
            spread = covariance @ row
            gain = spread / (row @ spread + one.sd**2)
            mean = mean + gain * (1.0 - row @ mean)
            covariance = covariance - np.outer(gain, spread)
        return Law(_clipped(mean), (covariance + covariance.T) / 2)

    def scale_of(self, term: str) -> float:
        """Factor of one family or `call`; families that are not listed are `other`."""
        return float(self.mean[_place(term)])

    @property
    def scales(self) -> dict[str, float]:
        """Factor by term, `offset` excepted."""
        return {t: float(v) for t, v in zip(TERMS[:-1], self.mean, strict=False)}

    @property
    def offset_s(self) -> float:
        """Seconds that belong to no term."""
        return float(self.mean[-1])

    def predict(self, seconds: Mapping[str, Any]) -> Any:
        """Latency from seconds by term, each a scalar or an array `[plans]`."""
        total: Any = self.offset_s
        for term, value in seconds.items():
            total = total + self.scale_of(term) * value
        return total

    def variance(self, seconds: Mapping[str, Any]) -> Any:
        """Variance of `predict`, seconds squared."""
        terms = [(_place(term), value) for term, value in seconds.items()] + [(len(TERMS) - 1, 1.0)]
        total: Any = 0.0
        for i, left in terms:
            for j, right in terms:
                total = total + self.covariance[i, j] * left * right
        return np.maximum(total, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "terms": list(TERMS),
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "scales": self.scales,
            "offset_s": self.offset_s,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Law:
        """Inverse of `to_dict`.

        Raises:
            ValueError: the terms are not those of this version.
        """
        mean, covariance = np.asarray(data["mean"], float), np.asarray(data["covariance"], float)
        if tuple(data["terms"]) != TERMS or covariance.shape != (len(TERMS), len(TERMS)):
            raise ValueError(f"the law has terms {data['terms']}, expected {list(TERMS)}")
        return Law(mean, covariance)


def _place(term: str) -> int:
    return TERMS.index(term) if term in TERMS else TERMS.index("other")


def _clipped(mean: np.ndarray) -> np.ndarray:
    """A scale that is not positive would make more channels cheaper; an offset below zero, nothing negative."""
    common = float(np.median(mean[: len(FAMILIES)]))
    least = np.full(len(mean), _FLOOR * max(common, 1e-3))
    least[-1] = 0.0
    return np.maximum(mean, least)
