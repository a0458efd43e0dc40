"""`insert-exits`: classifiers on early values, for samples that need no more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir import dialect
from sartor.ir.cuts import Cut, cuts
from sartor.ir.exits import exits_of
from sartor.ir.program import CANONICAL_OPSET, DIALECT_DOMAIN, Program
from sartor.ir.workload import build_workload
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import Rewriter

_EARLIEST, _LATEST = 0.05, 0.9
"""Share of the MACs before an exit: before, nothing can be told apart; behind, nothing is saved."""
_CANDIDATES = 12


@dataclasses.dataclass(frozen=True)
class InsertExits(Pass):
    """Put classifiers on early values, which answer for the samples that they are certain about.

    Becomes: y = f(h(x))   →   y = Exit(head(h(x)), f(h(x)), threshold)

    Exits are taken per sample where the `metric` of the head's logits meets its threshold; at first no sample does, so
    that heads can be trained and thresholds chosen. For `at=auto`, values through which everything goes come into
    question. With data, those are chosen that are expected to save the most, with imprinted classifiers in place of
    heads; without, they are spaced evenly by MACs. Backends with control flow end early by `If`.

    Ensures: the same function, because no exit is taken.

    Refuses when: the network has no output `[N, K]` of scores of two classes or more; a value has no channels; the
    network has exits already.

    Reference: Teerapittayanon et al., "BranchyNet: fast inference via early exiting from deep neural networks", ICPR
    2016; the difference of probabilities, METHODS.md, EdgeCompress (6.8).
    """

    name: ClassVar[str] = "insert-exits"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    at: tuple[str, ...] | None = option(None, help="values that heads read, in any order", absent="auto")
    count: int = option(2, help="exits where values are chosen", minimum=1, maximum=8)
    head: str = option(
        "linear", help="linear: mean and a layer; conv: a convolution first", choices=("linear", "conv")
    )
    metric: str = option("probability-difference", help="what decides", choices=sorted(dialect.EXITS))
    seed: int = option(0, help="of the heads' weights", minimum=0)

    def plan(self, program: Program, context: Context) -> Any:
        """Where the heads are. See `Pass.plan`."""
        if exits_of(program):
            return Planned(None, (Refusal("", "the network has exits already"),))
        logits, reason = classified(program)
        if logits is None:
            return Planned(None, (Refusal("", reason),))
        if self.at is not None:
            known = {v.name: v for node in program.nodes() for v in node.outputs}
            if missing := [name for name in self.at if name not in known]:
                raise UsageError(f"There is no value '{missing[0]}' to put an exit at; see 'sartor inspect'.")
            place = {name: i for i, name in enumerate(known)}
            values = sorted(self.at, key=lambda name: place[name])
        else:
            values = self._chosen(program, context, candidates(program))
        refusals = [Refusal(name, why) for name in values if (why := _unsuitable(program, name, logits))]
        refused = {one.node for one in refusals}
        exits = [
            {"value": name, "name": f"exit{i}"}
            for i, name in enumerate(v for v in values if v not in refused)
        ]
        if not exits:
            refusals = refusals or [Refusal("", "no value lies on all paths, far enough from both ends")]
            return Planned(None, tuple(refusals))
        plan = {"exits": exits, "logits": logits, "head": self.head, "metric": self.metric, "seed": self.seed}
        return Planned(plan, tuple(refusals))

    def _chosen(self, program: Program, context: Context, found: Mapping[str, float]) -> list[str]:
        """So many of the candidates, by the MACs that are expected for a sample."""
        names = [name for name in found if not _unsuitable(program, name, classified(program)[0] or "")]
        count = min(self.count, len(names))
        if not context.has_data:
            wanted = [(i + 1) / (count + 1) for i in range(count)]
            nearest = (min(names, key=lambda name: abs(found[name] - share)) for share in wanted)
            return sorted(set(nearest), key=lambda name: found[name])
        thinned = _thinned(names, found)
        solved = context.supplied("imprinted")(program, thinned, context)
        best = min(
            itertools.combinations(thinned, min(count, len(thinned))),
            key=lambda chosen: expected([found[name] for name in chosen], [solved[name] for name in chosen]),
        )
        return list(best)

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Put them in. See `Pass.apply`."""
        if int(program.model.opset_imports.get("", 0)) != CANONICAL_OPSET:
            raise UsageError(f"The opset must be {CANONICAL_OPSET} before exits go in.")
        function = dialect.exit_call(plan["metric"])
        program.model.functions.setdefault(function.identifier(), function)
        program.model.opset_imports[DIALECT_DOMAIN] = dialect.DIALECT_VERSION
        generator = np.random.default_rng(plan["seed"])
        values = {v.name: v for node in program.nodes() for v in node.outputs}
        logits = values[plan["logits"]]
        shapes, dtype = program.shapes(), program.types()[plan["logits"]].numpy()
        classes = shapes[plan["logits"]][-1]
        heads = []
        for one in plan["exits"]:
            value = values[one["value"]]
            head = _Head(
                rewriter, value, _channel_axis(value, shapes), shapes[one["value"]], one["name"], generator
            )
            heads.append(head.build(plan["head"], classes, dtype))
        rest = logits
        for one, head_logits in reversed(list(zip(plan["exits"], heads, strict=True))):
            threshold = rewriter.add_initializer(
                f"{one['name']}.threshold", np.asarray(dialect.NEVER[plan["metric"]], dtype)
            )
            anchor = rest.producer()
            assert anchor is not None
            call = rewriter.insert_after(
                anchor, function.name, [head_logits, rest, threshold], name=one["name"], domain=DIALECT_DOMAIN
            )
            rewriter.replace_value(rest, call.outputs[0])
            rest = call.outputs[0]
            rewriter.count("exits")


class _Head:
    """A classifier on one value."""

    def __init__(
        self,
        rewriter: Rewriter,
        value: ir.Value,
        axis: int,
        shape: Sequence[int],
        name: str,
        generator: np.random.Generator,
    ):
        self.rewriter, self.value, self.axis, self.shape = rewriter, value, axis, shape
        self.name, self.generator = name, generator
        anchor = value.producer()
        assert anchor is not None
        self.anchor = anchor

    def build(self, kind: str, classes: int, dtype: Any) -> ir.Value:
        """Its nodes, behind the value; its logits."""
        value, channels = self.value, self.shape[self.axis]
        if kind == "conv" and self.axis == 1 and len(self.shape) == 4:
            weight = self._weight("conv.weight", (channels, channels, 3, 3), dtype)
            value = self._add("Conv", [value, weight], "conv", strides=[2, 2], pads=[1, 1, 1, 1])
            statistics = [np.ones, np.zeros, np.zeros, np.ones]
            names = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
            norm = [
                self.rewriter.add_initializer(f"{self.name}.{name}", make(channels).astype(dtype))
                for name, make in zip(names, statistics, strict=True)
            ]
            value = self._add("Relu", [self._add("BatchNormalization", [value, *norm], "norm")], "relu")
        axes = [axis for axis in range(1, len(self.shape)) if axis != self.axis]
        if axes:
            table = self.rewriter.add_initializer(f"{self.name}.axes", np.asarray(axes, np.int64))
            value = self._add("ReduceMean", [value, table], "mean", keepdims=0)
        weight = self._weight("weight", (classes, channels), dtype)
        bias = self.rewriter.add_initializer(f"{self.name}.bias", np.zeros(classes, dtype))
        return self._add("Gemm", [value, weight, bias], "logits", transB=1)

    def _weight(self, name: str, shape: tuple[int, ...], dtype: Any) -> ir.Value:
        scale = float(np.prod(shape[1:])) ** -0.5
        array = (scale * self.generator.standard_normal(shape)).astype(dtype)
        return self.rewriter.add_initializer(f"{self.name}.{name}", array)

    def _add(self, op_type: str, inputs: Sequence[ir.Value], what: str, **attributes: Any) -> ir.Value:
        name = f"{self.name}/{what}"
        self.anchor = self.rewriter.insert_after(self.anchor, op_type, inputs, attributes, name=name)
        return self.anchor.outputs[0]


# ---- where -----------------------------------------------------------------------------------------
def classified(program: Program) -> tuple[str | None, str]:
    """The value with the scores of classes, in front of a final Softmax; or why there is none."""
    shapes, types = program.shapes(), program.types()
    found = []
    for value in program.graph.outputs:
        node = value.producer()
        if (
            node is not None
            and node.op_type in ("Softmax", "LogSoftmax", "Identity")
            and node.inputs[0] is not None
        ):
            value = node.inputs[0]
        shape = shapes[value.name or ""]
        if (
            len(shape) == 2
            and shape[1] > 1
            and types[value.name or ""].is_floating_point()
            and value.producer()
        ):
            found.append(value.name or "")
    if len(found) == 1 and len(program.graph.outputs) == 1:
        return found[0], ""
    described = ", ".join(f"'{v.name}' {list(shapes[v.name or ''])}" for v in program.graph.outputs)
    return None, (
        f"exits need one output of class scores [N, K], and the network has {described}; cut the network where it "
        "classifies"
    )


def candidates(program: Program) -> dict[str, float]:
    """Values that heads may read, with the share of the MACs that is spent before each; one between two layers."""
    workload = build_workload(program)
    names = [node.name or "" for node in program.nodes()]
    whole = workload.macs_of_nodes(names) or 1.0
    last: dict[float, Cut] = {workload.macs_of_nodes(cut.nodes) / whole: cut for cut in cuts(program)}
    return {cut.value: share for share, cut in last.items() if _EARLIEST <= share <= _LATEST}


def _thinned(names: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    """At most so many that all their combinations can be priced, spread over the network."""
    if len(names) <= _CANDIDATES:
        return list(names)
    places = np.linspace(0, len(names) - 1, _CANDIDATES)
    return [names[round(place)] for place in places]


def expected(shares: Sequence[float], solved: Sequence[float]) -> float:
    """MACs that a sample is expected to take, over those of the network, heads left out.

    Args:
        shares: of the MACs before each exit, ascending.
        solved: share of the samples that each could answer.
    """
    total, left, before = 0.0, 1.0, 0.0
    for share, solves in zip([*shares, 1.0], [*solved, 1.0], strict=True):
        total += left * (share - before)
        left, before = min(left, 1.0 - solves), share
    return total


def _channel_axis(value: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> int:
    rank = len(shapes[value.name or ""])
    readers = {user.op_type for user, _ in value.uses()}
    return 1 if rank == 4 or rank == 2 or "Conv" in readers else rank - 1


def _unsuitable(program: Program, name: str, logits: str) -> str:
    """Why no head can read a value; empty where one can."""
    shape, kind = program.shapes()[name], program.types()[name]
    if name == logits:
        return "these are the network's own scores"
    if not 2 <= len(shape) <= 4 or not kind.is_floating_point():
        return f"it has shape {list(shape)} and type {kind.name.lower()}; a head reads floats with channels"
    return ""
