"""Operators that place data by index: one-hot, reversal of sequences, the inverses of pooling and unfolding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sartor.ir.torch_ops.registry import operator

Ints = tuple[int, ...]


@operator("OneHot", static=(1,))
def one_hot(indices: Tensor, depth: tuple[float, ...], values: Tensor, *, axis: int = -1) -> Tensor:
    """`values[1]` at each index along a new axis of length `depth`, `values[0]` elsewhere.

    Negative indices count from the end; indices out of range give `values[0]` everywhere.
    """
    length = int(depth[0])
    axis = axis % (indices.dim() + 1)
    wrapped = torch.where(indices < 0, indices + length, indices).unsqueeze(axis)
    shape = [length if i == axis else 1 for i in range(indices.dim() + 1)]
    positions = torch.arange(length, device=indices.device).reshape(shape)
    return torch.where(wrapped == positions, values[1], values[0])


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first `sequence_lens[n]` steps of each sample; later steps stay."""
    steps = torch.arange(x.shape[time_axis], device=x.device)
    lengths = sequence_lens.to(torch.int64).reshape(-1, 1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)  # [N, T]
    if time_axis < batch_axis:
        source = source.t()
    shape = [x.shape[i] if i in (batch_axis, time_axis) else 1 for i in range(x.dim())]
    return torch.gather(x, time_axis, source.reshape(shape).expand(x.shape))


@operator("MaxUnpool", static=(2,))
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Put each value at its flat index in the tensor that was pooled, zeros elsewhere.

    The indices refer to the smallest such tensor; a larger `output_shape` extends it at the ends.
    """
    rank = len(kernel_shape)
    strides = strides or [1] * rank
    pads = pads or [0] * (2 * rank)
    sizes = [
        (x.shape[2 + i] - 1) * strides[i] - pads[i] - pads[rank + i] + kernel_shape[i] for i in range(rank)
    ]
    flat = torch.zeros(x.shape[0] * x.shape[1] * math.prod(sizes), dtype=x.dtype, device=x.device)
    placed = torch.scatter(flat, 0, indices.reshape(-1), x.reshape(-1))
    result = placed.reshape(x.shape[0], x.shape[1], *sizes)
    if output_shape is None:
        return result
    extra = [amount for i in reversed(range(rank)) for amount in (0, output_shape[2 + i] - sizes[i])]
    return torch.nn.functional.pad(result, extra)


@operator("Col2Im", static=(1, 2))
def col2im(
    x: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Add up `[N, C * prod(block), L]` sliding blocks into `[N, C, *image]`; any number of spatial axes."""
    rank = len(image_shape)
    dilations = dilations or [1] * rank
    pads = pads or [0] * (2 * rank)
    strides = strides or [1] * rank
    padded = [image_shape[i] + pads[i] + pads[rank + i] for i in range(rank)]
    counts = [(padded[i] - dilations[i] * (block_shape[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    batch, channels = x.shape[0], x.shape[1] // math.prod(block_shape)
    blocks = x.reshape(batch, channels, math.prod(block_shape), *counts)
    image = torch.zeros((batch, channels, *padded), dtype=x.dtype, device=x.device)
    for number, offsets in enumerate(itertools.product(*(range(k) for k in block_shape))):
        windows = tuple(
            slice(o * d, o * d + (count - 1) * s + 1, s)
            for o, d, s, count in zip(offsets, dilations, strides, counts, strict=True)
        )
        layer = torch.zeros_like(image)
        layer[(slice(None), slice(None), *windows)] = blocks[:, :, number]
        image = image + layer
    return image[(slice(None), slice(None), *(slice(pads[i], pads[i] + image_shape[i]) for i in range(rank)))]
