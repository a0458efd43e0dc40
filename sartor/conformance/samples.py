"""Small networks of the kinds that users bring."""

from __future__ import annotations

import numpy as np

from sartor.conformance.blocks import conv_norm, inverted_residual, normalized, residual, transformer
from sartor.conformance.draft import Draft
from sartor.conformance.models import ALL, HALF, Model, declare

MODELS: list[Model] = []


@declare(MODELS, "network", ALL)
def resnet(draft: Draft) -> None:
    """Stem, four residual blocks, one of them with a projection, and a classifier."""
    x = draft.node("Relu", conv_norm(draft, draft.input("x", "N", 3, 16, 16), 3, 8, 3))
    x = draft.same("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = residual(draft, residual(draft, x, 8, 8), 8, 8)
    x = residual(draft, residual(draft, x, 8, 12, stride=2), 12, 12)
    pooled = draft.node("Flatten", draft.same("GlobalAveragePool", x), axis=1)
    draft.output(draft.gemm(pooled, 12, 10), "y")


@declare(MODELS, "network", ALL)
def mobilenet(draft: Draft) -> None:
    """Three inverted residuals and a classifier."""
    x = conv_norm(draft, draft.input("x", "N", 3, 16, 16), 3, 6, 3, strides=[2, 2])
    x = inverted_residual(draft, x, 6, 12, 6)
    x = inverted_residual(draft, x, 6, 16, 8, stride=2)
    x = inverted_residual(draft, x, 8, 20, 8)
    pooled = draft.node("Flatten", draft.same("GlobalAveragePool", x), axis=1)
    draft.output(draft.gemm(pooled, 8, 10), "y")


@declare(MODELS, "network", HALF)
def vit(draft: Draft) -> None:
    """Patches, position embedding, two transformer blocks, mean over tokens, classifier."""
    x = draft.conv(draft.input("x", "N", 3, 12, 12), 3, 12, (4, 4), strides=[4, 4])
    x = draft.node("Transpose", draft.node("Reshape", x, draft.ints(0, 12, 9)), perm=[0, 2, 1])
    x = draft.node("Add", x, draft.weight(1, 9, 12))
    for _ in range(2):
        x = transformer(draft, x, tokens=9, width=12, heads=3, hidden=20)
    x = draft.node("ReduceMean", normalized(draft, x, 12), draft.ints(1), keepdims=0)
    draft.output(draft.gemm(x, 12, 10), "y")


@declare(MODELS, "network")
def unet(draft: Draft) -> None:
    """Down, up by transposed convolution and by interpolation, skip concatenations, a dense output."""
    a = draft.node("Relu", conv_norm(draft, draft.input("x", "N", 3, 12, 12), 3, 6, 3))
    b = draft.node("Relu", conv_norm(draft, _halved(draft, a), 6, 8, 3))
    c = draft.node("Relu", conv_norm(draft, _halved(draft, b), 8, 10, 3))
    up = draft.node("ConvTranspose", c, draft.weight(10, 8, 2, 2, fan_in=10), draft.weight(8), strides=[2, 2])
    d = draft.node("Relu", conv_norm(draft, draft.node("Concat", up, b, axis=1), 16, 8, 3))
    scales = draft.weight_free(np.array([1, 1, 2, 2], np.float32))
    d = draft.node("Resize", d, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    e = draft.node("Relu", conv_norm(draft, draft.node("Concat", a, d, axis=1), 14, 6, 3))
    draft.output(draft.conv(e, 6, 2, (1, 1)), "y")


def _halved(draft: Draft, x: str) -> str:
    return draft.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
