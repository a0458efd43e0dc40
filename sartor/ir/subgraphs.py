"""Programs with bodies (of If, Loop, Scan): their flat form, and the shapes inside bodies."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir import protos
from sartor.ir.bodies import body_graphs, read_values, with_inner_nodes
from sartor.ir.branches import BRANCHES, branch, flatten, has_choices, is_choice
from sartor.ir.program import Program


def flat(program: Program) -> Program:
    """The program with the branches of every `If` in the main graph (see `sartor.ir.branches`).

    It shares names and tensors with `program`, which is returned as it is where it has no `If`, or where one
    is not canonical (a branch with constants of its own, or with names that another one uses). Not to be
    changed, saved or run for its result.
    """
    if not has_choices(program.graph):
        return program
    return program.analysis("flat", _flat)


def _flat(program: Program) -> Program:
    known = {v.name for v in [*program.graph.inputs, *program.initializers.values()]}
    nodes: set[str | None] = set()
    stack = [program.graph]
    while stack:
        for node in (graph := stack.pop()):
            if node.name in nodes or any(o.name and o.name in known for o in node.outputs):
                return program
            nodes.add(node.name)
            known.update(o.name for o in node.outputs)
            if is_choice(node):
                stack += [branch(node, key) for key in BRANCHES]
            if node.op_type == "Constant" or (graph is not program.graph and graph.initializers):
                return program
    clone = program.clone()
    flatten(clone.graph)
    return clone


def body_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], ir.DataType]]:
    """Shape and element type of every value inside the bodies of the main graph's nodes, by name.

    Raises:
        ModelError: a body's shape depends on data; names the value.
    """
    owners = [node for node in program.nodes() if body_graphs(node)]
    if not owners:
        return {}
    shapes, types = program.shapes(), program.types()
    light = program.model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > 4096:  # never a shape
            light.graph.initializers.pop(name)
            value.const_value = None
            light.graph.inputs.append(value)
    for node in light.graph:
        for outer in (*read_values(node), *node.outputs):
            name = outer.name or ""
            if name in shapes:
                outer.shape, outer.type = ir.Shape(shapes[name]), ir.TensorType(types[name])
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(light), data_prop=True)
    found: dict[str, tuple[tuple[int, ...], ir.DataType]] = {}
    _, *inner = protos.graphs(inferred.graph)
    for graph, _ in inner:
        for info in [*graph.input, *graph.value_info, *graph.output]:
            tensor = info.type.tensor_type
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                dims = tuple(int(d.dim_value) for d in tensor.shape.dim)
                found[info.name] = (dims, ir.DataType(tensor.elem_type))
        for tensor in graph.initializer:
            found[tensor.name] = (tuple(tensor.dims), ir.DataType(tensor.data_type))
    _require_all(program, owners, found, shapes)
    return found


def _require_all(
    program: Program,
    owners: list[ir.Node],
    found: Mapping[str, object],
    outer: Mapping[str, object],
) -> None:
    for owner in owners:
        for node in with_inner_nodes(owner):
            for value in node.outputs:
                if value.name and value.name not in found and value.name not in outer:
                    raise ModelError(
                        f"The shape of value '{value.name}' inside {program.where(owner)} could not be "
                        "inferred at the given input shapes; it depends on data. Give every dimension a "
                        "fixed size with --shape NAME=1,3,224,224."
                    )
