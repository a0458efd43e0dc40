"""NeuLens' linear regressors of the compression levels of an image's tiles.

    y = w_0 + Σ_i w_i c_i + Σ_j v_j b_j,   total = y + rest(P)

`c_i` is the level of tile `i` of k x k (0: nothing is cut, 1: the tile is skipped), `b_j` a background load such as
the use of memory bandwidth, CPU or GPU; `rest(P)` is the recorded cost of the layers behind the first P, which run on
the whole image. One predictor per (P, k) and per metric (latency, memory).

The work of a tile is `(1 - c)²` inside the supernet, where both sides of a layer are cut, so that the source's basis
is misspecified; `basis="work"` uses that instead (ours).

Reference: X. Hou, Y. Guan, T. Han, "NeuLens: spatial-based dynamic acceleration of convolutional neural networks
on edge", MobiCom 2022, sections 5.2 and 5.3, figure 8 (a).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor, least_squares
from sartor.errors import UsageError

BASES = ("level", "work")


@dataclasses.dataclass(frozen=True, eq=False)
class TileLinear(SeedPredictor):
    """See the module docstring.

    Attributes:
        split: k.
        loads: names of the background loads.
        basis: `level` as in the source, or `work`.
        rest: of the layers behind the supernet, in the unit of the values; it is in what was measured, too.
    """

    kind: ClassVar[str] = "tile-linear"

    split: int
    loads: tuple[str, ...] = ()
    basis: str = "level"
    rest: float = 0.0

    def __post_init__(self) -> None:
        if self.split < 1 or self.basis not in BASES:
            raise UsageError(
                f"Predictor '{self.kind}' needs a split of at least 1 and a basis of {list(BASES)}, "
                f"got {self.split} and '{self.basis}'."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Levels row by row, then the loads."""
        k = self.split
        return (*(f"level_{i}_{j}" for i in range(k) for j in range(k)), *self.loads)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        return {"w": least_squares(self._design(rows), values - self.rest, self.kind)}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._design(rows) @ self.coefficients["w"] + self.rest)

    def _design(self, rows: np.ndarray) -> np.ndarray:
        tiles = self.split**2
        levels, loads = rows[:, :tiles], rows[:, tiles:]
        if levels.size and (levels.min() < 0 or levels.max() > 1):
            raise UsageError(f"Predictor '{self.kind}' got compression levels outside 0 to 1.")
        cut = levels if self.basis == "level" else (1.0 - levels) ** 2
        return np.concatenate([np.ones((len(rows), 1)), cut, loads], axis=1)
