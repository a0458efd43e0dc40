"""Bring a model of any opset to the canonical one, without touching its weights.

Older operators are rewritten one by one (`_UPGRADES`); newer ones are relabelled when their schema only
gained element types or attributes that the node does not use, or expanded through their ONNX function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError
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
        _upgrade(model, version)
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


# ---- from newer opsets --------------------------------------------------------------------------
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
            f"Node '{node.name}' uses operator '{node.op_type}' of opset {version}, which has no counterpart at "
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
        f"Node '{node.name}' ({node.op_type}) uses '{what}' of opset {version}, which opset {CANONICAL_OPSET} does "
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
            f"Operators {left} are newer than opset {CANONICAL_OPSET} and have no ONNX function body. Export the "
            f"model at opset {CANONICAL_OPSET}."
        )
    return result


# ---- from older opsets --------------------------------------------------------------------------
Upgrade = Callable[[ir.Node, int], None]


def _upgrade(model: ir.Model, version: int) -> None:
    ranks: dict[str, int] | None = None
    for node in _all_nodes(model):
        if node.domain not in _DEFAULT:
            continue
        if (rule_with_ranks := _rank_rule(node, version)) is not None:
            if ranks is None:
                ranks = _ranks(model)
            rule_with_ranks(node, ranks)
        elif (rule := _UPGRADES.get(node.op_type)) is not None:
            rule(node, version)
        elif node.op_type in _CHANGED_MEANING and version < _CHANGED_MEANING[node.op_type]:
            raise UnsupportedOperatorError(
                f"Node '{node.name}' ({node.op_type}) of opset {version} has another meaning at opset "
                f"{CANONICAL_OPSET}. Export the model at opset {CANONICAL_OPSET}."
            )


def _rank_rule(node: ir.Node, version: int) -> Callable[[ir.Node, dict[str, int]], None] | None:
    if node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and version < 13:
        return _softmax
    if version < 7 and ("broadcast" in node.attributes or (node.op_type == "PRelu")):
        return _align_second
    return None


def _align_second(node: ir.Node, ranks: dict[str, int]) -> None:
    """Before opset 7 the second operand was aligned at `axis`, not at the end (a PRelu slope at axis 1)."""
    explicit = node.attributes.pop("axis", None)
    node.attributes.pop("broadcast", None)
    axis = explicit.as_int() if explicit is not None else 1 if node.op_type == "PRelu" else None
    first, second = node.inputs[0], node.inputs[1]
    if axis is None or first is None or second is None:
        return
    rank, own = ranks.get(first.name or ""), ranks.get(second.name or "")
    if rank is None or own is None:
        raise ModelError(
            f"Node '{node.name}' ({node.op_type}) broadcasts at an axis, but a rank is not known."
        )
    trailing = rank - axis % rank - own
    if trailing > 0:
        axes = _new_constant(node, "trailing_axes", range(own, own + trailing))
        spread = ir.node("Unsqueeze", [second, axes], num_outputs=1, name=f"{node.outputs[0].name}.aligned")
        spread.outputs[0].name = spread.name
        assert node.graph is not None
        node.graph.insert_before(node, spread)
        node.replace_input_with(1, spread.outputs[0])


_CHANGED_MEANING = {"GroupNormalization": 21, "GridSample": 20, "DFT": 20, "Scan": 9, "RoiAlign": 16}


def _ranks(model: ir.Model) -> dict[str, int]:
    proto = ir.to_proto(model.clone())
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > 4096:
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
    inferred = onnx.shape_inference.infer_shapes(proto)
    return {
        i.name: len(i.type.tensor_type.shape.dim)
        for i in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
        if i.type.tensor_type.HasField("shape")
    }


def _new_constant(node: ir.Node, role: str, values: object, dtype: type = np.int64) -> ir.Value:
    """A Constant node before `node`; canonicalize turns it into an initializer."""
    array = np.asarray(list(values) if isinstance(values, range) else values, dtype=dtype)
    name = f"{node.outputs[0].name}.{role}"
    constant = ir.node("Constant", [], {"value": ir.Tensor(array, name=name)}, num_outputs=1, name=name)
    constant.outputs[0].name = name
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return constant.outputs[0]


def _put(node: ir.Node, index: int, value: ir.Value) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _attribute_to_input(attribute: str, index: int, dtype: type = np.int64) -> Upgrade:
    def rule(node: ir.Node, version: int) -> None:
        found = node.attributes.pop(attribute, None)
        if found is not None and (index >= len(node.inputs) or node.inputs[index] is None):
            _put(node, index, _new_constant(node, attribute, found.value, dtype))

    return rule


def _top_k(node: ir.Node, version: int) -> None:
    found = node.attributes.pop("k", None)
    if found is not None:
        _put(node, 1, _new_constant(node, "k", [found.as_int()]))


def _split(node: ir.Node, version: int) -> None:
    _attribute_to_input("split", 1)(node, version)
    if (len(node.inputs) < 2 or node.inputs[1] is None) and "num_outputs" not in node.attributes:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


def _slice(node: ir.Node, version: int) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        _attribute_to_input(name, index)(node, version)


def _clip(node: ir.Node, version: int) -> None:
    # The attributes are float32; Clip of any other element type did not exist before opset 11.
    for index, name in enumerate(("min", "max"), start=1):
        _attribute_to_input(name, index, np.float32)(node, version)


def _pad(node: ir.Node, version: int) -> None:
    _attribute_to_input("pads", 1)(node, version)
    _attribute_to_input("value", 2, np.float32)(node, version)


def _batch_norm(node: ir.Node, version: int) -> None:
    if node.attributes.get_int("spatial", 1) != 1:
        raise UnsupportedOperatorError(
            f"Node '{node.name}' (BatchNormalization) has spatial=0, statistics per pixel, which has no counterpart."
        )
    node.attributes.pop("spatial", None)
    if version < 7 and not node.attributes.get_int("is_test", 0):
        raise ModelError(f"Node '{node.name}' (BatchNormalization) has is_test=0: a training graph.")
    node.attributes.pop("is_test", None)
    if version < 14 and any(o.uses() for o in node.outputs[1:]):
        raise ModelError(
            f"Node '{node.name}' (BatchNormalization) returns batch statistics: a training graph."
        )
    if version < 14:
        node.resize_outputs(1)


def _dropout(node: ir.Node, version: int) -> None:
    found = node.attributes.pop("ratio", None)
    if found is not None and len(node.inputs) < 2:
        _put(node, 1, _new_constant(node, "ratio", found.value, np.float32))
    node.attributes.pop("is_test", None)


def _softmax(node: ir.Node, ranks: dict[str, int]) -> None:
    """Before opset 13 Softmax flattened to a matrix at `axis` (default 1) and worked on its rows."""
    axis = node.attributes.get_int("axis", 1)
    source = node.inputs[0]
    assert source is not None and node.graph is not None
    rank = ranks.get(source.name or "")
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        node.attributes.add(ir.AttrInt64("axis", -1))
        return
    stem = node.outputs[0].name or ""
    shape = ir.node("Shape", [source], num_outputs=1, name=f"{stem}.shape")
    flat = ir.node("Flatten", [source], {"axis": axis}, num_outputs=1, name=f"{stem}.flatten")
    rows = ir.node(node.op_type, [flat.outputs[0]], {"axis": -1}, num_outputs=1, name=f"{stem}.rows")
    for made in (shape, flat, rows):
        made.outputs[0].name = made.name
    node.graph.insert_before(node, [shape, flat, rows])
    back = ir.node("Reshape", [rows.outputs[0], shape.outputs[0]], num_outputs=1, name=node.name)
    node.graph.insert_before(node, back)
    _replace(node, back)


def _upsample(node: ir.Node, version: int) -> None:
    scales = node.attributes.pop("scales", None)
    operand = node.inputs[1] if scales is None else _new_constant(node, "scales", scales.value, np.float32)
    mode = node.attributes.get_string("mode", "nearest")
    _as_resize(node, operand, mode)


def _resize(node: ir.Node, version: int) -> None:
    if version < 11:
        _as_resize(node, node.inputs[1], node.attributes.get_string("mode", "nearest"))
    elif node.attributes.get_string("coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise UnsupportedOperatorError(
            f"Node '{node.name}' (Resize) uses 'tf_half_pixel_for_nn', which later opsets removed."
        )
    else:
        for index in (1, 2):  # empty tensors stood for absent inputs before opset 13
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.const_value is not None and value.const_value.size == 0:
                node.replace_input_with(index, None)


def _as_resize(node: ir.Node, scales: ir.Value | None, mode: str) -> None:
    """Before opset 11 positions were `floor(x / scale)`: asymmetric, rounded down."""
    assert node.graph is not None
    attributes = {"coordinate_transformation_mode": "asymmetric", "mode": mode, "nearest_mode": "floor"}
    resize = ir.node("Resize", [node.inputs[0], None, scales], attributes, num_outputs=1, name=node.name)
    node.graph.insert_before(node, resize)
    _replace(node, resize)


def _replace(old: ir.Node, new: ir.Node) -> None:
    graph = old.graph
    assert graph is not None
    new.metadata_props.update(old.metadata_props)
    source, target = old.outputs[0], new.outputs[0]
    name, target.type, target.shape = source.name, source.type, source.shape
    for index, output in enumerate(graph.outputs):
        if output is source:
            graph.outputs[index] = target
    source.name = None
    target.name = name
    source.replace_all_uses_with(target)
    graph.remove(old, safe=True)


_UPGRADES: dict[str, Upgrade] = {
    **{name: _attribute_to_input("axes", 1) for name in ("Squeeze", "Unsqueeze")},
    **{
        f"Reduce{kind}": _attribute_to_input("axes", 1)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Dropout": _dropout,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "TopK": _top_k,
    "Upsample": _upsample,
}
