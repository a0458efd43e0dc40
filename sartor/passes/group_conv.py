"""`group-conv`: convolutions cut into groups."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.grouped import channels_before, channels_behind, group, unsuitable
from sartor.passes.pays import Pays
from sartor.passes.prune import rewrite
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class GroupConv(Pass):
    """Cut k x k convolutions into groups, with the weights within groups.

    Becomes:
        y = Conv(x, W)   →   y = Conv(x, W′, group=g)          W′ the diagonal blocks of W

    Where the layers around take any order of channels for nothing, those come first into an order in which the blocks
    keep much of the squared weights: inputs that one regular convolution makes, and outputs that one reads, with
    norms, activations, pools and depthwise convolutions between. Elsewhere channels are grouped as they come.

    Ensures: the same function where the weights outside the blocks are 0.

    Refuses when: the cost model of the context says that it is not faster (`Context.extras["latency"]`, seconds of a
    program); a convolution is grouped or 1 x 1; its channels do not divide; a weight is computed, read by other nodes,
    or kept, or one that would come into another order is kept.

    Reference: Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", NIPS 2012, section
    3.2 (grouped convolutions); Huang et al., "CondenseNet: an efficient DenseNet using learned group convolutions",
    CVPR 2018 (groups of a dense layer by the norms of its weights).
    """

    name: ClassVar[str] = "group-conv"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING

    groups: int = option(2, help="number of groups", minimum=2)
    nodes: tuple[str, ...] = option((), help="globs of node names; all convolutions without")

    def plan(self, program: Program, context: Context) -> Any:
        """Convolutions for which it pays. See `Pass.plan`."""
        pays = Pays(program, context)
        chosen: dict[str, int] = {}
        refusals = []
        for node in program.nodes():
            name = node.name or ""
            if node.op_type != "Conv" or node.domain:
                continue
            if not any(fnmatch.fnmatchcase(name, glob) for glob in self.nodes or ("*",)):
                continue
            reason = unsuitable(node, self.groups) or _kept(node, context)
            if not reason:
                reason = pays.objection(f"{self.groups} groups", self._only(name))
            if reason:
                refusals.append(Refusal(name, reason))
            else:
                chosen[name] = self.groups
        if not chosen:
            return Planned(None, tuple(refusals))
        plan = Plan(program.source.sha256, grouped=chosen, notes={"pass": str(self)})
        return Planned(plan, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Cut mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)

    def _only(self, name: str) -> Any:
        return lambda program, rewriter: group(program, {name: self.groups}, rewriter)


def _kept(node: ir.Node, context: Context) -> str:
    """What a `keep` glob protects of a convolution and of what would come into another order with it, as a reason."""
    own = [node.name, *(value.name for value in node.inputs[1:] if value is not None)]
    for name in own:
        if name and context.is_kept(name):
            return f"'{name}' is kept"
    for value, _ in (*(channels_before(node) or ()), *(channels_behind(node) or ())):
        if value.name and context.is_kept(value.name):
            return f"'{value.name}', which would come into another order, is kept"
    return ""
