"""Small networks of the kinds that runtimes fuse differently, with random weights."""

from __future__ import annotations

import numpy as np
from builders import node, program_from_nodes


class Builder:
    """Adds nodes one behind the other; `value` is the last result."""

    def __init__(self, shape):
        self.shape, self.nodes, self.weights = shape, [], {}
        self.rng = np.random.default_rng(0)
        self.value = "x"

    def weight(self, name, *dims):
        fan_in = max(1, int(np.prod(dims[1:])))
        self.weights[name] = (self.rng.standard_normal(dims) / fan_in**0.5).astype(np.float32)
        return name

    def constant(self, name, value):
        self.weights[name] = np.asarray(value)
        return name

    def op(self, op_type, *inputs, name=None, outputs=None, **attributes):
        name = name or f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(node(op_type, list(inputs) or [self.value], outputs or [name], name, **attributes))
        self.value = name
        return name

    def conv(self, x, cin, cout, k=3, name="conv", group=1, stride=1, bias=True):
        inputs = [x, self.weight(f"{name}.w", cout, cin // group, k, k)]
        inputs += [self.weight(f"{name}.b", cout)] if bias else []
        return self.op("Conv", *inputs, name=name, pads=[k // 2] * 4, group=group, strides=[stride] * 2)

    def norm(self, x, channels, name):
        for part in ("gamma", "beta", "mean", "var"):
            self.weights[f"{name}.{part}"] = (0.5 + self.rng.random(channels)).astype(np.float32)
        return self.op(
            "BatchNormalization", x, *(f"{name}.{p}" for p in ("gamma", "beta", "mean", "var")), name=name
        )

    def program(self, output=None):
        """With a free batch whose reference is the first dimension."""
        dims = {"x": ["N", *self.shape[1:]]}
        size = {"N": self.shape[0]}
        return program_from_nodes(self.nodes, dims, [output or self.value], self.weights, reference=size)


def residual(side=32, width=64, batch=1):
    """Convolution, BatchNormalization, Relu, a residual block with a convolution on its shortcut, and a plain one."""
    b = Builder((batch, 3, side, side))
    b.op("Relu", b.norm(b.conv("x", 3, width, name="stem", bias=False), width, "stem.bn"), name="stem.relu")
    x = b.value
    down = b.norm(b.conv(x, width, 2 * width, 1, "down", stride=2, bias=False), 2 * width, "down.bn")
    y = b.op(
        "Relu", b.norm(b.conv(x, width, 2 * width, name="a1", stride=2), 2 * width, "a1.bn"), name="a1.relu"
    )
    y = b.norm(b.conv(y, 2 * width, 2 * width, name="a2", bias=False), 2 * width, "a2.bn")
    x = b.op("Relu", b.op("Add", y, down, name="a.add"), name="a.relu")
    y = b.op("Relu", b.norm(b.conv(x, 2 * width, 2 * width, name="b1"), 2 * width, "b1.bn"), name="b1.relu")
    y = b.norm(b.conv(y, 2 * width, 2 * width, name="b2"), 2 * width, "b2.bn")
    b.op("Relu", b.op("Add", y, x, name="b.add"), name="b.relu")
    b.op("GlobalAveragePool", name="pool")
    return b.program()


def squeezed(side=32, width=64, batch=1):
    """An inverted residual: expansion, depthwise, both with SiLU, a squeeze-and-excite gate, projection, sum."""
    b = Builder((batch, 3, side, side))

    def silu(x, name):
        gate = b.op("Sigmoid", x, name=f"{name}.gate")
        return b.op("Mul", x, gate, name=name)

    stem = silu(b.norm(b.conv("x", 3, width, name="stem", bias=False), width, "stem.bn"), "stem.silu")
    wide = 4 * width
    y = silu(b.norm(b.conv(stem, width, wide, 1, "expand", bias=False), wide, "expand.bn"), "expand.silu")
    y = silu(b.norm(b.conv(y, wide, wide, 3, "dw", group=wide, bias=False), wide, "dw.bn"), "dw.silu")
    pooled = b.op("GlobalAveragePool", y, name="squeeze")
    small = silu(b.conv(pooled, wide, 16, 1, "reduce"), "reduce.silu")
    gate = b.op("Sigmoid", b.conv(small, 16, wide, 1, "excite"), name="excite.gate")
    y = b.op("Mul", y, gate, name="excite.mul")
    y = b.norm(b.conv(y, wide, width, 1, "project", bias=False), width, "project.bn")
    b.op("Add", y, stem, name="sum")
    b.op("HardSwish", b.conv(b.value, width, width, 1, "last"), name="last.act")
    b.op("GlobalAveragePool", name="pool")
    return b.program()


def transformer(tokens=64, width=128, heads=4, batch=1):
    """LayerNormalization, attention, sum, LayerNormalization, a perceptron with Gelu, sum."""
    b = Builder((batch, tokens, width))
    size = width // heads

    def norm(x, name):
        self_weights = (
            b.constant(f"{name}.g", np.full(width, 0.9, np.float32)),
            b.weight(f"{name}.b", width),
        )
        return b.op("LayerNormalization", x, *self_weights, name=name, axis=-1)

    def linear(x, cin, cout, name):
        y = b.op("MatMul", x, b.weight(f"{name}.w", cin, cout), name=f"{name}.mm")
        return b.op("Add", y, b.weight(f"{name}.b", cout), name=name)

    h = norm("x", "norm1")
    b.constant("split_heads", np.array([0, 0, heads, size]))
    b.constant("merged", np.array([0, 0, width]))
    b.constant("scale", np.asarray(size**-0.5, np.float32))

    def head(name, perm):
        part = b.op("Reshape", linear(h, width, width, name), "split_heads", name=f"{name}.heads")
        return b.op("Transpose", part, name=f"{name}.t", perm=perm)

    q, k, v = head("q", [0, 2, 1, 3]), head("k", [0, 2, 3, 1]), head("v", [0, 2, 1, 3])
    q = b.op("Mul", q, "scale", name="q.scaled")
    weights = b.op("Softmax", b.op("MatMul", q, k, name="scores"), name="softmax", axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", weights, v, name="mix"), name="mix.t", perm=[0, 2, 1, 3])
    y = linear(b.op("Reshape", mixed, "merged", name="merge"), width, width, "out")
    x = b.op("Add", "x", y, name="sum1")
    y = b.op("Gelu", linear(norm(x, "norm2"), width, 4 * width, "up"), name="gelu")
    b.op("Add", x, linear(y, 4 * width, width, "down"), name="sum2")
    return b.program()


def dense(side=32, width=64, batch=1):
    """Concatenations with BatchNormalization and Relu in front of every convolution."""
    b = Builder((batch, 3, side, side))
    x = b.conv("x", 3, width, name="stem")
    channels = width
    for i in range(2):
        y = b.op("Relu", b.norm(x, channels, f"first{i}"), name=f"r{i}")
        y = b.op("Relu", b.norm(b.conv(y, channels, width, 1, f"in{i}"), width, f"second{i}"), name=f"s{i}")
        y = b.conv(y, width, width, 3, f"out{i}")
        x = b.op("Concat", x, y, name=f"cat{i}", axis=1)
        channels += width
    b.op("Relu", b.norm(x, channels, "last"), name="last.relu")
    b.op("GlobalAveragePool", name="pool")
    return b.program()


NETWORKS = {"residual": residual, "squeezed": squeezed, "transformer": transformer, "dense": dense}
