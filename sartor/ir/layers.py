"""Layers of a chain: a contraction with what normalises and activates its result, and whether it can go alone.

Residual blocks are listed by `sartor.ir.blocks`; a layer inside one is not listed here, because the block goes as a
whole. What a layer is followed by may be absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from sartor.ir.blocks import residual_blocks
from sartor.ir.cleanup import array_of
from sartor.ir.program import Program

ACTIVATIONS = frozenset(
    """Relu Clip LeakyRelu PRelu Elu Celu Selu Gelu HardSwish Mish Tanh Sigmoid HardSigmoid Softplus
    ThresholdedRelu""".split()
)
"""Operators that act on every number by itself; a slope of PRelu may differ between channels."""
_GATES = frozenset({"Sigmoid", "HardSigmoid"})
_IDEMPOTENT = frozenset({"Relu", "Clip"})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer; all fields are names of the main graph.

    Attributes:
        name: of the contraction.
        input: the value that enters.
        output: the value that leaves.
        nodes: contraction, BatchNormalization, activation, as far as they are there.
        removable: whether `output` can be replaced by `input`: both have the same shape.
        reason: why not; empty when removable.
        last_affine: initializers that make the result of contraction and norm 0 when they are.
    """

    name: str
    input: str
    output: str
    nodes: tuple[str, ...]
    removable: bool
    reason: str
    last_affine: tuple[str, ...]


def chain_layers(program: Program) -> tuple[Layer, ...]:
    """All layers of the main graph that are in no residual block, in graph order.

    Raises:
        ModelError: shapes cannot be inferred.
    """
    inside = {name for block in residual_blocks(program) for name in block.nodes}
    return tuple(
        _layer(program, node)
        for node in program.nodes()
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.domain == ""
        and node.name not in inside
        and array_of(node, 1) is not None
        and node.inputs[0] is not None
        and node.inputs[0].const_value is None
    )


def _layer(program: Program, node: ir.Node) -> Layer:
    nodes = [node]
    if (norm := _only_reader(nodes[-1])) is not None and norm.op_type == "BatchNormalization":
        nodes.append(norm)
    affine = nodes[-1]
    if (act := _only_reader(nodes[-1])) is not None and act.op_type in ACTIVATIONS and act.domain == "":
        nodes.append(act)
    shapes = program.shapes()
    entry, end = node.inputs[0], nodes[-1].outputs[0]
    assert entry is not None
    before, after = shapes[entry.name or ""], shapes[end.name or ""]
    reason = ""
    if end.is_graph_output():
        reason = "its result is a graph output"
    elif before != after:
        reason = f"it makes shape {list(after)} of {list(before)}"
    inputs = affine.inputs[1:3]
    return Layer(
        name=node.name or "",
        input=entry.name or "",
        output=end.name or "",
        nodes=tuple(one.name or "" for one in nodes),
        removable=not reason,
        reason=reason,
        last_affine=tuple(v.name or "" for v in inputs if v is not None and v.is_initializer()),
    )


def activated(value: ir.Value) -> ir.Value:
    """The value behind its one activation, where applying that twice is as once; else itself."""
    users = {user for user, _ in value.uses()}
    if len(users) == 1 and not value.is_graph_output():
        (user,) = users
        if user.op_type in _IDEMPOTENT and user.inputs[0] is value and not user.domain:
            return user.outputs[0]
    return value


def activation_before(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """What an activation function made a value of, and its nodes, last first; None where none made it.

    x · Sigmoid(x) is one, too.
    """
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in ACTIVATIONS and node.inputs[0] is not None:
        return node.inputs[0], (node,)
    if node.op_type == "Mul":
        for x, gate in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            maker = gate.producer() if gate is not None else None
            if maker is None or x is None or maker.op_type not in _GATES or maker.inputs[0] is not x:
                continue
            if read_by(maker.outputs[0], (node,)):
                return x, (node, maker)
    return None


def activation_behind(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """What the activation function makes that alone reads a value, and its nodes, last first; None without."""
    for node in dict.fromkeys(user for user, _ in value.uses()):
        found = activation_before(node.outputs[0]) if len(node.outputs) == 1 else None
        if found is not None and found[0] is value and read_by(value, found[1]):
            return node.outputs[0], found[1]
    return None


def read_by(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether nothing but some nodes of its own graph reads a value."""
    users = {user for user, _ in value.uses()}
    return not value.is_graph_output() and users <= set(nodes) and all(n.graph is value.graph for n in users)


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads the result of another, at its first input."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0][1] != 0:
        return None
    return uses[0][0] if uses[0][0].graph is output.graph else None


def connecting(program: Program, node: ir.Node) -> tuple[np.ndarray | None, str]:
    """The kernel of the 1 × 1 convolution that can stand for a convolution, or why there is none.

    Its weights are the sums over the taps: on a map that changes slowly it computes the same.
    """
    weight = array_of(node, 1)
    if node.op_type != "Conv" or weight is None or weight.ndim < 3:
        return None, "it is no convolution"
    if all(taps == 1 for taps in weight.shape[2:]):
        return None, "its kernel has one tap already"
    shapes = program.shapes()
    before, after = (
        shapes[value.name or ""] for value in (node.inputs[0], node.outputs[0]) if value is not None
    )
    strides = node.attributes.get_ints("strides", ()) or [1] * (weight.ndim - 2)
    found = [(length - 1) // stride + 1 for length, stride in zip(before[2:], strides, strict=True)]
    if tuple(found) != tuple(after[2:]):
        return None, f"a kernel of one tap would give a map of {found}, not {list(after[2:])}"
    total = weight.sum(axis=tuple(range(2, weight.ndim)), dtype=np.float64).astype(weight.dtype)
    return total.reshape(*total.shape, *[1] * (weight.ndim - 2)), ""
