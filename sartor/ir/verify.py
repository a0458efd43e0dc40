"""The verifier: what must hold for every program after every pass.

Structure, names, aliasing, operator schemas, strict shape inference, signature, and the constraints that
ONNX's own inference lets through (`sartor.ir.constraints`), such as a Conv of 5 channels on 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

import onnx
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError, VerificationError
from sartor.ir import canonicalize, text
from sartor.ir.bodies import body_graphs
from sartor.ir.constraints import CONSTRAINTS, Context
from sartor.ir.program import (
    BATCH_SYMBOL,
    CANONICAL_IR_VERSION,
    CANONICAL_OPSET,
    DIALECT_DOMAIN,
    Program,
    infer_shapes,
)

_FAILING_NODE = re.compile(r"node name: ([^)]+)\)")

Signature = tuple[tuple[str, str, str, tuple[int | str, ...]], ...]
"""`(input|output, name, element type, dimensions)` of every graph input and output, in order."""


def signature(program: Program) -> Signature:
    """Names, element types and dimensions of the graph's inputs and outputs."""

    def entry(kind: str, value: ir.Value) -> tuple[str, str, str, tuple[int | str, ...]]:
        dims = (
            tuple(d if isinstance(d, int) else str(d) for d in value.shape) if value.shape is not None else ()
        )
        return kind, value.name or "", value.dtype.name if value.dtype is not None else "", dims

    return (
        *(entry("input", v) for v in program.graph.inputs),
        *(entry("output", v) for v in program.graph.outputs),
    )


def verify_program(program: Program, reference: Signature | None = None) -> None:
    """Check every invariant of a canonical program; cached shapes are recomputed.

    Args:
        program: the program to check; not modified.
        reference: `signature()` of the program before a pass; inputs and outputs must equal it.

    Raises:
        VerificationError: names the value or node, the rule, and observed against expected; the
            surrounding lines of the dump are attached as a note.
    """
    program.invalidate()
    _check_header(program)
    _check_scopes(program)
    _check_schemas(program)
    _check_initializers(program)
    try:
        shapes, types = program.shapes(), program.types()
    except ModelError as error:
        _explain_inference(program, str(error))
    _check_types(program, types)
    context = Context(program, shapes)
    for node in program.nodes():
        _check_constraints(context, node)
    _check_signature(program, shapes, types, reference)


def _fail(program: Program, node: ir.Node | None, message: str) -> NoReturn:
    error = VerificationError(message)
    if node is not None:
        error.add_note(text.excerpt(program, node))
    raise error


def _check_constraints(context: Context, node: ir.Node) -> None:
    for constraint in CONSTRAINTS.get((node.domain, node.op_type), ()):
        problem = constraint(context, node)
        if problem:
            _fail(context.program, node, f"Node {context.program.where(node)}: {problem}")


def _explain_inference(program: Program, message: str) -> NoReturn:
    """Say in our words what ONNX's inference rejected; its own words name neither values nor source."""
    found = _FAILING_NODE.search(message)
    nodes = list(program.graph)
    failing = next((i for i, n in enumerate(nodes) if found is not None and n.name == found.group(1)), None)
    if failing is None:
        _fail(program, None, message)
    partial = program.clone()
    partial.graph.outputs.clear()
    partial.graph.remove(list(partial.graph)[failing:][::-1], safe=True)
    try:
        shapes, _ = infer_shapes(partial.model, partial.input_shapes)
    except ModelError:
        shapes = {}
    for node in nodes[: failing + 1]:  # the cause may lie before the node that inference stumbled over
        _check_constraints(Context(program, shapes), node)
    detail = message.partition(found.group(0))[2].strip(" :") if found is not None else message
    _fail(program, nodes[failing], f"Node {program.where(nodes[failing])}: {detail}")


def _check_header(program: Program) -> None:
    model = program.model
    imports = {d: int(v) for d, v in model.opset_imports.items()}
    if imports.get("") != CANONICAL_OPSET or set(imports) - {"", DIALECT_DOMAIN}:
        _fail(program, None, f"The program imports opsets {imports}; expected {{'': {CANONICAL_OPSET}}}.")
    if model.ir_version != CANONICAL_IR_VERSION:
        _fail(
            program, None, f"The program has IR version {model.ir_version}; expected {CANONICAL_IR_VERSION}."
        )
    foreign = sorted(f.name for f in model.functions.values() if f.domain != DIALECT_DOMAIN)
    if foreign:
        _fail(program, None, f"Functions {foreign} are not of domain '{DIALECT_DOMAIN}'; inline them.")


def _check_scopes(program: Program) -> None:
    graph = program.graph
    seen: dict[str, str] = {}

    def declare(value: ir.Value, kind: str, node: ir.Node | None) -> None:
        if not value.name:
            _fail(program, node, f"A {kind} has no name; every value needs one.")
        if value.name in seen:
            _fail(
                program, node, f"Name '{value.name}' is both a {seen[value.name]} and a {kind}; rename one."
            )
        seen[value.name] = kind

    for value in graph.inputs:
        declare(value, "graph input", None)
    for name, value in graph.initializers.items():
        if name != value.name:
            _fail(program, None, f"Initializer '{value.name}' is registered as '{name}'; register it again.")
        declare(value, "initializer", None)
    outputs = set(graph.outputs)
    if len(outputs) != len(graph.outputs):
        _fail(program, None, "One value is two graph outputs; give each its own Identity.")
    aliased = next((v for v in graph.outputs if v.is_initializer() or v.is_graph_input()), None)
    if aliased is not None:
        kind = "an initializer" if aliased.is_initializer() else "a graph input"
        _fail(program, None, f"Graph output '{aliased.name}' is {kind} too; compute it with Identity.")
    known: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    names: set[str] = set()
    _check_nodes(program, graph, known, names, declare)
    missing = next((v for v in graph.outputs if v not in known), None)
    if missing is not None:
        _fail(program, None, f"Graph output '{missing.name}' is not computed by any node.")
    _check_tail(program, seen)


def _check_tail(program: Program, seen: Mapping[str, str]) -> None:
    """What is left as it is finds its values, and shares no name with what was made since."""
    if program.tail is None:
        return
    twice = next((name for name in program.tail.names() if name in seen), None)
    if twice is not None:
        _fail(
            program,
            None,
            f"Name '{twice}' is also a value of the nodes that are left as they are; rename it.",
        )
    known = {v.name for v in (*program.graph.inputs, *program.graph.outputs)} | set(program.tail.weights)
    lost = next((v for v in program.tail.readers if v not in known), None)
    if lost is not None:
        _fail(
            program, None, f"Value '{lost}', which node '{program.tail.readers[lost]}' reads, is no output."
        )


def _check_nodes(program: Program, graph: ir.Graph, known: set[ir.Value], names: set[str], declare) -> None:  # type: ignore[no-untyped-def]
    anchor = graph is program.graph
    for node in graph:
        shown = node if anchor else None
        if not node.name:
            _fail(program, shown, f"A node of type '{node.op_type}' has no name; every node needs one.")
        if anchor and node.name in names:
            _fail(program, shown, f"Node name '{node.name}' is used twice; node names are unique.")
        names.add(node.name)
        for index, value in enumerate(node.inputs):
            if value is not None and value not in known:
                rule = (
                    "computed later"
                    if value.producer() is not None
                    else "neither an input nor an initializer"
                )
                _fail(
                    program,
                    shown,
                    f"Input {index} of node {program.where(node)} is value '{value.name}', which is {rule}. "
                    "Nodes "
                    "stand in execution order and read only what exists.",
                )
        for body in body_graphs(node):
            inner = known | set(body.inputs) | set(body.initializers.values())
            _check_nodes(program, body, inner, set(), lambda value, kind, at: None)
            missing = next((v for v in body.outputs if v not in inner), None)
            if missing is not None:
                _fail(
                    program,
                    shown,
                    f"Body output '{missing.name}' of {program.where(node)} is not computed.",
                )
        for output in node.outputs:
            declare(output, "node output", shown)
            known.add(output)


def _check_schemas(program: Program) -> None:
    try:
        canonicalize.check_operators(program.model, program.provenance)
    except UnsupportedOperatorError as error:
        _fail(program, None, str(error))
    for node in program.nodes():
        if node.domain != "":
            continue
        schema = onnx.defs.get_schema(node.op_type, CANONICAL_OPSET, "")
        unknown = sorted(set(node.attributes) - set(schema.attributes))
        if unknown:
            _fail(
                program,
                node,
                f"Node {program.where(node)} has attributes {unknown}, unknown to the operator.",
            )
        required = sorted(n for n, a in schema.attributes.items() if a.required and n not in node.attributes)
        if required:
            _fail(program, node, f"Node {program.where(node)} lacks the required attributes {required}.")
        if not schema.min_input <= len(node.inputs) <= schema.max_input:
            _fail(
                program,
                node,
                f"Node {program.where(node)} has {len(node.inputs)} inputs; expected {schema.min_input} to "
                f"{schema.max_input}.",
            )


def _check_initializers(program: Program) -> None:
    for name, value in program.initializers.items():
        tensor = value.const_value
        if tensor is None:
            _fail(program, None, f"Initializer '{name}' has no data.")
        stored = tuple(int(d) for d in tensor.shape)
        if value.shape is not None and tuple(value.shape) != stored:
            _fail(
                program,
                None,
                f"Initializer '{name}' declares shape {list(value.shape)}, its data has {list(stored)}.",
            )
        if value.dtype is not None and value.dtype != tensor.dtype:
            _fail(
                program,
                None,
                f"Initializer '{name}' declares type {value.dtype}, its data has {tensor.dtype}.",
            )


def _check_types(program: Program, types: Mapping[str, ir.DataType]) -> None:
    """Numbers only; and inputs that share a type variable of the schema share one allowed element type."""
    for name, known in types.items():
        if known is ir.DataType.STRING:
            _fail(
                program,
                None,
                f"Value '{name}' has element type STRING; only numbers and booleans can be computed.",
            )
    for node in program.nodes():
        if node.domain != "":
            continue
        schema = onnx.defs.get_schema(node.op_type, CANONICAL_OPSET, "")
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        bound: dict[str, tuple[int, ir.DataType]] = {}
        for index, value in enumerate(node.inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            dtype = types.get(value.name or "") if value is not None else None
            if dtype is None:
                continue
            legal = allowed.get(formal.type_str, [formal.type_str])
            if f"tensor({_onnx_name(dtype)})" not in legal:
                _fail(
                    program,
                    node,
                    f"Input {index} of node {program.where(node)} has type {dtype.name}, not allowed.",
                )
            if formal.is_homogeneous:
                first, expected = bound.setdefault(formal.type_str, (index, dtype))
                if dtype != expected:
                    _fail(
                        program,
                        node,
                        f"Node {program.where(node)} has type {expected.name} on input {first} and "
                        f"{dtype.name} on "
                        f"input {index}; they must be equal. Insert a Cast.",
                    )


def _onnx_name(dtype: ir.DataType) -> str:
    return onnx.helper.tensor_dtype_to_string(int(dtype)).rpartition(".")[2].lower()


def _check_signature(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, ir.DataType],
    reference: Signature | None,
) -> None:
    graph = program.graph
    names = [v.name or "" for v in graph.inputs]
    if sorted(names) != sorted(program.input_shapes):
        _fail(
            program,
            None,
            f"The program has inputs {names}, its reference shapes name {list(program.input_shapes)}.",
        )
    for value in [*graph.inputs, *graph.outputs]:
        name = value.name or ""
        if value.dtype is None or value.shape is None:
            _fail(program, None, f"'{name}' is a graph input or output without type or shape; declare both.")
        if name in types and types[name] != value.dtype:
            _fail(
                program,
                None,
                f"'{name}' is declared {value.dtype.name}, but is computed as {types[name].name}.",
            )
        declared = tuple(value.shape)
        actual = shapes.get(name)
        if actual is None:
            continue
        agrees = len(declared) == len(actual) and all(
            not isinstance(d, int) or d == a for d, a in zip(declared, actual, strict=True)
        )
        if not agrees:
            _fail(
                program,
                None,
                f"'{name}' is declared {[str(d) for d in declared]}, but has shape {list(actual)}.",
            )
    if program.batch.symbolic:
        for value in graph.inputs:
            first = str(value.shape[0]) if value.shape is not None and len(value.shape) else ""
            if value.name in program.batch.inputs and first != BATCH_SYMBOL:
                _fail(
                    program,
                    None,
                    f"Batch input '{value.name}' starts with '{first}'; expected '{BATCH_SYMBOL}'.",
                )
    if reference is not None:
        for before, after in zip(reference, found := signature(program), strict=False):
            if before != after:
                _fail(
                    program, None, f"The signature changed from {before} to {after}; inputs and outputs stay."
                )
        if len(reference) != len(found):
            _fail(program, None, f"The signature had {len(reference)} inputs and outputs, now {len(found)}.")
