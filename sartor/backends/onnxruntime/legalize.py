"""What ONNX Runtime needs rewritten: nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """The program itself: ONNX Runtime runs functions of the `sartor` domain as they are."""
    return program
