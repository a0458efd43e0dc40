"""TICO's polynomial of a unified statistic.

    G(N) = Σ_{i=0..n} θ_i S(N)^i                                   (5.12)
    S(N) = λ_f Z_f(N) + λ_p Z_p(N) + λ_a Z_a(N)                    (5.13)
    min over λ of Σ (G(N) - A(N))², λ ≥ 0, Σ λ = 1                 (5.14)

`Z` are FLOPs, parameters and activations, normalised; λ by random search on the simplex, θ by least squares inside
it; one predictor per metric. The source fits on 100 sampled networks and validates on 50; degree and normalisation
are not given. Ours: divided by the largest value of the networks fitted on; degree 2, or the best on held-out networks
with `chosen`; the second half of the draws is near the best of the first.

Reference: H. Kong, "Adaptive Neural Networks for Edge Intelligence", PhD thesis, NTU, 2023, section 5.2 (TICO),
equations 5.12 to 5.14.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor, least_squares
from sartor.errors import UsageError
from sartor.ir.population import Fractions, Removed
from sartor.ir.workload import Workload

_NEAR = 0.05  # of the second half of the draws to the best of the first


@dataclasses.dataclass(frozen=True, eq=False)
class UnifiedStatistic(SeedPredictor):
    """See the module docstring.

    Attributes:
        degree: n.
        draws: of the random search.
        seed: of it.
    """

    kind: ClassVar[str] = "unified-statistic"

    degree: int = 2
    draws: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        if self.degree < 1 or self.draws < 4:
            raise UsageError(
                f"Predictor '{self.kind}' needs a degree of at least 1 and at least 4 draws, "
                f"got {self.degree} and {self.draws}."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Statistics of the network."""
        return ("macs", "parameters", "activations")

    @classmethod
    def chosen(
        cls,
        rows: Any,
        values: Any,
        degrees: Sequence[int] = (1, 2, 3),
        held_out: float = 1 / 3,
        seed: int = 0,
    ) -> UnifiedStatistic:
        """The degree with the least squared error on held-out networks, fitted again on all of them."""
        inputs, measured = np.asarray(rows, float), np.asarray(values, float)
        order = np.random.default_rng(seed).permutation(len(measured))
        cut = round(held_out * len(order))
        test, train = order[:cut], order[cut:]

        def error(degree: int) -> float:
            fitted = cls(degree, seed=seed).update(inputs[train], measured[train])
            return float(np.mean((fitted.predict(inputs[test]) - measured[test]) ** 2))

        return cls(min(degrees, key=error), seed=seed).update(inputs, measured)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        scale = np.abs(rows).max(axis=0)
        if not (scale > 0).all():
            raise UsageError(
                f"Predictor '{self.kind}' needs every one of {list(self.columns)} above 0 somewhere."
            )
        normal = rows / scale
        rng = np.random.default_rng(self.seed)
        first = np.concatenate([np.eye(3), rng.dirichlet(np.ones(3), self.draws // 2)])
        best = min(first, key=lambda weights: self._error(weights, normal, values))
        near = best + _NEAR * rng.standard_normal((self.draws // 2, 3)) * rng.random((self.draws // 2, 1))
        near = np.maximum(near, 0.0)
        near = near[near.sum(axis=1) > 0]
        second = np.concatenate([best[None], near / near.sum(axis=1, keepdims=True)])
        best = min(second, key=lambda weights: self._error(weights, normal, values))
        theta = least_squares(_powers(normal @ best, self.degree), values, self.kind)
        return {"lambda": best, "theta": theta, "scale": scale}

    def _error(self, weights: np.ndarray, normal: np.ndarray, values: np.ndarray) -> float:
        powers = _powers(normal @ weights, self.degree)
        theta = np.linalg.lstsq(powers, values, rcond=None)[0]
        return float(np.sum((powers @ theta - values) ** 2))

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        statistic = rows / self.coefficients["scale"] @ self.coefficients["lambda"]
        return np.asarray(_powers(statistic, self.degree) @ self.coefficients["theta"])


def _powers(statistic: np.ndarray, degree: int) -> np.ndarray:
    return np.stack([statistic**i for i in range(degree + 1)], axis=1)


def network_statistics(
    workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
) -> np.ndarray:
    """Rows for `UnifiedStatistic`, an array `[plans, 3]`; activations are the bytes that kernels write.

    Raises:
        PlanError: a removed block is not in the workload.
    """
    priced = workload.evaluate(fractions, removed)
    parts = (priced.macs, priced.parameters, priced.bytes_written)
    return np.stack([np.atleast_1d(part) for part in np.broadcast_arrays(*parts)], axis=-1)
