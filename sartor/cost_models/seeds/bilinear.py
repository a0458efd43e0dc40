"""ECC's bilinear model of energy (or latency) in the widths of neighbouring layers.

    E(s) = a_0 + Σ_j a_j s_j s_{j+1},   a ≥ 0

`s_j` is the number of channels that layer j keeps, `s_0` that of the input. Fitted by least squares on random widths.
The source documents name the method and give no equation; this is the paper's, with non-negative coefficients. For
networks that are no chain, give the product `c_in · c_out / groups` of every kernel instead (`chain=False`, ours).

Reference: H. Yang, Y. Zhu, J. Liu, "ECC: platform-independent energy-constrained deep neural network compression via a
bilinear regression model", CVPR 2019.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor, nonnegative_least_squares
from sartor.cost_models.signatures import signature_of
from sartor.cost_models.work import work
from sartor.errors import UsageError
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.workload import Workload, presence


@dataclasses.dataclass(frozen=True, eq=False)
class Bilinear(SeedPredictor):
    """See the module docstring.

    Attributes:
        chain: rows hold widths `s_0 … s_L`; False: they hold the products.
    """

    kind: ClassVar[str] = "bilinear"

    chain: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """As many as the network has layers."""
        return ()

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        design = self._design(rows)
        if len(rows) < design.shape[1]:
            raise UsageError(
                f"Predictor '{self.kind}' has {design.shape[1]} coefficients, but saw {len(rows)} networks; "
                "measure more random widths."
            )
        return {"a": nonnegative_least_squares(design, values)}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._design(rows) @ self.coefficients["a"])

    def _design(self, rows: np.ndarray) -> np.ndarray:
        products = rows[:, :-1] * rows[:, 1:] if self.chain else rows
        return np.concatenate([np.ones((len(rows), 1)), products], axis=1)


def kernel_products(
    workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
) -> np.ndarray:
    """`c_in · c_out / groups` of every contraction under every plan, an array `[plans, kernels]`.

    Raises:
        PlanError: a removed block is not in the workload.
    """
    workload.check_removed(removed or {})
    plans = Population(fractions or {}, removed or {})
    columns = []
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        if signature is None or signature.kind != "contraction":
            continue
        found = work(signature, [plans.quantity(v) for v in signature.variables])
        product = found.groups * found.columns * found.channels * plans.present(presence(kernel))
        columns.append(np.broadcast_to(product, plans.shape or (1,)))
    return np.stack(columns, axis=-1)
