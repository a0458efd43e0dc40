"""TECO's dimension-wise linear latency model.

    l_s = a_s · m + c_s, s in {depth, width, resolution}    (5.4)
    T(u) = a_s · M(u)                                        (5.5)

`m` are the MACs of the network that is left, `M(u)` those that a unit `u` of dimension `s` removes (5.3). Fitted
by least squares, per dimension, on networks of which one dimension alone was cut. The source defines moves along
one dimension. Ours: a network cut along several has its cuts subtracted one after the other, from the lines'
values for the whole network, each weighted by its share of the cut, so that for one dimension (5.4) is left.

Reference: H. Kong, "Adaptive Neural Networks for Edge Intelligence", PhD thesis, NTU, 2023, section 5.1 (TECO),
equations 5.3 to 5.5.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor, least_squares
from sartor.errors import UsageError

DIMENSIONS = ("depth", "width", "resolution")


@dataclasses.dataclass(frozen=True, eq=False)
class DimensionLinear(SeedPredictor):
    """See the module docstring.

    Attributes:
        macs: of the whole network, before any cut.
    """

    kind: ClassVar[str] = "dimension-linear"

    macs: float

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise UsageError(f"Predictor '{self.kind}' needs the MACs of the whole network, got {self.macs}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """MACs removed along each dimension."""
        return tuple(f"macs_removed_{name}" for name in DIMENSIONS)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        slopes, offsets, known = np.zeros(3), np.zeros(3), np.zeros(3)
        for s in range(3):
            others = np.delete(rows, s, axis=1)
            alone = ~others.any(axis=1)  # the whole network, too, belongs to every dimension
            if rows[alone, s].any():
                left = self.macs - rows[alone, s]
                design = np.stack([left, np.ones(left.size)], axis=1)
                slopes[s], offsets[s] = least_squares(design, values[alone], self.kind)
                known[s] = 1.0
        if not known.any():
            raise UsageError(
                f"Predictor '{self.kind}' needs networks that were cut along one dimension alone; "
                f"none of these {len(rows)} was."
            )
        return {"a": slopes, "c": offsets, "known": known}

    def latency_removed(self, dimension: str, macs_removed: float) -> float:
        """`T(u)`: seconds that removing a unit of this many MACs saves (5.5).

        Raises:
            UsageError: a dimension that is not one, or of which no network was seen.
        """
        if dimension not in DIMENSIONS:
            raise UsageError(f"Dimension '{dimension}' is not one of {list(DIMENSIONS)}.")
        index = DIMENSIONS.index(dimension)
        self.predict(np.eye(3)[[index]] * macs_removed)  # refuses what was never seen
        return float(self.coefficients["a"][index] * abs(macs_removed))

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        known = self.coefficients["known"] > 0
        unknown = [d for i, d in enumerate(DIMENSIONS) if rows[:, i].any() and not known[i]]
        if unknown:
            raise UsageError(
                f"Predictor '{self.kind}' has seen no network cut along {unknown} alone; measure some."
            )
        slopes, offsets, cut = self.coefficients["a"][known], self.coefficients["c"][known], rows[:, known]
        total = cut.sum(axis=1, keepdims=True)
        shares = np.where(total > 0, cut / np.where(total > 0, total, 1.0), 1.0 / len(slopes))
        return np.asarray(shares @ (slopes * self.macs + offsets) - cut @ slopes)
