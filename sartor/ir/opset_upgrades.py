"""Rewrite operators of older opsets to the canonical one, one rule per operator, weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir.program import CANONICAL_OPSET

Upgrade = Callable[[ir.Node, int], None]


def upgrade(model: ir.Model, nodes: Iterable[ir.Node], version: int) -> None:
    """Rewrite `nodes` of `model` from opset `version` to the canonical one, in place.

    Raises:
        UnsupportedOperatorError: an operator changed its meaning and has no rule.
    """
    ranks: dict[str, int] | None = None
    for node in list(nodes):
        if node.domain not in ("", "ai.onnx"):
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


_CHANGED_MEANING = {"Scan": 9}


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
    array: np.ndarray = np.asarray(list(values) if isinstance(values, range) else values, dtype=dtype)
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
            f"Node '{node.name}' (BatchNormalization) has spatial=0, statistics per pixel, which has no "
            "counterpart."
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


def _dft(node: ir.Node, version: int) -> None:
    """The axis became an input at opset 20, and its default moved from 1 to the last but one."""
    if version >= 20:
        return
    found = node.attributes.pop("axis", None)
    node.resize_inputs(3)
    _put(node, 2, _new_constant(node, "axis", found.as_int() if found is not None else 1))


def _grid_sample(node: ir.Node, version: int) -> None:
    """The modes lost their "bi" when opset 20 allowed any number of axes."""
    mode = node.attributes.get_string("mode", "bilinear")
    if version < 20:
        renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
        node.attributes.add(ir.AttrString("mode", renamed))


def _roi_align(node: ir.Node, version: int) -> None:
    if version < 16:
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def _scatter(node: ir.Node, version: int) -> None:
    node.op_type = "ScatterElements"


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
    "DFT": _dft,
    "Dropout": _dropout,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Scatter": _scatter,
    "Slice": _slice,
    "Split": _split,
    "TopK": _top_k,
    "Upsample": _upsample,
}
