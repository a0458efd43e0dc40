"""What a predictor must beat: guessing, and time in proportion to FLOPs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sartor.cost_models.seeds.base import SeedPredictor
from sartor.errors import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class RandomGuess(SeedPredictor):
    """Any of the values seen so far, whatever the network.

    Attributes:
        seed: of the guesses; equal rows in equal order are guessed alike.
    """

    kind: ClassVar[str] = "random"

    seed: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Any."""
        return ()

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        return {"values": np.sort(values)}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return np.random.default_rng(self.seed).choice(self.coefficients["values"], len(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class FlopsProportional(SeedPredictor):
    """`value = a · MACs`: what a latency claimed from FLOPs assumes. `a` is the median of value / MACs."""

    kind: ClassVar[str] = "flops-proportional"

    @property
    def columns(self) -> tuple[str, ...]:
        """MACs of the network."""
        return ("macs",)

    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        if not len(rows) or rows.min() <= 0:
            raise UsageError(f"Predictor '{self.kind}' needs networks with MACs above 0.")
        return {"a": np.asarray(np.median(values / rows[:, 0]))}

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 0] * float(self.coefficients["a"])
