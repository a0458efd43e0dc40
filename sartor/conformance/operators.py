"""Models of single operators without weights of their own: activations, elementwise, movement, reduction."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sartor.conformance.draft import Draft
from sartor.conformance.models import FLOAT, HALF, Model, declare

MODELS: list[Model] = []

_ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.2},
    "Sigmoid": {},
    "Tanh": {},
    "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "HardSwish": {},
    "Elu": {"alpha": 0.7},
    "Softplus": {},
    "Gelu": {"approximate": "none"},
    "Erf": {},
    "Exp": {},
    "Abs": {},
    "Neg": {},
    "Floor": {},
}
"""Operators of one input, which see a convolution's output: values on both sides of zero."""


def _one_input(op_type: str, attributes: Mapping[str, Any], draft: Draft) -> None:
    x = draft.conv(draft.input("x", "N", 3, 5, 6), 3, 4, pads=[1, 1, 1, 1])
    draft.output(draft.node(op_type, x, **attributes), "y")


for _op_type, _attributes in _ACTIVATIONS.items():
    MODELS.append(
        Model(
            f"activation-{_op_type.lower()}",
            "activation",
            f"{_op_type} of a convolution.",
            functools.partial(_one_input, _op_type, _attributes),
            HALF if _op_type in ("Relu", "Sigmoid", "Tanh") else FLOAT,
        )
    )


@declare(MODELS, "activation", HALF)
def relu6(draft: Draft) -> None:
    """Clip to [0, 6] of four times a convolution, so that both bounds are reached."""
    x = draft.conv(draft.input("x", "N", 3, 5, 6), 3, 4, pads=[1, 1, 1, 1])
    x = draft.node("Mul", x, draft.constant(4.0))
    draft.output(draft.node("Clip", x, draft.constant(0.0), draft.constant(6.0)), "y")


@declare(MODELS, "activation")
def softmax(draft: Draft) -> None:
    """Softmax over the last axis of a linear layer."""
    draft.output(draft.node("Softmax", draft.linear(draft.input("x", "N", 5, 6), 6, 7), axis=-1), "y")


@declare(MODELS, "activation")
def log_softmax(draft: Draft) -> None:
    """LogSoftmax over the last axis of a linear layer."""
    draft.output(draft.node("LogSoftmax", draft.linear(draft.input("x", "N", 5, 6), 6, 7), axis=-1), "y")


@declare(MODELS, "activation")
def prelu(draft: Draft) -> None:
    """PRelu with a slope per channel."""
    x = draft.input("x", "N", 5, 4, 6)
    draft.output(draft.node("PRelu", x, draft.weight(5, 1, 1)), "y")


@declare(MODELS, "activation")
def silu(draft: Draft) -> None:
    """Product of x and sigmoid(x)."""
    x = draft.conv(draft.input("x", "N", 3, 5, 6), 3, 4, pads=[1, 1, 1, 1])
    draft.output(draft.node("Mul", x, draft.node("Sigmoid", x)), "y")


@declare(MODELS, "elementwise", HALF)
def add_broadcast(draft: Draft) -> None:
    """Sum with a vector along the channels, then with one number."""
    x = draft.input("x", "N", 5, 4, 6)
    y = draft.node("Add", x, draft.weight(1, 5, 1, 1))
    draft.output(draft.node("Add", draft.constant(0.7), y), "y")


@declare(MODELS, "elementwise")
def sub_and_div(draft: Draft) -> None:
    """The operators in which the order counts, with the constant on either side."""
    x = draft.input("x", "N", 5, 6)
    y = draft.node("Sub", draft.weight(6), draft.node("Sub", x, draft.weight(5, 1)))
    above = draft.node("Add", draft.node("Abs", y), draft.constant(0.6))
    draft.output(draft.node("Div", draft.node("Div", x, draft.positive(6)), above), "y")


@declare(MODELS, "elementwise")
def mul_of_two(draft: Draft) -> None:
    """Product and difference of two inputs with different shapes: their order shows."""
    a, b = draft.input("a", "N", 4, 5), draft.input("b", "N", 1, 5)
    draft.output(draft.node("Sub", draft.node("Mul", a, b), b), "y")


@declare(MODELS, "elementwise")
def sqrt_and_pow(draft: Draft) -> None:
    """Square, square root, reciprocal and a power."""
    x = draft.input("x", "N", 4, 6)
    size = draft.node(
        "Sqrt", draft.node("Add", draft.node("Pow", x, draft.constant(2.0)), draft.constant(0.3))
    )
    draft.output(draft.node("Mul", draft.node("Reciprocal", size), x), "y")


@declare(MODELS, "elementwise")
def min_and_max(draft: Draft) -> None:
    """Minimum and maximum with tensors."""
    x = draft.input("x", "N", 4, 6)
    draft.output(draft.node("Min", draft.node("Max", x, draft.weight(6)), draft.weight(4, 1, at=0.8)), "y")


@declare(MODELS, "elementwise")
def where(draft: Draft) -> None:
    """A choice by comparison."""
    x = draft.input("x", "N", 4, 6)
    chosen = draft.node("Greater", x, draft.weight(6))
    draft.output(draft.node("Where", chosen, x, draft.node("Mul", x, draft.constant(-0.4))), "y")


@declare(MODELS, "movement")
def reshape(draft: Draft) -> None:
    """Reshape that merges and splits axes, batch kept."""
    x = draft.input("x", "N", 6, 4, 5)
    y = draft.node("Reshape", x, draft.ints(0, 3, 2, 20))
    draft.output(draft.node("Reshape", y, draft.ints(0, -1, 10)), "y")


@declare(MODELS, "movement")
def transpose(draft: Draft) -> None:
    """Channels last, a linear layer, and back."""
    x = draft.node("Transpose", draft.input("x", "N", 4, 5, 6), perm=[0, 2, 3, 1])
    draft.output(draft.node("Transpose", draft.linear(x, 4, 7), perm=[0, 3, 1, 2]), "y")


@declare(MODELS, "movement")
def flatten(draft: Draft) -> None:
    """Flatten alone: the output holds the numbers of the input as they lie."""
    draft.output(draft.node("Flatten", draft.input("x", "N", 3, 4, 5), axis=1), "y")


@declare(MODELS, "movement")
def transpose_alone(draft: Draft) -> None:
    """Transpose alone."""
    draft.output(draft.node("Transpose", draft.input("x", "N", 3, 4, 5), perm=[0, 2, 3, 1]), "y")


@declare(MODELS, "movement")
def squeeze(draft: Draft) -> None:
    """Squeeze alone."""
    draft.output(draft.node("Squeeze", draft.input("x", "N", 4, 1, 6), draft.ints(2)), "y")


@declare(MODELS, "movement")
def concat(draft: Draft) -> None:
    """Three branches of unequal width side by side, and a convolution that reads them."""
    x = draft.input("x", "N", 3, 6, 5)
    branches = [draft.conv(x, 3, width, (1, 1)) for width in (2, 4)]
    draft.output(draft.conv(draft.node("Concat", branches[1], x, branches[0], axis=1), 9, 4, (1, 1)), "y")


@declare(MODELS, "movement")
def split(draft: Draft) -> None:
    """Two unequal parts, each used differently."""
    x = draft.conv(draft.input("x", "N", 3, 6, 5), 3, 7, (1, 1))
    first, second = draft.nodes("Split", x, draft.ints(3, 4), results=2, axis=1)
    draft.output(draft.node("Concat", draft.node("Relu", second), first, axis=1), "y")


@declare(MODELS, "movement")
def slice_strided(draft: Draft) -> None:
    """Slices with a start, an end and a step."""
    x = draft.input("x", "N", 7, 8, 9)
    bounds = (draft.ints(1, 2), draft.ints(6, 9), draft.ints(1, 3), draft.ints(1, 2))
    draft.output(draft.node("Slice", x, *bounds), "y")


@declare(MODELS, "movement")
def pad(draft: Draft) -> None:
    """Padding with a constant, unequal on every side."""
    x = draft.input("x", "N", 3, 4, 5)
    draft.output(draft.node("Pad", x, draft.ints(0, 0, 1, 2, 0, 0, 3, 0), draft.constant(0.5)), "y")


@declare(MODELS, "movement")
def pad_reflect(draft: Draft) -> None:
    """Padding by reflection."""
    x = draft.input("x", "N", 3, 5, 6)
    draft.output(draft.node("Pad", x, draft.ints(0, 0, 2, 1, 0, 0, 1, 3), mode="reflect"), "y")


@declare(MODELS, "movement")
def squeeze_and_unsqueeze(draft: Draft) -> None:
    """Axes of length 1 taken out and put in elsewhere."""
    x = draft.node("Squeeze", draft.input("x", "N", 4, 1, 6), draft.ints(2))
    draft.output(draft.node("Unsqueeze", draft.linear(x, 6, 5), draft.ints(1)), "y")


@declare(MODELS, "movement")
def gather(draft: Draft) -> None:
    """Channels in another order, one of them twice."""
    x = draft.input("x", "N", 5, 6)
    draft.output(draft.node("Gather", x, draft.ints(3, 0, 4, 0), axis=1), "y")


@declare(MODELS, "movement")
def depth_to_space(draft: Draft) -> None:
    """Channels become positions."""
    x = draft.input("x", "N", 12, 3, 4)
    draft.output(draft.node("DepthToSpace", x, blocksize=2, mode="CRD"), "y")


@declare(MODELS, "reduction", HALF)
def reduce_mean(draft: Draft) -> None:
    """Mean over positions."""
    x = draft.input("x", "N", 4, 5, 6)
    draft.output(draft.node("ReduceMean", x, draft.ints(2, 3), keepdims=0), "y")


@declare(MODELS, "reduction")
def reduce_sum_and_max(draft: Draft) -> None:
    """Sum along one axis plus maximum along it."""
    x = draft.input("x", "N", 4, 5, 6)
    total = draft.node("ReduceSum", x, draft.ints(3), keepdims=1)
    draft.output(draft.node("Sub", total, draft.node("ReduceMax", x, draft.ints(3), keepdims=1)), "y")


@declare(MODELS, "resize")
def resize_nearest(draft: Draft) -> None:
    """Every position twice along both axes."""
    x = draft.input("x", "N", 3, 4, 5)
    scales = draft.weight_free(np.array([1, 1, 2, 2], np.float32))
    options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    draft.output(draft.node("Resize", x, "", scales, **options), "y")


@declare(MODELS, "resize")
def resize_linear(draft: Draft) -> None:
    """Bilinear interpolation to twice the size."""
    x = draft.input("x", "N", 3, 4, 5)
    scales = draft.weight_free(np.array([1, 1, 2, 2], np.float32))
    options = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    draft.output(draft.node("Resize", x, "", scales, **options), "y")


@declare(MODELS, "interface")
def two_inputs(draft: Draft) -> None:
    """Two inputs of the same shape that are not treated alike, named against the alphabet."""
    later, earlier = draft.input("z", "N", 4, 5), draft.input("a", "N", 4, 5)
    draft.output(draft.node("Sub", draft.linear(later, 5, 5), earlier), "y")


@declare(MODELS, "interface")
def two_outputs(draft: Draft) -> None:
    """Two outputs of the same shape with different contents, named against the alphabet."""
    x = draft.conv(draft.input("x", "N", 3, 5, 6), 3, 4, pads=[1, 1, 1, 1])
    draft.output(draft.node("Relu", x), "second")
    draft.output(draft.node("Tanh", x), "first")
