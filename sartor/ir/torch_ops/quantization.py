"""Affine quantization: `q = saturate(round(x / scale) + zero_point)`, and products of quantized tensors.

Sums of products are taken in float64, which is exact below 2^53, and returned as int32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sartor.ir.torch_ops.contraction import conv
from sartor.ir.torch_ops.registry import operator

Ints = Sequence[int]
_BOUNDS = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
}


def _along(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point that broadcasts to `x`: one for all, one per index of `axis`, or one per block."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block_size:
        return torch.repeat_interleave(parameter, block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _quantize(x: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """Round half to even, shift, saturate."""
    low, high = _BOUNDS[dtype]
    return torch.clamp(torch.round(x).to(torch.int64) + zero_point.to(torch.int64), low, high).to(dtype)


@operator("QuantizeLinear", types=("output_dtype",), unsigned=True)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    saturate: int = 1,
) -> Tensor:
    """To 8 or 16 bits, per tensor, per index of `axis`, or per block of it.

    `saturate` concerns 8-bit floats only, which are refused before this is reached.
    """
    dtype = zero_point.dtype if zero_point is not None else output_dtype or torch.uint8
    wide = x if x.is_floating_point() else x.to(scale.dtype)
    divided = wide / _along(scale, x, axis, block_size)
    shift = torch.zeros((), dtype=torch.int64, device=x.device)
    if zero_point is not None:
        shift = _along(zero_point.to(torch.int64), x, axis, block_size)
    return _quantize(divided, shift, dtype)


@operator("DequantizeLinear", unsigned=True)
def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """`(x - zero_point) * scale` in the element type of the scale."""
    shifted = x.to(torch.int64)
    if zero_point is not None:
        shifted = shifted - _along(zero_point.to(torch.int64), x, axis, block_size)
    return shifted.to(scale.dtype) * _along(scale, x, axis, block_size)


def _shifted(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """`x - zero_point` in float64; the zero point is one, one per index of `axis`, or of x's own rank."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    shift = zero_point.to(torch.float64)
    if shift.numel() == 1 or shift.dim() != 1:
        return wide - (shift.reshape(()) if shift.numel() == 1 else shift)
    return wide - shift.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@operator("MatMulInteger")
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """`(a - a_zero_point) (b - b_zero_point)` as int32; zero points per row of `a`, per column of `b`."""
    product = torch.matmul(_shifted(a, a_zero_point, -2), _shifted(b, b_zero_point, -1))
    return product.to(torch.int64).to(torch.int32)


@operator("ConvInteger")
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution of shifted integers as int32; padding holds the zero point of `x`."""
    result = conv(
        _shifted(x, x_zero_point, 1),
        _shifted(w, w_zero_point, 0),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return result.to(torch.int64).to(torch.int32)


@operator("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """The matrix product of two quantized tensors, quantized again; parameters per row of `a`, column of `b`."""
    product = torch.matmul(_shifted(a, a_zero_point, -2), _shifted(b, b_zero_point, -1))
    product = product * _broadcast(a_scale, product, -2) * _broadcast(b_scale, product, -1)
    scaled = product / _broadcast(y_scale, product, -2)
    return _quantize(scaled, _broadcast(y_zero_point, product, -2), y_zero_point.dtype)


@operator("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Quantized convolution; the int32 bias has scale `x_scale * w_scale`, weights may have one per channel."""
    total = conv(
        _shifted(x, x_zero_point, 1),
        _shifted(w, w_zero_point, 0),
        bias.to(torch.float64) if bias is not None else None,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    scale = x_scale.to(torch.float64) * _broadcast(w_scale, total, 1) / y_scale.to(torch.float64)
    return _quantize(total * scale, y_zero_point, y_zero_point.dtype)


def _broadcast(parameter: Tensor, like: Tensor, axis: int) -> Tensor:
    """A scale or zero point in float64, aligned with `axis` of `like`."""
    wide = parameter.to(torch.float64)
    if wide.numel() == 1:
        return wide.reshape(())
    if wide.dim() > 1:
        return wide
    return wide.reshape([-1 if i == axis % like.dim() else 1 for i in range(like.dim())])
