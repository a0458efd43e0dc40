"""Fourier transforms; complex numbers are a last axis of length 2, real ones of length 1.

They are computed in float64 whatever the element type, because sums of many terms that cancel are all that
is left of some bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sartor.ir.torch_ops.registry import operator


def _signal(x: Tensor) -> Tensor:
    """A complex or real float64 tensor without the last axis."""
    wide = x.to(torch.float64)
    return wide.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(wide.contiguous())


@operator("DFT", static=(1, 2))
def dft(
    x: Tensor,
    dft_length: tuple[int, ...] | None = None,
    axis: tuple[int, ...] | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Discrete Fourier transform along one axis; one-sided keeps (or, inverse, takes) half the spectrum."""
    dim = (axis[0] if axis else -2) % x.dim()
    length = dft_length[0] if dft_length else None
    signal = _signal(x)
    if inverse and onesided:
        return torch.fft.irfft(signal, n=length, dim=dim).unsqueeze(-1).to(x.dtype)
    if onesided and not signal.is_complex():
        result = torch.fft.rfft(signal, n=length, dim=dim)
    else:
        result = (torch.fft.ifft if inverse else torch.fft.fft)(signal, n=length, dim=dim)
        if onesided:
            result = result.narrow(dim, 0, result.shape[dim] // 2 + 1)
    return torch.view_as_real(result).to(x.dtype)


@operator("STFT", static=(1, 3))
def stft(
    signal: Tensor,
    frame_step: tuple[int, ...],
    window: Tensor | None = None,
    frame_length: tuple[int, ...] | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Transforms of overlapping frames: `[N, samples, 1 or 2]` to `[N, frames, bins, 2]`."""
    length = frame_length[0] if frame_length else window.shape[0] if window is not None else signal.shape[1]
    frames = _signal(signal).unfold(1, length, frame_step[0])
    if window is not None:
        frames = frames * window.to(frames.real.dtype)
    if onesided and not frames.is_complex():
        result = torch.fft.rfft(frames, dim=-1)
    else:
        result = torch.fft.fft(frames, dim=-1)
        if onesided:
            result = result[..., : length // 2 + 1]
    return torch.view_as_real(result).to(signal.dtype)
