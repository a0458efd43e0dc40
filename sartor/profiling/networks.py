"""Generated whole networks, for fitting and testing what kernels alone cannot show.

They are made of the blocks that published networks are made of, with random depths, widths (also next to a
multiple of the channel grid) and resolutions, and none of them *is* a published network: errors on those are
measured elsewhere, on networks that no profile has seen.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sartor.cost_models.model_builder import ModelBuilder
from sartor.cost_models.samples import kernels_of
from sartor.cost_models.signatures import Signature
from sartor.errors import UsageError
from sartor.ir.fusion_rules import GENERIC, FusionRules
from sartor.profiling.design import width

_MOST_PARAMETERS, _MOST_MACS = 12_000_000, 2.5e9
_ACTIVATIONS = ("Relu", "Relu", "Relu6", "Silu", "HardSwish")


def names(seed: int) -> Iterator[str]:
    """Endless names, the kinds in turn; of every two rounds, one is held out (`is_heldout`)."""
    number = 0
    while True:
        for kind in KINDS:
            yield f"{kind}-{seed}-{number}"
        number += 1


def is_heldout(name: str) -> bool:
    """Half of the networks of every kind."""
    return int(name.rpartition("-")[2]) % 2 == 1


def network(name: str) -> bytes:
    """The serialized ONNX model of that name; equal names give equal bytes.

    Raises:
        UsageError: `name` is none of `names`.
    """
    kind = name.partition("-")[0]
    if kind not in KINDS:
        raise UsageError(f"There is no network '{name}'; kinds are {', '.join(KINDS)}.")
    for attempt in range(100):
        rng = random.Random(f"{name}/{attempt}")
        net = _Net(rng, rng.choice([64, 96, 112, 128, 160, 192, 224]))
        KINDS[kind](net)
        if net.parameters <= _MOST_PARAMETERS and net.macs <= _MOST_MACS:
            break
    return net.finish()


def described(
    model: bytes, rules: FusionRules = GENERIC
) -> tuple[list[tuple[Signature, tuple[float, ...], int]], float]:
    """The kernels that a network has, and the bytes of its weights.

    Args:
        model: serialized ONNX.
        rules: what the target runs as one kernel.
    """
    from sartor.ir.channels import channel_groups
    from sartor.ir.load import load
    from sartor.ir.workload import build_workload

    with tempfile.TemporaryDirectory(prefix="sartor-network-") as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(model)
        program = load(path)
    workload = build_workload(program, channel_groups(program).extents, rules=rules)
    kernels, _ = kernels_of(workload)
    return kernels, float(workload.evaluate().weight_bytes)


class _Net:
    """A network that grows from its input; `shape` is that of `value`."""

    def __init__(self, rng: random.Random, edge: int):
        self.rng = rng
        self.model = ModelBuilder()
        self.value = self.model.input("image", (1, 3, edge, edge))
        self.shape: tuple[int, ...] = (1, 3, edge, edge)
        self.parameters, self.macs = 0, 0.0
        self._number = 0
        self.activation = rng.choice(_ACTIVATIONS)

    def weight(self, dims: tuple[int, ...], fan_in: int) -> str:
        self._number += 1
        self.parameters += math.prod(dims)
        return self.model.weight(f"w{self._number}", dims, fan_in)

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        self.value = self.model.node(op_type, inputs, attributes)
        return self.value

    def conv(
        self, c_out: int, kernel: int = 3, stride: int = 1, group: int = 1, act: str | None = None
    ) -> str:
        """A padded convolution with its bias, and its activation."""
        c_in, edge = self.shape[1], self.shape[2]
        pad = 0 if kernel == stride else kernel // 2
        inputs = [
            self.value,
            self.weight((c_out, c_in // group, kernel, kernel), c_in // group * kernel * kernel),
            self.weight((c_out,), 1),
        ]
        self.node("Conv", inputs, strides=[stride] * 2, pads=[pad] * 4, group=group)
        out = (edge + 2 * pad - kernel) // stride + 1
        self.shape = (1, c_out, out, out)
        self.macs += math.prod(self.shape) * c_in // group * kernel * kernel
        return self.act(act) if act else self.value

    def act(self, kind: str) -> str:
        if kind == "Relu6":
            self._number += 1
            bounds = [
                self.model.constant(f"{b}{self._number}", v, "FLOAT") for b, v in (("a", 0.0), ("b", 6.0))
            ]
            return self.node("Clip", [self.value, *bounds])
        if kind == "Silu":
            source = self.value
            return self.node("Mul", [source, self.node("Sigmoid", [source])])
        return self.node(kind, [self.value])

    def add(self, other: str) -> str:
        return self.node("Add", [self.value, other])

    def pool(self, kind: str = "MaxPool") -> str:
        edge = (self.shape[2] + 2 - 3) // 2 + 1
        self.node(kind, [self.value], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        self.shape = (1, self.shape[1], edge, edge)
        return self.value

    def gate(self, reduced: int) -> str:
        """Squeeze and excitation."""
        source, shape = self.value, self.shape
        self.node("GlobalAveragePool", [source])
        self.shape = (1, shape[1], 1, 1)
        self.conv(reduced, 1, act="Relu")
        self.conv(shape[1], 1, act=self.rng.choice(["Sigmoid", "HardSigmoid"]))
        self.shape = shape
        return self.node("Mul", [source, self.value])

    def matmul(self, n: int) -> str:
        k = self.shape[-1]
        self.node("MatMul", [self.value, self.weight((k, n), k)])
        self.shape = (*self.shape[:-1], n)
        return self.node("Add", [self.value, self.weight((n,), 1)])

    def norm(self) -> str:
        c = self.shape[-1]
        return self.node(
            "LayerNormalization", [self.value, self.weight((c,), 1), self.weight((c,), 1)], axis=-1
        )

    def batch_norm(self) -> str:
        c = self.shape[1]
        return self.node("BatchNormalization", [self.value, *(self.weight((c,), 1) for _ in range(4))])

    def head(self) -> None:
        """Global average and classifier."""
        if self.shape[2] > 1:
            self.node("GlobalAveragePool", [self.value])
        c, classes = self.shape[1], self.rng.choice([10, 100, 1000])
        self.node("Flatten", [self.value], axis=1)
        self.node("Gemm", [self.value, self.weight((classes, c), c), self.weight((classes,), 1)], transB=1)

    def finish(self) -> bytes:
        return self.model.finish()


def _stem(net: _Net, most: int = 64) -> None:
    kernel, stride = net.rng.choice([(3, 1), (3, 2), (3, 2), (5, 2), (7, 2)])
    if net.shape[2] > 128 and stride == 1:
        stride = 2
    net.conv(width(net.rng, 16, most), kernel, stride, act=net.activation)
    if net.shape[2] > 64 and net.rng.random() < 0.5:
        net.pool()


def _stages(net: _Net, most: int) -> Iterator[tuple[int, int]]:
    """(width, stride) per block, in stages that halve the map and widen it."""
    c = max(net.shape[1], 8)
    for _ in range(net.rng.randint(3, 4)):
        c = min(most, round(c * net.rng.uniform(1.3, 2.4)))
        chosen = width(net.rng, max(4, int(c * 0.8)), max(8, int(c * 1.2)))
        for block in range(net.rng.randint(1, 4)):
            yield chosen, 2 if block == 0 and net.shape[2] > 4 else 1


def _plain(net: _Net) -> None:
    _stem(net)
    for c, stride in _stages(net, 512):
        net.conv(c, net.rng.choice([1, 3, 3, 3, 5]), 1, act=net.activation)
        if stride == 2:
            net.pool(net.rng.choice(["MaxPool", "MaxPool", "AveragePool"]))
    net.head()


def _join(net: _Net, source: str, shape: tuple[int, ...], stride: int) -> None:
    """Add what a block began with, brought to the block's shape by a convolution where it differs."""
    branch, after = net.value, net.shape
    if after != shape:
        net.value, net.shape = source, shape
        source = net.conv(after[1], 1, stride)
    net.value, net.shape = branch, after
    net.add(source)
    net.act(net.activation)


def _residual(net: _Net) -> None:
    _stem(net)
    deep = net.rng.random() < 0.5
    for c, stride in _stages(net, 512):
        source, shape = net.value, net.shape
        inner = max(4, c // 4) if deep else c
        if deep:
            net.conv(inner, 1, act=net.activation)
        net.conv(inner, 3, stride, act=net.activation)
        net.conv(c, 1 if deep else 3)
        _join(net, source, shape, stride)
    net.head()


def _inverted(net: _Net) -> None:
    """Inverted residuals with depthwise convolutions, some of them with squeeze and excitation."""
    _stem(net, 32)
    gated = net.rng.random() < 0.5
    for c, stride in _stages(net, 200):
        source, shape = net.value, net.shape
        inner = width(net.rng, shape[1] * 2, shape[1] * 6)
        net.conv(inner, 1, act=net.activation)
        net.conv(inner, net.rng.choice([3, 3, 5]), stride, group=inner, act=net.activation)
        if gated:
            net.gate(max(4, inner // net.rng.choice([4, 16])))
        net.conv(c, 1)
        if net.shape == shape:
            net.add(source)
    net.conv(width(net.rng, 128, 1280), 1, act=net.activation)
    net.head()


def _grouped(net: _Net) -> None:
    _stem(net)
    groups = net.rng.choice([2, 4, 8, 16, 32])
    for c, stride in _stages(net, 1024):
        source, shape = net.value, net.shape
        inner = groups * max(1, round(c * net.rng.choice([0.5, 0.5, 1]) / groups))
        net.conv(inner, 1, act=net.activation)
        net.conv(inner, 3, stride, group=groups, act=net.activation)
        net.conv(c, 1)
        _join(net, source, shape, stride)
    net.head()


def _dense(net: _Net) -> None:
    """Every layer reads what all before it made; its normalization comes first and does not fold away."""
    _stem(net)
    growth = width(net.rng, 8, 40)
    for stage in range(net.rng.randint(2, 4)):
        for _ in range(net.rng.randint(2, 6)):
            source, shape = net.value, net.shape
            net.batch_norm()
            net.act("Relu")
            net.conv(min(4 * growth, 128), 1, act="Relu")
            net.conv(growth, 3)
            net.node("Concat", [source, net.value], axis=1)
            net.shape = (1, shape[1] + growth, *shape[2:])
        if stage < 3 and net.shape[2] > 4:
            net.conv(max(8, net.shape[1] // 2), 1, act="Relu")
            net.pool("AveragePool")
    net.head()


def _vit(net: _Net) -> None:
    patch = 16 if net.shape[2] % 16 == 0 else 8
    heads = net.rng.choice([2, 3, 4, 6, 8])
    d = 8 * net.rng.randint(3, 8)
    c = heads * d
    net.conv(c, patch, patch)
    tokens = net.shape[2] ** 2
    number = net.model.constant("tokens", [1, c, tokens], "INT64")
    net.node("Reshape", [net.value, number])
    net.node("Transpose", [net.value], perm=[0, 2, 1])
    net.shape = (1, tokens, c)
    split = net.model.constant("heads", [1, tokens, heads, d], "INT64")
    joined = net.model.constant("joined", [1, tokens, c], "INT64")
    scale = net.model.constant("scale", d**-0.5, "FLOAT")
    for _ in range(net.rng.randint(2, 6)):
        source = net.value
        normed = net.norm()
        parts = []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            net.value, net.shape = normed, (1, tokens, c)
            net.node("Reshape", [net.matmul(c), split])
            parts.append(net.node("Transpose", [net.value], perm=perm))
        net.node("Mul", [net.node("MatMul", parts[:2]), scale])
        net.node("MatMul", [net.node("Softmax", [net.value], axis=-1), parts[2]])
        net.node("Reshape", [net.node("Transpose", [net.value], perm=[0, 2, 1, 3]), joined])
        net.shape = (1, tokens, c)
        net.matmul(c)
        source = net.add(source)
        net.norm()
        net.matmul(width(net.rng, 2 * c, 4 * c))
        net.node("Gelu", [net.value])
        net.matmul(c)
        net.add(source)
    net.norm()
    net.node("Transpose", [net.value], perm=[0, 2, 1])
    net.shape = (1, c, tokens)
    net.head()


KINDS = {
    "plain": _plain,
    "residual": _residual,
    "inverted": _inverted,
    "grouped": _grouped,
    "dense": _dense,
    "vit": _vit,
}
"""What builds a network of each kind."""
