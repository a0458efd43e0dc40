"""`factorize`: layers as products of cheaper ones."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sartor.ir.cleanup import array_of
from sartor.ir.plan import Factorization, Plan
from sartor.ir.program import Program
from sartor.passes import factors, polyadic
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.factored import factorize, multiplications, stored, unsuitable, weight_of
from sartor.passes.pays import Pays
from sartor.passes.prune import rewrite
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class Factorize(Pass):
    """Replace layers by two to four cheaper ones whose product is near theirs.

    Becomes:
        svd       y = W x          →   y = U (V x)             Gemm, MatMul and Conv; a kernel stays in V
        spatial   k × l kernel     →   k × 1, then 1 × l
        tucker    k × l kernel     →   1 × 1, k × l between fewer channels, 1 × 1
        cp        k × l kernel     →   1 × 1, k × 1 and 1 × l of every channel by itself, 1 × 1

    Ranks are the smallest that keep `energy` of the squared singular values; with cp of the squared weights, to within
    a sixteenth, by as many decompositions as it takes to find them: minutes for a layer of hundreds of channels.

    Ensures: at full rank the same function, up to rounding.

    Refuses when: the layers that would replace one have no fewer multiplications; the cost model of the context says
    that they are not faster (`Context.extras["latency"]`, seconds of a program); a convolution is grouped; a weight is
    kept, computed, or read by other nodes.

    Requires: for cp the extra `sartor[factorize]`, which is tensorly.

    Reference: Jaderberg et al., BMVC 2014 (spatial); Kim et al., ICLR 2016 (tucker); Lebedev et al., "Speeding-up
    convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015 (cp).
    """

    name: ClassVar[str] = "factorize"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE

    kind: str = option("svd", help="how", choices=("svd", "spatial", "tucker", "cp"))
    energy: float = option(
        0.9, help="share of the squared singular values, or weights, that is kept", minimum=0.0, maximum=1.0
    )
    nodes: tuple[str, ...] = option((), help="globs of node names; all layers without")

    def plan(self, program: Program, context: Context) -> Any:
        """Ranks of the layers for which it pays. See `Pass.plan`."""
        pays = Pays(program, context)
        chosen: dict[str, Factorization] = {}
        refusals = []
        for node, weight in self._layers(program):
            reason = unsuitable(node, self.kind)
            if not reason and (
                context.is_kept(node.name or "") or context.is_kept(weight_of(node).name or "")
            ):
                reason = "its weight is kept"
            if not reason:
                found = Factorization(self.kind, self._rank(program, node, weight))
                old, new = multiplications(program, node, found)
                what = f"rank {' x '.join(map(str, found.rank))}"
                if new >= old:
                    reason = f"{what} needs {new} multiplications instead of {old}"
                else:
                    reason = pays.objection(what, _only(node.name or "", found))
            if reason:
                refusals.append(Refusal(node.name or "", reason))
            else:
                chosen[node.name or ""] = found
        if not chosen:
            return Planned(None, tuple(refusals))
        plan = Plan(program.source.sha256, factors=chosen, notes={"pass": str(self)})
        return Planned(plan, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Replace mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)

    def _layers(self, program: Program) -> Iterator[tuple[ir.Node, np.ndarray]]:
        for node in program.graph:
            if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
                continue
            weight = array_of(node, 1)
            wanted = not self.nodes or any(fnmatch.fnmatchcase(node.name or "", glob) for glob in self.nodes)
            if wanted and weight is not None and weight.dtype.kind == "f" and weight.ndim in (2, 4):
                yield node, weight

    def _rank(self, program: Program, node: ir.Node, weight: np.ndarray) -> tuple[int, ...]:
        matrix = stored(node, weight)
        if self.kind == "cp":
            old, each = multiplications(program, node, Factorization("cp", (1,)))
            return (polyadic.cp_rank(matrix, self.energy, max((old - 1) // each, 0)),)
        if self.kind != "tucker":
            return (factors.energy_rank(factors.singular_values(matrix, self.kind), self.energy),)
        into = factors.singular_values(np.swapaxes(matrix, 0, 1), "tucker")
        return (
            factors.energy_rank(into, self.energy),
            factors.energy_rank(factors.singular_values(matrix, "tucker"), self.energy),
        )


def _only(name: str, found: Factorization) -> Callable[[Program, Rewriter], None]:
    return lambda program, rewriter: factorize(program, {name: found}, rewriter)
