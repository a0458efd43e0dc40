"""Which activations ONNX Runtime keeps in its blocked layout (NCHWc), where alone a sum runs inside a convolution.

A value that is made in the layout and read outside it is copied, and the other way round: kernels that no node of the
program names. Follows `onnxruntime/core/optimizer/nchwc_transformer.cc`: convolutions of suitable widths make the
layout; poolings, sums, concatenations and activations of blocked values hand it on.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sartor.ir.program import Program

_ALIGNMENT = 4
"""Channels that a value needs to be reordered at all."""
_BLOCK = 16
"""Floats of one block where the vectors have 512 bits; grouped convolutions need whole blocks per group."""
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
_WEIGHTED = frozenset({"Conv", "BatchNormalization"})
_KEEP = frozenset({"Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu"})
_FUSED_EARLIER = frozenset({"Clip", "LeakyRelu"})
"""Fused into a convolution before layouts are chosen, and unknown afterwards: behind a sum or a pooling they are
computed in the plain layout."""
_PLAIN_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})


def blocked_values(program: Program) -> frozenset[str]:
    """Names of the activations in the blocked layout, at the widths before any pruning."""
    shapes = program.shapes()
    blocked: set[str] = set()
    for node in program.nodes():
        if node.outputs and _is_blocked(node, shapes, blocked):
            blocked.add(node.outputs[0].name or "")
    return frozenset(blocked)


def takes_activation(op_type: str, *, blocked: bool, after_sum: bool) -> bool:
    """Whether a convolution's kernel computes an activation, too.

    Args:
        op_type: of the activation.
        blocked: the convolution runs in the blocked layout.
        after_sum: a residual sum stands between the two.
    """
    if blocked:
        return not (after_sum and op_type in _FUSED_EARLIER)
    return op_type in _PLAIN_ACTIVATIONS


def layout_changes(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the values that the runtime copies into the layout, and of those that it copies out of it.

    A Transpose between channels first and last that stands beside a copy is part of it.
    """
    shapes, blocked = program.shapes(), blocked_values(program)
    into: dict[str, None] = {}
    out: dict[str, None] = {}
    for node in program.nodes():
        inside = bool(node.outputs) and node.outputs[0].name in blocked
        for index, value in enumerate(node.inputs):
            if value is None or value.is_initializer() or (index and node.op_type in _WEIGHTED):
                continue
            name = value.name or ""
            # A convolution of few channels reads them as they are, side by side.
            plain = node.op_type == "Conv" and index == 0 and shapes[name][1] < _BLOCK
            if name in blocked and (not inside or plain):
                if not _turns(node, (0, 2, 3, 1)):
                    out[name] = None
            elif name not in blocked and inside and not plain and not _turns(value.producer(), (0, 3, 1, 2)):
                into[name] = None
    out.update((v.name or "", None) for v in program.graph.outputs if v.name in blocked)
    return tuple(into), tuple(out)


def _turns(node: ir.Node | None, perm: tuple[int, ...]) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and tuple(node.attributes.get_ints("perm", ())) == perm
    )


def _is_blocked(node: ir.Node, shapes: Mapping[str, tuple[int, ...]], blocked: set[str]) -> bool:
    inputs = [value.name or "" for value in node.inputs if value is not None]
    if node.op_type == "Conv":
        return _convolution(shapes[inputs[0]], shapes[inputs[1]], node)
    if node.op_type == "BatchNormalization":
        return inputs[0] in blocked
    if node.op_type in _POOLS:
        shape = shapes[inputs[0]]
        return len(shape) == 4 and shape[1] % _BLOCK == 0
    if node.op_type in _FUSED_EARLIER:
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        return inputs[0] in blocked and maker is not None and maker.op_type in _WEIGHTED
    if node.op_type == "Concat":
        axis = node.attributes.get_int("axis", 0)
        return axis == 1 and all(v in blocked and shapes[v][1] % _BLOCK == 0 for v in inputs)
    if node.op_type == "Add":
        same = len(inputs) == 2 and shapes[inputs[0]] == shapes[inputs[1]]
        return same and all(v in blocked for v in inputs)
    if node.op_type == "Mul":  # x * sigmoid(x)
        gated = len(inputs) == 2 and shapes[inputs[0]] == shapes[inputs[1]]
        return gated and all(v in blocked for v in inputs)
    return node.op_type in _KEEP and inputs[0] in blocked


def _convolution(x: tuple[int, ...], w: tuple[int, ...], node: ir.Node) -> bool:
    if len(x) != 4:
        return False
    group = node.attributes.get_int("group", 1)
    channels, out = x[1], w[0]
    if group == 1:  # other output channels are filled up
        return channels < _BLOCK or channels % _ALIGNMENT == 0
    if group == channels and group == out:
        return out % _ALIGNMENT == 0
    return (channels // group) % _BLOCK == 0 and (out // group) % _BLOCK == 0
