"""Two curves of one variable: a layer's importance by its width, and a network's accuracy by its MACs.

    I_l(C) = a_l · C^{b_l}                          (4.6, HACScale)
    A_s(M) = a_s (M - M_0)² + b_s (M - M_0) + A_0   (6.6, EdgeCompress)

One predictor per layer or per dimension `s`. `C` are output channels; `M_0` and `A_0` are the whole network's MACs and
accuracy, which the second curve passes through. The first is fitted by non-linear least squares, the second by linear.

Reference: H. Kong, "Adaptive Neural Networks for Edge Intelligence", PhD thesis, NTU, 2023, sections 4.1 and 6.4.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor, least_squares
from sartor.errors import UsageError

_STEPS = 100
_FIRST_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class PowerLaw(SeedPredictor):
    """Importance of a layer by its width (4.6)."""

    kind: ClassVar[str] = "power-law"

    @property
    def columns(self) -> tuple[str, ...]:
        """Output channels of the layer."""
        return ("channels",)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        widths = rows[:, 0]
        if widths.size == 0 or widths.min() <= 0 or values.min() <= 0:
            raise UsageError(f"Predictor '{self.kind}' needs channels and values above 0.")
        logs = np.log(widths)
        start = least_squares(np.stack([np.ones(len(logs)), logs], axis=1), np.log(values), self.kind)
        log_a, b = _levenberg_marquardt(start, logs, values)
        return {"a": np.exp(log_a), "b": np.asarray(b)}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        if rows.size and rows.min() <= 0:
            raise UsageError(f"Predictor '{self.kind}' needs channels above 0.")
        return np.asarray(self.coefficients["a"] * rows[:, 0] ** self.coefficients["b"])


def _levenberg_marquardt(start: np.ndarray, logs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of `exp(p_0 + p_1 · log C)` from the fit of the logarithms, damped."""
    found, damping = start, _FIRST_DAMPING

    def residual(parameters: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(parameters[0] + parameters[1] * logs) - values)

    error = residual(found)
    for _ in range(_STEPS):
        model = error + values
        slopes = np.stack([model, model * logs], axis=1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ error)
        trial = residual(found + step)
        if trial @ trial < error @ error:
            found, error, damping = found + step, trial, damping / 10
        else:
            damping *= 10
        if np.abs(step).max() < 1e-14:
            break
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class AccuracyCurve(SeedPredictor):
    """Accuracy of networks cut along one dimension, by their MACs (6.6).

    Attributes:
        macs: M_0.
        accuracy: A_0.
    """

    kind: ClassVar[str] = "accuracy-curve"

    macs: float
    accuracy: float

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise UsageError(f"Predictor '{self.kind}' needs the MACs of the whole network, got {self.macs}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """MACs that are left."""
        return ("macs",)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        return {"ab": least_squares(self._design(rows), values - self.accuracy, self.kind)}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._design(rows) @ self.coefficients["ab"] + self.accuracy)

    def _design(self, rows: np.ndarray) -> np.ndarray:
        cut = rows[:, 0] - self.macs
        return np.stack([cut**2, cut], axis=1)
