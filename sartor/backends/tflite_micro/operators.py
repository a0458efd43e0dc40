"""What the portable kernels of TensorFlow Lite Micro lack of what the conversion takes, by operator.

ONNX's own node tests in float32, int32, int64 and bool, up to four programs per operator, converted as for `tflite`
and run by tflite-micro 0.dev20261023182759. An operator is refused whose flatbuffer has an operator without a kernel,
or one that its kernel has no type or rank for; which ones these are depends on the converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.legality import Check, NodeRule
from sartor.backends.node_rules import (
    attribute,
    attribute_of,
    constant,
    merged,
    missing_types,
    not_converted,
    numbers,
    operand,
    rank_at_most,
    type_of,
)
from sartor.backends.tflite import operators as tflite

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

_NO_KERNEL = {
    "Acos": "ATAN2",
    "Asin": "ATAN2",
    "Asinh": "SIGN",
    "Atan": "ATAN2",
    "BitwiseNot": "BITWISE_XOR",
    "BitwiseXor": "BITWISE_XOR",
    "LpPool": "POW",
    "MaxUnpool": "STABLEHLO_SCATTER",
    "OneHot": "ONE_HOT",
    "ReduceProd": "REDUCE_PROD",
    "ScatterElements": "STABLEHLO_SCATTER",
    "ScatterND": "STABLEHLO_SCATTER",
    "Sign": "SIGN",
}
"""Operators by what the converter makes of them."""
_INTEGER_CHOICE = ("GatherElements", "GridSample", "ReverseSequence")
_IMAGES = "There are kernels for images only: the input has at most 4 axes."


def _square(program: Program, node: ir.Node) -> Check:
    exponent = numbers(operand(node, 1))
    return exponent == [2], f"exponent {exponent}" if exponent is not None else "it is computed"


def _no_strides(program: Program, node: ir.Node) -> Check:
    strides = list(attribute_of(node, "strides", None) or [1])
    return all(step == 1 for step in strides), f"strides={strides}"


def _repeated_type(program: Program, node: ir.Node) -> Check:
    kind = type_of(program, operand(node, 0))
    mode = attribute_of(node, "mode", "constant")
    return mode == "constant" or kind in (None, "FLOAT"), f"'{mode}' of type {(kind or 'unknown').lower()}"


OPERATORS = merged(
    tflite.OPERATORS,
    {
        name: (not_converted(f"It is converted to {kernel}, for which there is no kernel."),)
        for name, kernel in _NO_KERNEL.items()
    },
    {
        name: (
            not_converted("Its indices are chosen by a SELECT of integers, for which there is no kernel."),
        )
        for name in _INTEGER_CHOICE
    },
    {
        "AveragePool": (rank_at_most(4, _IMAGES),),
        "Col2Im": (
            NodeRule("no-strides", "Blocks lie side by side or overlap: every stride is 1.", _no_strides),
        ),
        "Conv": (rank_at_most(4, _IMAGES),),
        "DeformConv": (constant(2, "offset", "The offsets are a constant."),),
        "DepthToSpace": (
            attribute("mode", ("CRD",), "DCR", "'mode' is 'CRD'; the other has 6 axes inside."),
        ),
        "Gather": (constant(1, "indices", "The indices are a constant."),),
        "GatherND": (constant(1, "indices", "The indices are a constant."),),
        "MaxPool": (rank_at_most(4, _IMAGES),),
        "Pad": (
            NodeRule("repeated-type", "What is padded with its own values is of type float.", _repeated_type),
        ),
        "Pow": (NodeRule("square", "The exponent is the constant 2: that is a product.", _square),),
        "SpaceToDepth": (not_converted("It is a TRANSPOSE of 6 axes; the kernel takes 5."),),
        "Tile": (rank_at_most(2, "The input has at most 2 axes: the kernel takes twice as many, up to 5."),),
    },
    missing_types(dict.fromkeys(("INT32", "INT64"), "Gather.T GatherND.T Trilu.T Where.T")),
)
"""Rules by operator."""
