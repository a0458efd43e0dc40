"""Models of the blocks that networks are made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sartor.conformance.draft import Draft
from sartor.conformance.models import ALL, HALF, Model, declare

if TYPE_CHECKING:
    import onnx

MODELS: list[Model] = []


def conv_norm(draft: Draft, x: str, c_in: int, c_out: int, kernel: int, **attributes: Any) -> str:
    """Convolution, padded to keep the size, and BatchNormalization; int8 models come folded."""
    y = draft.conv(x, c_in, c_out, (kernel, kernel), pads=[kernel // 2] * 4, **attributes)
    if draft.precision == "int8":
        return y
    statistics = (draft.positive(c_out), draft.weight(c_out), draft.weight(c_out), draft.positive(c_out))
    return draft.node("BatchNormalization", y, *statistics)


def clipped(draft: Draft, x: str) -> str:
    """ReLU6."""
    return draft.node("Clip", x, draft.constant(0.0), draft.constant(6.0))


def residual(draft: Draft, x: str, c_in: int, c_out: int, stride: int = 1) -> str:
    """Two convolutions and a skip connection, projected where the shape changes."""
    y = draft.node("Relu", conv_norm(draft, x, c_in, c_out, 3, strides=[stride, stride]))
    y = conv_norm(draft, y, c_out, c_out, 3)
    same = stride == 1 and c_in == c_out
    skip = x if same else conv_norm(draft, x, c_in, c_out, 1, strides=[stride, stride])
    return draft.node("Relu", draft.add(y, skip))


def inverted_residual(draft: Draft, x: str, c_in: int, hidden: int, c_out: int, stride: int = 1) -> str:
    """Expansion, depthwise convolution, linear projection, and a skip connection where the shape stays."""
    y = clipped(draft, conv_norm(draft, x, c_in, hidden, 1))
    y = clipped(draft, conv_norm(draft, y, hidden, hidden, 3, group=hidden, strides=[stride, stride]))
    y = conv_norm(draft, y, hidden, c_out, 1)
    return draft.add(x, y) if stride == 1 and c_in == c_out else y


def normalized(draft: Draft, x: str, width: int) -> str:
    """LayerNormalization over the last axis."""
    return draft.node("LayerNormalization", x, draft.positive(width), draft.weight(width), axis=-1)


def self_attention(draft: Draft, x: str, tokens: int, width: int, heads: int) -> str:
    """Multi-head attention on `[N, tokens, width]`, written as matrix products."""
    size = width // heads

    def heads_of(perm: list[int], bias: bool = True) -> str:
        y = draft.linear(x, width, width, bias)
        y = draft.node("Reshape", y, draft.ints(0, tokens, heads, size))
        return draft.node("Transpose", y, perm=perm)

    queries, values = heads_of([0, 2, 1, 3]), heads_of([0, 2, 1, 3])
    keys = heads_of([0, 2, 3, 1], bias=False)  # a bias of keys adds the same to every score: Softmax drops it
    scores = draft.node("Mul", draft.node("MatMul", queries, keys), draft.constant(1 / math.sqrt(size)))
    mixed = draft.node("MatMul", draft.node("Softmax", scores, axis=-1), values)
    mixed = draft.node("Transpose", mixed, perm=[0, 2, 1, 3])
    return draft.linear(draft.node("Reshape", mixed, draft.ints(0, tokens, width)), width, width)


def transformer(draft: Draft, x: str, tokens: int, width: int, heads: int, hidden: int) -> str:
    """Attention and MLP, each after a norm and beside a skip connection."""
    x = draft.node("Add", x, self_attention(draft, normalized(draft, x, width), tokens, width, heads))
    y = draft.linear(normalized(draft, x, width), width, hidden)
    return draft.node("Add", x, draft.linear(draft.node("Gelu", y), hidden, width))


@declare(MODELS, "block", ALL)
def residual_block(draft: Draft) -> None:
    """Residual block that keeps its shape, after a convolution."""
    x = draft.node("Relu", conv_norm(draft, draft.input("x", "N", 3, 9, 7), 3, 6, 3))
    draft.output(residual(draft, x, 6, 6), "y")


@declare(MODELS, "block", ALL)
def mobilenet_block(draft: Draft) -> None:
    """Inverted residual with ReLU6 and a depthwise convolution."""
    x = conv_norm(draft, draft.input("x", "N", 3, 8, 7), 3, 4, 3)
    draft.output(inverted_residual(draft, x, 4, 10, 4), "y")


@declare(MODELS, "block")
def squeeze_excite(draft: Draft) -> None:
    """Channels weighted by a gate that sees their means."""
    x = draft.conv(draft.input("x", "N", 3, 6, 7), 3, 8, pads=[1, 1, 1, 1])
    gate = draft.node("Relu", draft.conv(draft.node("GlobalAveragePool", x), 8, 6, (1, 1)))
    draft.output(draft.node("Mul", x, draft.node("Sigmoid", draft.conv(gate, 6, 8, (1, 1)))), "y")


@declare(MODELS, "block", HALF)
def attention_block(draft: Draft) -> None:
    """Multi-head attention with a norm before it and a skip connection."""
    x = draft.input("x", "N", 7, 12)
    y = self_attention(draft, normalized(draft, x, 12), 7, 12, 3)
    draft.output(draft.node("Add", x, y), "y")


@declare(MODELS, "block", HALF)
def gated_mlp(draft: Draft) -> None:
    """Two linear layers, one gating the other, and a third."""
    x = draft.input("x", "N", 5, 10)
    gate = draft.linear(x, 10, 14, bias=False)
    gate = draft.node("Mul", gate, draft.node("Sigmoid", gate))
    y = draft.node("Mul", gate, draft.linear(x, 10, 14, bias=False))
    draft.output(draft.linear(y, 14, 10), "y")


@declare(MODELS, "control flow")
def branches(draft: Draft) -> None:
    """`If` on an input: one of two convolutions."""
    x, flag = draft.input("x", "N", 3, 6, 5), draft.input("flag", 1, dtype="bool")
    weights = [(draft.weight(4, 3, 3, 3, fan_in=27), draft.weight(4)) for _ in range(2)]

    def branch(name: str, index: int) -> onnx.GraphProto:
        from onnx import TensorProto, helper

        node = helper.make_node(
            "Conv", [x, *weights[index]], [f"{name}_y"], name=f"conv_{name}", pads=[1, 1, 1, 1]
        )
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [info])

    choice = draft.node("If", flag, then_branch=branch("then", 0), else_branch=branch("else", 1))
    draft.output(draft.node("Relu", choice), "y")
