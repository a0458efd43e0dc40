"""Quantization in uint8 rewritten into int8, for runtimes that have only this.

With q' = q - 128 and z' = z - 128 nothing else changes: `s (q' - z') = s (q - z)`, and both types saturate at the
same numbers. So the function stays the same to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from sartor.ir.program import Program

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def to_int8(program: Program) -> Program:
    """An equal program without uint8 between QuantizeLinear and DequantizeLinear; itself where there is none.

    What reads the integers themselves, and parameters that are computed, stay as they are for a rule to refuse.
    """
    if not any(_concerned(node) for node in program.graph.all_nodes()):
        return program
    result = program.clone()
    for node in list(result.graph.all_nodes()):
        if _concerned(node):
            _shift(result.graph, node)
    result.invalidate()
    return result


def _concerned(node: ir.Node) -> bool:
    """Whether a node quantizes to uint8 for DequantizeLinear alone, or dequantizes a stored uint8."""
    if node.domain or node.op_type not in _PAIR or not _is_unsigned(node):
        return False
    if node.op_type == "DequantizeLinear":
        return _array(node.inputs[0]) is not None
    integers = node.outputs[0]
    readers = list(integers.uses())
    pairs = all(user.op_type == "DequantizeLinear" and index == 0 for user, index in readers)
    return (
        bool(readers)
        and pairs
        and not integers.is_graph_output()
        and all(_is_unsigned(user) for user, _ in readers)
    )


def _is_unsigned(node: ir.Node) -> bool:
    """Whether the integers of a node are uint8 and its zero point is known; a QuantizeLinear without one makes them."""
    if node.attributes.get_int("output_dtype", 0) not in (0, ir.DataType.UINT8):
        return False
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        array = _array(zero)
        return array is not None and array.dtype == np.uint8
    if node.op_type == "QuantizeLinear":
        return True
    stored = _array(node.inputs[0])
    writer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return stored.dtype == np.uint8 if stored is not None else writer is not None and _is_unsigned(writer)


def _shift(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type == "DequantizeLinear":
        _shift_input(graph, node, 0)
        _shift_input(graph, node, 2)
        return
    for each in [node, *(user for user, _ in node.outputs[0].uses())]:
        _shift_input(graph, each, 2)
    node.attributes.pop("output_dtype", None)  # the zero point tells it
    node.outputs[0].type = None


def _shift_input(graph: ir.Graph, node: ir.Node, index: int) -> None:
    """Let a node read its integers less 128; nodes that read the same constant share the new one."""
    old = node.inputs[index] if index < len(node.inputs) else None
    array = _array(old)
    name = f"{old.name}/int8" if old is not None else f"{node.name}/zero_point/int8"
    if array is None:  # a zero point that is not given is 0
        scale = _array(node.inputs[1])
        array = np.zeros(scale.shape if scale is not None else (), np.uint8)
    value = graph.initializers.get(name)
    if value is None:
        signed = (array.astype(np.int16) - 128).astype(np.int8)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(signed.shape))
        value.const_value = ir.Tensor(signed, name=name)
        graph.initializers.add(value)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and not old.uses() and not old.is_graph_output():
        graph.initializers.pop(old.name or "", None)


def _array(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()
