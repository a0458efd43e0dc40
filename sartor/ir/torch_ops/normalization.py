"""Normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sartor.ir.torch_ops.registry import operator


class BatchNorm(nn.Module):
    """BatchNormalization whose `train()` and `eval()` choose batch or running statistics.

    It owns no tensors: scale, bias and running statistics are arguments, so that they keep their
    initializer names and may be shared. In training the running statistics are updated in place.

    Attributes:
        epsilon: added to the variance.
        momentum: ONNX's sense, `running * momentum + batch * (1 - momentum)`; torch's is 1 minus it.
    """

    def __init__(self, epsilon: float, momentum: float):
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Normalize `x` `[N, C, ...]` with per-channel tensors `[C]`."""
        return functional.batch_norm(
            x, mean, variance, scale, bias, self.training, 1.0 - self.momentum, self.epsilon
        )

    def extra_repr(self) -> str:
        """The two options, for printing."""
        return f"epsilon={self.epsilon}, momentum={self.momentum}"


def _per_channel(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(1, -1, *[1] * (like.dim() - 2))


@operator("BatchNormalization", several=True)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """ONNX's own training mode: batch statistics, and new running statistics as outputs.

    Canonical programs have `training_mode=0`, for which `BatchNorm` is used instead.
    """
    if not training_mode:
        return (functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon),)
    axes = (0, *range(2, x.dim()))
    now_mean = torch.mean(x, axes)
    now_variance = torch.mean((x - _per_channel(now_mean, x)) ** 2, axes)
    y = (x - _per_channel(now_mean, x)) / torch.sqrt(_per_channel(now_variance, x) + epsilon)
    y = y * _per_channel(scale, x) + _per_channel(bias, x)
    new_mean = mean * momentum + now_mean * (1 - momentum)
    new_variance = variance * momentum + now_variance * (1 - momentum)
    return (y, new_mean, new_variance)[:outputs]


@operator("LayerNormalization", several=True)
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Normalize over all axes from `axis` on; also the mean and the inverse standard deviation."""
    first = axis % x.dim()
    shape = x.shape[first:]
    if outputs == 1 and scale.shape == shape and (bias is None or bias.shape == shape):
        return (functional.layer_norm(x, shape, scale, bias, epsilon),)
    axes = tuple(range(first, x.dim()))
    mean = torch.mean(x, axes, keepdim=True)
    inverse = torch.rsqrt(torch.mean((x - mean) ** 2, axes, keepdim=True) + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias, mean, inverse)[:outputs]


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalize each channel of each sample over its spatial axes."""
    return functional.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization")
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalize each group of channels; scale and bias are per channel (opset 21)."""
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """`(x - mean) / (std + 1e-9)` over `axes`; the constant is ONNX's."""
    mean = torch.mean(x, tuple(axes), keepdim=True)
    variance = torch.mean((x - mean) ** 2, tuple(axes), keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the L1 or L2 norm along the axis; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@operator("LRN")
def local_response_normalization(
    x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int
) -> Tensor:
    """Divide by a power of the local energy over `size` neighbouring channels.

    The window of an even size reaches one channel further *up*; torch's own reaches further down.
    """
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = functional.pad((x * x).unsqueeze(1).flatten(3), (0, 0, before, after))
    energy = functional.avg_pool2d(squares, (size, 1), stride=1).reshape(x.shape)
    return x / (bias + alpha * energy) ** beta
