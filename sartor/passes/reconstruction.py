"""Least squares for one layer: the weights with which it makes, from what enters it now, what it made before.

With `x` what the layer sums over at one place of one sample (im2col for a convolution), `y` what the original made
there, and W, b the weights at hand, the change that is sought is

    D, d = argmin  Σ |y − (W + D) x − (b + d)|²  +  ridge · s · |D|²         s = mean over features of Var(x)

in closed form by the normal equations, from second moments that are added up over samples. Penalised is the change:
along what the data do not show, the weights stay as they are. Without an intercept d = 0, and moments are about 0.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from torch import Tensor

_CUTOFF = 1e-12
"""Share of the largest eigenvalue below which a direction of the inputs counts as not seen; moments are in float64."""


class Moments:
    """Sums over samples of `x`, `x xᵀ`, and of the residual `r = y − W x − b` with them.

    Args:
        features: length of `x`.
        outputs: length of `r`.
    """

    def __init__(self, features: int, outputs: int):
        self.count = 0
        self._x, self._r = np.zeros(features), np.zeros(outputs)
        self._xx, self._rx = np.zeros((features, features)), np.zeros((outputs, features))
        self._rr = self._yy = 0.0

    def add(self, x: np.ndarray, y: np.ndarray, residual: np.ndarray) -> None:
        """Samples in rows: `[n, features]`, `[n, outputs]` and `[n, outputs]`, in float64."""
        self.count += len(x)
        self._x += x.sum(axis=0)
        self._r += residual.sum(axis=0)
        self._xx += x.T @ x
        self._rx += residual.T @ x
        self._rr += float((residual**2).sum())
        self._yy += float((y**2).sum())

    def solve(self, ridge: float, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
        """The change of the weights `[outputs, features]` and of the bias `[outputs]`."""
        xx, rx = self._xx / self.count, self._rx / self.count
        x, r = self._x / self.count, self._r / self.count
        if intercept:
            xx, rx = xx - np.outer(x, x), rx - np.outer(r, x)
        if ridge > 0.0 and np.trace(xx) > 0.0:
            xx = xx + ridge * np.trace(xx) / len(xx) * np.eye(len(xx))
            change = np.linalg.solve(xx, rx.T).T
        else:
            change = rx @ np.linalg.pinv(xx, rcond=_CUTOFF, hermitian=True)
        return change, r - change @ x if intercept else np.zeros_like(r)

    def errors(self, change: np.ndarray, shift: np.ndarray) -> tuple[float, float]:
        """Root of the squared residual over that of `y`, before and after a change."""
        after = self._rr - 2 * float((change * self._rx).sum()) - 2 * float(shift @ self._r)
        after += float((change @ self._xx * change).sum()) + 2 * float(shift @ change @ self._x)
        after += self.count * float(shift @ shift)
        scale = self._yy or 1.0
        return float(np.sqrt(self._rr / scale)), float(np.sqrt(max(after, 0.0) / scale))


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a convolution looks; of one axis, the other has length 1.

    Attributes:
        kernel: taps of each axis.
        strides: steps.
        dilations: distances of taps.
        pads: zeros before and after each axis: `[top, left, bottom, right]`.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]

    @staticmethod
    def of(node: ir.Node, kernel: tuple[int, ...]) -> Window:
        """Of a Conv node with these taps per axis, one or two."""
        rank = len(kernel)
        attributes = node.attributes
        strides = tuple(attributes.get_ints("strides", ())) or (1,) * rank
        dilations = tuple(attributes.get_ints("dilations", ())) or (1,) * rank
        pads = tuple(attributes.get_ints("pads", ())) or (0,) * 2 * rank
        if rank == 1:
            return Window((1, kernel[0]), (1, strides[0]), (1, dilations[0]), (0, pads[0], 0, pads[1]))
        return Window(kernel, strides, dilations, pads)  # type: ignore[arg-type]


def entering_at(x: Tensor, window: Window | None, places: tuple[np.ndarray, ...]) -> np.ndarray:
    """What a layer sums over at some places of every sample, `[n, features]`, float64.

    Args:
        x: what enters it, `[N, C, H, W]` or `[N, C, W]` with a window, else `[N, ..., C]`.
        window: of a convolution.
        places: indices in what the layer makes: rows and columns with a window, else positions.
    """
    if window is None:
        return flat(x.reshape(len(x), -1, x.shape[-1])[:, places[0]].numpy())
    if x.dim() == 3:
        x = x.unsqueeze(2)
    taps, inside = [], []
    for axis, place in enumerate(places):
        first = place[:, None] * window.strides[axis] - window.pads[axis]
        at = first + np.arange(window.kernel[axis]) * window.dilations[axis]
        taps.append(at.clip(0, x.shape[2 + axis] - 1))
        inside.append(at == taps[-1])  # else it is in the padding, which is zeros
    patches = x.numpy()[:, :, taps[0][:, :, None], taps[1][:, None, :]]  # [N, C, places, kh, kw]
    patches *= inside[0][:, :, None] & inside[1][:, None, :]
    patches = np.moveaxis(patches, 2, 1)
    return flat(patches.reshape(*patches.shape[:2], -1))


def flat(array: np.ndarray) -> np.ndarray:
    """`[N, places, features]` as rows, float64."""
    return array.reshape(-1, array.shape[-1]).astype(np.float64)
