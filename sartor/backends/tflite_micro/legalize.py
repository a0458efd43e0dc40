"""What the conversion needs rewritten: as for `tflite`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.tflite import legalize as tflite

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """Inline the dialect's functions; the result is the program itself when it has none."""
    return tflite.legalize(program)
