"""What of a kernel's code and weights others have displaced from the caches since it last ran."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.least_squares import fit_logarithm
from sartor.cost_models.profile import Sample

_WEIGHTS = -3  # column of a law's rows
_HEAVY_BYTES, _FEW = 1 << 19, 56  # of weights that tell; samples of a law that do
_KNOTS = 7  # ends that are tried
_AS_WELL = 1.2  # times the least sum of squares


def share_of(period_s: Any, periods: tuple[float, float]) -> np.ndarray:
    """Share of what a kernel needs that others have displaced since it last ran, in 0..1."""
    low, high = periods
    if not 0 < low < high:
        return np.zeros(np.shape(period_s))
    reached = np.log(np.maximum(np.asarray(period_s, float), low) / low) / np.log(high / low)
    return np.minimum(reached, 1.0)


def periods_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """The shortest and the longest period, a twentieth of the models that samples ran in left out at either end."""
    return _range({s.period_s for s in samples})


def pauses_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """Likewise, of the pauses."""
    return _range({s.period_s / s.alike for s in samples})


def _range(seen: Collection[float]) -> tuple[float, float]:
    positive = sorted(seconds for seconds in seen if seconds > 0)
    if not positive:
        return 0.0, 0.0
    low, high = np.quantile(positive, [0.05, 0.95])
    return float(low), float(high)


def waiting(rows: np.ndarray, period: np.ndarray, displaced: tuple[float, float]) -> np.ndarray:
    """Rows with the share of the weights that are displaced in the period of each sample.

    Args:
        rows: of a law, as of weights that are all displaced, `[samples, coefficients + 2]`: columns, of which the last
            is that of the weights, seconds, and the weight of the error.
        period: seconds, `[samples]`.
        displaced: between which periods.
    """
    found = rows.copy()
    found[:, _WEIGHTS] *= share_of(period, displaced)
    return found


def displaced_between(
    rows: np.ndarray, period: np.ndarray, ways: Sequence[str], periods: tuple[float, float]
) -> tuple[float, float]:
    """Between which periods weights are displaced: where laws of kernels with many of them fit best.

    Of those that fit about as well, the pair that ends first. Few samples ran in the longest networks, and where the
    displacing is taken to go on to the longest of all, products in networks that are longer still wait twice as long
    as memory needs (seen: a ViT of 80 ms, 15 % too slow). After the one-standard-error rule of L. Breiman et al.,
    "Classification and Regression Trees", 1984.

    Args:
        rows: as of `waiting`.
        period: seconds, `[samples]`.
        ways: what each sample has a law in common with.
        periods: the shortest and the longest; also the answer where too few kernels have many weights.
    """
    heavy = rows[:, _WEIGHTS] >= _HEAVY_BYTES
    kinds = [heavy & (np.array(ways) == way) for way in sorted(set(ways))]
    kinds = [mine for mine in kinds if mine.sum() >= _FEW]
    if not kinds or not 0 < periods[0] < periods[1]:
        return periods
    knots = [*map(float, np.geomspace(*periods, _KNOTS))]
    pairs = [(low, high) for low, high in itertools.combinations(knots, 2)]

    def error(pair: tuple[float, float]) -> float:
        parts = [waiting(rows[mine], period[mine], pair) for mine in kinds]
        return sum(len(p) * fit_logarithm(p[:, :-2], p[:, -2], p[:, -1])[1] ** 2 for p in parts)

    errors = {pair: error(pair) for pair in pairs}
    good = [pair for pair in pairs if errors[pair] <= _AS_WELL * min(errors.values())]
    return min(good, key=lambda pair: (pair[1], errors[pair]))
