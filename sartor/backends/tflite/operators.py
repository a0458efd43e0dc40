"""What the conversion does not take of the canonical table, by operator.

ONNX's own node tests in float32, int32, int64 and bool, converted by litert-torch 0.10.0, run by LiteRT 2.3.0, outputs
compared with the FX twin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.legality import Check, NodeRule
from sartor.backends.node_rules import (
    attribute,
    constant,
    merged,
    not_converted,
    numbers,
    operand,
    rank_at_most,
    type_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")
_MISSING = {
    "BitwiseAnd": "A flatbuffer has no operator for it.",
    "BitwiseOr": "A flatbuffer has no operator for it.",
    "ConvInteger": "Integers are quantized by QuantizeLinear and DequantizeLinear only.",
    "DFT": "Transforms go through complex numbers in float64.",
    "DynamicQuantizeLinear": "Scales that are computed at run time do not fit a flatbuffer, which stores them.",
    "Hardmax": "Its one-hot encoding is checked at run time, which the converter cannot express.",
    "If": "The converter takes no branches.",
    "MatMulInteger": "Integers are quantized by QuantizeLinear and DequantizeLinear only.",
    "QLinearConv": "Integers are quantized by QuantizeLinear and DequantizeLinear only.",
    "QLinearMatMul": "Integers are quantized by QuantizeLinear and DequantizeLinear only.",
    "RoiAlign": "Its sampling points depend on data in a way that the converter cannot express.",
    "STFT": "Transforms go through complex numbers in float64.",
    "TopK": "The converter's own sorting mixes integers of 32 and 64 bits.",
    "Xor": "A flatbuffer has no operator for it.",
}


def _one_output(program: Program, node: ir.Node) -> Check:
    used = [output.name for output in node.outputs[1:] if output.name]
    return not used, f"'{used[0]}' is given" if used else "not given"


def _int8(program: Program, node: ir.Node) -> Check:
    """Of a QuantizeLinear its result, of a DequantizeLinear what it reads."""
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    kind = type_of(program, value)
    stored = value is not None and numbers(value) is not None
    allowed = ("INT8", "INT32") if node.op_type == "DequantizeLinear" and stored else ("INT8",)
    return (
        kind is None or kind in allowed,
        f"'{value.name if value else ''}' is {(kind or 'unknown').lower()}",
    )


def _parameters(program: Program, node: ir.Node) -> Check:
    stored = numbers(operand(node, 0)) is not None and node.op_type == "DequantizeLinear"
    scale, zero_point = numbers(operand(node, 1)), numbers(operand(node, 2))
    if scale is None or (operand(node, 2) is not None and zero_point is None):
        return False, "they are computed"
    if not stored and len(scale) > 1:
        return False, f"{len(scale)} scales of an activation"
    if not (stored and any(zero_point or ())):
        return True, f"{len(scale)} scales"
    layers = [user.op_type for user, _ in node.outputs[0].uses() if user.op_type in _LAYERS]
    return len(scale) == 1 and not layers, f"zero point {zero_point} and {len(scale)} scales of a constant"


_QUANTIZED = (
    NodeRule("int8", "Quantized activations and weights are int8, biases int32.", _int8),
    NodeRule(
        "stored-parameters",
        "Scale and zero point are constants: one of each for an activation; for a constant one or one per channel, "
        "and the zero point is 0 where there are several, or where Conv, ConvTranspose, Gemm or MatMul reads it.",
        _parameters,
    ),
)

OPERATORS = merged(
    {name: (not_converted(text),) for name, text in _MISSING.items()},
    {name: (*_QUANTIZED, attribute("block_size", (0,), 0, "Scales are not per block.")) for name in QDQ},
    {
        "ConvTranspose": (
            rank_at_most(4, "There is a kernel for images only: the input has at most 4 axes."),
        ),
        "GridSample": (
            attribute("padding_mode", ("zeros", "border"), "zeros", "'padding_mode' is 'zeros' or 'border'."),
        ),
        "LpPool": (rank_at_most(4, "The input has at most 4 axes."),),
        "Pad": (constant(2, "value", "The value of the padding is a constant."),),
        "ScatterElements": (attribute("reduction", ("none",), "none", "'reduction' is 'none'."),),
        "ScatterND": (attribute("reduction", ("none",), "none", "'reduction' is 'none'."),),
        "MaxPool": (NodeRule("no-indices", "The second output, 'Indices', is not used.", _one_output),),
    },
)
"""Rules by operator."""
