"""What a target that has no floating-point unit could not run of a quantized program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sartor.ir.canonicalize import QUANTIZED
from sartor.quantization.placement import ACTIVATIONS

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program


@dataclasses.dataclass(frozen=True)
class FloatNode:
    """A node that computes in floating point.

    Attributes:
        node: its name.
        op_type: its operator.
        reason: which operand or result is not quantized.
    """

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"Node '{self.node}' ({self.op_type}) computes in float: {self.reason}."


def integer_only(program: Program) -> list[FloatNode]:
    """The nodes that compute in floating point, in execution order; empty when a target needs integers alone.

    A node computes in integers when every floating operand comes from a DequantizeLinear and every floating result
    goes to QuantizeLinear alone, directly or through one Relu or Clip. Quantizing the graph's inputs and
    dequantizing its outputs is the caller's business and not counted; nor is what computes no floats at all.
    """
    types = program.types()
    left = []
    for node in program.graph.all_nodes():
        if node.op_type in QUANTIZED and not node.domain:
            continue
        reason = _float_operand(node, types) or _float_result(node, types)
        if reason:
            left.append(FloatNode(node.name or "", node.op_type, reason))
    return left


def _float_operand(node: ir.Node, types: Mapping[str, ir.DataType]) -> str:
    for index, value in enumerate(node.inputs):
        if value is None or not _floating(value, types):
            continue
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            continue
        if node.op_type in ACTIVATIONS and (index > 0 or (producer is not None and _fused(value))):
            continue
        if node.op_type in ("Resize", "Pad") and index > 0:
            continue  # factors and a fill value, which are known before anything runs
        what = "constant" if value.is_initializer() else "input" if producer is None else "value"
        return f"{what} '{value.name}' is not quantized"
    return ""


def _float_result(node: ir.Node, types: Mapping[str, ir.DataType]) -> str:
    for value in node.outputs:
        if not value.name or not _floating(value, types):
            continue
        if value.is_graph_output():
            return f"output '{value.name}' is not quantized"
        readers = [user for user, _ in value.uses()]
        if not all(user.op_type == "QuantizeLinear" for user in readers) and not (
            node.op_type not in ACTIVATIONS and _fused(value)
        ):
            return f"its result '{value.name}' is not quantized"
    return ""


def _fused(value: ir.Value) -> bool:
    """Whether one activation function reads the value, and nothing else does."""
    readers = [user for user, _ in value.uses()]
    return len(readers) == 1 and readers[0].op_type in ACTIVATIONS and not value.is_graph_output()


def _floating(value: ir.Value, types: Mapping[str, ir.DataType]) -> bool:
    dtype = types.get(value.name or "", value.dtype)
    return dtype is not None and dtype.is_floating_point()
