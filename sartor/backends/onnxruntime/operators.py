"""What ONNX Runtime's CPU provider does not take of the canonical table, by operator.

Element types: every operator in every type that its schema allows, offered to ONNX Runtime 1.31.1 as a model of one
node; float16 is nearly always taken, because the runtime computes it in float32 where it has no kernel. The other
rules: ONNX's own node tests, compiled and run, outputs compared.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from sartor.backends.legality import Check, NodeRule
from sartor.backends.node_rules import (
    absent,
    attribute_of,
    merged,
    missing_types,
    operand,
    sequence_first,
    shape_of,
    sign_of_dividend,
    type_combinations,
    when,
    whole_sizes,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare"
)
_MISSING = {
    "DOUBLE": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool Col2Im Conv ConvTranspose Cosh Elu Erf GlobalAveragePool "
        "GlobalLpPool GlobalMaxPool HardSigmoid HardSwish Hardmax InstanceNormalization LRN LeakyRelu LpPool MaxUnpool "
        "Mean Mish PRelu RNN Resize Selu Sinh Softplus Softsign Tan ThresholdedRelu"
    ),
    "FLOAT16": "EyeLike.T2 OneHot",
    "BFLOAT16": (
        "Abs Add ArgMax ArgMin BatchNormalization Ceil Clip Col2Im CumSum DFT DepthToSpace DequantizeLinear.T2 "
        "Div Equal Erf Exp Expand Floor Gelu Gemm Greater GreaterOrEqual GroupNormalization Hardmax LRN LeakyRelu "
        "Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mod Mul Neg PRelu Pad Pow Pow.T1 QLinearMatMul.TS "
        f"QuantizeLinear Reciprocal {_REDUCTIONS} Relu Resize STFT Sigmoid Size Softmax SpaceToDepth Sqrt Sub Sum "
        "Tanh Tile Trilu Where.T"
    ),
    "BOOL": "Col2Im DepthToSpace EyeLike EyeLike.T2 GridSample Resize SpaceToDepth Where.T",
    "INT8": "Col2Im Einsum EyeLike EyeLike.T2 GridSample Pow.T1 Trilu",
    "UINT8": "Col2Im Einsum EyeLike EyeLike.T2 GridSample Pow.T1 Trilu",
    "INT16": (
        "ArgMax ArgMin Clip Col2Im DepthToSpace Einsum EyeLike EyeLike.T2 GridSample Max Min Pad Pow.T1 Relu Resize "
        "SpaceToDepth Trilu Where.T"
    ),
    "UINT16": (
        "ArgMax ArgMin BitShift Clip Col2Im DepthToSpace Einsum EyeLike EyeLike.T2 GridSample Max Min Pad Pow.T1 "
        "Resize SpaceToDepth TopK Trilu Where.T"
    ),
    "INT32": "Col2Im DepthToSpace Gemm GridSample PRelu QuantizeLinear SpaceToDepth",
    "UINT32": (
        f"ArgMax ArgMin Col2Im CumSum DepthToSpace Einsum EyeLike EyeLike.T2 Gemm GridSample PRelu Pow.T1 "
        f"{_REDUCTIONS} Resize SpaceToDepth TopK Trilu"
    ),
    "INT64": "Col2Im DepthToSpace Gemm GridSample PRelu Relu Resize SpaceToDepth",
    "UINT64": (
        f"ArgMax ArgMin Col2Im CumSum DepthToSpace Einsum Gemm GridSample PRelu Pow.T1 {_REDUCTIONS} Resize "
        "SpaceToDepth TopK Trilu Where.T"
    ),
}


def _one_zero_point(program: Program, node: ir.Node) -> Check:
    shape = shape_of(program, operand(node, 3))
    return shape is None or math.prod(shape) == 1, "not given" if shape is None else f"shape {list(shape)}"


OPERATORS = merged(
    missing_types(_MISSING),
    type_combinations("BatchNormalization", ("T", "T1", "T2"), ("FLOAT FLOAT FLOAT", "DOUBLE DOUBLE DOUBLE")),
    type_combinations("GridSample", ("T1", "T2"), ("FLOAT FLOAT", "DOUBLE DOUBLE")),
    type_combinations(
        "OneHot",
        ("T1", "T2", "T3"),
        (
            *("INT64 INT64 INT64", "FLOAT INT64 INT64", "FLOAT FLOAT FLOAT", "INT64 FLOAT INT32"),
            *("INT64 INT64 FLOAT", "INT32 INT32 FLOAT", "INT32 FLOAT FLOAT", "INT64 FLOAT FLOAT"),
            "INT64 INT32 FLOAT",
        ),
    ),
    type_combinations(
        "QLinearConv", ("T1", "T2", "T3"), ("UINT8 UINT8 UINT8", "UINT8 INT8 UINT8", "INT8 INT8 INT8")
    ),
    type_combinations(
        "QLinearMatMul", ("T1", "T2", "T3"), ("UINT8 UINT8 UINT8", "UINT8 INT8 UINT8", "INT8 INT8 INT8")
    ),
    {
        "ConvInteger": (
            NodeRule(
                "one-zero-point", "All output channels share one zero point of the weights.", _one_zero_point
            ),
        ),
        "GRU": (sequence_first(),),
        "Gelu": (
            when(
                dataclasses.replace(
                    missing_types({"DOUBLE": "Gelu"})["Gelu"][0],
                    text="Without an approximation, 'X' and 'Y' are not of type double.",
                ),
                lambda program, node: attribute_of(node, "approximate", "none") == "none",
            ),
        ),
        "LSTM": (sequence_first(),),
        "MaxUnpool": (
            absent(
                2, "output_shape", "'output_shape' is not given: indices would be read as of another shape."
            ),
        ),
        "Mod": (sign_of_dividend(),),
        "RNN": (sequence_first(),),
        "Resize": (whole_sizes(),),
    },
)
"""Rules by operator."""
