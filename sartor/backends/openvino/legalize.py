"""What OpenVINO needs rewritten: functions of the `sartor` domain, which its reader does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """Inline the dialect's functions; the result is the program itself when it has none."""
    from sartor.ir.dialect import inline_dialect

    return inline_dialect(program)
