"""Blocks and layers that a pass may remove: those that globs name, what is kept of them, and how much each matters."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.passes.base import Context


class Candidate(Protocol):
    """A block or a layer."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def nodes(self) -> Sequence[str]: ...  # noqa: D102


_Found = TypeVar("_Found", bound=Candidate)


def matching(found: Sequence[_Found], patterns: Sequence[str], kind: str) -> list[_Found]:
    """Those that a glob names, all without globs.

    Args:
        found: what there is.
        patterns: globs of names.
        kind: what they are, in singular.

    Raises:
        UsageError: a glob matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(one.name, pattern) for one in found):
            names = ", ".join(f"'{one.name}'" for one in found[:20]) or "none"
            raise UsageError(f"No {kind} matches '{pattern}'; this program has: {names}. Name one of these.")
    wanted = patterns or ("*",)
    return [one for one in found if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in wanted)]


def scores_of(
    program: Program, candidates: Sequence[Candidate], criterion: str, seed: int, context: Context
) -> Mapping[str, float]:
    """A finite score per candidate, higher is more important; those other than random by `context.importance`.

    Raises:
        UsageError: nothing provides the criterion, or it gives a candidate no finite score.
    """
    if criterion == "random":
        draws = np.random.default_rng(seed).random(len(candidates))
        return {one.name: float(draw) for one, draw in zip(candidates, draws, strict=True)}
    scores = context.importance(criterion, program, None, tuple(candidates), context).blocks
    for one in candidates:
        score = scores.get(one.name)
        if score is None or not math.isfinite(score):
            raise UsageError(
                f"Criterion '{criterion}' gives '{one.name}' the score {score}, expected a finite number. Use another "
                "criterion."
            )
    return {one.name: float(scores[one.name]) for one in candidates}


def kept_by(program: Program, block: Candidate, context: Context) -> str | None:
    """What a `keep` glob protects of a block or layer: its name, a node, a node's module or a parameter it reads."""
    if not context.keep:
        return None
    inside = set(block.nodes)
    for node in program.nodes():
        if node.name not in inside:
            continue
        origin = program.provenance.get(node.name or "")
        names = [
            block.name,
            node.name or "",
            origin.module if origin is not None else "",
            *(v.name or "" for v in node.inputs if v is not None and v.is_initializer()),
        ]
        for name in names:
            if name and context.is_kept(name):
                return name
    return None
