"""`fuse-mbconv`: an expansion and its depthwise convolution as one regular convolution."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, ClassVar

from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.fused import Pair, fuse, is_depthwise, pair_of
from sartor.passes.pays import Pays
from sartor.passes.prune import rewrite
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class FuseMbconv(Pass):
    """Replace a 1 x 1 convolution and the depthwise one behind it by one regular convolution (Fused-MBConv).

    Becomes:
        y = DepthwiseConv(act(BatchNormalization(Conv(x))))   →   y = Conv(x), k × k

    The new kernel is the product of both, with the norm between folded, and the activation between goes: where there
    is none, the function is the same but for where the depthwise convolution pads. It has more multiplications, and is
    faster where a depthwise convolution does not use what the target could do. What follows stays: its norm has the
    statistics of another layer until it is trained (or `reestimate-batch-norm`).

    Ensures: the same function where no activation lies between, and nothing is padded or the expansion and its norm
    add nothing.

    Refuses when: the cost model of the context says that it is not faster (`Context.extras["latency"]`, seconds of a
    program; without one every pair is fused that `nodes` names); what enters the depthwise convolution is not made by a
    1 x 1 convolution without strides, pads and groups, or is read elsewhere; weights are computed or kept.

    Reference: Gupta & Tan, "EfficientNet-EdgeTPU", 2019; Tan & Le, "EfficientNetV2: smaller models and faster
    training", ICML 2021, section 3.2.
    """

    name: ClassVar[str] = "fuse-mbconv"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING

    nodes: tuple[str, ...] = option((), help="globs of names of depthwise convolutions; all without")

    def plan(self, program: Program, context: Context) -> Any:
        """Pairs for which it pays. See `Pass.plan`."""
        pays = Pays(program, context)
        chosen, refusals = [], []
        for node in program.nodes():
            name = node.name or ""
            if not is_depthwise(node) or not any(
                fnmatch.fnmatchcase(name, glob) for glob in self.nodes or ("*",)
            ):
                continue
            found = pair_of(node)
            reason = found if isinstance(found, str) else _kept(found, context)
            if not reason:
                reason = pays.objection("one convolution", _only(name))
            if reason:
                refusals.append(Refusal(name, reason))
            else:
                chosen.append(name)
        if not chosen:
            return Planned(None, tuple(refusals))
        plan = Plan(program.source.sha256, fused=tuple(chosen), notes={"pass": str(self)})
        return Planned(plan, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Fuse mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)


def _only(name: str) -> Any:
    return lambda program, rewriter: fuse(program, (name,), rewriter)


def _kept(pair: Pair, context: Context) -> str:
    """What of a pair a `keep` glob protects, as a reason."""
    for node in (pair.depthwise, *pair.gone):
        values = [v.name for v in node.inputs if v is not None and v.is_initializer()]
        for name in (node.name, *values):
            if name and context.is_kept(name):
                return f"'{name}' is kept"
    return ""
