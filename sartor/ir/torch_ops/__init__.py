"""Every canonical ONNX operator as a differentiable torch function, one file per family.

`OPERATORS` is the table; the functions keep ONNX's operand order and attribute names. They are proven on
ONNX's own node test cases (tests/test_torch_ops.py).
"""

from __future__ import annotations

from sartor.ir.torch_ops import (
    contraction,
    dialect,
    elementwise,
    indexing,
    movement,
    normalization,
    quantization,
    recurrent,
    reduction,
    resize,
    sampling,
    spectral,
)
from sartor.ir.torch_ops.movement import dimension
from sartor.ir.torch_ops.normalization import BatchNorm
from sartor.ir.torch_ops.registry import OPERATORS, Operator
from sartor.ir.torch_ops.unsigned import MODULAR, to_signed, to_unsigned

__all__ = [
    "MODULAR",
    "OPERATORS",
    "BatchNorm",
    "Operator",
    "contraction",
    "dialect",
    "dimension",
    "elementwise",
    "indexing",
    "movement",
    "normalization",
    "quantization",
    "recurrent",
    "reduction",
    "resize",
    "sampling",
    "spectral",
    "to_signed",
    "to_unsigned",
]
