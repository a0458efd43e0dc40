"""`ForeignPass`: what every adapter does before and after the code that others wrote."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.errors import PassError, SartorError, UsageError
from sartor.interop.equality import require_same_function
from sartor.interop.rebuild import rebuild
from sartor.ir.program import NodeProvenance, Program
from sartor.passes.base import Context, Pass, Semantics
from sartor.passes.registry import REGISTRY
from sartor.passes.rewriter import Rewriter
from sartor.passes.structure import structure_of

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclasses.dataclass(frozen=True)
class Transformed:
    """What foreign code made of a program.

    Attributes:
        model: the new model, in any opset and spelling that loading understands.
        provenance: where its nodes come from, by node name; None when names of nodes and values survive.
    """

    model: ir.Model
    provenance: Mapping[str, NodeProvenance] | None = None


@dataclasses.dataclass(frozen=True)
class ForeignPass(Pass):
    """Base of the adapters. Subclasses of `GraphSurgeonPass` and its siblings define `transform`.

    Becomes: whatever the foreign code makes of the program, in canonical form.
    Ensures: the verifier's rules, and the signature. `EXACT`: equal outputs, with the program's weights and with
    random ones, in float64.
    Refuses when: the foreign code raises, returns something else, changes inputs or outputs, leaves a value that
    nothing computes, uses operators outside the canonical table, or claims to be exact and is not.
    """

    semantics: ClassVar[Semantics] = Semantics.EXACT

    @abc.abstractmethod
    def _foreign(self, program: Program) -> Transformed:
        """Run the foreign code on a private copy of `program`."""

    def plan(self, program: Program, context: Context) -> Any:
        """Foreign code decides and does in one step; the plan only says that it is to run."""
        return {"foreign": str(self)}

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Run the foreign code and take over its result if it is sound. See `Pass.apply`."""
        result = self._canonical(program)
        if structure_of(result) == structure_of(program):
            rewriter.refuse("*", "the foreign code changed nothing")
            return
        if self.semantics is Semantics.EXACT:
            require_same_function(self.name, program, result, self._canonical)
        _count(program, result, rewriter)
        program.model, program.provenance = result.model, result.provenance
        program.invalidate()

    def _canonical(self, program: Program) -> Program:
        program = program.understood()
        try:
            transformed = self._foreign(program)
        except SartorError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:300].rstrip(".") or "no message"
            raise PassError(
                f"The foreign code of pass '{self.name}' failed: {type(error).__name__}: {message}. Repair it; the "
                "program is as it was."
            ) from error
        return rebuild(self.name, program, transformed.model, transformed.provenance)


def _count(before: Program, after: Program, rewriter: Rewriter) -> None:
    old, new = ({(n.name, n.op_type) for n in p.nodes()} for p in (before, after))
    kept = [n for n in after.initializers if n in before.initializers]
    changed = sum(before.initializers[n].const_value is not after.initializers[n].const_value for n in kept)
    for what, number in (
        ("nodes_removed", len(old - new)),
        ("nodes_added", len(new - old)),
        ("initializers_removed", len(before.initializers) - len(kept)),
        ("initializers_added", len(after.initializers) - len(kept)),
        ("initializers_changed", changed),
    ):
        if number:
            rewriter.count(what, number)


def wrap(
    base: type, method: str, body: Callable[..., Any], name: str, semantics: Semantics, doc: str | None
) -> Any:
    """An instance of a subclass of `base` made for one piece of foreign code.

    Args:
        base: the adapter class.
        method: the abstract method that `body` becomes.
        body: called with the instance and the foreign graph.
        name: any text; made kebab-case.
        semantics: what the foreign code promises.
        doc: its docstring.

    Raises:
        UsageError: the name cannot be a pass name, or a registered pass has it.
    """
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not _NAME.fullmatch(found):
        raise UsageError(f"'{name}' cannot be the name of a pass; give one such as name='fuse-bias'.")
    if found in REGISTRY.names():
        raise UsageError(f"A pass named '{found}' is registered already; give this one another with name=….")
    if not isinstance(semantics, Semantics):
        raise UsageError(f"Expected a Semantics member for pass '{found}', got {semantics!r}.")
    members = {
        "name": found,
        "semantics": semantics,
        method: body,
        "__doc__": doc,
        "__module__": base.__module__,
    }
    cls: Any = dataclasses.dataclass(frozen=True)(type(base.__name__, (base,), members))
    return cls()
