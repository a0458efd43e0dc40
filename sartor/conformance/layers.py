"""Models of the layers that hold weights or pool, and of the norms."""

from __future__ import annotations

from typing import Any

from sartor.conformance.draft import Draft
from sartor.conformance.models import ALL, HALF, Model, declare

MODELS: list[Model] = []


@declare(MODELS, "convolution", ALL)
def conv(draft: Draft) -> None:
    """3x3 convolution and ReLU."""
    x = draft.input("x", "N", 3, 9, 7)
    draft.output(draft.node("Relu", draft.conv(x, 3, 5, pads=[1, 1, 1, 1])), "y")


@declare(MODELS, "convolution")
def conv_pointwise(draft: Draft) -> None:
    """1x1 convolution."""
    draft.output(draft.conv(draft.input("x", "N", 6, 5, 7), 6, 4, (1, 1)), "y")


@declare(MODELS, "convolution")
def conv_strided(draft: Draft) -> None:
    """Convolution with a kernel, strides and pads that differ by axis and side."""
    x = draft.input("x", "N", 3, 11, 9)
    draft.output(draft.conv(x, 3, 6, (3, 5), strides=[2, 1], pads=[0, 1, 1, 2]), "y")


@declare(MODELS, "convolution")
def conv_dilated(draft: Draft) -> None:
    """Convolution with dilation."""
    x = draft.input("x", "N", 4, 10, 12)
    draft.output(draft.conv(x, 4, 5, dilations=[2, 3], pads=[2, 3, 2, 3]), "y")


@declare(MODELS, "convolution")
def conv_grouped(draft: Draft) -> None:
    """Convolution in two groups, with more outputs than inputs."""
    x = draft.input("x", "N", 4, 7, 9)
    draft.output(draft.conv(x, 4, 6, group=2, pads=[1, 1, 1, 1]), "y")


@declare(MODELS, "convolution")
def conv_1d(draft: Draft) -> None:
    """Convolution along one axis."""
    draft.output(draft.conv(draft.input("x", "N", 4, 15), 4, 6, (5,), pads=[2, 2], strides=[2]), "y")


@declare(MODELS, "depthwise", ALL)
def depthwise(draft: Draft) -> None:
    """Depthwise 3x3 convolution with stride 2."""
    x = draft.input("x", "N", 6, 9, 7)
    draft.output(draft.conv(x, 6, 6, group=6, strides=[2, 2], pads=[1, 1, 1, 1]), "y")


@declare(MODELS, "depthwise")
def depthwise_multiplier(draft: Draft) -> None:
    """Depthwise convolution with two outputs per channel."""
    x = draft.input("x", "N", 5, 7, 9)
    draft.output(draft.conv(x, 5, 10, group=5, pads=[1, 1, 1, 1]), "y")


@declare(MODELS, "transposed convolution")
def conv_transpose(draft: Draft) -> None:
    """Transposed 2x2 convolution with stride 2: doubles the resolution."""
    x = draft.input("x", "N", 4, 5, 6)
    weight, bias = draft.weight(4, 3, 2, 2, fan_in=4), draft.weight(3)
    draft.output(draft.node("ConvTranspose", x, weight, bias, strides=[2, 2]), "y")


@declare(MODELS, "transposed convolution")
def conv_transpose_padded(draft: Draft) -> None:
    """Transposed 3x3 convolution with pads and output padding."""
    x = draft.input("x", "N", 4, 5, 6)
    weight = draft.weight(4, 3, 3, 3, fan_in=9)
    options: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    draft.output(draft.node("ConvTranspose", x, weight, **options), "y")


@declare(MODELS, "matrix product", ALL)
def gemm(draft: Draft) -> None:
    """Two linear layers on vectors, with ReLU between them."""
    x = draft.input("x", "N", 11)
    draft.output(draft.gemm(draft.node("Relu", draft.gemm(x, 11, 9)), 9, 6), "y")


@declare(MODELS, "matrix product", HALF)
def matmul(draft: Draft) -> None:
    """Linear layer on a sequence of vectors."""
    draft.output(draft.linear(draft.input("x", "N", 7, 10), 10, 6), "y")


@declare(MODELS, "matrix product")
def matmul_activations(draft: Draft) -> None:
    """Batched product of two activations."""
    x = draft.input("x", "N", 5, 8)
    scores = draft.node("MatMul", x, draft.node("Transpose", x, perm=[0, 2, 1]))
    draft.output(draft.node("MatMul", scores, draft.linear(x, 8, 6)), "y")


@declare(MODELS, "normalization", HALF)
def batch_norm(draft: Draft) -> None:
    """Convolution, BatchNormalization with random statistics, ReLU."""
    x = draft.input("x", "N", 3, 8, 7)
    y = draft.conv(x, 3, 6, pads=[1, 1, 1, 1])
    statistics = (draft.positive(6), draft.weight(6), draft.weight(6), draft.positive(6))
    draft.output(draft.node("Relu", draft.node("BatchNormalization", y, *statistics)), "y")


@declare(MODELS, "normalization")
def batch_norm_first(draft: Draft) -> None:
    """BatchNormalization that no convolution precedes."""
    x = draft.input("x", "N", 5, 6, 7)
    statistics = (draft.positive(5), draft.weight(5), draft.weight(5), draft.positive(5))
    draft.output(draft.node("BatchNormalization", x, *statistics), "y")


@declare(MODELS, "normalization", HALF)
def layer_norm(draft: Draft) -> None:
    """LayerNormalization over the last axis."""
    x = draft.input("x", "N", 5, 12)
    draft.output(draft.node("LayerNormalization", x, draft.positive(12), draft.weight(12), axis=-1), "y")


@declare(MODELS, "normalization")
def group_norm(draft: Draft) -> None:
    """GroupNormalization in two groups."""
    x = draft.input("x", "N", 6, 5, 7)
    draft.output(draft.node("GroupNormalization", x, draft.positive(6), draft.weight(6), num_groups=2), "y")


@declare(MODELS, "normalization")
def instance_norm(draft: Draft) -> None:
    """InstanceNormalization."""
    x = draft.input("x", "N", 4, 6, 7)
    draft.output(draft.node("InstanceNormalization", x, draft.positive(4), draft.weight(4)), "y")


@declare(MODELS, "pooling", ALL)
def max_pool(draft: Draft) -> None:
    """3x3 maximum with stride 2 and padding."""
    x = draft.conv(draft.input("x", "N", 3, 10, 9), 3, 5, pads=[1, 1, 1, 1])
    draft.output(draft.same("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), "y")


@declare(MODELS, "pooling")
def average_pool(draft: Draft) -> None:
    """2x3 average."""
    x = draft.input("x", "N", 4, 8, 9)
    draft.output(draft.node("AveragePool", x, kernel_shape=[2, 3], strides=[2, 3]), "y")


@declare(MODELS, "pooling")
def average_pool_padded(draft: Draft) -> None:
    """3x3 average with padding that does not count."""
    x = draft.input("x", "N", 4, 8, 9)
    options: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    draft.output(draft.node("AveragePool", x, **options), "y")


@declare(MODELS, "pooling", ALL)
def global_average_pool(draft: Draft) -> None:
    """Average over all positions, flattened, and a linear layer."""
    x = draft.conv(draft.input("x", "N", 3, 8, 9), 3, 8, pads=[1, 1, 1, 1])
    pooled = draft.same("GlobalAveragePool", draft.node("Relu", x))
    draft.output(draft.gemm(draft.node("Flatten", pooled, axis=1), 8, 5), "y")
