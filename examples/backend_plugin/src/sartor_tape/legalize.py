"""Rewriting a program into what `tape` can run, without changing what it computes.

Passes of Sartor do it here. A rewriting of your own is a class like them: see CONTRIBUTING.md, "A pass".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """An equal program without foldable BatchNormalization; the argument itself stays as it is."""
    if not any(node.op_type == "BatchNormalization" for node in program.nodes()):
        return program
    from sartor import Pipeline

    return Pipeline.parse("fold-batch-norm,remove-dead").run(program).program
