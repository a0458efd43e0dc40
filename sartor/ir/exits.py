"""Early exits of a program: which there are, the program without them, its stages, and its form with `If`.

An exit is a call of the `sartor` dialect, `y = Exit(logits, rest, threshold)`: per sample, the logits of a classifier
on an early value where these are certain enough, else what the rest of the network says. As the bodies stand,
everything is computed. Two forms save it: *stages*, programs that run one after the other, each for the samples that
are left; and `If`, one program that ends early where all samples of a call are certain. Both give what the bodies give,
sample by sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sartor.errors import InternalError
from sartor.ir import branches, cleanup, dialect
from sartor.ir.program import BATCH_SYMBOL, Batch, Program


@dataclasses.dataclass(frozen=True)
class Exit:
    """One early exit.

    Attributes:
        node: name of the call.
        logits: value that its classifier makes, `[N, K]`.
        rest: value that the rest of the network makes.
        threshold: initializer with one number.
        metric: what is compared with it, a key of `sartor.ir.dialect.EXITS`.
    """

    node: str
    logits: str
    rest: str
    threshold: str
    metric: str


def exits_of(program: Program) -> list[Exit]:
    """The exits of a program, the earliest first."""
    metrics = {name: metric for metric, name in dialect.EXITS.items()}
    calls = {node.outputs[0].name: node for node in program.nodes() if dialect.is_exit(node)}
    inner = {_name(node.inputs[1]) for node in calls.values()}
    found = []
    node = next((node for name, node in calls.items() if name not in inner), None)
    while node is not None:
        logits, rest, threshold = map(_name, node.inputs)
        found.append(Exit(node.name or "", logits, rest, threshold, metrics[node.op_type]))
        node = calls.get(rest)
    return found


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def without_exits(program: Program) -> Program:
    """The program whose exits are never taken, without the classifiers."""
    found = exits_of(program)
    return _leading_to(program, found, found[-1].rest) if found else program


def opened(program: Program) -> Program:
    """The program without exits, with the logits of all of them as further outputs, to train and to judge heads by.

    Weights have the names that they have in `program`.
    """
    found = exits_of(program)
    clone = program.clone()
    nodes = {node.name: node for node in clone.nodes()}
    calls = [nodes[one.node] for one in found]
    logits = [call.inputs[0] for call in calls]
    _bypass(clone, calls, calls[-1].inputs[1] if calls else None)
    shapes, types = program.shapes(), program.types()
    for value in logits:
        assert value is not None
        value.type = ir.TensorType(types[value.name or ""])
        value.shape = _shape(clone, shapes[value.name or ""])
        clone.graph.outputs.append(value)
    return _cleaned(clone)


@dataclasses.dataclass(frozen=True)
class ExitStage:
    """What runs for the samples that no earlier exit took.

    Attributes:
        program: with the outputs of the whole, as they are if this stage's exit is taken; then values for later ones.
        decides: its output that says whether its exit is taken; empty of the last stage.
        exit: that exit; None of the last stage.
    """

    program: Program
    decides: str
    exit: Exit | None


def stages(program: Program) -> list[ExitStage]:
    """One stage per exit, and one for the rest: each computes what no earlier one has."""
    found = exits_of(program)
    if not found:
        return [ExitStage(program, "", None)]
    ends = [*(one.logits for one in found), found[-1].rest]
    variants = [_leading_to(program, found, end) for end in ends]
    known = {node.name for node in program.nodes()}
    behind = _behind(program, found[0].node)
    outputs = [_name(value) for value in program.graph.outputs]
    done: set[str] = set()
    owned: list[set[str]] = []  # nodes of each stage
    for variant in variants:
        names = {node.name or "" for node in variant.nodes()}
        owned.append(names - done)
        # what is behind the exits runs in every stage, and so does what carries an output's name
        done |= {name for name in names if name in known and name not in behind}
    result = []
    for i, (variant, end) in enumerate(zip(variants, ends, strict=True)):
        made = _made(variant, owned[i])
        later = [
            name for j in range(i + 1, len(variants)) for name in _read(variants[j], owned[j]) if name in made
        ]
        decides = ""
        if i < len(found):
            decides = end if behind or end in later or end in outputs else outputs[0]
        wanted = dict.fromkeys([*outputs, *([decides] if decides else []), *later])
        inputs = [name for name in _read(variant, owned[i]) if name not in made]
        part = _extracted(program, variant, inputs, list(wanted))
        result.append(ExitStage(part, decides, found[i] if i < len(found) else None))
    return result


def _made(program: Program, names: set[str]) -> set[str]:
    return {_name(v) for node in program.nodes() if node.name in names for v in node.outputs}


def _read(program: Program, names: set[str]) -> list[str]:
    """Values that some nodes read and that are no constants."""
    values = [v for node in program.nodes() if node.name in names for v in node.inputs if v is not None]
    return list(dict.fromkeys(_name(v) for v in values if not v.is_initializer()))


def _behind(program: Program, call: str) -> set[str]:
    """Nodes that read what a node makes, directly or not."""
    reached = {call}
    for node in program.nodes():
        producers = {value.producer() for value in node.inputs if value is not None}
        if any(producer is not None and producer.name in reached for producer in producers):
            reached.add(node.name or "")
    return reached - {call}


def _leading_to(program: Program, found: Sequence[Exit], end: str) -> Program:
    """The program whose outputs follow from one value, as if its exit were always taken, without the other heads."""
    clone = program.clone()
    nodes = {node.name: node for node in clone.nodes()}
    calls = [nodes[one.node] for one in found]
    value = next(v for call in calls for v in call.inputs[:2] if _name(v) == end)
    _bypass(clone, calls, value)
    return _cleaned(clone)


def _bypass(clone: Program, calls: Sequence[ir.Node], value: ir.Value | None) -> None:
    """Let what reads the outermost of `calls` read `value`; outputs keep their names."""
    if not calls or value is None:
        return
    outermost = calls[0].outputs[0]
    identity = ir.node("Identity", [value], num_outputs=1, name=f"{outermost.name}/chosen")
    clone.graph.insert_after(calls[0], identity)
    _take_over(outermost, identity.outputs[0])


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `old` was, by name, type and readers."""
    graph = old.graph
    assert graph is not None
    for user, index in list(old.uses()):
        if user is not new.producer():
            user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    name, old.name = old.name, f"{old.name}/replaced"
    new.name, new.type, new.shape = name, old.type, old.shape


def _cleaned(clone: Program) -> Program:
    for key in [key for key, f in clone.model.functions.items() if f.name in dialect.EXITS.values()]:
        del clone.model.functions[key]
    if not clone.model.functions:
        clone.model.opset_imports.pop(dialect.DIALECT_DOMAIN, None)
    cleanup.remove_dead(clone.graph)
    clone.invalidate()
    return clone


def _shape(program: Program, shape: Sequence[int]) -> ir.Shape:
    dims: list[int | str] = list(shape)
    if program.batch.symbolic and dims:
        dims[0] = BATCH_SYMBOL
    return ir.Shape(dims)


def _extracted(program: Program, variant: Program, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
    """The part of a program between some values."""
    graph = ir.convenience.extract(variant.graph, list(inputs), list(outputs))
    shapes, types = variant.shapes(), variant.types()
    whole = {_name(value): value for value in [*program.graph.inputs, *program.graph.outputs]}
    for value in [*graph.inputs, *graph.outputs]:
        name = _name(value)
        known = whole.get(name)
        value.type = ir.TensorType(types[name])
        value.shape = known.shape if known is not None and known.shape else _shape(program, shapes[name])
    model = ir.Model(
        graph,
        ir_version=variant.model.ir_version,
        producer_name=variant.model.producer_name,
        functions=list(variant.model.functions.values()),
    )
    batch = program.batch
    carried = tuple(
        name for name in inputs if not (name in program.input_shapes and name not in batch.inputs)
    )
    return Program(
        model,
        source=program.source,
        input_shapes={name: shapes[name] for name in inputs},
        batch=Batch(batch.symbolic, batch.reason, carried if batch.symbolic else ()),
        provenance=program.provenance,
        applied=program.applied,
    )


def with_choices(program: Program) -> Program:
    """The program with an `If` in the place of every exit: what no sample of a call needs is not computed.

    Where some samples of a call are certain and others are not, the rest is computed for all, and chosen from.
    """
    found = exits_of(program)
    if not found:
        return program
    clone = program.clone()
    nodes = {node.name: node for node in clone.nodes()}
    for number, one in enumerate(reversed(found)):  # the innermost first
        _as_choice(clone, nodes[one.node], one.metric, number)
    cleanup.constants_to_initializers(clone.graph)
    branches.nest(clone.graph)
    return _cleaned(clone)


def _as_choice(clone: Program, call: ir.Node, metric: str, number: int) -> None:
    logits, rest, threshold = call.inputs
    if logits is None or rest is None or threshold is None:
        raise InternalError(f"Exit '{call.name}' lacks an input.")
    graph, name = clone.graph, call.name

    def put(op_type: str, inputs: Sequence[ir.Value], suffix: str, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, num_outputs=1, name=f"{name}/{suffix}")
        node.outputs[0].name = f"{name}/{suffix}"
        graph.insert_before(call, node)
        return node.outputs[0]

    go = _inlined(graph, call, dialect.certain(metric), {"logits": logits, "threshold": threshold})
    numbers = put("Cast", [go], "numbers", to=ir.DataType.INT32.value)
    least = put("ReduceMin", [numbers], "least", keepdims=0)
    every = put("Cast", [least], "all", to=ir.DataType.BOOL.value)
    mixed = put("Where", [go, logits, rest], "mixed")
    bodies = {}
    for key, value in zip(branches.BRANCHES, (logits, mixed), strict=True):
        identity = ir.node("Identity", [value], num_outputs=1, name=f"{name}/{key}")
        identity.outputs[0].name = f"{name}/{key}"
        bodies[key] = ir.Graph([], [identity.outputs[0]], nodes=[identity], name=f"{name}/{key}")
    choice = ir.node("If", [every], bodies, num_outputs=1, name=f"{name}/if")
    choice.metadata_props["sartor.if"] = str(number)
    graph.insert_before(call, choice)
    _take_over(call.outputs[0], choice.outputs[0])
    graph.remove(call, safe=True)


def _inlined(graph: ir.Graph, anchor: ir.Node, function: ir.Function, given: dict[str, ir.Value]) -> ir.Value:
    """The nodes of a function before `anchor`, and its result."""
    values: dict[ir.Value, ir.Value] = {value: given[value.name or ""] for value in function.inputs}
    for node in list(function):
        copy = ir.node(
            node.op_type,
            [None if value is None else values[value] for value in node.inputs],
            dict(node.attributes),
            num_outputs=len(node.outputs),
            name=f"{anchor.name}/{node.name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"{anchor.name}/{old.name}"
            values[old] = new
        graph.insert_before(anchor, copy)
    return values[function.outputs[0]]
