"""Elementwise operators: unary functions, activations, and arithmetic with broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.registry import operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": functional.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
for _name, _function in _UNARY.items():
    operator(_name)(_function)

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
for _name, _binary in _BINARY.items():
    operator(_name, arithmetic=True)(_binary)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """The input itself."""
    return x


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`max(0, x) + min(0, alpha (exp(x / alpha) - 1))`."""
    return functional.celu(x, alpha)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x` where positive, else `alpha (exp(x) - 1)`."""
    return functional.elu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Tensor:
    """`gamma` times `elu(x, alpha)`."""
    return gamma * functional.elu(x, alpha)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Exact (`none`) or `tanh` Gaussian error linear unit."""
    return functional.gelu(x, approximate=approximate)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """`clamp(alpha x + beta, 0, 1)`."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """`x clamp(x / 6 + 1 / 2, 0, 1)`."""
    return functional.hardswish(x)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """`x` where positive, else `alpha x`."""
    return functional.leaky_relu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x` where greater than `alpha`, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`; exact, where torch's own turns linear above 20 and is off by 2e-9 there."""
    return torch.logaddexp(x, torch.zeros_like(x))


@operator("Mish")
def mish(x: Tensor) -> Tensor:
    """`x tanh(softplus(x))`."""
    return x * torch.tanh(softplus(x))


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """`x + bias` below `-lambd`, `x - bias` above `lambd`, else 0."""
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """True at infinities of the requested signs."""
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_positive:
        return torch.isposinf(x)
    return torch.isneginf(x) if detect_negative else torch.zeros_like(x, dtype=torch.bool)


@operator("Clip", scalars=(1, 2))
def clip(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    """`min(high, max(low, x))`; either bound may be absent, and `high` wins where they cross."""
    if low is not None:
        x = torch.clamp(x, min=low) if not isinstance(low, Tensor) else torch.maximum(x, low)
    if high is not None:
        x = torch.clamp(x, max=high) if not isinstance(high, Tensor) else torch.minimum(x, high)
    return x


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """`x` where not negative, else `slope x`; the slope broadcasts to `x`."""
    return torch.where(x >= 0, x, slope * x)


@operator("Div", arithmetic=True)
def div(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; integers truncate toward zero."""
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


@operator("Mod", arithmetic=True)
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend when `fmod` is 1."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Pow", scalars=(1,), arithmetic=True)
def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """`base ** exponent` in the element type of `base`."""
    if isinstance(exponent, Tensor) and exponent.is_floating_point() and not base.is_floating_point():
        return torch.pow(base.to(exponent.dtype), exponent).to(base.dtype)
    return torch.pow(base, exponent).to(base.dtype)


@operator("BitShift")
def bit_shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    """Logical shift of unsigned integers, `LEFT` or `RIGHT`."""
    if direction == "LEFT":
        return torch.bitwise_left_shift(x, by)
    return torch.bitwise_right_shift(x, by)


@operator("Where", arithmetic=True)
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where the condition holds, else `b`."""
    return torch.where(condition, a, b)


@operator("Max", arithmetic=True)
def maximum(*operands: Tensor) -> Tensor:
    """Elementwise maximum of one or more operands, broadcast."""
    return functools.reduce(torch.maximum, operands)


@operator("Min", arithmetic=True)
def minimum(*operands: Tensor) -> Tensor:
    """Elementwise minimum of one or more operands, broadcast."""
    return functools.reduce(torch.minimum, operands)


@operator("Sum", arithmetic=True)
def total(*operands: Tensor) -> Tensor:
    """Elementwise sum of one or more operands, broadcast."""
    return functools.reduce(torch.add, operands)


@operator("Mean", arithmetic=True)
def mean(*operands: Tensor) -> Tensor:
    """Elementwise mean of one or more operands, broadcast."""
    return functools.reduce(torch.add, operands) / len(operands)


@operator("Cast", types=("to",), unsigned=True)
def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Conversion of the element type; floats truncate toward zero when they become integers.

    `saturate` and `round_mode` concern 8-bit floats only, which are refused before this is reached.
    """
    return x.to(to)


@operator("CastLike", unsigned=True)
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in the element type of `like`."""
    return x.to(like.dtype)


@operator("Dropout", static=(1, 2), several=True)
def dropout(
    x: Tensor,
    ratio: tuple[float, ...] | None = None,
    training: tuple[int, ...] | None = None,
    *,
    outputs: int,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """The identity: canonical programs carry no active Dropout, which the twin could not reproduce."""
    if training is not None and training[0] and (ratio is None or ratio[0] > 0):
        raise UnsupportedOperatorError("Dropout in training mode is random; export the model in eval mode.")
    return (x, torch.ones_like(x, dtype=torch.bool))[:outputs]
