"""Resize, axis by axis: interpolation is separable, so each axis is a small list of weighted taps.

Reference: ONNX operator Resize, version 19 (coordinate transformations, coefficients, tie rules).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.registry import operator

Floats = tuple[float, ...]
Ints = tuple[int, ...]
_DENSE_TAPS = 4  # with more taps per output, one matrix product is cheaper than gathers


@operator("Resize", static=(1, 2, 3))
def resize(
    x: Tensor,
    roi: Floats | None = None,
    scales: Floats | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: Ints | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resample `axes` (all by default) by `scales` or to `sizes`."""
    rank = x.dim()
    axes = tuple(a % rank for a in axes) if axes is not None else tuple(range(rank))
    lengths = [x.shape[a] for a in axes]
    if sizes:
        factors, targets = _from_sizes(lengths, sizes, keep_aspect_ratio_policy)
    elif scales:
        factors = list(scales)  # a scale of 1 must not touch the length: the batch may be symbolic
        targets = [
            n if math.isclose(s, 1.0) else math.floor(s * n) for s, n in zip(scales, lengths, strict=True)
        ]
    else:
        raise UnsupportedOperatorError("Resize has neither scales nor sizes; give one of them.")
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    if crop and not roi:
        raise UnsupportedOperatorError("Resize with mode tf_crop_and_resize needs a roi.")
    changed = [
        i for i in range(len(axes)) if crop or targets[i] != lengths[i] or not math.isclose(factors[i], 1.0)
    ]
    exact = all(targets[i] == factors[i] * lengths[i] for i in changed)
    if (
        mode == "linear"
        and not antialias
        and not exclude_outside
        and exact
        and rank == 4
        and x.is_floating_point()
        and [axes[i] for i in changed] == [2, 3]
        and coordinate_transformation_mode in ("half_pixel", "align_corners")
    ):
        corners = coordinate_transformation_mode == "align_corners"
        size = [targets[i] for i in changed]
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=corners)
    result = x if x.is_floating_point() else x.to(torch.float64)
    for i in changed:
        region = (roi[i], roi[len(axes) + i]) if crop and roi else None
        taps = axis_taps(
            int(lengths[i]),
            int(targets[i]),
            float(factors[i]),
            mode=mode,
            antialias=bool(antialias),
            coordinates=coordinate_transformation_mode,
            cubic=cubic_coeff_a,
            exclude_outside=bool(exclude_outside),
            nearest=nearest_mode,
            region=region,
        )
        result = _apply(result, axes[i], *taps, extrapolation_value)
    if not x.is_floating_point():
        limits = torch.iinfo(x.dtype)
        result = torch.clamp(result, limits.min, limits.max)
    return result.to(x.dtype)


def _from_sizes(lengths: list[int], sizes: Ints, policy: str) -> tuple[list[float], list[int]]:
    factors = [s / n for s, n in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return factors, list(sizes)
    scale = min(factors) if policy == "not_larger" else max(factors)
    return [scale] * len(sizes), [int(scale * n + 0.5) for n in lengths]


@functools.lru_cache(maxsize=256)
def axis_taps(
    length: int,
    target: int,
    scale: float,
    *,
    mode: str,
    antialias: bool,
    coordinates: str,
    cubic: float,
    exclude_outside: bool,
    nearest: str,
    region: tuple[float, float] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source indices and weights of one axis.

    Returns:
        Indices `[target, taps]` clipped to the axis, weights of the same shape, and a mask `[target]`
        of positions outside the source (tf_crop_and_resize only).
    """
    x, outside = _source_positions(length, target, scale, coordinates, region)
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(x - 0.5),
            "round_prefer_ceil": np.floor(x + 0.5),
            "floor": np.floor(x),
            "ceil": np.ceil(x),
        }.get(nearest)
        if rounded is None or antialias:
            raise UnsupportedOperatorError(
                f"Resize has nearest_mode '{nearest}' with antialias={antialias}; the FX twin knows neither."
            )
        indices = rounded.astype(np.int64)[:, None]
        return np.clip(indices, 0, length - 1), np.ones(indices.shape), outside
    base = np.ceil(x) - 1.0  # so that the fraction lies in (0, 1]: ties belong to the left pixel
    fraction = x - base
    shrink = min(scale, 1.0) if antialias else 1.0
    if mode == "linear":
        first = math.floor(-1.0 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weights = np.clip(1.0 - np.abs((offsets[None] - fraction[:, None]) * shrink), 0.0, 1.0)
    elif mode == "cubic":
        first = math.floor(-2.0 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weights = _cubic_kernel((offsets[None] - fraction[:, None]) * shrink, cubic)
    else:
        raise UnsupportedOperatorError(f"Resize has mode '{mode}'; expected nearest, linear or cubic.")
    indices = base.astype(np.int64)[:, None] + offsets[None]
    if exclude_outside:
        weights = np.where((indices < 0) | (indices >= length), 0.0, weights)
    if exclude_outside or antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, length - 1), weights, outside


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _source_positions(
    length: int, target: int, scale: float, coordinates: str, region: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(target, dtype=np.float64)
    width = scale * length
    inside = np.zeros(target, dtype=bool)
    if coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and width != 1):
        return (y + 0.5) / scale - 0.5, inside
    if coordinates == "pytorch_half_pixel":
        return np.full(target, -0.5), inside
    if coordinates == "asymmetric":
        return y / scale, inside
    if coordinates == "align_corners":
        return (np.zeros(target) if width == 1 else y * (length - 1) / (width - 1)), inside
    if coordinates == "half_pixel_symmetric":
        offset = length / 2 * (1 - target / width)
        return offset + (y + 0.5) / scale - 0.5, inside
    if coordinates == "tf_crop_and_resize" and region is not None:
        start, end = region
        if width == 1:
            x = np.full(target, (end - start) * (length - 1) / 2)
        else:
            x = y * (end - start) * (length - 1) / (width - 1)
        x = x + start * (length - 1)
        return x, (x < 0) | (x > length - 1)
    raise UnsupportedOperatorError(f"Resize has coordinate_transformation_mode '{coordinates}', unknown.")


def _apply(
    x: Tensor, axis: int, indices: np.ndarray, weights: np.ndarray, outside: np.ndarray, fill: float
) -> Tensor:
    target, taps = indices.shape
    if taps == 1:
        result = torch.index_select(x, axis, torch.tensor(indices[:, 0].tolist(), device=x.device))
    elif taps > _DENSE_TAPS:
        matrix = np.zeros((target, x.shape[axis]))
        np.add.at(matrix, (np.arange(target)[:, None], indices), weights)
        dense = torch.tensor(matrix.tolist(), dtype=x.dtype, device=x.device)
        result = torch.movedim(torch.movedim(x, axis, -1) @ dense.t(), -1, axis)
    else:
        shape = [1] * x.dim()
        shape[axis] = target
        result = torch.zeros((), dtype=x.dtype, device=x.device)
        for tap in range(taps):
            picked = torch.index_select(x, axis, torch.tensor(indices[:, tap].tolist(), device=x.device))
            weight = torch.tensor(weights[:, tap].tolist(), dtype=x.dtype, device=x.device)
            result = result + picked * weight.reshape(shape)
    if outside.any():
        shape = [1] * x.dim()
        shape[axis] = target
        mask = torch.tensor(outside.tolist(), device=x.device).reshape(shape)
        result = torch.where(mask, torch.full((), fill, dtype=x.dtype, device=x.device), result)
    return result
