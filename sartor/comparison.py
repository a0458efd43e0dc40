"""How far the outputs of two programs are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def relative_error(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Largest max|a − b| / max|a| over the outputs.

    Infinite for different shapes, for an output that `other` lacks, and for NaN or infinities, unless both have
    them in the same places and there are other numbers to compare. False and True count as 0 and 1.
    """
    worst = 0.0
    for name, a in reference.items():
        b = other.get(name)
        if b is None or a.shape != b.shape:
            return math.inf
        if a.size:
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(a)
            if not (finite.any() and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
                return math.inf
            a, b = a[finite], b[finite]
            if not np.isfinite(b).all():
                return math.inf
            scale = float(np.abs(a).max())
            difference = float(np.abs(a - b).max())
            worst = max(worst, difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf))
    return worst


def seen(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs that hold a number; whether the others matter is for the check of sensitivity to say."""
    return {name: a for name, a in outputs.items() if not a.size or np.isfinite(a.astype(np.float64)).any()}
