"""`remove-layers`: take layers out of chains, or leave a 1 × 1 convolution in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sartor.errors import PlanError
from sartor.ir.layers import Layer, chain_layers, connecting
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.base import LAYER_CRITERIA, Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.candidates import kept_by, matching, scores_of
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class RemoveLayers(Pass):
    """Remove layers that are in no residual block: those that globs name, or the least important ones.

    Becomes: y = Relu(BatchNormalization(Conv(x)))   →   y = x                  where the shapes are the same
             y = Conv(x), k × k                      →   y = Conv(x), 1 × 1     otherwise, with `connect`

    The 1 × 1 convolution has the sums of the weights over the taps, and the norm and activation that were there.

    Ensures: every shape stays.

    Refuses when: shapes differ and `connect` is off, or no 1 × 1 convolution gives the same map; the result is a graph
    output; a node or parameter is kept; fewer layers can go than `count`.
    """

    name: ClassVar[str] = "remove-layers"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING

    layers: tuple[str, ...] = option((), help="globs of node names of Conv, Gemm or MatMul")
    count: int = option(0, help="how many layers to remove; 0: every layer that `layers` names", minimum=0)
    connect: bool = option(False, help="leave a 1 x 1 convolution where shapes differ")
    criterion: str = option("random", help=f"what ranks layers: {LAYER_CRITERIA}")
    seed: int = option(0, help="of criterion random", minimum=0)

    def plan(self, program: Program, context: Context) -> Any:
        """Choose layers. See `Pass.plan`.

        Raises:
            UsageError: a glob matches no layer, or the criterion gives a layer no finite score.
        """
        if not self.layers and not self.count:
            return None
        ways: dict[str, str] = {}
        candidates, refusals = [], []
        for layer in matching(chain_layers(program), self.layers, "layer outside residual blocks"):
            way, reason = self._way(program, layer, context)
            if reason:
                refusals.append(Refusal(layer.name, reason))
            else:
                ways[layer.name] = way
                candidates.append(dataclasses.replace(layer, removable=True))
        if self.count:
            if len(candidates) < self.count:
                asked = f"{self.count} layers are to be removed, but only {len(candidates)} can be"
                refusals.append(Refusal(", ".join(self.layers) or "*", asked))
            scores = scores_of(program, candidates, self.criterion, self.seed, context)
            ranked = sorted(candidates, key=lambda layer: scores[layer.name])[: self.count]
            ways = {layer.name: ways[layer.name] for layer in ranked}
        if not ways:
            return Planned(None, tuple(refusals))
        return Planned(Plan(program.source.sha256, layers=ways, notes={"pass": str(self)}), tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Remove the plan's layers. See `Pass.apply`."""
        remove_layers(program, plan.layers, rewriter)

    def _way(self, program: Program, layer: Layer, context: Context) -> tuple[str, str]:
        """How a layer goes (a word of the plan), or why it cannot."""
        kept = kept_by(program, layer, context)
        if kept is not None:
            return "", f"'{kept}' is kept"
        if layer.removable:
            return "drop", ""
        if not self.connect:
            return "", layer.reason
        _, reason = connecting(program, next(node for node in program.nodes() if node.name == layer.name))
        return "connect", f"{layer.reason}, and {reason}" if reason else ""


def remove_layers(program: Program, ways: Mapping[str, str], rewriter: Rewriter) -> None:
    """Remove layers of `program` in place.

    Args:
        program: rewritten.
        ways: by node name, `drop` or `connect`.
        rewriter: of `program`.

    Raises:
        PlanError: a name is no layer of this program, or it cannot go this way.
    """
    if not ways:
        return
    found = {layer.name: layer for layer in chain_layers(program)}
    for name, way in ways.items():
        layer = found.get(name)
        if layer is None:
            raise PlanError(
                f"The plan removes layer '{name}', which this program does not have outside blocks."
            )
        node = rewriter.node(name)
        if way == "drop":
            if not layer.removable:
                raise PlanError(f"The plan drops layer '{name}', which cannot be: {layer.reason}.")
            last = rewriter.node(layer.nodes[-1])
            entry = node.inputs[0]
            assert entry is not None
            read = [v for name in layer.nodes for v in rewriter.node(name).inputs if v is not None]
            rewriter.replace_value(last.outputs[0], entry)
            rewriter.remove_nodes([rewriter.node(name) for name in reversed(layer.nodes)])
            for value in dict.fromkeys(read):
                if value.is_initializer() and not value.uses() and not value.is_graph_output():
                    rewriter.remove_initializer(value)
            rewriter.count("layers_removed")
            continue
        kernel, reason = connecting(program, node)
        if kernel is None:
            raise PlanError(f"The plan connects across layer '{name}' by 1 x 1, which cannot be: {reason}.")
        rewriter.set_initializer(rewriter.private_initializer(node, 1), kernel)
        spatial = kernel.ndim - 2
        rewriter.set_attribute(node, "kernel_shape", [1] * spatial)
        for attribute in ("pads", "dilations", "auto_pad"):
            rewriter.set_attribute(node, attribute, None)
        rewriter.count("layers_connected")
    program.invalidate()
