"""The function behind `Context.importance`: any criterion, for passes, which may not import criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.ir.program import Program
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
