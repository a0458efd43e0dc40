"""Tensors whose contents are computed when they are read, and forgotten again.

A model of many gigabytes whose weights lie in external data is analysed, narrowed, randomised and saved one
tensor at a time: whatever is derived from a tensor on disk is a recipe, not an array. Small tensors and
those that are in memory already are ordinary arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import InternalError

SMALLEST_BYTES = 1 << 20
"""Smaller tensors are read at once: there are many, and shapes and attributes hide among them."""
CHUNK_BYTES = 1 << 24


def deferred(
    name: str | None, shape: Sequence[int], dtype: np.dtype, compute: Callable[[], np.ndarray]
) -> ir.LazyTensor:
    """A tensor that calls `compute` at every read.

    Args:
        name: of the tensor.
        shape: of what `compute` returns.
        dtype: numpy element type of what `compute` returns.
        compute: gives the same array at every call.
    """
    kind = ir.DataType.from_numpy(dtype)
    expected = tuple(int(d) for d in shape)

    def tensor() -> ir.Tensor:
        array = compute()
        if array.shape != expected or array.dtype != dtype:
            raise InternalError(
                f"Deferred tensor '{name}' became {array.dtype} {list(array.shape)}, not {dtype} {list(expected)}."
            )
        return ir.Tensor(array, name=name)

    return ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(expected), name=name)


def is_deferred(tensor: ir.TensorProtocol | None) -> bool:
    """Whether reading `tensor` costs time and memory that depend on its size."""
    return isinstance(tensor, ir.LazyTensor)


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Whether `tensor` is better not held in a second copy."""
    return tensor.nbytes >= SMALLEST_BYTES
