"""Rewrites on `onnx_graphsurgeon` graphs: the same function in the spelling that TensorRT's parser takes.

* int64 indices and bounds become int32 where ONNX has both types and the values fit; bounds of Slice beyond
  int32 are clamped first, which changes nothing on axes shorter than 2^31.
* `DequantizeLinear` of a constant is computed where the parser does not take it: an int32 one (a bias), or one with
  a zero point. What else has a zero point is in `symmetric`.
* Resize: `half_pixel_symmetric` is `half_pixel` where the output size is the scale times the input size exactly;
  `tf_crop_and_resize` of the whole image is `align_corners`; antialiasing does nothing where no axis shrinks; an
  aspect-ratio policy is the scale that follows from it, where rounding down gives the same size.
* RNN has one activation per direction; the schema's default of two is spelled out in a canonical program.
* Outputs that nobody reads are dropped from LayerNormalization and MaxPool, of which the parser takes one output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.tensorrt.symmetric import constants, dequantized, make_symmetric

if TYPE_CHECKING:
    import onnx_ir as ir

Shapes = Mapping[str, tuple[int, ...]]

_INT32 = np.iinfo(np.int32)
_INDEX_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "Gather": (1,),
    "GatherElements": (1,),
    "OneHot": (1,),
    "ScatterElements": (1,),
    "Slice": (1, 2, 3, 4),
}
"""Inputs that ONNX allows in int32 as well; those of one node have one type together."""
_ONE_OUTPUT = ("LayerNormalization", "MaxPool")


def concerns(node: ir.Node) -> bool:
    """Whether `rewrite` may change the node."""
    if node.domain:
        return False
    if node.op_type in (*_ONE_OUTPUT, "Resize", "RNN"):
        return node.op_type not in _ONE_OUTPUT or len(node.outputs) > 1
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return True
    return any(
        value is not None and value.const_value is not None and value.const_value.dtype.name == "INT64"
        for value in (node.inputs[i] for i in _INDEX_INPUTS.get(node.op_type, ()) if i < len(node.inputs))
    )


def rewrite(graph: Any, shapes: Shapes) -> None:
    """Rewrite one graph in place; its bodies are graphs of their own.

    Args:
        graph: an `onnx_graphsurgeon.Graph`.
        shapes: shape by value name.
    """
    for node in list(graph.nodes):
        if node.domain:
            continue
        if node.op in _INDEX_INPUTS:
            _narrow(node)
        step = _STEPS.get(node.op)
        if step is not None:
            step(graph, node, shapes)
    make_symmetric(graph)  # afterwards: biases are constants now


def _replaced(node: Any, position: int, array: np.ndarray) -> None:
    """Give `node` a constant of its own; it takes over the name where nobody else reads the old one."""
    old = node.inputs[position]
    name = old.name if len(old.outputs) == 1 else f"{old.name}.{node.name}.{position}"
    node.inputs[position] = type(old)(name, np.asarray(array, order="C"))


def _narrow(node: Any) -> None:
    operands = constants(node, _INDEX_INPUTS[node.op])
    if not operands or any(operand.values.dtype != np.int64 for operand in operands.values()):
        return
    if node.op == "Slice" and len(operands) < 4:
        return  # the parser takes bounds in int32 with steps only: it makes up too many of its own
    arrays = {position: operand.values for position, operand in operands.items()}
    if node.op == "Slice":
        arrays = {
            position: np.clip(array, _INT32.min, _INT32.max) if position in (1, 2) else array
            for position, array in arrays.items()
        }
    if all(
        array.size == 0 or _INT32.min <= array.min() <= array.max() <= _INT32.max for array in arrays.values()
    ):
        for position, array in arrays.items():
            _replaced(node, position, array.astype(np.int32))


def _dequantize(graph: Any, node: Any, shapes: Shapes) -> None:
    value = dequantized(node)
    output = node.outputs[0]
    if value is None or output in graph.outputs or not _not_taken(node):
        return
    constant = type(node.inputs[1])(output.name, value.astype(node.inputs[1].values.dtype))
    for reader in {id(reader): reader for reader in output.outputs}.values():
        reader.inputs = [constant if operand is output else operand for operand in reader.inputs]
    output.name = f"{output.name}/computed"  # the name has gone to the constant


def _not_taken(node: Any) -> bool:
    """A constant in 32 bits, or with a zero point."""
    zero = node.inputs[2].values if len(node.inputs) > 2 and not node.inputs[2].is_empty() else np.zeros(1)
    return bool(node.inputs[0].values.dtype == np.int32 or zero.any())


def _activations(graph: Any, node: Any, shapes: Shapes) -> None:
    directions = 2 if node.attrs.get("direction") == "bidirectional" else 1
    for name in ("activations", "activation_alpha", "activation_beta"):
        if len(node.attrs.get(name, ())) > directions:
            node.attrs[name] = list(node.attrs[name])[:directions]


def _first_output(graph: Any, node: Any, shapes: Shapes) -> None:
    while len(node.outputs) > 1 and not node.outputs[-1].outputs and node.outputs[-1] not in graph.outputs:
        del node.outputs[-1]


def _resize(graph: Any, node: Any, shapes: Shapes) -> None:
    before, after = shapes.get(node.inputs[0].name), shapes.get(node.outputs[0].name)
    operands = constants(node, (1, 2, 3))
    if before is None or after is None or operands is None:
        return
    attributes = node.attrs
    axes = [axis % len(before) for axis in attributes.get("axes", range(len(before)))]
    scales = dict(zip(axes, operands[2].values.tolist(), strict=True)) if 2 in operands else {}
    policy = attributes.get("keep_aspect_ratio_policy", "stretch")
    if 3 in operands and policy != "stretch":
        scale = _common_scale(policy, axes, before, operands[3].values)
        if all(math.floor(scale * before[axis]) == after[axis] for axis in axes):
            scales = dict.fromkeys(axes, scale)
            values = np.full(len(axes), scale, np.float32)
            node.inputs = [*node.inputs[:2], type(operands[3])(f"{operands[3].name}.scales", values)]
            attributes["keep_aspect_ratio_policy"] = "stretch"
    whole = all(scales.get(axis, 0) * before[axis] == after[axis] for axis in axes) or not scales
    mode = attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode == "half_pixel_symmetric" and whole:
        attributes["coordinate_transformation_mode"] = "half_pixel"
    if mode == "tf_crop_and_resize" and whole and _whole_image(operands.get(1), axes, before, after):
        attributes["coordinate_transformation_mode"] = "align_corners"
        node.inputs[1] = type(node.outputs[0]).empty()
    if attributes.get("antialias") and all(after[axis] >= before[axis] for axis in axes):
        attributes["antialias"] = 0


def _common_scale(policy: str, axes: Sequence[int], before: Sequence[int], sizes: np.ndarray) -> float:
    ratios = [float(size) / before[axis] for axis, size in zip(axes, sizes, strict=True)]
    return float(np.float32(min(ratios) if policy == "not_larger" else max(ratios)))


def _whole_image(roi: Any, axes: Sequence[int], before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether the region is everything; axes that end with one pixel are centred by one mode and not the other."""
    if roi is None:
        return False
    starts, ends = np.split(roi.values.astype(np.float64), 2)
    return bool(
        (starts == 0).all()
        and (ends == 1).all()
        and all(after[axis] > 1 or before[axis] == 1 for axis in axes)
    )


_STEPS: Mapping[str, Callable[[Any, Any, Shapes], None]] = {
    "DequantizeLinear": _dequantize,
    "LayerNormalization": _first_output,
    "MaxPool": _first_output,
    "RNN": _activations,
    "Resize": _resize,
}
