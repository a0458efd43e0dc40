"""Convolutions cut into groups: which weights stay, and in which order channels come for that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.cleanup import array_of
from sartor.ir.layers import activation_before, activation_behind, read_by
from sartor.ir.program import Program
from sartor.passes.fused import constants, is_depthwise
from sartor.passes.rewriter import Rewriter

_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_STARTS, _ROUNDS = 8, 20
"""Orders that the search for two at once starts from, and its steps from each."""

Along = list[tuple[ir.Value, int]]
"""Initializers and the axis of each along which a channel order runs."""


def unsuitable(node: ir.Node, groups: int) -> str:
    """Why a convolution cannot be cut into so many groups; empty where it can."""
    weight = array_of(node, 1)
    if weight is None or not constants(node, (1, 2)) or any(len(v.uses()) > 1 for v in _own(node)):
        return "its weight or bias is computed, or read by other nodes"
    if node.attributes.get_int("group", 1) != 1:
        return "it is grouped"
    if max(weight.shape[2:]) < 2:
        return f"its kernel is {' x '.join(map(str, weight.shape[2:]))}"
    if weight.shape[0] % groups or weight.shape[1] % groups:
        return (
            f"its {weight.shape[1]} inputs and {weight.shape[0]} outputs do not divide into {groups} groups"
        )
    return ""


def group(program: Program, chosen: Mapping[str, int], rewriter: Rewriter) -> None:
    """Cut convolutions of `program` into groups, in place and in graph order.

    Raises:
        PlanError: a convolution does not exist, or cannot be cut so.
    """
    nodes = {node.name: node for node in program.nodes() if node.op_type == "Conv" and not node.domain}
    for name, count in chosen.items():
        node = nodes.get(name)
        reason = unsuitable(node, count) if node is not None else "this program has no such convolution"
        if reason:
            raise PlanError(f"The plan cuts '{name}' into {count} groups, which is not possible: {reason}.")
    for node in nodes.values():
        groups = chosen.get(node.name or "")
        if groups is not None:
            _cut(node, groups, rewriter)
            rewriter.count("layers_grouped")
    if chosen:
        program.invalidate()


def _cut(node: ir.Node, groups: int, rewriter: Rewriter) -> None:
    weight = array_of(node, 1)
    assert weight is not None
    before, behind = channels_before(node), channels_behind(node)
    outputs, inputs = orders(energies(weight), groups, inputs=before is not None, outputs=behind is not None)
    for along, order in ((before, inputs), (behind, outputs)):
        for value, axis in along or ():
            assert value.const_value is not None
            rewriter.set_initializer(value, np.take(value.const_value.numpy(), order, axis))
    own = _own(node)
    rewriter.set_initializer(own[0], diagonal(weight[outputs][:, inputs], groups))
    for bias in own[1:]:
        assert bias.const_value is not None
        rewriter.set_initializer(bias, bias.const_value.numpy()[outputs])
    rewriter.set_attribute(node, "group", groups)


def diagonal(weight: np.ndarray, groups: int) -> np.ndarray:
    """The blocks that stay, as ONNX stores a grouped kernel: `[out, in / groups, ...]`."""
    parts = [
        rows[:, part]
        for rows, part in zip(
            np.split(weight, groups), np.split(np.arange(weight.shape[1]), groups), strict=True
        )
    ]
    return np.concatenate(parts)


def energies(weight: np.ndarray) -> np.ndarray:
    """Sums of squares over the taps, `[out, in]`."""
    found: np.ndarray = (weight.astype(np.float64) ** 2).reshape(*weight.shape[:2], -1).sum(axis=2)
    return found


# ---- orders --------------------------------------------------------------------------------------
def orders(energy: np.ndarray, groups: int, *, inputs: bool, outputs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Orders of outputs and inputs in which the diagonal blocks keep much of the energy, and never less than as it is.

    Args:
        energy: `[out, in]`.
        groups: number of blocks; divides both.
        inputs: whether inputs may come in another order.
        outputs: whether outputs may.

    Returns:
        For each new position the old one.
    """
    out, into = (np.repeat(np.arange(groups), length // groups) for length in energy.shape)
    best, most = (out, into), _inside(energy, out, into)
    for start in range(_STARTS if inputs and outputs else 1):
        generator = np.random.default_rng(start)
        rows, columns = (
            (out, into) if start == 0 else (generator.permutation(out), generator.permutation(into))
        )
        for _ in range(_ROUNDS if inputs and outputs else 1):
            before = rows, columns
            if inputs:
                columns = _balanced(_gains(energy.T, rows, groups))
            if outputs:
                rows = _balanced(_gains(energy, columns, groups))
            found = _inside(energy, rows, columns)
            if found > most * (1 + 1e-12):
                best, most = (rows, columns), found
            if (rows == before[0]).all() and (columns == before[1]).all():
                break
    return np.argsort(best[0], kind="stable"), np.argsort(best[1], kind="stable")


def _inside(energy: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """The energy within blocks."""
    return float(energy[rows[:, None] == columns[None, :]].sum())


def _gains(energy: np.ndarray, other: np.ndarray, groups: int) -> np.ndarray:
    """What each channel keeps in each group, `[channels, groups]`."""
    return np.stack([energy[:, other == number].sum(axis=1) for number in range(groups)], axis=1)


def _balanced(gains: np.ndarray) -> np.ndarray:
    """A group for every channel, the same number in each: who would lose most by its second choice comes first."""
    channels, groups = gains.shape
    room = np.full(groups, channels // groups)
    chosen = np.full(channels, -1)
    while (chosen < 0).any():
        left = np.flatnonzero(chosen < 0)
        open_gains = np.where(room > 0, gains[left], -np.inf)
        ranked = np.sort(open_gains, axis=1)
        regret = ranked[:, -1] - ranked[:, -2] if (room > 0).sum() > 1 else ranked[:, -1]
        wanted = open_gains.argmax(axis=1)
        for index in np.argsort(-regret, kind="stable"):
            chosen[left[index]] = wanted[index]
            room[wanted[index]] -= 1
            if room[wanted[index]] == 0:
                break  # the others choose again
    return chosen


# ---- neighbours ----------------------------------------------------------------------------------
def channels_before(node: ir.Node) -> Along | None:
    """What has to follow when the inputs of a convolution come in another order; None where more would have to.

    Back to the convolution that makes them, through norms, activations, pools and depthwise convolutions.
    """
    along: Along = []
    value = node.inputs[0]
    readers: tuple[ir.Node, ...] = (node,)
    while value is not None and read_by(value, readers):
        maker = value.producer()
        activation = activation_before(value)
        if activation is not None and activation[1][0].op_type != "PRelu":
            value, readers = activation[0], activation[1]
            continue
        if maker is None or maker.domain:
            return None
        if _makes_channels(maker):
            return along + [(one, 0) for one in _own(maker)]
        found = _passed(maker)
        if found is None:
            return None
        along += found
        value, readers = maker.inputs[0], (maker,)
    return None


def channels_behind(node: ir.Node) -> Along | None:
    """As `channels_before`, for the outputs: on to the convolution that alone reads them."""
    along: Along = []
    value = node.outputs[0]
    while True:
        activation = activation_behind(value)
        if activation is not None and activation[1][0].op_type != "PRelu":
            value = activation[0]
            continue
        users = {user for user, _ in value.uses()}
        if len(users) != 1 or not read_by(value, users):
            return None
        (user,) = users
        if user.domain or user.inputs[0] is not value or len(value.uses()) > 1:
            return None
        if _makes_channels(user):
            return [*along, (_own(user)[0], 1)]
        found = _passed(user)
        if found is None:
            return None
        along += found
        value = user.outputs[0]


def _makes_channels(node: ir.Node) -> bool:
    """Whether a node is a regular convolution whose own weights take any order of channels."""
    return (
        node.op_type == "Conv"
        and node.attributes.get_int("group", 1) == 1
        and constants(node, (1, 2))
        and all(len(value.uses()) == 1 for value in _own(node))
    )


def _passed(node: ir.Node) -> Along | None:
    """Parameters per channel of a node that keeps channels apart; None where it does not, or they are not its own."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if node.op_type in _POOLS:
        return []
    values = [value for value in node.inputs[1:] if value is not None]
    depthwise = is_depthwise(node) and node.attributes.get_int("group", 1) == array_of(node, 1).shape[0]  # type: ignore[union-attr]
    if not depthwise and node.op_type != "BatchNormalization":
        return None
    if not constants(node, range(1, len(node.inputs))) or any(len(value.uses()) > 1 for value in values):
        return None
    return [(value, 0) for value in values]


def _own(node: ir.Node) -> list[ir.Value]:
    """Weight and bias of a convolution."""
    return [value for value in node.inputs[1:3] if value is not None]
