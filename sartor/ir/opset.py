"""Bring a model of any opset to the canonical one, without touching its weights.

Older operators are rewritten one by one (`sartor.ir.opset_upgrades`); newer ones are relabelled when their
schema only gained element types or attributes that the node does not use, or expanded through their ONNX
function.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir import opset_functions
from sartor.ir.opset_functions import all_nodes
from sartor.ir.opset_upgrades import upgrade
from sartor.ir.program import CANONICAL_OPSET, DIALECT_DOMAIN

OLDEST_OPSET = 6
_DEFAULT = ("", "ai.onnx")
# Attributes that a newer operator gained, with the value that means "as before".
_NEUTRAL = {
    ("Cast", "round_mode"): "up",
    ("CastLike", "round_mode"): "up",
    ("DequantizeLinear", "output_dtype"): 0,
    ("QuantizeLinear", "precision"): 0,
    ("SpaceToDepth", "mode"): "DCR",
    ("Range", "stash_type"): 1,
}


def raise_opset(model: ir.Model) -> ir.Model:
    """Return `model` at the canonical opset; operators outside the table give way to their ONNX bodies.

    Raises:
        ModelError: the opset is older than 6 and an operator has changed since, or it is unknown.
        UnsupportedOperatorError: an operator has no counterpart at the canonical opset.
    """
    version = _default_opset(model)
    for node in all_nodes(model):
        node.version = version
        if version < OLDEST_OPSET and node.domain in _DEFAULT:
            _check_unchanged(node, version)
    opset_functions.expand(model, version)
    by_version: dict[int, list[ir.Node]] = {}
    for node in all_nodes(model):
        by_version.setdefault(node.version or version, []).append(node)
    for older, nodes in sorted(by_version.items()):
        if older < CANONICAL_OPSET:
            upgrade(model, nodes, older)
        elif older > CANONICAL_OPSET:
            for node in nodes:
                if node.domain in _DEFAULT:
                    _relabel(node, older)
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        imports.pop("ai.onnx", None)
        if "" in imports or imports is model.opset_imports:
            imports[""] = CANONICAL_OPSET
    for node in all_nodes(model):
        if node.domain == "ai.onnx":
            node.domain = ""
        node.version = None
    return model


def _check_unchanged(node: ir.Node, version: int) -> None:
    """Refuse a node of an opset that no rule knows, unless its operator was already what it is now."""
    if _signature(node.op_type, version) != _signature(node.op_type, OLDEST_OPSET):
        raise ModelError(
            f"The model has opset {version}; the oldest supported is {OLDEST_OPSET}, and operator "
            f"'{node.op_type}' of node '{node.name}' has changed since. Convert it with "
            "onnx.version_converter first."
        )


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
