"""Images at another size: antialiased linear interpolation, the same numbers for arrays and for tensors.

Each new position is the mean of the old ones around it, weighted by a triangle as wide as the step between new
positions, and at least as wide as that between old ones. Equal to what Pillow and torch call bilinear, antialiased.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from sartor.errors import UsageError

_Array = TypeVar("_Array")


def resized(images: _Array, shape: Sequence[int]) -> _Array:
    """A batch of images, or of any other samples over a grid, at another size.

    Args:
        images: numpy array or torch tensor `[N, ...]`; integers are rounded.
        shape: new shape; its batch is not looked at.

    Raises:
        UsageError: another number of axes, or an axis without positions.
    """
    array: Any = images
    if len(shape) != array.ndim or any(length < 1 for length in (*array.shape[1:], *shape[1:])):
        raise UsageError(f"Samples of shape {list(array.shape)} cannot be resized to {list(shape)}.")
    moving = [axis for axis in range(1, array.ndim) if array.shape[axis] != shape[axis]]
    if not moving:
        return images
    return (
        _of_array(array, moving, shape) if isinstance(array, np.ndarray) else _of_tensor(array, moving, shape)
    )


def at_shapes(inputs: Mapping[str, _Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, _Array]:
    """A batch of inputs, those of `shapes` at another size; see `resized`."""
    return {name: resized(a, shapes[name]) if name in shapes else a for name, a in inputs.items()}


def _of_array(array: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> Any:
    found = array if array.dtype.kind == "f" else array.astype(np.float32)
    for axis in axes:
        weights = weights_of(found.shape[axis], shape[axis]).astype(found.dtype)
        found = np.moveaxis(np.moveaxis(found, axis, -1) @ weights.T, -1, axis)
    return np.ascontiguousarray(found if array.dtype.kind == "f" else np.rint(found), array.dtype)


def _of_tensor(tensor: Any, axes: Sequence[int], shape: Sequence[int]) -> Any:
    import torch

    found = tensor if tensor.is_floating_point() else tensor.float()
    for axis in axes:
        weights = torch.from_numpy(weights_of(found.shape[axis], shape[axis])).to(found)
        found = (found.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return (found if tensor.is_floating_point() else found.round().to(tensor.dtype)).contiguous()


@functools.lru_cache(maxsize=64)
def weights_of(before: int, after: int) -> np.ndarray:
    """What each new position takes of each old one, `[after, before]`, rows of sum 1."""
    step = before / after
    centres = (np.arange(after) + 0.5) * step
    distance = np.abs(np.arange(before) + 0.5 - centres[:, None])
    weights = np.maximum(1.0 - distance / max(step, 1.0), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
