"""What passes ask strategies for, which they may not import: criteria, and imprinted classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.ir.program import Program
from sartor.strategies import imprinting
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import AnalysisLike, BlockLike, Importance, Subject
from sartor.strategies.layer_scores import layer_scores


def importance(
    name: str, program: Program, analysis: AnalysisLike | None, blocks: Sequence[BlockLike], context: Any
) -> Importance:
    """Score units and blocks by the criterion called `name`.

    Args:
        name: see `sartor.strategies.criteria.CRITERIA`; of blocks alone, `sartor.strategies.layer_scores`.
        program: the program that `analysis` and `blocks` describe.
        analysis: its channel groups; None when only blocks are to be scored.
        blocks: its residual blocks; empty when only units are to be scored.
        context: `sartor.passes.base.Context`; `calibration` of its data (else `evaluate`), its loss and its
            seed are used.

    Raises:
        UsageError: there is no such criterion, it cannot score this program, or data are missing.
    """
    data = context.data.get("calibration", context.data.get("evaluate"))
    if analysis is None:
        scores = layer_scores(name, program, blocks, data=data, loss=context.loss, seed=context.seed)
        return Importance({}, scores)
    return criterion(name).unit_importance(
        Subject(program, analysis, blocks, data, context.loss, context.seed)
    )


def imprinted(program: Program, values: Sequence[str], context: Any) -> dict[str, float]:
    """Accuracy of an imprinted classifier behind each value; see `sartor.strategies.imprinting`.

    Args:
        program: the program.
        values: names.
        context: as for `importance`.

    Raises:
        UsageError: labels are missing or no class ids, or a class has no samples to be judged by.
    """
    data = context.data.get("calibration", context.data.get("evaluate"))
    return imprinting.accuracies(program, values, data)
