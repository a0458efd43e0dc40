"""Sums of terms that fit the logarithm of what was measured, with coefficients that are not negative."""

from __future__ import annotations

import itertools

import numpy as np

_STEPS, _FAR = 8, 0.7


def fit_logarithm(columns: np.ndarray, seconds: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares of the logarithm, by Gauss-Newton steps; least *relative* squares would predict too little.

    (A prediction that is far too small is off by 100 % at most, one that is far too large by any share.)

    Args:
        columns: what the coefficients multiply, `[rows, coefficients]`.
        seconds: to be explained, `[rows]`.
        weight: of a row's error.

    Returns:
        Coefficients, none negative, and the root mean square of the error of the logarithm.
    """
    best = _not_negative(columns * (weight / seconds)[:, None], weight)
    for _ in range(_STEPS):
        predicted = np.maximum(columns @ best, 1e-3 * seconds)
        error = np.clip(np.log(seconds / predicted), -_FAR, _FAR)  # a stuck timing is not followed
        best = _not_negative(columns * (weight / predicted)[:, None], weight * (1.0 + error))
    predicted = np.maximum(columns @ best, 1e-12)
    return best, float(np.sqrt(np.mean(np.square(np.log(predicted / seconds)))))


def _not_negative(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: the best of all sets of those that are not zero."""
    scale = np.maximum(np.sqrt(np.square(design).sum(0)), 1e-300)
    unit = design / scale
    gram, right = unit.T @ unit, unit.T @ target
    best, least = np.zeros(len(scale)), np.inf
    present = [i for i in range(len(scale)) if design[:, i].any()]
    for size in range(1, len(present) + 1):
        for chosen in itertools.combinations(present, size):
            picked = list(chosen)
            part, *_ = np.linalg.lstsq(gram[np.ix_(picked, picked)], right[picked], rcond=1e-12)
            error = float(part @ gram[np.ix_(picked, picked)] @ part - 2 * part @ right[picked])
            if (part >= 0).all() and error < least - 1e-9 * abs(least if np.isfinite(least) else 1.0):
                best, least = np.zeros(len(scale)), error
                best[picked] = part / scale[picked]
    return best
