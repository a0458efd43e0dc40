"""RNN, GRU and LSTM: one loop over time per direction, differentiable, any activation that ONNX names.

Shapes: `x [T, N, I]`, weights `W [D, gates * H, I]`, `R [D, gates * H, H]`, `B [D, 2 * gates * H]`, states
`[D, N, H]`, where D is the number of directions. With `layout=1` the batch comes first everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.registry import operator

Floats = Sequence[float]
Function = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

_PLAIN: dict[str, Function] = {
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": functional.softsign,
    "tanh": torch.tanh,
}
# Name: function of (x, alpha, beta), default alpha, default beta; None where the name takes none.
_WITH_SETTINGS: dict[str, tuple[Callable[..., Tensor], float | None, float | None]] = {
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "elu": (lambda x, a, b: functional.elu(x, a), 1.0, None),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0), 0.2, 0.5),
    "leakyrelu": (lambda x, a, b: functional.leaky_relu(x, a), 0.01, None),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)), 1.0, None),
}


def _activations(
    given: Sequence[str] | None,
    default: Sequence[str],
    directions: int,
    alphas: Floats | None,
    betas: Floats | None,
) -> list[list[Function]]:
    """The functions of each direction; alphas and betas are dealt out to those that take one, in order."""
    chosen = list(given or list(default) * directions)
    alpha, beta = iter(alphas or ()), iter(betas or ())
    functions = [_activation(name, alpha, beta) for name in chosen]
    count = len(default)
    return [functions[i * count : (i + 1) * count] for i in range(directions)]


def _activation(name: str, alphas: Iterator[float], betas: Iterator[float]) -> Function:
    key = name.lower()
    if key in _PLAIN:
        return _PLAIN[key]
    if key not in _WITH_SETTINGS:
        raise UnsupportedOperatorError(
            f"activation '{name}' of a recurrent operator is unknown; expected one of "
            f"{sorted([*_PLAIN, *_WITH_SETTINGS])}."
        )
    function, alpha, beta = _WITH_SETTINGS[key]
    first = alpha if alpha is None else next(alphas, alpha)
    second = beta if beta is None else next(betas, beta)
    return lambda x: function(x, first, second)


def _clipped(functions: list[Function], clip: float | None) -> list[Function]:
    """Bound the input of every activation by `clip`."""
    if clip is None:
        return functions
    bound = clip
    return [lambda x, f=f: f(torch.clamp(x, -bound, bound)) for f in functions]  # type: ignore[misc]


def _unroll(
    x: Tensor, states: tuple[Tensor, ...], step: Step, lengths: Tensor | None, backward: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `step` over axis 0 of `x`; samples past their length keep their state and give zeros."""
    outputs: list[Tensor] = []
    order = range(x.shape[0])
    for t in reversed(order) if backward else order:
        new = step(x[t], states)
        if lengths is None:
            outputs.append(new[0])
            states = new
            continue
        alive = (lengths > t).reshape(-1, 1)
        outputs.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
        states = tuple(torch.where(alive, n, s) for n, s in zip(new, states, strict=True))
    if backward:
        outputs.reverse()
    return torch.stack(outputs), states


def _run(
    x: Tensor,
    hidden_size: int,
    initial: Sequence[Tensor | None],
    lengths: Tensor | None,
    direction: str,
    layout: int,
    make_step: Callable[[int], Step],
) -> tuple[Tensor, ...]:
    """All directions: `Y [T, D, N, H]`, then each final state `[D, N, H]`; the batch first with `layout=1`."""
    if layout:
        x = x.transpose(0, 1)
        initial = [s if s is None else s.transpose(0, 1) for s in initial]
    backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    zero = torch.zeros((x.shape[1], hidden_size), dtype=x.dtype, device=x.device)
    outputs, finals = [], []
    for index, backward in enumerate(backwards):
        start = tuple(zero if s is None else s[index] for s in initial)
        output, final = _unroll(x, start, make_step(index), lengths, backward)
        outputs.append(output)
        finals.append(final)
    y = torch.stack(outputs, 1)
    last = [torch.stack(states) for states in zip(*finals, strict=True)]
    if layout:
        return (y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last))
    return (y, *last)


def _directions(direction: str) -> int:
    return 2 if direction == "bidirectional" else 1


def _biases(
    b: Tensor | None, index: int, gates: int, hidden_size: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Input and recurrent bias `[gates * H]` of one direction."""
    if b is None:
        none = torch.zeros(gates * hidden_size, dtype=like.dtype, device=like.device)
        return none, none
    first, second = torch.split(b[index], gates * hidden_size)
    return first, second


@operator("RNN", several=True)
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = ("Tanh", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """`h' = f(x W' + h R' + b)`."""
    size = hidden_size or r.shape[-1]
    chosen = _activations(activations, ("Tanh",), _directions(direction), activation_alpha, activation_beta)

    def make_step(index: int) -> Step:
        (f,) = _clipped(chosen[index], clip)
        first, second = _biases(b, index, 1, size, x)

        def step(now: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (
                f(functional.linear(now, w[index], first) + functional.linear(states[0], r[index], second)),
            )

        return step

    return _run(x, size, (initial_h,), sequence_lens, direction, layout, make_step)[:outputs]


@operator("GRU", several=True)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Gates in ONNX's order z, r, h; the reset acts before or after the recurrent product."""
    size = hidden_size or r.shape[-1]
    chosen = _activations(
        activations, ("Sigmoid", "Tanh"), _directions(direction), activation_alpha, activation_beta
    )

    def make_step(index: int) -> Step:
        f, g = _clipped(chosen[index], clip)
        first, second = _biases(b, index, 3, size, x)
        gates, candidate = torch.split(r[index], [2 * size, size])
        gates_bias, candidate_bias = torch.split(second, [2 * size, size])

        def step(now: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h = states[0]
            from_x = functional.linear(now, w[index], first)
            zr = f(from_x[:, : 2 * size] + functional.linear(h, gates, gates_bias))
            z, reset = torch.split(zr, size, -1)
            if linear_before_reset:
                recurrent = reset * functional.linear(h, candidate, candidate_bias)
            else:
                recurrent = functional.linear(reset * h, candidate, candidate_bias)
            return ((1 - z) * g(from_x[:, 2 * size :] + recurrent) + z * h,)

        return step

    return _run(x, size, (initial_h,), sequence_lens, direction, layout, make_step)[:outputs]


@operator("LSTM", several=True)
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Gates in ONNX's order i, o, f, c; peepholes `P [D, 3 H]` in the order i, o, f."""
    size = hidden_size or r.shape[-1]
    chosen = _activations(
        activations, ("Sigmoid", "Tanh", "Tanh"), _directions(direction), activation_alpha, activation_beta
    )

    def make_step(index: int) -> Step:
        f, g, h_function = _clipped(chosen[index], clip)
        first, second = _biases(b, index, 4, size, x)
        peepholes = torch.split(p[index], size) if p is not None else None

        def step(now: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, c = states
            both = functional.linear(now, w[index], first) + functional.linear(h, r[index], second)
            i, o, forget, cell = torch.split(both, size, -1)
            if peepholes is not None:
                i, forget = i + peepholes[0] * c, forget + peepholes[2] * c
            i = f(i)
            forget = 1 - i if input_forget else f(forget)
            c = forget * c + i * g(cell)
            if peepholes is not None:
                o = o + peepholes[1] * c
            return f(o) * h_function(c), c

        return step

    return _run(x, size, (initial_h, initial_c), sequence_lens, direction, layout, make_step)[:outputs]
