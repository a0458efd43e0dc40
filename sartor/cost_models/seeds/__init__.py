"""Predictors of the source documents, and two baselines, behind one small protocol.

All take rows of named columns, one row per network, and learn a number per row: `predict`, `update`, `save`, `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sartor.cost_models.seeds.base import SeedPredictor
from sartor.cost_models.seeds.baselines import FlopsProportional, RandomGuess
from sartor.cost_models.seeds.bilinear import Bilinear
from sartor.cost_models.seeds.curves import AccuracyCurve, PowerLaw
from sartor.cost_models.seeds.dimension_linear import DimensionLinear
from sartor.cost_models.seeds.tile_linear import TileLinear
from sartor.cost_models.seeds.unified_statistic import UnifiedStatistic
from sartor.errors import UsageError

__all__ = [
    "KINDS",
    "AccuracyCurve",
    "Bilinear",
    "DimensionLinear",
    "FlopsProportional",
    "PowerLaw",
    "RandomGuess",
    "SeedPredictor",
    "TileLinear",
    "UnifiedStatistic",
    "load_predictor",
]

KINDS: dict[str, type[SeedPredictor]] = {
    cls.kind: cls
    for cls in (
        *(AccuracyCurve, Bilinear, DimensionLinear, FlopsProportional),
        *(PowerLaw, RandomGuess, TileLinear, UnifiedStatistic),
    )
}


def load_predictor(document: Mapping[str, Any]) -> SeedPredictor:
    """A predictor that `save` wrote.

    Raises:
        UsageError: unknown kind, or malformed.
    """
    kind = document.get("kind")
    if kind not in KINDS:
        raise UsageError(f"Expected a predictor of one of the kinds {sorted(KINDS)}, found {kind!r}.")
    return KINDS[kind].load(document)
