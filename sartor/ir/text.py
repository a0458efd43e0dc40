"""A deterministic text dump of a program: one line per node, for people, diffs and error notes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir.bodies import attribute_graphs
from sartor.ir.program import Program

_SHORT = 8  # constants of at most this many elements are written out
_HASH_DIGITS = 12


def to_text(program: Program) -> str:
    """The whole program: signature, initializers with shape, type and content hash, nodes, functions.

    Equal programs give equal text. Shapes are those at the reference input shapes, `?` where inference fails.
    """
    shapes, types = _known(program)
    batch = "symbolic" if program.batch.symbolic else f"fixed ({program.batch.reason})"
    opsets = ", ".join(f"{d or 'ai.onnx'}={v}" for d, v in sorted(program.model.opset_imports.items()))
    lines = [f"program opset {opsets} ir {program.model.ir_version} batch {batch}"]
    lines += [
        f"input  {_declared(v)} at {_dims(program.input_shapes.get(v.name or ''))}"
        for v in program.graph.inputs
    ]
    lines += [f"const  {_initializer(value)}" for _, value in sorted(program.initializers.items())]
    lines += node_lines(program, shapes, types)
    lines += [f"output {_declared(v)}" for v in program.graph.outputs]
    for function in program.model.functions.values():
        formal = ", ".join(f"%{v.name}" for v in function.inputs)
        results = ", ".join(f"%{v.name}" for v in function.outputs)
        lines.append(f"function {function.domain}::{function.name}({formal}) -> {results}")
        lines += [f"  {_node(node, {}, {})}" for node in function]
    return "\n".join(lines) + "\n"


def node_lines(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    types: Mapping[str, ir.DataType] | None = None,
) -> list[str]:
    """One line per node of the main graph, bodies of `If` indented below it."""
    lines: list[str] = []
    for node in program.graph:
        lines.append(_node(node, shapes or {}, types or {}))
        lines += _bodies(node, 1)
    return lines


def excerpt(program: Program, node: ir.Node, around: int = 5) -> str:
    """The dump lines from `around` before to `around` after `node`, which is marked."""
    nodes = list(program.graph)
    if node not in nodes:
        return ""
    index = nodes.index(node)
    first, last = max(0, index - around), min(len(nodes), index + around + 1)
    shapes, types = _known(program)
    return "\n".join(
        f"{'>' if position == index else ' '} {_node(nodes[position], shapes, types)}"
        for position in range(first, last)
    )


def _known(program: Program) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, ir.DataType]]:
    try:
        return program.shapes(), program.types()
    except (
        ModelError,
        RuntimeError,
        ValueError,
        TypeError,
    ):  # a dump must also work on the broken program it explains
        return {}, {}


def _bodies(node: ir.Node, depth: int) -> list[str]:
    lines: list[str] = []
    for name, attribute in sorted(node.attributes.items()):
        for graph in attribute_graphs(attribute):
            results = ", ".join(f"%{v.name}" for v in graph.outputs)
            lines.append(f"{'  ' * depth}{name} -> {results}")
            for inner in graph:
                lines.append(f"{'  ' * (depth + 1)}{_node(inner, {}, {})}")
                lines += _bodies(inner, depth + 2)
    return lines


def _node(node: ir.Node, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, ir.DataType]) -> str:
    outputs = ", ".join(f"%{o.name}{_annotation(o.name or '', shapes, types)}" for o in node.outputs)
    inputs = ", ".join(f"%{i.name}" if i is not None else "-" for i in node.inputs)
    attributes = ", ".join(
        f"{k}={text}" for k, a in sorted(node.attributes.items()) if (text := _attribute(a))
    )
    domain = f"{node.domain}::" if node.domain else ""
    options = f" {{{attributes}}}" if attributes else ""
    return f"{outputs} = {domain}{node.op_type}({inputs}){options} # {node.name}"


def _annotation(name: str, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, ir.DataType]) -> str:
    if name not in shapes:
        return ""
    dtype = types[name].name.lower() if name in types else ""
    return f":{dtype}{_dims(shapes[name])}"


def _dims(shape: tuple[int, ...] | None) -> str:
    return "[?]" if shape is None else f"[{','.join(map(str, shape))}]"


def _declared(value: ir.Value) -> str:
    dims = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    return f"%{value.name}:{dtype}[{dims}]"


def _initializer(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return f"%{value.name} without data"
    head = f"%{value.name}:{tensor.dtype.name.lower()}[{','.join(str(d) for d in tensor.shape)}]"
    if tensor.size <= _SHORT and not tensor.dtype.is_floating_point():
        return f"{head} = {tensor.numpy().tolist()}"
    return f"{head} sha256:{hashlib.sha256(tensor.tobytes()).hexdigest()[:_HASH_DIGITS]}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return ""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:_HASH_DIGITS]
        return f"{tensor.dtype.name.lower()}{list(tensor.shape)}:{digest}"
    value = attribute.value
    if isinstance(value, (list, tuple)):
        return f"[{','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
