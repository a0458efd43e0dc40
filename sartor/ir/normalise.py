"""One spelling per operator: every default explicit, every pad a number, private shape constants."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir import folding
from sartor.ir.cleanup import array_of
from sartor.ir.folding import names
from sartor.ir.program import CANONICAL_OPSET

_WINDOWED = names("AveragePool Conv ConvTranspose LpPool MaxPool")
_PRIVATE_CONSTANTS = names(
    "Expand Gather Pad Reshape Resize Slice Split Squeeze Tile TopK Unsqueeze CumSum Trilu"
)
_QUANTIZED = names("DequantizeLinear QuantizeLinear")
_INTEGERS = names("INT8 INT16 INT32 UINT8 UINT16")
_REDUCTIONS_PREFIX = "Reduce"

Shapes = Mapping[str, tuple[int, ...]]
Types = Mapping[str, ir.DataType]


def normalise(graph: ir.Graph, shapes: Shapes, types: Types, protected: Set[str]) -> None:
    """Rewrite attributes and constant operands of every node of the main graph to one spelling.

    * windows: `kernel_shape strides pads dilations group` explicit, `auto_pad` and `output_shape` gone;
    * `axes`, `steps`, `split` and `pads` operands complete; Reshape and Expand targets explicit;
    * QuantizeLinear and DequantizeLinear with a zero point, which says the type of the integers;
    * schema defaults filled in, attributes sorted by name;
    * integer operands of data-movement operators belong to one node each, so that a pass can edit them.
    """
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _WINDOWED:
            _window(node, shapes)
        elif node.op_type == "BatchNormalization":
            _inference_mode(node)
        elif node.op_type in _QUANTIZED:
            _zero_point(graph, node, shapes, types)
        _operands(graph, node, shapes)
        if node.op_type in _PRIVATE_CONSTANTS:
            _privatise(graph, node, protected)
        fill_defaults(node)


@functools.cache
def _schema(op_type: str) -> tuple[tuple[str, ...], tuple[tuple[str, ir.Attr], ...]]:
    schema = onnx.defs.get_schema(op_type, CANONICAL_OPSET, "")
    defaults = tuple(
        (name, ir.serde.deserialize_attribute(attribute.default_value))
        for name, attribute in sorted(schema.attributes.items())
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    )
    return tuple(p.name for p in schema.inputs), defaults


def fill_defaults(node: ir.Node) -> None:
    """Make schema defaults explicit and sort attributes by name."""
    if not onnx.defs.has(node.op_type, CANONICAL_OPSET, ""):
        return
    for name, attribute in _schema(node.op_type)[1]:
        if name not in node.attributes and name != "auto_pad":
            node.attributes.add(attribute)
    ordered = [node.attributes[name] for name in sorted(node.attributes)]
    node.attributes.clear()
    for attribute in ordered:
        node.attributes.add(attribute)


def _set_ints(node: ir.Node, name: str, values: object) -> None:
    node.attributes.add(ir.AttrInt64s(name, [int(v) for v in values]))  # type: ignore[attr-defined]


def _window(node: ir.Node, shapes: Shapes) -> None:
    data = shapes[node.inputs[0].name]  # type: ignore[union-attr, index]
    spatial = len(data) - 2
    if node.op_type in ("Conv", "ConvTranspose"):
        kernel = shapes[node.inputs[1].name][2:]  # type: ignore[union-attr, index]
        node.attributes.add(ir.AttrInt64("group", node.attributes.get_int("group", 1)))
    else:
        kernel = tuple(node.attributes["kernel_shape"].as_ints())
    attributes = node.attributes
    strides = list(attributes.get_ints("strides", [1] * spatial))
    dilations = list(attributes.get_ints("dilations", [1] * spatial))
    pads = list(attributes.get_ints("pads", [0] * (2 * spatial)))
    auto_pad = attributes.get_string("auto_pad", "NOTSET")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if node.op_type == "ConvTranspose":
        extra = list(attributes.get_ints("output_padding", [0] * spatial))
        wanted = attributes.get_ints("output_shape", None)
        if wanted is None and auto_pad.startswith("SAME"):
            wanted = [size * s for size, s in zip(data[2:], strides, strict=True)]
        if wanted is not None:
            total = [
                s * (size - 1) + e + r - w
                for s, size, e, r, w in zip(
                    strides, data[2:], extra, reach, list(wanted)[-spatial:], strict=True
                )
            ]
            pads = _split_pads(total, upper=auto_pad == "SAME_UPPER")
            for axis in range(spatial):  # one position more than strides reach: append it
                if pads[axis] >= 0 > pads[spatial + axis]:
                    extra[axis] -= pads[spatial + axis]
                    pads[spatial + axis] = 0
        attributes.pop("output_shape", None)
        _set_ints(node, "output_padding", extra)
    elif auto_pad.startswith("SAME"):
        total = [
            max((-(-size // s) - 1) * s + r - size, 0)
            for size, s, r in zip(data[2:], strides, reach, strict=True)
        ]
        pads = _split_pads(total, upper=auto_pad == "SAME_UPPER")
    if auto_pad == "VALID":
        pads = [0] * (2 * spatial)
    if min(pads, default=0) < 0:
        raise ModelError(f"Node '{node.name}' ({node.op_type}) has negative pads {pads}; use Slice to crop.")
    attributes.pop("auto_pad", None)
    for name, values in (
        ("kernel_shape", kernel),
        ("strides", strides),
        ("pads", pads),
        ("dilations", dilations),
    ):
        _set_ints(node, name, values)


def _split_pads(total: list[int], upper: bool) -> list[int]:
    small = [t // 2 for t in total]
    large = [t - t // 2 for t in total]
    return small + large if upper else large + small


def _inference_mode(node: ir.Node) -> None:
    if node.attributes.get_int("training_mode", 0):
        raise ModelError(
            f"Node '{node.name}' (BatchNormalization) runs in training mode; export the model in inference "
            "mode."
        )


def _zero_point(graph: ir.Graph, node: ir.Node, shapes: Shapes, types: Types) -> None:
    """Zeros where none is given, in the shape of the scale: an absent one stands for them."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        data, scale = node.inputs[:2]
        assert data is not None and scale is not None and scale.name is not None
        kind = types.get(data.name or "", data.dtype)
        if node.op_type == "QuantizeLinear":
            kind = ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
        if kind is None or kind.name not in _INTEGERS:
            return  # floats of 8 bits have none
        set_operand(graph, node, 2, np.zeros(shapes[scale.name], kind.numpy()))
    node.attributes.pop("output_dtype", None)


def _operands(graph: ir.Graph, node: ir.Node, shapes: Shapes) -> None:
    kind = node.op_type
    data = shapes.get(node.inputs[0].name or "") if node.inputs and node.inputs[0] is not None else None
    result = shapes.get(node.outputs[0].name or "")
    if data is None or result is None:
        return
    rank = len(data)
    if kind in ("Reshape", "Expand") and 0 not in result:
        _operand(graph, node, 1, result)
        if kind == "Reshape":
            node.attributes.add(ir.AttrInt64("allowzero", 0))
    elif kind in ("Squeeze", "Unsqueeze") and (axes := array_of(node, 1)) is not None:
        _operand(graph, node, 1, np.atleast_1d(axes))
    elif kind == "Squeeze" and array_of(node, 1) is None and (len(node.inputs) < 2 or node.inputs[1] is None):
        _operand(graph, node, 1, [axis for axis, size in enumerate(data) if size == 1])
    elif kind.startswith(_REDUCTIONS_PREFIX) and not node.attributes.get_int("noop_with_empty_axes", 0):
        axes = array_of(node, 1)
        if (axes is None and (len(node.inputs) < 2 or node.inputs[1] is None)) or (
            axes is not None and axes.size == 0
        ):
            _operand(graph, node, 1, range(rank))
        elif axes is not None and axes.ndim == 0:
            _operand(graph, node, 1, [axes])
    elif kind == "Split":
        axis = node.attributes.get_int("axis", 0)
        _operand(graph, node, 1, [shapes[o.name or ""][axis] for o in node.outputs])
        node.attributes.pop("num_outputs", None)
    elif kind == "Slice":
        starts = array_of(node, 1)
        if starts is not None:
            if array_of(node, 3) is None:
                _operand(graph, node, 3, range(len(starts)))
            if len(node.inputs) < 5 or node.inputs[4] is None:
                _operand(graph, node, 4, [1] * len(starts))
    elif kind == "Pad":
        pads, axes = array_of(node, 1), array_of(node, 3)
        if pads is not None and axes is not None:
            full = [0] * (2 * rank)
            for index, axis in enumerate(int(a) % rank for a in axes):
                full[axis], full[rank + axis] = int(pads[index]), int(pads[len(axes) + index])
            _operand(graph, node, 1, full)
            node.resize_inputs(3)
    elif kind == "Resize":
        _crop_axes(graph, node, data, result)
    elif kind == "Transpose" and "perm" not in node.attributes:
        _set_ints(node, "perm", reversed(range(rank)))


def _crop_axes(graph: ir.Graph, node: ir.Node, data: tuple[int, ...], result: tuple[int, ...]) -> None:
    """Leave the axes that a crop neither moves nor resizes out of `axes`, the batch above all."""
    if node.attributes.get_string("coordinate_transformation_mode", "") != "tf_crop_and_resize":
        return
    region = array_of(node, 1)
    axes = [a % len(data) for a in node.attributes.get_ints("axes", range(len(data)))]
    if region is None or region.size != 2 * len(axes):
        return
    moved = [i for i in range(len(axes)) if region[i] != 0 or region[len(axes) + i] != 1]
    kept = [i for i, a in enumerate(axes) if i in moved or data[a] != result[a]]
    if not kept or len(kept) == len(axes):
        return
    _set_ints(node, "axes", [axes[i] for i in kept])
    set_operand(
        graph,
        node,
        1,
        np.asarray([*(region[i] for i in kept), *(region[len(axes) + i] for i in kept)], region.dtype),
    )
    for index in (2, 3):
        operand = array_of(node, index)
        if operand is not None and operand.size == len(axes):
            set_operand(graph, node, index, operand[kept])


def _operand(graph: ir.Graph, node: ir.Node, index: int, values: object) -> None:
    """Make input `index` of `node` a private int64 constant."""
    array = np.asarray([int(v) for v in values], dtype=np.int64)  # type: ignore[attr-defined]
    set_operand(graph, node, index, array)


def set_operand(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> ir.Value:
    """Make input `index` of `node` a private constant holding `array`; named after the node."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    node.replace_input_with(index, None)
    if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
        graph.initializers.pop(old.name or "", None)
    value = folding.constant(graph, free_name(graph, f"{node.name}.{_schema(node.op_type)[0][index]}"), array)
    node.replace_input_with(index, value)
    return value


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name.1`, `name.2`… if an initializer has it already."""
    candidate, number = name, 0
    while candidate in graph.initializers:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _privatise(graph: ir.Graph, node: ir.Node, protected: Set[str]) -> None:
    formal = _schema(node.op_type)[0]
    for index in range(1, len(node.inputs)):
        value = node.inputs[index]
        if (
            value is None
            or value.const_value is None
            or not value.is_initializer()
            or value.name in protected
        ):
            continue
        if value.name == f"{node.name}.{formal[index]}" and len(value.uses()) == 1:
            continue
        set_operand(graph, node, index, value.const_value.numpy())
