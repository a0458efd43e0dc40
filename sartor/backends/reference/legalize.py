"""What the reference needs rewritten: nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """The program itself: the twin is built of the canonical dialect."""
    return program
