"""The `sartor` dialect: dynamic structure as ONNX functions whose bodies are the reference semantics.

A program that calls them stays a valid ONNX model: ONNX Runtime runs the bodies as they are. Rules: load and
canonicalize inline every function except those of domain `sartor`; the opset is raised before a call goes
in; weights enter as inputs, never as constants of a body; the first input carries the batch on axis 0; and
only the ONNX Runtime lowering may ever see a call, every other backend gets `inline_dialect(program)` or its
own legalisation of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sartor.errors import InternalError, UsageError
from sartor.ir import cleanup, folding
from sartor.ir.normalise import free_name
from sartor.ir.program import CANONICAL_OPSET, DIALECT_DOMAIN, Program, infer_shapes

DIALECT_VERSION = 1
CHANNEL_GATE = "ChannelGate"
FILTER_MASK = "FilterMask"


def channel_gate() -> ir.Function:
    """`ChannelGate(x [N, C, ...], gate [C]) -> y [N, C, ...]` with `y[n, c] = x[n, c] * gate[c]`, any rank "
    ">= 2."""
    x, gate = ir.Value(name="x"), ir.Value(name="gate")
    body = _Body()
    spatial = body.node("Shape", "spatial", [body.node("Shape", "pixels", [x], start=2)])
    one = ir.Tensor(np.asarray([1], np.int64), name="one")
    ones = body.node("ConstantOfShape", "ones", [spatial], value=one)
    target = body.node("Concat", "target", [body.constant("channels", [-1]), ones], axis=0)
    y = body.node("Mul", "y", [x, body.node("Reshape", "spread", [gate, target])])
    return body.function(CHANNEL_GATE, [x, gate], y)


def filter_mask() -> ir.Function:
    """`FilterMask(mask [U], index [...]) -> y [...]`: 1 where `mask[index] >= 0`, else 0; 1 where the index is below 0.

    What a mask keeps are the units whose sigmoid is one half or more. Its gradient in the FX twin is the sigmoid's, as
    if nothing had been rounded (a straight-through estimator).
    """
    mask, index = ir.Value(name="mask"), ir.Value(name="index")
    body = _Body()
    zero, one = body.constant("zero", 0), body.constant("one", 1)
    values = body.node("Gather", "values", [mask, body.node("Max", "within", [index, zero])])
    is_open = body.node("GreaterOrEqual", "open", [values, body.node("CastLike", "threshold", [zero, mask])])
    hard = body.node("CastLike", "hard", [is_open, mask])
    whole = body.node("CastLike", "whole", [one, mask])
    y = body.node("Where", "y", [body.node("Less", "outside", [index, zero]), whole, hard])
    return body.function(FILTER_MASK, [mask, index], y)


EXITS = {
    "probability-difference": "ExitByProbabilityDifference",
    "max-probability": "ExitByMaxProbability",
    "entropy": "ExitByEntropy",
}
"""Calls of an early exit by the metric that decides; what a metric is says `sartor.runtime.confidence`."""
NEVER = {"probability-difference": 2.0, "max-probability": 2.0, "entropy": -1.0}
"""Thresholds by metric that no sample ever meets."""


def exit_call(metric: str) -> ir.Function:
    """`ExitBy…(logits [N, K], rest [N, K], threshold []) -> y [N, K]`: `logits` of the samples that are certain enough.

    Certain enough is a difference or a probability of at least the threshold, or an entropy below it. Reference: the
    difference of the two largest probabilities, METHODS.md, EdgeCompress (6.8).
    """
    logits, rest, threshold = (ir.Value(name=name) for name in ("logits", "rest", "threshold"))
    body = _Body()
    y = body.node("Where", "y", [body.certain(metric, logits, threshold), logits, rest])
    return body.function(EXITS[metric], [logits, rest, threshold], y)


def certain(metric: str) -> ir.Function:
    """`Certain…(logits [N, K], threshold []) -> go [N, 1]`: the condition of `exit_call`, to be inlined."""
    logits, threshold = ir.Value(name="logits"), ir.Value(name="threshold")
    body = _Body()
    return body.function(
        f"Certain{EXITS[metric]}", [logits, threshold], body.certain(metric, logits, threshold)
    )


class _Body:
    """Nodes of a function, in order; every value has the name of its node."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def node(self, op_type: str, name: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        return self.several(op_type, [name], inputs, **attributes)[0]

    def several(
        self, op_type: str, names: list[str], inputs: list[ir.Value], **attributes: Any
    ) -> list[ir.Value]:
        made = ir.node(op_type, inputs, attributes, num_outputs=len(names), name=names[0])
        for output, name in zip(made.outputs, names, strict=True):
            output.name = name
        self.nodes.append(made)
        return list(made.outputs)

    def constant(self, name: str, value: Any) -> ir.Value:
        return self.node("Constant", name, [], value=ir.Tensor(np.asarray(value, np.int64), name=name))

    def certain(self, metric: str, logits: ir.Value, threshold: ir.Value) -> ir.Value:
        """Which samples meet the threshold, `[N, 1]`."""
        probabilities = self.node("Softmax", "probabilities", [logits], axis=-1)
        last = self.constant("last", [-1])
        if metric == "entropy":
            logarithms = self.node("LogSoftmax", "logarithms", [logits], axis=-1)
            terms = self.node("Mul", "terms", [probabilities, logarithms])
            entropy = self.node("Neg", "entropy", [self.node("ReduceSum", "sum", [terms, last], keepdims=1)])
            return self.node("Less", "go", [entropy, threshold])
        if metric == "max-probability":
            found = self.node("ReduceMax", "largest", [probabilities, last], keepdims=1)
            return self.node("GreaterOrEqual", "go", [found, threshold])
        two = self.several("TopK", ["two", "places"], [probabilities, self.constant("count", [2])], axis=-1)[
            0
        ]
        first, second = self.several("Split", ["first", "second"], [two], axis=-1, num_outputs=2)
        return self.node("GreaterOrEqual", "go", [self.node("Sub", "difference", [first, second]), threshold])

    def function(self, name: str, inputs: list[ir.Value], output: ir.Value) -> ir.Function:
        opsets = {"": CANONICAL_OPSET}
        graph = ir.Graph(inputs, [output], nodes=self.nodes, opset_imports=opsets, name=name)
        return ir.Function(DIALECT_DOMAIN, name, graph=graph, attributes=[])


def is_exit(node: ir.Node) -> bool:
    """True for a call of an early exit."""
    return node.domain == DIALECT_DOMAIN and node.op_type in EXITS.values()


def is_filter_mask(node: ir.Node) -> bool:
    """True for a call of `FilterMask`."""
    return node.domain == DIALECT_DOMAIN and node.op_type == FILTER_MASK


def is_channel_gate(node: ir.Node) -> bool:
    """True for a call of `ChannelGate`."""
    return node.domain == DIALECT_DOMAIN and node.op_type == CHANNEL_GATE


def insert_channel_gate(program: Program, value_name: str, *, name: str | None = None) -> str:
    """Gate axis 1 of a value of the main graph; every reader then sees the gated value.

    **Becomes** `v -> readers` to `v -> ChannelGate(v, gate) -> readers`, with an initializer `gate` of ones,
    so that the program still computes the same function. `program` is modified.

    Args:
        program: canonical; its opset is already the canonical one.
        value_name: a node output of rank 2 or more that is not a graph output.
        name: of the gate's initializer; `<value>.gate` by default.

    Returns:
        The name of the gate's initializer, shape `[C]`.

    Raises:
        UsageError: there is no such value, or it is a graph output.
    """
    node = next((n for n in program.nodes() for o in n.outputs if o.name == value_name), None)
    if node is None:
        raise UsageError(
            f"Value '{value_name}' is not computed by a node of this program, so it cannot be gated."
        )
    value = next(o for o in node.outputs if o.name == value_name)
    if value.is_graph_output():
        raise UsageError(
            f"Value '{value_name}' is a graph output; outputs keep their meaning. Gate a value before it."
        )
    if int(program.model.opset_imports.get("", 0)) != CANONICAL_OPSET:
        raise InternalError(f"The opset must be {CANONICAL_OPSET} before a gate goes in.")
    shape, dtype = program.shapes()[value_name], program.types()[value_name]
    if len(shape) < 2:
        raise UsageError(f"Value '{value_name}' has shape {list(shape)}; a gate needs a channel axis 1.")
    function = channel_gate()
    program.model.functions.setdefault(function.identifier(), function)
    program.model.opset_imports[DIALECT_DOMAIN] = DIALECT_VERSION
    gate_name = free_name(program.graph, name or f"{value_name}.gate")
    readers = list(value.uses())
    gate = folding.constant(program.graph, gate_name, np.ones(shape[1], dtype=dtype.numpy()))
    call = ir.Node(
        DIALECT_DOMAIN, function.name, [value, gate], num_outputs=1, name=f"{value_name}.{CHANNEL_GATE}"
    )
    call.outputs[0].name = f"{value_name}.gated"
    program.graph.insert_after(node, call)
    for reader, index in readers:
        reader.replace_input_with(index, call.outputs[0])
    origin = program.provenance.get(node.name or "")
    if origin is not None:
        program.provenance[call.name or ""] = origin
    cleanup.sort_initializers(program.graph)
    program.invalidate()
    return gate_name


def inline_dialect(program: Program) -> Program:
    """The program as plain ONNX: every dialect call replaced by its reference body; itself if it has none."""
    if not program.model.functions:
        return program
    result = program.clone()
    before = set(result.graph)
    InlinePass()(result.model)
    result.model.opset_imports.pop(DIALECT_DOMAIN, None)
    folded = {v.name or "" for v in cleanup.constants_to_initializers(result.graph)}
    cleanup.fix_names(result.model)
    result.invalidate()
    shapes, types = infer_shapes(result.model, result.input_shapes)
    # A body asks for shapes only to learn ranks; the program's own nodes (the batch idiom) stay.
    folding.fold(result.graph, shapes, types, set(program.initializers), folded, skip=before)
    cleanup.remove_dead(result.graph)
    cleanup.sort_initializers(result.graph)
    return result
