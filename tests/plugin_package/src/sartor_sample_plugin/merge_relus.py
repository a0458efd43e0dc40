"""`their-pass`: one Relu in place of two in a row."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Semantics, option
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class TheirPass(Pass):
    """Let readers of Relu(Relu(x)) read Relu(x).

    Becomes: y = Relu(Relu(x))  →  y = Relu(x)
    """

    name: ClassVar[str] = "their-pass"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    limit: int = option(1000, help="how many to remove at most", minimum=1)

    def plan(self, program: Program, context: Context) -> Any:
        """Names of the second Relus."""
        found = []
        for node in program.nodes():
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            if node.op_type == "Relu" and source is not None and source.op_type == "Relu":
                found.append(node.name)
        return found[: self.limit] or None

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Replace each by its input."""
        for name in plan:
            node = rewriter.node(name)
            source = node.inputs[0]
            assert source is not None
            rewriter.replace_value(node.outputs[0], source)
            rewriter.remove_node(node)


@dataclasses.dataclass(frozen=True)
class UnfinishedPass(Pass):
    """A pass whose author has not come to the end."""

    name: ClassVar[str] = "unfinished-pass"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def plan(self, program: Program, context: Context) -> Any:
        """Nothing yet."""
