"""Whether a replacement is predicted to be faster, by the cost model of the context."""

from __future__ import annotations

from collections.abc import Callable

from sartor.ir.program import Program
from sartor.passes.base import Context
from sartor.passes.rewriter import Rewriter


class Pays:
    """Prices one replacement at a time, each in the program as it is otherwise.

    Args:
        program: the program.
        context: `extras["latency"]`, if it is there, gives the seconds of a program.
    """

    def __init__(self, program: Program, context: Context):
        self._program = program
        self._latency: Callable[[Program], float] | None = context.extras.get("latency")
        self._before = self._latency(program) if self._latency is not None else 0.0

    def objection(self, what: str, replace: Callable[[Program, Rewriter], None]) -> str:
        """Why a replacement does not pay; empty where it does, or nothing is known of time.

        Args:
            what: subject of the sentence.
            replace: does it, to a clone.
        """
        if self._latency is None:
            return ""
        clone = self._program.clone()
        replace(clone, Rewriter(clone, "priced"))
        clone.invalidate()
        after = self._latency(clone)
        return f"{what} would take {after / self._before:.3f}x the time" if after >= self._before else ""
