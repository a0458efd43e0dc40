"""What the hardware computes: one function per kernel. Each returns a fresh array and writes into none it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Settings = Mapping[str, Any]


def _windows(settings: Settings, x: np.ndarray, kernel: Sequence[int], fill: float) -> np.ndarray:
    """What each output position sees: `[N, C, H_out, W_out, K_h, K_w]`."""
    top, left, bottom, right = settings["pads"]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=np.float32(fill))
    (down, across), (d_h, d_w) = settings["strides"], settings["dilations"]
    extent = (d_h * (kernel[0] - 1) + 1, d_w * (kernel[1] - 1) + 1)
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=(2, 3))
    return windows[:, :, ::down, ::across, ::d_h, ::d_w]


def conv(settings: Settings, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Convolution of `[N, C_in, H, W]` with `[C_out, C_in / group, K_h, K_w]`."""
    windows = _windows(settings, x, weight.shape[2:], fill=0.0)
    parts = []
    for group_x, group_weight in zip(
        np.split(windows, settings["group"], axis=1), np.split(weight, settings["group"]), strict=True
    ):
        product = np.tensordot(group_x, group_weight, axes=((1, 4, 5), (1, 2, 3)))
        parts.append(np.moveaxis(product, -1, 1))
    result = np.concatenate(parts, axis=1)
    return result if bias is None else result + bias[:, None, None]


def max_pool(settings: Settings, x: np.ndarray) -> np.ndarray:
    """Maximum over a window; what was padded is never the largest."""
    return _windows(settings, x, settings["kernel"], fill=-np.inf).max(axis=(4, 5))


def gemm(settings: Settings, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x W + b; the weight is `[C_out, C_in]` when `transposed`."""
    result = x @ (weight.T if settings["transposed"] else weight)
    return result if bias is None else result + bias


def clip(
    settings: Settings, x: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
) -> np.ndarray:
    """Bounds may be absent."""
    return np.clip(x, low, high)


def flatten(settings: Settings, x: np.ndarray) -> np.ndarray:
    """To two axes."""
    rows = int(np.prod(x.shape[: settings["axis"]], dtype=np.int64))
    return x.reshape(rows, -1).copy()


def concat(settings: Settings, *parts: np.ndarray) -> np.ndarray:
    """Side by side."""
    return np.concatenate(parts, axis=settings["axis"])


KERNELS: Mapping[str, Callable[..., np.ndarray]] = {
    "add": lambda settings, a, b: a + b,
    "clip": clip,
    "concat": concat,
    "conv": conv,
    "flatten": flatten,
    "gemm": gemm,
    "globalaveragepool": lambda settings, x: x.mean(axis=(2, 3), keepdims=True),
    "matmul": lambda settings, a, b: np.matmul(a, b),
    "maxpool": max_pool,
    "relu": lambda settings, x: np.maximum(x, np.float32(0)),
    "sub": lambda settings, a, b: a - b,
}


def execute(instruction: Mapping[str, Any], registers: dict[str, np.ndarray]) -> None:
    """Run one instruction. A read of '' is an optional operand that is absent."""
    operands: Sequence[np.ndarray | None] = [
        registers[name] if name else None for name in instruction["reads"]
    ]
    result = KERNELS[instruction["kernel"]](instruction["settings"], *operands)
    registers[instruction["writes"]] = np.asarray(result, np.float32)
