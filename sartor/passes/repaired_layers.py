"""Layers that sum over fewer inputs than they did, and how each can be given other weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sartor.ir.cleanup import array_of
from sartor.ir.program import Program
from sartor.passes.base import Context
from sartor.passes.reconstruction import Window
from sartor.passes.slices import kept_slices

_FEATURES = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1, "GRU": -1, "LSTM": -1, "RNN": -1}
"""Operators that sum over features, and along which axis of their first operand these lie."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer to repair.

    Attributes:
        name: of the node.
        weight: name of its initializer.
        matrix: its weight as `[outputs, features]`, float64.
        transposed: whether features come first where it is stored.
        shape: as it is stored.
        bias: what it adds by itself; 0 without.
        rows: which of the original's outputs are left.
        window: of a convolution.
        constant: name of the initializer that takes the constant part, or empty.
        sign: +1 for a bias, −1 for a running mean.
    """

    name: str
    weight: str
    matrix: np.ndarray
    transposed: bool
    shape: tuple[int, ...]
    bias: np.ndarray
    rows: np.ndarray
    window: Window | None
    constant: str
    sign: float

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix as the initializer has it."""
        return (matrix.T if self.transposed else matrix).reshape(self.shape)


def affected(program: Program, original: Program) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Nodes that sum over other features than in the original, fewer or made otherwise, and what they were.

    In execution order. Features are others behind everything that was removed, narrowed or replaced.
    """
    nodes = {node.name: node for node in original.graph.all_nodes()}
    shapes, before = program.shapes(), original.shapes()
    others: set[str] = set()
    for node in program.graph.all_nodes():
        twin = nodes.get(node.name)
        if twin is None or twin.op_type != node.op_type or node.domain != twin.domain:
            others.update(output.name or "" for output in node.outputs)
            continue
        pairs = list(itertools.zip_longest(_names(node), _names(twin)))
        entering = {now for now, then in pairs if now != then or now in others}
        resized = any(shapes.get(now) != before.get(now) for now, _ in pairs)
        if entering or resized:
            others.update(output.name or "" for output in node.outputs)
        if pairs and pairs[0][0] in entering and sums_over_weights(node):
            yield node, twin


def _names(node: ir.Node) -> list[str]:
    return [value.name or "" if value is not None else "" for value in node.inputs]


def sums_over_weights(node: ir.Node) -> bool:
    """Whether what a node makes are sums over features, by weights of its own."""
    if node.domain or node.op_type not in _FEATURES:
        return False
    # without weights a MatMul is an attention's product
    return node.op_type != "MatMul" or _weight(node)[0].is_initializer()


def layer_of(
    program: Program, original: Program, node: ir.Node, before: ir.Node, context: Context
) -> Layer | str:
    """A layer as it is repaired, or why it stays."""
    reason = _unsuitable(program, node, context)
    if reason:
        return reason
    (value, transposed), (old, was_transposed) = _weight(node), _weight(before)
    if not old.is_initializer() or old.const_value is None or value.const_value is None:
        return "the original's weight is computed"
    weight, whole = value.const_value.numpy(), old.const_value.numpy()
    if _elsewhere(program, original, node, before):
        return "its results lie at other places than the original's"
    straight, unfolded = (
        array.T if flipped else array for array, flipped in ((weight, transposed), (whole, was_transposed))
    )
    slices = kept_slices(*(array.reshape(*array.shape[:2], -1) for array in (unfolded, straight)))
    if isinstance(slices, str):
        return slices
    constant, sign = _constant(node, len(straight), context)
    own = array_of(node, 2) if node.op_type != "MatMul" else None
    return Layer(
        name=node.name or "",
        weight=value.name or "",
        matrix=straight.reshape(len(straight), -1).astype(np.float64),
        transposed=transposed,
        shape=weight.shape,
        bias=np.zeros(()) if own is None else own.astype(np.float64).reshape(-1),
        rows=slices[0],
        window=Window.of(node, weight.shape[2:]) if node.op_type == "Conv" else None,
        constant=constant,
        sign=sign,
    )


def _weight(node: ir.Node) -> tuple[ir.Value, bool]:
    """The value that holds the weight, itself or behind a Transpose, and whether features come first there."""
    value = node.inputs[1]
    assert value is not None
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    maker = value.producer()
    if (
        maker is not None
        and maker.op_type == "Transpose"
        and node.op_type != "Conv"
        and len(value.uses()) == 1
    ):
        inside = maker.inputs[0]
        if inside is not None and inside.is_initializer() and len(inside.shape or ()) == 2:
            return inside, not transposed
    return value, transposed


def _unsuitable(program: Program, node: ir.Node, context: Context) -> str:
    """Why a layer that was narrowed stays as it is; empty where it need not."""
    if node.graph is not program.graph:
        return "it lies in a body of If"
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"it is a {node.op_type}; only Conv, Gemm and MatMul are repaired"
    attributes = node.attributes
    if attributes.get_int("group", 1) != 1:
        return "it is grouped: its outputs go with its inputs"
    weight, _ = _weight(node)
    if not _private(weight):
        return "its weight is computed, or read by other nodes"
    rank = len(weight.shape or ())
    if node.op_type == "Conv" and rank > 4:
        return f"its kernel has {rank - 2} axes"
    if node.op_type != "Conv" and rank != 2:
        return f"its weight has {rank} axes, expected 2"
    if attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "it pads by itself (auto_pad)"
    if node.op_type == "Gemm" and (
        attributes.get_int("transA", 0) == 1 or attributes.get_float("alpha", 1.0) != 1.0
    ):
        return "it transposes or scales its operands"
    if node.op_type == "Gemm" and attributes.get_float("beta", 1.0) != 1.0:
        return "it scales its bias"
    bias = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    if bias is not None and (array_of(node, 2) is None or len(bias.shape or ()) > 1):
        return "its bias is computed, or no vector"
    kept = next((n for n in (node.name, weight.name) if n and context.is_kept(n)), None)
    return f"'{kept}' is kept" if kept else ""


def _elsewhere(program: Program, original: Program, node: ir.Node, before: ir.Node) -> bool:
    """Whether results have another shape than the original's, channels aside."""
    axis = _FEATURES[node.op_type]
    now, then = (
        list(one.shapes()[value.outputs[0].name or ""])
        for one, value in ((program, node), (original, before))
    )
    if len(now) != len(then):
        return True
    now[axis] = then[axis] = 0
    return now != then


def _constant(node: ir.Node, outputs: int, context: Context) -> tuple[str, float]:
    """The initializer that can take a constant part of the result, and its sign; empty without."""
    found: ir.Value | None = None
    sign = 1.0
    if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
        found = node.inputs[2]
    else:
        output = node.outputs[0]
        users = list(output.uses())
        if len(users) == 1 and not output.is_graph_output() and users[0][0].graph is node.graph:
            user, index = users[0]
            if user.op_type == "Add" and node.op_type == "MatMul" and not user.domain:
                found = user.inputs[1 - index]
            elif (
                user.op_type == "BatchNormalization"
                and node.op_type != "MatMul"
                and not user.attributes.get_int("training_mode", 0)
            ):
                found, sign = user.inputs[3], -1.0
    if found is None or not _private(found) or context.is_kept(found.name or ""):
        return "", 1.0
    assert found.const_value is not None
    # one number behind a MatMul is part of a formula in the twin, which could not be changed as it runs
    alike = tuple(found.const_value.shape.numpy()) == (outputs,) and (outputs > 1 or node.op_type != "MatMul")
    return (found.name or "", sign) if alike else ("", 1.0)


def _private(value: ir.Value | None) -> bool:
    """Whether a value is a constant initializer that one node reads."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and not value.is_graph_input()
        and not value.is_graph_output()
        and len(value.uses()) == 1
    )
