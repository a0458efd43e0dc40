"""Tensors of the FX twin: element types, and arrays to tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sartor.errors import UnsupportedOperatorError

TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}
_NUMPY_FLOATS: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
UNSIGNED = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})
"""Types that torch stores but does not compute with."""


def to_tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor that owns a copy of `array`; floats become `dtype` when given.

    Raises:
        UnsupportedOperatorError: torch has no such element type.
    """
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        tensor = torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    elif array.dtype.kind not in "fiub":
        raise UnsupportedOperatorError(f"element type '{array.dtype}' has no arithmetic in torch; cast it.")
    else:
        wanted: np.dtype[Any] = array.dtype
        if dtype is not None and array.dtype.kind == "f":
            wanted = _NUMPY_FLOATS.get(dtype, wanted)
        tensor = torch.from_numpy(np.array(array, dtype=wanted, order="C", copy=True))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A numpy copy of `tensor`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.float().numpy().astype(ir.DataType.BFLOAT16.numpy())
    return tensor.numpy().copy()


def constant_array(node: ir.Node) -> np.ndarray:
    """What a `Constant` node holds.

    Raises:
        UnsupportedOperatorError: no dense tensor of numbers.
    """
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, dtype=np.int64)
    raise UnsupportedOperatorError(f"Constant '{node.name}' is no dense tensor of numbers; expected one.")
