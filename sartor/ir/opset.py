"""Bring a model of any opset to the canonical one, without touching its weights.

Older operators are rewritten one by one (`sartor.ir.opset_upgrades`); newer ones are relabelled when their
schema only gained element types or attributes that the node does not use, or expanded through their ONNX
function.
"""

from __future__ import annotations

import functools

import onnx
import onnx.inliner
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir.opset_upgrades import upgrade
from sartor.ir.program import CANONICAL_OPSET, DIALECT_DOMAIN

OLDEST_OPSET = 6
_DEFAULT = ("", "ai.onnx")
# Attributes that a newer operator gained, with the value that means "as before".
_NEUTRAL = {
    ("Cast", "round_mode"): "up",
    ("CastLike", "round_mode"): "up",
    ("SpaceToDepth", "mode"): "DCR",
    ("Range", "stash_type"): 1,
}


def raise_opset(model: ir.Model) -> ir.Model:
    """Return `model` at the canonical opset.

    Raises:
        ModelError: the opset is older than 7 or unknown.
        UnsupportedOperatorError: an operator has no counterpart at the canonical opset.
    """
    version = _default_opset(model)
    if version < OLDEST_OPSET:
        raise ModelError(
            f"The model has opset {version}; the oldest supported is {OLDEST_OPSET}. Convert it with "
            "onnx.version_converter first."
        )
    if version > CANONICAL_OPSET:
        model = _lower(model, version)
    elif version < CANONICAL_OPSET:
        upgrade(model, _all_nodes(model), version)
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        imports.pop("ai.onnx", None)
        if "" in imports or imports is model.opset_imports:
            imports[""] = CANONICAL_OPSET
    for node in _all_nodes(model):
        if node.domain == "ai.onnx":
            node.domain = ""
        node.version = None
    return model


def _default_opset(model: ir.Model) -> int:
    versions = {int(v) for d, v in model.opset_imports.items() if d in _DEFAULT}
    versions |= {
        int(v)
        for f in model.functions.values()
        if f.domain != DIALECT_DOMAIN
        for d, v in f.opset_imports.items()
        if d in _DEFAULT
    }
    if len(versions) != 1:
        raise ModelError(
            f"The model imports {sorted(versions) or 'no'} versions of the ONNX operators; expected one."
        )
    version = versions.pop()
    if not 1 <= version <= onnx.defs.onnx_opset_version():
        raise ModelError(
            f"The model has opset {version}; the newest known is {onnx.defs.onnx_opset_version()}."
        )
    return version


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    nodes = list(model.graph.all_nodes())
    for function in model.functions.values():
        if function.domain != DIALECT_DOMAIN:
            nodes.extend(function.all_nodes())
    return nodes


@functools.cache
def _signature(op_type: str, version: int) -> tuple | None:
    """What a schema promises besides element types; None if the operator does not exist."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    attributes = {
        name: (str(a.type), a.required, a.default_value.SerializeToString())
        for name, a in schema.attributes.items()
    }
    formal = tuple((str(p.option), p.name) for p in [*schema.inputs, *schema.outputs])
    return attributes, formal, schema.since_version


def _lower(model: ir.Model, version: int) -> ir.Model:
    fresh = sorted({n.op_type for n in _all_nodes(model) if n.domain in _DEFAULT and not _exists(n)})
    if fresh:
        model = _expand_functions(model, fresh)
    for node in _all_nodes(model):
        if node.domain in _DEFAULT:
            _relabel(node, version)
    return model


def _exists(node: ir.Node) -> bool:
    return _signature(node.op_type, CANONICAL_OPSET) is not None


def _relabel(node: ir.Node, version: int) -> None:
    new, old = _signature(node.op_type, version), _signature(node.op_type, CANONICAL_OPSET)
    if new is None or old is None:
        raise UnsupportedOperatorError(
            f"Node '{node.name}' uses operator '{node.op_type}' of opset {version}, which has no "
            "counterpart at "
            f"opset {CANONICAL_OPSET}. Export the model at opset {CANONICAL_OPSET}."
        )
    if new[2] == old[2]:
        return
    for name in set(new[0]) - set(old[0]):
        attribute = node.attributes.get(name)
        neutral = _NEUTRAL.get((node.op_type, name))
        if neutral is None:
            raise _changed(node, version, name)
        if attribute is not None and attribute.value != neutral:
            raise _changed(node, version, name)
        node.attributes.pop(name, None)
    if any(new[0].get(name) != entry for name, entry in old[0].items()) or new[1] != old[1]:
        raise _changed(node, version, "signature")


def _changed(node: ir.Node, version: int, what: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"Node '{node.name}' ({node.op_type}) uses '{what}' of opset {version}, which opset "
        f"{CANONICAL_OPSET} does "
        f"not have. Export the model at opset {CANONICAL_OPSET}."
    )


def _expand_functions(model: ir.Model, op_types: list[str]) -> ir.Model:
    """Replace operators that the canonical opset lacks by their ONNX function bodies."""
    weights = {name: v.const_value for name, v in model.graph.initializers.items()}
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > 256:
            light.graph.initializers.pop(name)
            value.shape, value.type = (
                ir.Shape(value.const_value.shape),
                ir.TensorType(value.const_value.dtype),
            )
            value.const_value = None
            light.graph.inputs.append(value)
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(light), data_prop=True)
        inlined = onnx.inliner.inline_selected_functions(
            proto, [("", name) for name in op_types], inline_schema_functions=True
        )
    except Exception as error:
        raise UnsupportedOperatorError(
            f"Operators {op_types} are newer than opset {CANONICAL_OPSET} and could not be expanded: {error}"
        ) from error
    result = ir.from_proto(inlined)
    for value in list(result.graph.inputs):
        if value.name in weights:
            result.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            result.graph.register_initializer(value)
    left = sorted({n.op_type for n in _all_nodes(result) if n.domain in _DEFAULT and not _exists(n)})
    if left:
        raise UnsupportedOperatorError(
            f"Operators {left} are newer than opset {CANONICAL_OPSET} and have no ONNX function body. "
            "Export the "
            f"model at opset {CANONICAL_OPSET}."
        )
    return result
