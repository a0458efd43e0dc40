"""From a canonical program to one that TensorRT's parser takes: the rewrites of `surgery`, then the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from sartor.backends import telemetry
from sartor.backends.signed import to_int8
from sartor.backends.tensorrt import operators, surgery
from sartor.backends.tensorrt.settings import RTX, Settings
from sartor.errors import BackendError
from sartor.ir.dialect import inline_dialect
from sartor.ir.exits import with_choices

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program, settings: Settings) -> Program:
    """An equal program for the parser; the program itself when nothing needs rewriting and there is no surgery.

    Raises:
        UsageError: onnx_graphsurgeon is not installed, or an installed surgery cannot be imported.
        BackendError: a user's surgery fails, or leaves no graph.
    """
    program = to_int8(inline_dialect(with_choices(program)))
    hooks = settings.hooks()
    if not hooks and not any(surgery.concerns(node) for node in program.graph.all_nodes()):
        return program
    import onnx_ir as ir

    gs = telemetry.import_vendor("onnx_graphsurgeon", RTX.requirement)
    core = program.understood()
    graph = gs.import_onnx(_with_types(core))
    for part in (graph, *graph.subgraphs(recursive=True)):
        surgery.rewrite(part, operators.inferred(core)[0])
    graph.cleanup()
    for name, hook in hooks:
        graph = _applied(gs, graph, name, hook)
    proto = gs.export_onnx(graph)
    proto.ir_version = core.model.ir_version
    _keep_types_of_plugins(proto)
    result = program.clone()
    result.model = ir.from_proto(proto)
    result.invalidate()
    return result


def _with_types(program: Program) -> onnx.ModelProto:
    """The protobuf with shape and type of every value, at the reference shapes, for those who write surgery."""
    proto = program.to_proto()
    shapes, types = operators.inferred(program)
    declared = {value.name for value in proto.graph.output}
    for name in (name for node in proto.graph.node for name in node.output):
        if name in shapes and name in types and name not in declared:
            proto.graph.value_info.append(
                onnx.helper.make_tensor_value_info(name, int(types[name]), shapes[name])
            )
    return proto


def _keep_types_of_plugins(proto: onnx.ModelProto) -> None:
    """Drop all other declarations: inference finds the types anew, and surgery may have changed them."""
    plugins = {name for node in proto.graph.node if node.domain for name in node.output}
    kept = [info for info in proto.graph.value_info if info.name in plugins]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def _applied(gs: Any, graph: Any, name: str, hook: Any) -> Any:
    try:
        returned = hook(graph)
    except Exception as error:
        raise BackendError(
            f"TensorRT surgery '{name}' failed: {type(error).__name__}: {error}. Repair it, or leave it out."
        ) from error
    result = graph if returned is None else returned
    if not isinstance(result, gs.Graph):
        raise BackendError(
            f"TensorRT surgery '{name}' returned '{type(result).__name__}'; expected an onnx_graphsurgeon.Graph or "
            "None."
        )
    return result.cleanup().toposort()
