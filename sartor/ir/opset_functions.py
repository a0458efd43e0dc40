"""Replace operators that ONNX defines as functions, and that a canonical program lacks, by their bodies.

A body may be written in another opset than the model, and may call further functions. Its nodes carry
their own `version`, by which `sartor.ir.opset` raises or lowers each of them afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sartor.errors import ModelError, SartorError, UnsupportedOperatorError
from sartor.ir import protos
from sartor.ir.program import CANONICAL_OPSET, DIALECT_DOMAIN

_DEFAULT = ("", "ai.onnx")
_EXPANSION = "sartor.expansion"  # domain of the calls while they wait to be inlined
ALWAYS_EXPANDED = frozenset(
    {
        "AffineGrid",
        "BlackmanWindow",
        "CenterCropPad",
        "DynamicQuantizeLinear",
        "HammingWindow",
        "HannWindow",
        "NegativeLogLikelihoodLoss",
        "SoftmaxCrossEntropyLoss",
    }
)
"""Operators of the canonical opset that are outside the table and whose bodies are inside it."""

Types = Mapping[str, onnx.TypeProto]


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of all graphs and functions but those of domain `sartor`."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        if function.domain != DIALECT_DOMAIN:
            yield from function.all_nodes()


def expand(model: ir.Model, version: int) -> None:
    """Inline the bodies of all operators that need it, in place.

    Args:
        model: its nodes carry their opset in `version`.
        version: opset of the model.

    Raises:
        UnsupportedOperatorError: an operator that is newer than the canonical opset has no body.
        ModelError: a body does not fit its operands.
    """
    if not any(_wanted(node, version) for node in all_nodes(model)):
        return
    if any(f.domain != DIALECT_DOMAIN for f in model.functions.values()):
        try:  # types inside them are known only inline
            InlinePass(criteria=lambda f: f.domain != DIALECT_DOMAIN)(model)
        except (ir.passes.PreconditionError, ir.passes.PassError) as error:
            raise ModelError(f"The model's functions cannot be inlined: {error}") from error
    calls = [node for node in model.graph.all_nodes() if _wanted(node, version)]
    types = _model_types(model) if any(_needs_types(node, version) for node in calls) else {}
    try:
        _replace(model, calls, version, types)
        InlinePass(criteria=lambda f: f.domain == _EXPANSION)(model)
    except SartorError:
        raise
    except Exception as error:  # ONNX builds bodies from operands and attributes as they come
        kinds = sorted({node.op_type for node in calls})
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"Operators {kinds} cannot be expanded into their ONNX function bodies: {said}. Their "
            "operands or attributes do not fit; export the model again."
        ) from error


def _wanted(node: ir.Node, version: int) -> bool:
    if node.domain not in _DEFAULT:
        return False
    if node.op_type in ALWAYS_EXPANDED:
        return True
    if node.op_type == "SpaceToDepth":  # its second order of the block exists from opset 28 only
        return version > CANONICAL_OPSET and node.attributes.get_string("mode", "DCR") != "DCR"
    if node.op_type == "GroupNormalization":  # scale and bias were per group
        return version < CANONICAL_OPSET
    return version > CANONICAL_OPSET and not onnx.defs.has(node.op_type, CANONICAL_OPSET, "")


def _needs_types(node: ir.Node, version: int) -> bool:
    return onnx.defs.has(node.op_type, version, "") and bool(
        _schema(node.op_type, version).has_context_dependent_function
    )


def _schema(op_type: str, version: int) -> Any:
    """The operator's schema; onnx's own stubs leave out everything about functions."""
    return onnx.defs.get_schema(op_type, version, "")


def _replace(model: ir.Model, nodes: Iterable[ir.Node], version: int, types: Types) -> None:
    """Turn each node into a call of a function of its own."""
    for node in nodes:
        function = _body(node, version, types)
        _resolve(function.node, node, version)
        _complete(function, node)
        body_version = next(int(o.version) for o in function.opset_import if o.domain in _DEFAULT)
        called = ir.serde.deserialize_function(function)
        called.domain, called.name, called.overload = _EXPANSION, node.op_type, f"{len(model.functions)}"
        called.opset_imports.clear()  # the body's nodes know their own versions
        model.functions[called.identifier()] = called
        inner = []
        for child in called.all_nodes():
            child.version = body_version
            if _wanted(child, body_version):
                inner.append(child)
        if inner:
            dependent = any(_needs_types(child, body_version) for child in inner)
            _replace(model, inner, body_version, _body_types(function, node, types) if dependent else {})
        node.attributes.clear()
        node.domain, node.overload = _EXPANSION, called.overload


def _resolve(nodes: Iterable[onnx.NodeProto], call: ir.Node, version: int) -> None:
    """Replace references to the call's attributes by their values, or by the schema's defaults."""
    values = {
        name: attribute.default_value
        for name, attribute in onnx.defs.get_schema(call.op_type, version, "").attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    }
    values |= {name: ir.to_proto(attribute) for name, attribute in call.attributes.items()}
    for node in nodes:
        for body in protos.bodies(node):
            _resolve(body.node, call, version)
        for attribute in list(node.attribute):
            if not attribute.ref_attr_name:
                continue
            found = values.get(attribute.ref_attr_name)
            if found is None:
                node.attribute.remove(attribute)
                continue
            name = attribute.name
            attribute.CopyFrom(found)
            attribute.name = name


def _complete(function: onnx.FunctionProto, call: ir.Node) -> None:
    """Let the body compute exactly the outputs of its call: a schema's body leaves out unwanted ones."""
    del function.output[len(call.outputs) :]
    computed = {name for node in function.node for name in node.output}
    for name in function.output:
        if name not in computed:  # an omitted optional output; nothing reads it
            zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])
            function.node.append(onnx.helper.make_node("Constant", [], [name], value=zero))


def _body(node: ir.Node, version: int, types: Types) -> onnx.FunctionProto:
    """The body of the operator for these attributes and input types, in the newest opset up to `version`."""
    if not onnx.defs.has(node.op_type, version, ""):
        raise UnsupportedOperatorError(
            f"Node '{node.name}' uses operator '{node.op_type}', which opset {version} does not have."
        )
    schema = _schema(node.op_type, version)
    plain = [v for v in schema.function_opset_versions if v <= version]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= version]
    data = b""
    if plain:
        data = schema.get_function_with_opset_version(max(plain))
    elif dependent:
        inputs = [
            types.get(i.name or "", onnx.TypeProto()) if i is not None else onnx.TypeProto()
            for i in node.inputs
        ]
        proto = ir.to_proto(node)
        data = schema.get_context_dependent_function_with_opset_version(
            max(dependent), proto.SerializeToString(), [t.SerializeToString() for t in inputs]
        )
    function = onnx.FunctionProto()
    function.ParseFromString(data)
    if not function.node:
        raise UnsupportedOperatorError(
            f"Node '{node.name}' uses operator '{node.op_type}', which opset {CANONICAL_OPSET} does not have and "
            "which has no ONNX function body here. Export the model at opset "
            f"{CANONICAL_OPSET}, or replace the operator."
        )
    return function


def _model_types(model: ir.Model) -> dict[str, onnx.TypeProto]:
    """Types of the values of the main graph, as far as inference knows them."""
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.size > 256:  # a weight: only its type and shape matter
            light.graph.initializers.pop(name)
            value.shape, value.type, value.const_value = (
                ir.Shape(tensor.shape),
                ir.TensorType(tensor.dtype),
                None,
            )
            light.graph.inputs.append(value)
    proto = ir.to_proto(light)
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:
        raise UnsupportedOperatorError(
            f"The element types that a function body depends on cannot be inferred: {error}. Export the model at "
            f"opset {CANONICAL_OPSET}."
        ) from error
    types = _declared(proto.graph)
    for tensor_proto in proto.graph.initializer:
        types[tensor_proto.name] = onnx.helper.make_tensor_type_proto(
            tensor_proto.data_type, tensor_proto.dims
        )
    return types


def _body_types(function: onnx.FunctionProto, node: ir.Node, types: Types) -> dict[str, onnx.TypeProto]:
    """Types of the values inside a body, from those of the call's inputs."""
    inputs = []
    for name, value in zip(function.input, node.inputs, strict=False):
        info = onnx.ValueInfoProto(name=name)
        if value is not None and value.name in types:
            info.type.CopyFrom(types[value.name])
            inputs.append(info)
    graph = onnx.helper.make_graph(function.node, "body", inputs, [])
    model = onnx.helper.make_model(graph, opset_imports=function.opset_import, ir_version=10)
    return _declared(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)


def _declared(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    return {
        info.name: info.type
        for info in [*graph.input, *graph.value_info, *graph.output]
        if info.type.WhichOneof("value") is not None
    }
