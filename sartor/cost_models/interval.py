"""Prediction intervals that hold what they promise: 90 % of what is predicted lies inside.

A prediction's standard deviation adds up three parts: errors of single kernels, which average out; errors that
the kernels of a network share, which do not; the noise of a measurement. How many of them an interval takes is
not assumed but counted, on networks of a kind that was left out of the fit (split conformal prediction), because
an architecture that nobody has seen is not like those that were generated for the profile.

Reference: J. Lei, M. G'Sell, A. Rinaldo, R. Tibshirani and L. Wasserman, "Distribution-free predictive
inference for regression", Journal of the American Statistical Association 113 (2018).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.protocol import CONFIDENCE

NORMAL = 1.6448536269514722
"""Quantile of a standard normal that `CONFIDENCE` of its absolute values lie below."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """Coefficients of the interval of a profile.

    Attributes:
        common: standard deviation of the error that all kernels of a network share, as a share.
        family: of the error that the kernels of one family share.
        noise: of a careful measurement. Those of a profile are less careful, but their errors do not follow what is
            told of their noise, so that all of it is counted as the models'.
        quantile: standard deviations that the interval of a network takes.
        kernels: the same for single kernels, by tier.
        n: networks that `quantile` was counted on.
    """

    common: float = 0.05
    family: float = 0.05
    noise: float = 0.01
    quantile: float = NORMAL
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    n: int = 0

    def of_network(self, latency_s: Any, variance_s2: Any) -> tuple[Any, Any]:
        """Interval around predicted seconds from their variance, noise excepted."""
        sd = np.sqrt(variance_s2 / np.square(latency_s) + self.noise**2)
        return _around(latency_s, self.quantile * sd)

    def of_kernel(self, tier: str, seconds: float, log_sd: float) -> tuple[float, float]:
        """Interval around the predicted seconds of one kernel."""
        low, high = _around(seconds, self.kernels.get(tier, NORMAL) * log_sd)
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"confidence": CONFIDENCE, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Interval:
        """Inverse of `to_dict`.

        Raises:
            ValueError: of another confidence.
        """
        rest = dict(data)
        if rest.pop("confidence") != CONFIDENCE:
            raise ValueError(f"the intervals are not of {CONFIDENCE:.0%}")
        return Interval(**rest)


def _around(seconds: Any, half: Any) -> tuple[Any, Any]:
    factor = np.exp(half)
    return seconds / factor, seconds * factor


def conformal(scores: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """The quantile that covers the next score with `confidence`; between two scores, interpolated.

    (The next larger score would cover more: of 27 scores 93 % where 90 are asked for.) With too few scores for that
    (`n < confidence / (1 - confidence)`), the largest, or the normal quantile if that is larger: nothing less can be
    promised.

    Args:
        scores: absolute errors in standard deviations, of what was not fitted.
        confidence: in (0, 1).
    """
    ordered = np.sort(np.abs(np.asarray(scores, float)))
    if not len(ordered):
        return NORMAL
    place = (len(ordered) + 1) * confidence - 1
    if place > len(ordered) - 1:
        return max(float(ordered[-1]), NORMAL)
    return float(np.interp(place, np.arange(len(ordered)), ordered))


def excess_sd(errors: Sequence[float], expected: Sequence[float]) -> float:
    """What errors vary beyond the variance that was expected of each; robust to one outlier in twenty.

    Args:
        errors: of the logarithm.
        expected: standard deviation of each that is explained already.
    """
    squares = np.square(np.asarray(errors, float)) - np.square(np.asarray(expected, float))
    if not len(squares):
        return 0.0
    kept = np.sort(squares)[: max(1, math.ceil(0.95 * len(squares)))]
    return math.sqrt(max(0.0, float(kept.mean())))
