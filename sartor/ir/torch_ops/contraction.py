"""Convolutions, matrix products and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sartor.ir.torch_ops.registry import operator

_CONV: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
Ints = Sequence[int]


def torch_pads(begins: Ints, ends: Ints) -> list[int]:
    """Paddings per spatial axis in the order of `functional.pad`: last axis first, begin before end."""
    return [pad for begin, end in zip(reversed(begins), reversed(ends), strict=True) for pad in (begin, end)]


def window_pads(
    sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints, pads: Ints | None, auto_pad: str
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis.

    Args:
        sizes: spatial sizes of the input.
        kernel: window sizes.
        strides: window strides.
        dilations: window dilations.
        pads: explicit ONNX pads (all begins, then all ends), or None for zero.
        auto_pad: `NOTSET`, `VALID`, `SAME_UPPER` or `SAME_LOWER`.
    """
    rank = len(kernel)
    if auto_pad in ("NOTSET", ""):
        explicit = list(pads) if pads is not None else [0] * (2 * rank)
        return explicit[:rank], explicit[rank:]
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        count = -(-size // stride)
        total = max((count - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(less if auto_pad == "SAME_UPPER" else more)
        ends.append(more if auto_pad == "SAME_UPPER" else less)
    return begins, ends


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution: `[N, C, *spatial]` with `[C_out, C / group, *kernel]`; one to three spatial axes."""
    rank = x.dim() - 2
    kernel = weight.shape[2:]
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    begins, ends = window_pads(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    if begins != ends or min(begins, default=0) < 0:
        x = functional.pad(x, torch_pads(begins, ends))
        begins = [0] * rank
    return _CONV[rank](x, weight, bias, tuple(strides), tuple(begins), tuple(dilations), group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Transposed convolution: `[N, C, *spatial]` with `[C, C_out / group, *kernel]`."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    extra = list(output_padding or [0] * rank)
    pads = list(pads or [0] * (2 * rank))
    begins, ends = pads[:rank], pads[rank:]
    if auto_pad == "VALID":
        begins, ends = [0] * rank, [0] * rank
    if output_shape or auto_pad.startswith("SAME"):
        wanted = list(output_shape or [s * t for s, t in zip(x.shape[2:], strides, strict=True)])[-rank:]
        for axis in range(rank):
            reach = (weight.shape[2 + axis] - 1) * dilations[axis] + 1
            full = strides[axis] * (x.shape[2 + axis] - 1) + extra[axis] + reach
            total = full - wanted[axis]
            less, more = total // 2, total - total // 2
            begins[axis], ends[axis] = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    plain = begins == ends and min(begins) >= 0
    if plain and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        return _CONV_TRANSPOSE[rank](x, weight, bias, strides, begins, extra, group, dilations)
    # Crop (or extend) an unpadded result: torch knows neither unequal pads nor a large output_padding.
    y = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, group, dilations)
    crop_ends = [e - end for e, end in zip(extra, ends, strict=True)]
    y = functional.pad(y, torch_pads([-b for b in begins], crop_ends))
    return y if bias is None else y + bias.reshape(1, -1, *[1] * rank)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """`alpha A' B' + beta C` on matrices; `C` broadcasts."""
    product = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    if alpha != 1.0:
        product = (alpha * product).to(a.dtype)
    if c is None:
        return product
    return product + (c if beta == 1.0 else (beta * c).to(a.dtype))


@operator("MatMul")
def mat_mul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with numpy's broadcasting."""
    return torch.matmul(a, b)


@operator("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    """Einstein summation; `equation` as in numpy, with optional spaces and ellipsis."""
    return torch.einsum(equation.replace(" ", ""), *operands)


def _ceil_extension(
    sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints, begins: Ints, ends: Ints, ceil_mode: int
) -> list[int]:
    """Positions that ceil mode reads past the padding; a window may not start in the end padding."""
    extra = []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        free = size + begins[axis] + ends[axis] - reach
        count = free // strides[axis] + 1
        if ceil_mode and free % strides[axis] and count * strides[axis] < size + begins[axis]:
            count += 1
        extra.append(max((count - 1) * strides[axis] - free, 0))
    return extra


@operator("MaxPool", several=True)
def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Maximum over windows, and the flat index of each maximum in the whole input tensor."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    sizes = x.shape[2:]
    begins, ends = window_pads(sizes, kernel_shape, strides, dilations, pads, auto_pad)
    extra = _ceil_extension(sizes, kernel_shape, strides, dilations, begins, ends, ceil_mode)
    source = x if x.is_floating_point() else x.to(torch.float64)
    half = all(2 * b <= k for b, k in zip(begins, kernel_shape, strict=True))  # torch allows no more
    if begins == ends and half and not any(extra):
        padding = begins
    else:
        full = torch_pads(begins, [e + f for e, f in zip(ends, extra, strict=True)])
        source = functional.pad(source, full, value=-math.inf)
        padding = [0] * rank
    pooled = _MAX_POOL[rank](
        source, kernel_shape, strides, padding, dilations, False, return_indices=outputs > 1
    )
    if outputs == 1:
        return (pooled.to(x.dtype),)
    values, indices = pooled
    offsets = begins if padding == [0] * rank else [0] * rank
    indices = _tensor_indices(indices, x, source.shape[2:], offsets, storage_order)
    return values.to(x.dtype), indices


def _tensor_indices(indices: Tensor, x: Tensor, padded: Ints, offsets: Ints, storage_order: int) -> Tensor:
    """Turn torch's index within a padded plane into ONNX's index within the unpadded tensor."""
    sizes = x.shape[2:]
    coordinates: list[Tensor] = []
    for axis in reversed(range(len(sizes))):
        coordinates.insert(0, indices % padded[axis] - offsets[axis])
        indices = torch.div(indices, padded[axis], rounding_mode="floor")
    order = range(len(sizes)) if storage_order == 0 else reversed(range(len(sizes)))
    flat = torch.zeros_like(indices)
    for axis in order:
        flat = flat * sizes[axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * math.prod(sizes)
    return flat + planes.reshape(x.shape[0], x.shape[1], *[1] * len(sizes))


def _window_sum(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    """Sum over windows of each channel: a convolution with ones, since torch pools have no dilation."""
    rank = len(kernel)
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONV[rank](planes, ones, None, tuple(strides), 0, tuple(dilations))
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Mean over windows; padding counts only with `count_include_pad`, ceil-mode overhang never."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    sizes = x.shape[2:]
    begins, ends = window_pads(sizes, kernel_shape, strides, dilations, pads, auto_pad)
    extra = _ceil_extension(sizes, kernel_shape, strides, dilations, begins, ends, ceil_mode)
    simple = begins == ends and not any(extra) and all(d == 1 for d in dilations)
    if simple and all(0 <= 2 * b <= k for b, k in zip(begins, kernel_shape, strict=True)):
        return _AVERAGE_POOL[rank](
            x, tuple(kernel_shape), tuple(strides), tuple(begins), False, bool(count_include_pad)
        )
    overhang = torch_pads([0] * rank, extra)
    padding = torch_pads(begins, ends)
    ones = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
    counted = functional.pad(functional.pad(ones, padding, value=float(count_include_pad)), overhang)
    padded = functional.pad(functional.pad(x, padding), overhang)
    sums = _window_sum(padded, kernel_shape, strides, dilations)
    return sums / _window_sum(counted, kernel_shape, strides, dilations)


@operator("LpPool")
def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """`(sum |x|^p)^(1/p)` over windows."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    begins, ends = window_pads(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    extra = _ceil_extension(x.shape[2:], kernel_shape, strides, dilations, begins, ends, ceil_mode)
    full = torch_pads(begins, [e + f for e, f in zip(ends, extra, strict=True)])
    raised = functional.pad(torch.abs(x) ** p, full)
    return _window_sum(raised, kernel_shape, strides, dilations) ** (1.0 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """Mean over all spatial axes, which stay with length 1."""
    return torch.mean(x, tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """Maximum over all spatial axes, which stay with length 1."""
    return torch.amax(x, tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """`(sum |x|^p)^(1/p)` over all spatial axes, which stay with length 1."""
    return torch.sum(torch.abs(x) ** p, tuple(range(2, x.dim())), keepdim=True) ** (1.0 / p)
