"""Quantization in uint8 rewritten into int8, or in int8 into uint8, for runtimes that have only one of them.

With q' = q - 128 and z' = z - 128 nothing else changes: `s (q' - z') = s (q - z)`, and both types saturate at the
same numbers. So the function stays the same to the bit.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from sartor.ir.program import Program

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclasses.dataclass(frozen=True)
class _Change:
    """From one type of 8 bits to the other, with weights or of activations alone."""

    old: type[np.generic]
    new: type[np.generic]
    weights: bool

    def shifted(self, array: np.ndarray) -> np.ndarray:
        """The same numbers under the other zero point."""
        offset = np.iinfo(self.new).min - np.iinfo(self.old).min  # type: ignore[type-var]
        result: np.ndarray = (array.astype(np.int16) + offset).astype(self.new)
        return result


def to_int8(program: Program) -> Program:
    """An equal program without uint8 between QuantizeLinear and DequantizeLinear; itself where there is none.

    What reads the integers themselves, and parameters that are computed, stay as they are for a rule to refuse.
    """
    return _changed(program, _Change(np.uint8, np.int8, weights=True))


def activations_to_uint8(program: Program) -> Program:
    """An equal program whose activations are uint8 where they were int8; weights stay. Itself where there is none."""
    return _changed(program, _Change(np.int8, np.uint8, weights=False))


def _changed(program: Program, change: _Change) -> Program:
    if not any(_concerned(node, change) for node in program.graph.all_nodes()):
        return program
    result = program.clone()
    for node in list(result.graph.all_nodes()):
        if _concerned(node, change):
            _shift(result.graph, node, change)
    result.invalidate()
    return result


def _concerned(node: ir.Node, change: _Change) -> bool:
    """Whether a node quantizes to the old type for DequantizeLinear alone, or dequantizes what is stored in it."""
    if node.domain or node.op_type not in _PAIR or not _has_type(node, change.old):
        return False
    if node.op_type == "DequantizeLinear":
        return change.weights and _array(node.inputs[0]) is not None
    integers = node.outputs[0]
    readers = list(integers.uses())
    pairs = all(user.op_type == "DequantizeLinear" and index == 0 for user, index in readers)
    return bool(readers) and pairs and all(_has_type(user, change.old) for user, _ in readers)


def _has_type(node: ir.Node, wanted: type[np.generic]) -> bool:
    """Whether the integers of a node are of a type and its zero point is known; without one they are uint8."""
    declared = node.attributes.get_int("output_dtype", 0)
    if declared not in (0, ir.DataType.from_numpy(np.dtype(wanted))):
        return False
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        array = _array(zero)
        return array is not None and array.dtype == wanted
    if node.op_type == "QuantizeLinear":
        return bool(declared) or wanted is np.uint8
    stored = _array(node.inputs[0])
    writer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return stored.dtype == wanted if stored is not None else writer is not None and _has_type(writer, wanted)


def _shift(graph: ir.Graph, node: ir.Node, change: _Change) -> None:
    if node.op_type == "DequantizeLinear":
        _shift_input(graph, node, 0, change)
        _shift_input(graph, node, 2, change)
        return
    if node.outputs[0].is_graph_output():
        node = _beside(node)
    for each in [node, *(user for user, _ in node.outputs[0].uses())]:
        _shift_input(graph, each, 2, change)
    node.attributes.pop("output_dtype", None)  # the zero point tells it
    node.outputs[0].type = None


def _beside(node: ir.Node) -> ir.Node:
    """A second QuantizeLinear for the readers of one whose integers leave the model."""
    twin = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        list(node.attributes.values()),
        name=f"{node.name}/inside",
        num_outputs=1,
    )
    integers, inside = node.outputs[0], twin.outputs[0]
    inside.name, inside.shape = f"{integers.name}/inside", integers.shape
    node.graph.insert_after(node, twin)  # type: ignore[union-attr]
    for user, index in list(integers.uses()):
        user.replace_input_with(index, inside)
    return twin


def _shift_input(graph: ir.Graph, node: ir.Node, index: int, change: _Change) -> None:
    """Let a node read its integers in the new type; nodes that read the same constant share the new one."""
    old = node.inputs[index] if index < len(node.inputs) else None
    array = _array(old)
    kind = np.dtype(change.new).name
    name = f"{old.name}/{kind}" if old is not None else f"{node.name}/zero_point/{kind}"
    if array is None:  # a zero point that is not given is 0
        scale = _array(node.inputs[1])
        array = np.zeros(scale.shape if scale is not None else (), change.old)
    value = graph.initializers.get(name)
    if value is None:
        moved: Any = change.shifted(array)
        dtype = ir.DataType.from_numpy(moved.dtype)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(moved.shape))
        value.const_value = ir.Tensor(moved, name=name)
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
