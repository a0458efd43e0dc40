"""Which activations ONNX Runtime keeps in its blocked layout (NCHWc), where alone a sum runs inside a convolution.

A value that is made in the layout and read outside it is copied, and the other way round: kernels that no node of the
program names. Follows `onnxruntime/core/optimizer/nchwc_transformer.cc`: convolutions of suitable widths make the
layout; poolings, sums, concatenations and activations of blocked values hand it on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sartor.ir.program import Program

_ALIGNMENT = 4
"""Channels that a value needs to be reordered at all."""
BLOCK = 16
"""Floats of one block where the vectors have 512 bits; grouped convolutions need whole blocks per group."""
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
_MAKING_POOLS = frozenset({"MaxPool", "AveragePool"})
"""Poolings that bring a plain value into the layout; global ones hand it on only."""
_WEIGHTED = frozenset({"Conv", "BatchNormalization"})
_KEEP = frozenset({"Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu"})
_FUSED_EARLIER = frozenset({"Clip", "LeakyRelu"})
"""Fused into a convolution before layouts are chosen, and unknown afterwards: behind a sum or a pooling they are
computed in the plain layout."""
_PLAIN_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})


@dataclasses.dataclass(frozen=True)
class Step:
    """A node of which the layout depends, its widths apart.

    Attributes:
        op_type: operator.
        output: name of its first output.
        inputs: names of the activations that it reads, in their order.
        shares: it can be in the layout at all, by what no plan changes: ranks, axes, equal shapes.
        behind_weights: a convolution or a BatchNormalization makes its first input.
        turned_in: per input, whether a copy into the layout is part of the Transpose that makes it.
        turned_out: it is the Transpose that a copy out of the layout is part of.
    """

    op_type: str
    output: str
    inputs: tuple[str, ...]
    shares: bool
    behind_weights: bool = False
    turned_in: tuple[bool, ...] = ()
    turned_out: bool = False


class Widths(Protocol):
    """Channels of a population of plans, scalars or arrays `[plans]`."""

    def channels(self, value: str) -> Any:
        """Of a value, on its second axis."""
        ...

    def per_group(self, step: Step) -> tuple[Any, Any, Any]:
        """Groups of a convolution, and input and output channels of one of them."""
        ...


def convolves_blocked(groups: Any, inner: Any, outer: Any) -> np.ndarray:
    """Whether a convolution runs in the blocked layout; numbers or arrays of one shape.

    Args:
        groups: of the convolution.
        inner: input channels of one group.
        outer: output channels of one group.
    """
    groups, inner, outer = (np.asarray(value, float) for value in (groups, inner, outer))
    dense = (inner < BLOCK) | (inner % _ALIGNMENT == 0)  # output channels are filled up to whole blocks
    depthwise = groups % _ALIGNMENT == 0
    whole_groups = (inner % BLOCK == 0) & (outer % BLOCK == 0)
    one_each = (inner == 1) & (outer == 1)
    return np.where(groups == 1, dense, np.where(one_each, depthwise, whole_groups))


def steps_of(program: Program) -> tuple[Step, ...]:
    """What `states` needs of a program, in execution order."""
    shapes = program.shapes()
    return tuple(_step(node, shapes) for node in program.nodes() if node.outputs)


def states(steps: Sequence[Step], widths: Widths) -> dict[str, np.ndarray]:
    """Whether each value is in the blocked layout, scalars or bool arrays `[plans]`; others are not in it."""
    blocked: dict[str, np.ndarray] = {}
    for step in steps:
        if step.shares:
            blocked[step.output] = np.asarray(_state(step, widths, blocked))
    return blocked


def copied(
    steps: Sequence[Step], outputs: Iterable[str], widths: Widths, blocked: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values that the runtime copies into the layout, and those that it copies out of it, by name.

    A Transpose between channels first and last that stands beside a copy is part of it.

    Args:
        steps: of the program.
        outputs: names of its outputs.
        widths: of a population of plans.
        blocked: as `states` says.
    """
    into: dict[str, np.ndarray] = {}
    out: dict[str, np.ndarray] = {}
    never = np.False_
    for step in steps:
        inside = blocked.get(step.output, never)
        for number, name in enumerate(step.inputs):
            if name not in blocked and step.output not in blocked:
                continue
            mine = blocked.get(name, never)
            # A convolution of few channels reads them as they are, side by side.
            plain = widths.channels(name) < BLOCK if step.op_type == "Conv" and number == 0 else never
            if not step.turned_out:
                out[name] = out.get(name, never) | (mine & (~np.asarray(inside) | plain))
            if not step.turned_in[number]:
                into[name] = into.get(name, never) | (~np.asarray(mine) & inside & ~np.asarray(plain))
    for name in outputs:
        if name in blocked:
            out[name] = out.get(name, never) | blocked[name]
    return into, out


def blocked_values(program: Program) -> frozenset[str]:
    """Names of the activations in the blocked layout, at the widths before any pruning."""
    found = states(steps_of(program), _Whole(program))
    return frozenset(name for name, state in found.items() if state)


def layout_changes(program: Program) -> tuple[frozenset[str], frozenset[str]]:
    """As `copied`, at the widths before any pruning."""
    outputs = [_name(value) for value in program.graph.outputs]
    steps, widths = steps_of(program), _Whole(program)
    into, out = copied(steps, outputs, widths, states(steps, widths))
    return tuple(frozenset(n for n, needed in found.items() if needed) for found in (into, out))  # type: ignore


class _Whole:
    """Widths before any pruning."""

    def __init__(self, program: Program):
        self._shapes = program.shapes()
        self._convolutions = {
            node.outputs[0].name or "": node for node in program.nodes() if node.op_type == "Conv"
        }

    def channels(self, value: str) -> int:
        return self._shapes[value][1]

    def per_group(self, step: Step) -> tuple[int, int, int]:
        node = self._convolutions[step.output]
        group = node.attributes.get_int("group", 1)
        out, inner = self._shapes[_name(node.inputs[1])][:2]
        return group, inner, out // group


# ---- what runs inside -----------------------------------------------------------------------------
def takes_activation(op_type: str, lead: str, *, blocked: Any, after_sum: bool) -> Any:
    """Whether a kernel computes an activation, too; a bool or an array like `blocked`.

    Args:
        op_type: of the activation.
        lead: operator of the kernel. A BatchNormalization behind no convolution becomes one in the blocked layout.
        blocked: the kernel runs in the blocked layout; a bool or an array.
        after_sum: a residual sum stands between the two.
    """
    plain = lead == "Conv" and op_type in _PLAIN_ACTIVATIONS
    return np.where(blocked, not (after_sum and op_type in _FUSED_EARLIER), plain)


def _step(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> Step:
    read = [
        (index, value)
        for index, value in enumerate(node.inputs)
        if value is not None and not value.is_initializer() and not (index and node.op_type in _WEIGHTED)
    ]
    names = tuple(_name(value) for _, value in read)
    maker = read[0][1].producer() if read else None
    return Step(
        node.op_type,
        _name(node.outputs[0]),
        names,
        shares=_shares(node, names, shapes),
        behind_weights=maker is not None and maker.op_type in _WEIGHTED,
        turned_in=tuple(_turns(value.producer(), (0, 3, 1, 2)) for _, value in read),
        turned_out=_turns(node, (0, 2, 3, 1)),
    )


def _shares(node: ir.Node, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if not names or len(shapes.get(names[0], ())) != 4:
        return False
    if node.op_type == "Concat":
        return node.attributes.get_int("axis", 0) == 1
    if node.op_type in ("Add", "Mul"):  # a product is x * sigmoid(x)
        return len(names) == len(node.inputs) == 2 and shapes[names[0]] == shapes[names[1]]
    return node.op_type in _POOLS | _WEIGHTED | _FUSED_EARLIER | _KEEP


def _state(step: Step, widths: Widths, blocked: Mapping[str, np.ndarray]) -> Any:
    never = np.False_
    first = blocked.get(step.inputs[0], never)
    if step.op_type == "Conv":
        return convolves_blocked(*widths.per_group(step))
    if step.op_type in _POOLS:
        whole = np.asarray(widths.channels(step.inputs[0])) % BLOCK == 0
        return whole if step.op_type in _MAKING_POOLS else whole & first
    if step.op_type in _FUSED_EARLIER:
        return first & step.behind_weights
    if step.op_type == "Concat":
        whole = [np.asarray(widths.channels(name)) % BLOCK == 0 for name in step.inputs]
        return functools.reduce(np.logical_and, [*whole, *(blocked.get(name, never) for name in step.inputs)])
    if step.op_type in ("Add", "Mul"):
        return first & blocked.get(step.inputs[1], never)
    return first


def _turns(node: ir.Node | None, perm: tuple[int, ...]) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and tuple(node.attributes.get_ints("perm", ())) == perm
    )


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""
