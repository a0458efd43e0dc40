"""What ONNX Runtime needs rewritten: early exits, and what its CPU provider is to compute in integers.

Exits become `If`. The kernels fuse `DequantizeLinear → Conv → QuantizeLinear`, on x86-64 for unsigned activations only,
and nothing where a Relu stands before the QuantizeLinear; a layer that is not fused runs in float, between conversions.
Both are rewritten, and the function stays the same to the bit:

* A QuantizeLinear saturates. With z its zero point, s its scale and [l, h] its integers, it maps every number below
  (l − z) · s to l and above (h − z) · s to h, so that `Q(Relu(x)) = Q(x)` if Q(0) = l, and `Q(Clip(x, a, b)) = Q(x)`
  if Q(a) = l and Q(b) = h. Then the activation function is removed.
* A signed pair of QuantizeLinear and DequantizeLinear is an unsigned one with q + 128 and z + 128. Weights of
  layers stay signed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sartor.ir.exits import with_choices

if TYPE_CHECKING:
    from sartor.ir.program import Program


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def legalize(program: Program) -> Program:
    """An equal program that the runtime computes in integers; itself when nothing is quantized."""
    program = with_choices(program)
    if not any(node.op_type == "QuantizeLinear" for node in program.nodes()):
        return program
    result = program.clone()
    for node in [node for node in result.nodes() if _redundant(node)]:
        source = node.inputs[0]
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, source)
        _remove(result.graph, node)
    for node in list(result.nodes()):
        if node.op_type == "QuantizeLinear":
            _make_unsigned(result.graph, node)
        elif node.op_type == "DequantizeLinear":
            _make_operand_unsigned(result.graph, node)
    result.invalidate()
    return result


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    operands = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in operands:
        _drop_unused(graph, value)


def _drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    if value.is_initializer() and not value.uses() and not value.is_graph_output():
        graph.initializers.pop(value.name or "", None)


# ---- signs ---------------------------------------------------------------------------------------
def _make_unsigned(graph: ir.Graph, quantize: ir.Node) -> None:
    """A pair whose integers nothing else reads."""
    readers = [user for user, _ in quantize.outputs[0].uses()]
    pair = [quantize, *readers]
    if not readers or any(node.op_type != "DequantizeLinear" for node in readers):
        return
    zero_points = [_operand(node, 2) for node in pair]
    first = zero_points[0]
    if first is None or first.dtype != np.int8 or quantize.outputs[0].is_graph_output():
        return
    if any(other is None or not np.array_equal(other, first) for other in zero_points):
        return
    if quantize.attributes.get_int("output_dtype", 0):
        return
    for node in pair:
        _replace(graph, node, 2, _shifted(first))
    quantize.outputs[0].type = None


def _make_operand_unsigned(graph: ir.Graph, dequantize: ir.Node) -> None:
    """A constant operand of an elementwise operator, whose kernels want both operands alike."""
    stored, zero_point = _operand(dequantize, 0), _operand(dequantize, 2)
    readers = [user.op_type for user, _ in dequantize.outputs[0].uses()]
    if stored is None or stored.dtype != np.int8 or zero_point is None or not readers:
        return
    if not any(op_type in _LAYERS for op_type in readers):
        _replace(graph, dequantize, 0, _shifted(stored))
        _replace(graph, dequantize, 2, _shifted(zero_point))


def _shifted(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.int16) + 128).astype(np.uint8)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Let one input of a node read `array`; nodes that read the same constant share the new one."""
    old = node.inputs[index]
    assert old is not None
    name = f"{old.name}/uint8"
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(array.shape))
        value.const_value = ir.Tensor(array, name=name)
        graph.initializers.add(value)
    node.replace_input_with(index, value)
    _drop_unused(graph, old)


# ---- activation functions ------------------------------------------------------------------------
def _redundant(node: ir.Node) -> bool:
    """Whether every reader is a QuantizeLinear that saturates where the function does."""
    if node.op_type not in ("Relu", "Clip") or node.domain or node.outputs[0].is_graph_output():
        return False
    readers = list(node.outputs[0].uses())
    if not readers or any(user.op_type != "QuantizeLinear" or index for user, index in readers):
        return False
    low, high = 0.0, np.inf
    if node.op_type == "Clip":
        low = _bound(node, 1, -np.inf)
        high = _bound(node, 2, np.inf)
    return all(_saturates(user, low, high) for user, _ in readers)


def _saturates(quantize: ir.Node, low: float, high: float) -> bool:
    scale, zero_point = _operand(quantize, 1), _operand(quantize, 2)
    if scale is None or zero_point is None or scale.size != 1 or np.isnan(low) or np.isnan(high):
        return False
    bounds = np.iinfo(zero_point.dtype)

    def image(number: float) -> float:
        if np.isinf(number):
            return bounds.min if number < 0 else bounds.max
        integer = float(np.rint(np.float32(number) / scale.reshape(()))) + int(zero_point.reshape(()))
        return min(max(integer, bounds.min), bounds.max)

    return image(low) == bounds.min and image(high) == bounds.max


def _bound(node: ir.Node, index: int, absent: float) -> float:
    """A bound of Clip; NaN where it is not constant."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return absent
    array = _operand(node, index)
    return float(array.reshape(())) if array is not None and array.size == 1 else np.nan


def _operand(node: ir.Node, index: int) -> np.ndarray | None:
    """A constant operand; None where it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()
