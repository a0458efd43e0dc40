"""Gaussian processes over the features of kernels: what a fitted roofline misses is alike for kernels that are alike.

Beside trees, which step and are constant where there are no samples, a process goes smoothly from one sample to the
next and forgets what is far away. The two err differently, so their mean is better than either (ADR 13). Points are
features on scales of their own; features that follow from others, such as the work, count nothing. The covariance falls
exponentially with the sum of the distances, as that of `table` does.

References: C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", MIT Press 2006, §2.2; for
weights without a fold, from the one inverse, §5.4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LENGTH = 6.0  # of the covariance, in natural logarithms of a size
_LOGARITHM, _COUNT, _OPERATOR = 1.0, 0.5, 0.7
_SCALES = {
    **dict.fromkeys(
        (
            *("log_macs", "log_weight_bytes", "log_read", "log_written", "log_working_set", "log_intensity"),
            *("log_c_in", "log_c_out", "log_windows", "log_bytes"),  # these follow from others
            *("width", "height", "out_width", "window_width", "padding", "blocks", "columns_left"),
            *("last", "item_bytes"),
        ),
        0.0,
    ),
    **dict.fromkeys(("align_in", "align_out", "align_columns", "align", "align_second", "align_rest"), 0.35),
    **dict.fromkeys(("waste_in_8", "waste_out_8", "waste_in_16", "waste_out_16"), 1.0),
    **{"log_period": 0.7, "log_pause": 0.3, "smallest": 0.3, "blocks_left": 0.1},
    **{"carried": 1.5, "turned": 1.5, "way": 2.0, "transposed": 3.0, "stored": 3.0},
}
"""What a unit of a feature counts; of logarithms that are not listed `_LOGARITHM`, of others `_COUNT`."""
_LEAST_NOISE = 0.05  # of the logarithm of a time: two kernels with equal features are not equally fast
_FAR = 0.995  # of the residuals count as they are; what lies farther off is a disturbed timing
_MOST = 4000  # samples: the inverse takes their cube
_DIGITS = 4  # of points
_CHUNK = 1 << 20  # (sample, row) pairs that are computed at once


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianProcesses:
    """One process per fold, which has not seen the samples of that fold.

    Attributes:
        scales: per column of the rows, `[columns]`; columns with 0 count nothing.
        points: samples, `[samples, columns that count]`.
        weights: `K⁻¹ · residuals` times the variance, `[folds, samples]`; 0 for samples of the fold.
    """

    scales: np.ndarray
    points: np.ndarray
    weights: np.ndarray

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """What each process says, `[folds, rows]`.

        Args:
            rows: `[rows, columns]`.
        """
        found = _points(rows, self.scales)
        said = np.empty((len(self.weights), len(rows)))
        chunk = max(1, _CHUNK // max(len(self.points), 1))
        for start in range(0, len(rows), chunk):
            here = found[start : start + chunk]
            said[:, start : start + chunk] = self.weights @ np.exp(-_distance(self.points, here))
        return said

    def of_fold(self, fold: int) -> GaussianProcesses:
        """One of them alone."""
        return dataclasses.replace(self, weights=self.weights[fold : fold + 1])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], columns: int) -> GaussianProcesses:
        """Inverse of `to_dict`.

        Args:
            data: that form.
            columns: of the rows.

        Raises:
            ValueError: the arrays do not belong together.
        """
        scales, points, weights = (np.asarray(data[k], float) for k in ("scales", "points", "weights"))
        whole = points.ndim == weights.ndim == 2 and scales.shape == (columns,)
        if not whole or points.shape != (weights.shape[1], np.count_nonzero(scales)):
            raise ValueError("the arrays of the Gaussian processes do not belong together")
        if not all(np.isfinite(array).all() for array in (scales, points, weights)):
            raise ValueError("the arrays of the Gaussian processes have numbers that are not finite")
        return GaussianProcesses(scales, points, weights)


def fit(
    rows: np.ndarray,
    residuals: np.ndarray,
    noise: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    count: int,
) -> GaussianProcesses:
    """Fit a process per fold to what lies outside of it.

    Args:
        rows: features, `[samples, columns]`.
        residuals: `log(measured / roofline)`, `[samples]`.
        noise: standard deviation of them, `[samples]`.
        folds: of the samples, `[samples]`.
        names: of the columns; those behind them are operators.
        count: of folds.
    """
    scales = np.array([_scale(name) for name in names] + [_OPERATOR] * (rows.shape[1] - len(names)))
    if len(rows) > _MOST:
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST])
        rows, residuals, noise, folds = rows[chosen], residuals[chosen], noise[chosen], folds[chosen]
    points = _points(rows, scales)
    middle = np.median(residuals)
    far = np.quantile(np.abs(residuals - middle), _FAR)
    target = np.clip(residuals, middle - far, middle + far)
    variance = max(float(np.mean(target**2)), 1e-6)
    covariance = variance * np.exp(-_distance(points, points))
    covariance[np.diag_indices(len(points))] += noise**2 + _LEAST_NOISE**2
    inverse = np.linalg.inv(covariance)
    whole = inverse @ target
    weights = np.tile(whole, (count, 1))
    for fold in range(count):
        out = np.flatnonzero(folds == fold)
        weights[fold] -= inverse[:, out] @ np.linalg.solve(inverse[np.ix_(out, out)], whole[out])
        weights[fold, out] = 0.0
    return GaussianProcesses(scales, points, variance * weights)


def _scale(name: str) -> float:
    return _SCALES.get(name, _LOGARITHM if name.startswith("log_") else _COUNT)


def _points(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    counted = np.flatnonzero(scales)
    return np.round(rows[:, counted] * (scales[counted] / _LENGTH), _DIGITS)


def _distance(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum of the distances along every axis, `[points, rows]`; most of what describes a kernel is alike in all rows."""
    same = (rows == rows[:1]).all(0)
    common = np.abs(points[:, same] - rows[:1, same]).sum(1)
    found = np.repeat(common[:, None], len(rows), 1)
    for axis in np.flatnonzero(~same):
        found += np.abs(points[:, axis, None] - rows[None, :, axis])
    return found
