"""Generated whole networks, for fitting and testing what kernels alone cannot show.

They are made of the blocks that published networks are made of, with random depths, resolutions and widths: half of
the networks have widths as designers choose them, and most kinds repeat blocks as they do; half have widths as pruning
leaves them, also next to a multiple of the channel grid. None of them *is* a published network: errors on those are
measured elsewhere, on networks that no profile has seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from sartor.errors import UsageError
from sartor.profiling.attention import vit
from sartor.profiling.network_builder import Net

_MOST_PARAMETERS, _MOST_MACS = 12_000_000, 2.5e9
_DEPTHS = (1, 2, 2, 3, 4, 6)
_LARGE = {"heavy": 100_000_000, "broad": 40_000_000, "vit": 40_000_000, "windows": 40_000_000}
"""Kinds with more parameters: what weights cost that no cache holds."""


def names(seed: int) -> Iterator[str]:
    """Endless names, the kinds in turn."""
    number = 0
    while True:
        for kind in KINDS:
            yield f"{kind}-{seed}-{number}"
        number += 1


def anchors(seed: int) -> tuple[str, ...]:
    """Networks of several kinds that are timed several times while a profile is built.

    What others take is told in units of them, so they have to be known better than others.
    """
    return tuple(f"{kind}-{seed}-0" for kind in ("dense", "grouped", "inverted", "plain"))


def role_of(name: str) -> str:
    """What a network is for.

    A fifth of every kind is held out.
    """
    kind, _, number = name.partition("-")[0], *name.rpartition("-")[1:]
    return "heldout" if (int(number) + list(KINDS).index(kind)) % 5 == 1 else "fit"


def network(name: str) -> bytes:
    """The serialized ONNX model of that name; equal names give equal bytes.

    Raises:
        UsageError: `name` is none of `names`.
    """
    kind = name.partition("-")[0]
    if kind not in KINDS:
        raise UsageError(f"There is no network '{name}'; kinds are {', '.join(KINDS)}.")
    number = int(name.rpartition("-")[2])
    for attempt in range(100):
        rng = random.Random(f"{name}/{attempt}")
        edge = rng.choice([64, 96, 112, 128, 160, 192, 224])
        net = Net(rng, edge, exported=number % 2 == 1, designed=number % 4 > 1)
        KINDS[kind](net)
        if net.parameters <= _LARGE.get(kind, _MOST_PARAMETERS) and net.macs <= _MOST_MACS:
            break
    return net.finish()


def _stem(net: Net, most: int = 64) -> None:
    kernel, stride = net.rng.choice([(3, 1), (3, 2), (3, 2), (5, 2), (7, 2)])
    if net.shape[2] > 128 and stride == 1:
        stride = 2
    net.conv(net.width(16, most), kernel, stride, act=net.activation)
    if net.shape[2] > 64 and net.rng.random() < 0.5:
        net.pool()


def _stages(net: Net, most: int) -> Iterator[tuple[int, int]]:
    """(width, stride) per block, in stages that halve the map and widen it."""
    c = max(net.shape[1], 8)
    for _ in range(net.rng.randint(3, 4)):
        c = min(most, round(c * net.rng.uniform(1.3, 2.4)))
        chosen = net.width(max(4, int(c * 0.8)), max(8, int(c * 1.2)))
        for block in range(net.rng.choice(_DEPTHS)):
            yield chosen, 2 if block == 0 and net.shape[2] > 4 else 1


def _plain(net: Net) -> None:
    _stem(net)
    for c, stride in _stages(net, 512):
        net.conv(c, net.rng.choice([1, 3, 3, 3, 5]), 1, act=net.activation)
        if stride == 2:
            net.pool(net.rng.choice(["MaxPool", "MaxPool", "AveragePool"]))
    net.head()


def _join(net: Net, source: str, shape: tuple[int, ...], stride: int) -> None:
    """Add what a block began with, brought to the block's shape by a convolution where it differs."""
    branch, after = net.value, net.shape
    if after != shape:
        net.value, net.shape = source, shape
        source = net.conv(after[1], 1, stride)
    net.value, net.shape = branch, after
    net.add(source)
    net.act(net.activation)


def _residual(net: Net) -> None:
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


def _inverted(net: Net) -> None:
    """Inverted residuals with depthwise convolutions, some of them with squeeze and excitation."""
    _stem(net, 32)
    gated = net.rng.random() < 0.5
    before: tuple[int, ...] = ()
    for c, stride in _stages(net, 200):
        source, shape = net.value, net.shape
        if not net.designed or shape != before:
            inner, window = net.width(shape[1] * 2, shape[1] * 6), net.rng.choice([3, 3, 5])
        before = shape
        net.conv(inner, 1, act=net.activation)
        net.conv(inner, window, stride, group=inner, act=net.activation)
        if gated:
            net.gate(max(4, inner // net.rng.choice([4, 16])))
        net.conv(c, 1)
        if net.shape == shape:
            net.add(source)
    net.conv(net.width(128, 1280), 1, act=net.activation)
    net.head()


def _grouped(net: Net) -> None:
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


def _dense(net: Net) -> None:
    """Every layer reads what all before it made; its normalization comes first and does not fold away."""
    _stem(net)
    growth = net.width(8, 40)
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


def _branches(net: Net) -> None:
    """Blocks of several branches that are joined: small windows, long ones, a pooling."""
    _stem(net)
    for stage in range(net.rng.randint(2, 4)):
        for _ in range(net.rng.randint(1, 3)):
            source, shape = net.value, net.shape
            parts = []
            for kind in net.rng.sample(["point", "window", "double", "long", "pool"], net.rng.randint(2, 4)):
                net.at(source, shape)
                c = net.width(16, 64 << stage)
                if kind == "pool":
                    net.node("AveragePool", [net.value], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
                net.conv(c, 1, act=net.activation)
                if kind == "long":
                    for window in ((1, 7), (7, 1)):
                        net.conv_of(c, window, act=net.activation)
                for _ in range({"window": 1, "double": 2}.get(kind, 0)):
                    c = net.width(16, 64 << stage)
                    net.conv(c, net.rng.choice([3, 3, 5]), act=net.activation)
                parts.append((net.value, net.shape[1]))
            net.concat(parts)
        if net.shape[2] > 4:
            net.pool("MaxPool")
    net.head()


def _large_windows(net: Net) -> None:
    """Depthwise convolutions with large windows, then layers on channels that come last."""
    c = net.width(*net.rng.choice([(16, 128), (64, 128)]))
    patch = net.rng.choice([2, 4])
    net.conv(c, patch, patch)
    by_place = net.rng.random() < 0.5
    norm = net.norm_of_channels if by_place else net.batch_norm
    if by_place:
        norm()
    for stage in range(net.rng.randint(2, 4)):
        if stage and net.shape[2] > 4:
            norm()
            c = net.width(c, 2 * c)
            net.conv(c, 2, 2)
        for block in range(net.rng.choice(_DEPTHS)):
            source, shape = net.value, net.shape
            if not net.designed or not block:
                window, hidden = net.rng.choice([5, 7]), net.width(2 * c, 4 * c)
            net.conv(c, window, group=c)
            net.transpose((0, 2, 3, 1))
            net.norm()
            net.matmul(hidden)
            net.node("Gelu", [net.value])
            net.matmul(c)
            net.node("Mul", [net.value, net.weight((c,), 1)])
            net.transpose((0, 3, 1, 2))
            net.at(net.value, shape)
            net.add(source)
    net.head()


def _shuffled(net: Net) -> None:
    """Halves of the channels, one of them through a depthwise bottleneck; then both are interleaved."""
    _stem(net, 32)
    for half_width, stride in _stages(net, 256):
        if stride == 2:
            net.conv(2 * half_width, 3, 2, act="Relu")
        shape = net.shape
        half = shape[1] // 2
        left, right = net.halves()
        net.at(right, (1, half, *shape[2:]))
        net.conv(half, 1, act="Relu")
        net.conv(half, 3, group=half)
        net.conv(half, 1, act="Relu")
        net.concat([(left, half), (net.value, half)])
        height, across = net.shape[2:]
        net.reshape((1, 2, half, height, across))
        net.transpose((0, 2, 1, 3, 4))
        net.reshape((1, 2 * half, height, across))
    net.head()


def _heavy(net: Net) -> None:
    """A few convolutions, then fully connected layers that no cache holds."""
    _stem(net)
    for c, stride in _stages(net, 384):
        net.conv(c, 3, 1, act="Relu")
        if stride == 2:
            net.pool("MaxPool")
    while net.shape[2] > 7:
        net.pool("MaxPool")
    net.node("Flatten", [net.value], axis=1)
    net.shape = (1, net.shape[1] * net.shape[2] ** 2)
    for _ in range(net.rng.randint(1, 2)):
        net.dense(net.width(*net.rng.choice([(256, 1024), (1024, 4608)])), act="Relu")
    net.dense(net.rng.choice([10, 100, 1000]))


def _broad(net: Net) -> None:
    """Bottlenecks so wide that their weights fill the caches."""
    _stem(net)
    c = 0
    for stage in range(4):
        c = min(2048, net.width(128, 256) if not stage else net.width(round(1.6 * c), 2 * c))
        inner = max(8, c // net.rng.choice([2, 4, 4]))
        for block in range(net.rng.randint(1, 3)):
            source, shape = net.value, net.shape
            stride = 2 if stage and not block and net.shape[2] > 4 else 1
            net.conv(inner, 1, act="Relu")
            net.conv(inner, 3, stride, act="Relu")
            net.conv(c, 1)
            _join(net, source, shape, stride)
    net.head()


def _narrow(net: Net) -> None:
    """Few channels on large maps: what is left of networks that were pruned far, and modules that make half of their
    channels by depthwise convolutions.
    """
    c = net.width(3, 16)
    net.conv(c, 3, 2, act=net.activation)
    for _ in range(net.rng.randint(3, 5)):
        for _ in range(net.rng.randint(1, 3)):
            source, shape = net.value, net.shape
            halves = []
            for out in (net.width(2, 4 * c), c):
                half = max(1, out // 2)
                net.conv(half, 1, act=net.activation)
                halves = [(net.value, half)]
                net.conv(half, net.rng.choice([3, 5]), group=half, act=net.activation)
                halves.append((net.value, half))
                net.concat(halves)
            if net.shape == shape:
                net.add(source)
        if net.shape[2] > 4:
            net.conv(net.shape[1], 3, 2, group=net.shape[1])
        c = net.width(c, 2 * c)
        net.conv(c, 1)
    net.head()


KINDS = {
    "plain": _plain,
    "residual": _residual,
    "inverted": _inverted,
    "grouped": _grouped,
    "dense": _dense,
    "vit": vit,
    "branches": _branches,
    "windows": _large_windows,
    "shuffled": _shuffled,
    "heavy": _heavy,
    "broad": _broad,
    "narrow": _narrow,
}
"""What builds a network of each kind."""
