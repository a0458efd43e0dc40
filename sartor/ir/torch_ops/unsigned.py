"""Unsigned integers of 16 to 64 bits: torch stores them, but computes with few operators only.

They travel through int64. 16 and 32 bits fit; 64 bits travel as they are, which is right modulo 2^64, and
for everything that depends on their order right below 2^63.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sartor.errors import UnsupportedOperatorError

MODULAR = frozenset(
    {
        "Add",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Concat",
        "Equal",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Mul",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators for which 64 unsigned bits may be taken as signed ones."""


def to_signed(x: Tensor, exact: bool) -> Tensor:
    """The int64 of the same value; of the same bits for uint64, whose upper half `exact` refuses.

    Raises:
        UnsupportedOperatorError: a value of 2^63 or more where its order matters.
    """
    if x.dtype is not torch.uint64:
        return x.to(torch.int64)
    signed = x.view(torch.int64)
    if exact and bool((signed < 0).any()):
        raise UnsupportedOperatorError(
            "A uint64 value of 2^63 or more meets an operator for which the FX twin has signed arithmetic only; "
            "cast it to a smaller type."
        )
    return signed


def to_unsigned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The value modulo the range of `dtype`; a tensor that has the type already passes."""
    if x.dtype is dtype or x.dtype is not torch.int64:
        return x.to(dtype)
    return x.view(torch.uint64) if dtype is torch.uint64 else x.to(dtype)
