"""The function behind `Context.importance`: any criterion, for passes, which may not import criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.ir.program import Program
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import AnalysisLike, BlockLike, Importance, Subject


class _NoGroups:
    groups: Sequence[Any] = ()


def importance(
    name: str, program: Program, analysis: AnalysisLike | None, blocks: Sequence[BlockLike], context: Any
) -> Importance:
    """Score units and blocks by the criterion called `name`.

    Args:
        name: see `sartor.strategies.criteria.CRITERIA`.
        program: the program that `analysis` and `blocks` describe.
        analysis: its channel groups; None when only blocks are to be scored.
        blocks: its residual blocks; empty when only units are to be scored.
        context: `sartor.passes.base.Context`; `calibration` of its data (else `evaluate`), its loss and its
            seed are used.

    Raises:
        UsageError: there is no such criterion, it cannot score this program, or data are missing.
    """
    data = context.data.get("calibration", context.data.get("evaluate"))
    groups = analysis if analysis is not None else _NoGroups()
    return criterion(name).unit_importance(Subject(program, groups, blocks, data, context.loss, context.seed))
