"""How far predictions are from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    array = np.asarray(values, float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Correlation of the ranks; None where it is not defined."""
    a, b = ranks(predicted), ranks(measured)
    if len(a) < 3 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def summary(
    predicted: Sequence[float],
    measured: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None = None,
) -> dict[str, float]:
    """`n`, `mape`, `within_10`, `bias`, and where they are defined `spearman` and `coverage_90`.

    Args:
        predicted: seconds.
        measured: seconds.
        intervals: of the predictions, at 90 %.
    """
    truth, said = np.asarray(measured, float), np.asarray(predicted, float)
    if not len(truth):
        return {"n": 0}
    error = said / truth - 1.0
    result = {
        "n": len(truth),
        "mape": float(np.abs(error).mean()),
        "within_10": float((np.abs(error) <= 0.1).mean()),
        "bias": float(np.exp(np.median(np.log(said / truth))) - 1.0),
    }
    correlation = spearman(said.tolist(), truth.tolist())
    if correlation is not None:
        result["spearman"] = correlation
    if intervals is not None:
        low, high = np.array(intervals, float).T
        result["coverage_90"] = float(((low <= truth) & (truth <= high)).mean())
    return result
