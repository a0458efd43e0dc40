"""Networks built node by node whose widths are named groups, with the extents of every value."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from sartor.ir.extents import Extent
from sartor.ir.program import Program, Source

Dim = "int | tuple[str, int]"


@dataclasses.dataclass(frozen=True)
class FakeBlock:
    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Net:
    """Adds nodes; a channel count is `("group", size)`. `kept[group]` narrows the group for real."""

    def __init__(self, shape: tuple[int, ...], kept: Mapping[str, int] | None = None, zeros: bool = False):
        self.kept = dict(kept or {})
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.extents: dict[str, tuple[Extent, ...]] = {}
        self.spatial: dict[str, tuple[int, ...]] = {}
        self.channels: dict[str, Dim] = {}
        self.shape = shape
        self.channels["x"], self.spatial["x"] = shape[1], tuple(shape[2:])
        self.label("x", shape)
        self.rng = np.random.default_rng(0)
        self.zeros = zeros

    def size(self, dim: Dim) -> int:
        return dim if isinstance(dim, int) else self.kept.get(dim[0], dim[1])

    def label(self, name: str, dims: tuple[Dim, ...]) -> None:
        self.extents[name] = tuple(
            Extent.constant(d) if isinstance(d, int) else Extent(((float(d[1]), (d[0],)),)) for d in dims
        )

    def weight(self, name: str, dims: tuple[Dim, ...]) -> str:
        shape = tuple(self.size(d) for d in dims)
        make = np.zeros if self.zeros else self.rng.random
        self.weights[name] = np.asarray(make(shape), np.float32)
        self.label(name, dims)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = value
        return name

    def node(self, op: str, inputs: list[str], output: str, channels: Dim, spatial: tuple[int, ...], **attrs):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"n_{output}", **attrs))
        self.channels[output], self.spatial[output] = channels, spatial
        self.label(output, (self.shape[0], channels, *spatial))
        return output

    def conv(self, x: str, out: Dim, k: int, name: str, stride: int = 1, depthwise: bool = False, pad=None):
        pad = k // 2 if pad is None else pad
        cin = self.channels[x]
        w = self.weight(f"{name}.weight", (out, 1 if depthwise else cin, k, k))
        spatial = tuple((s + 2 * pad - k) // stride + 1 for s in self.spatial[x])
        group = self.size(out) if depthwise else 1
        attrs = {"strides": [stride] * 2, "pads": [pad] * 4, "group": group}
        return self.node("Conv", [x, w], name, out, spatial, **attrs)

    def bn(self, x: str, name: str) -> str:
        c = self.channels[x]
        names = [self.weight(f"{name}.{s}", (c,)) for s in ("weight", "bias", "mean", "var")]
        return self.node("BatchNormalization", [x, *names], name, c, self.spatial[x])

    def unary(self, op: str, x: str, name: str, *extra: str, **attrs) -> str:
        return self.node(op, [x, *extra], name, self.channels[x], self.spatial[x], **attrs)

    def add(self, a: str, b: str, name: str) -> str:
        return self.node("Add", [a, b], name, self.channels[a], self.spatial[a])

    def max_pool(self, x: str, name: str, k: int = 3, stride: int = 2, pad: int = 1) -> str:
        spatial = tuple((s + 2 * pad - k) // stride + 1 for s in self.spatial[x])
        attrs = {"kernel_shape": [k] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self.node("MaxPool", [x], name, self.channels[x], spatial, **attrs)

    def head(self, x: str, classes: int) -> str:
        self.node("GlobalAveragePool", [x], "gap", self.channels[x], (1,) * len(self.spatial[x]))
        self.node("Flatten", ["gap"], "flat", self.channels[x], ())
        w = self.weight("fc.weight", (classes, self.channels[x]))
        b = self.weight("fc.bias", (classes,))
        return self.node("Gemm", ["flat", w, b], "logits", classes, (), transB=1)

    def program(self, outputs: tuple[str, ...]) -> Program:
        return make_program(self.nodes, {"x": self.shape}, outputs, self.weights)


def make_program(nodes, inputs, outputs, weights, types=None) -> Program:
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()]
    outs = [helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), None) for n in outputs]
    constants = [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()]
    graph = helper.make_graph(list(nodes), "main", infos, outs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    shapes = {name: tuple(shape) for name, shape in inputs.items()}
    return Program(ir.from_proto(model), source=Source("onnx", "net.onnx", digest), input_shapes=shapes)


def resnet50() -> Net:
    net = Net((1, 3, 224, 224), zeros=True)
    x = net.unary("Relu", net.bn(net.conv("x", 64, 7, "stem", 2), "stem.bn"), "stem.relu")
    x = net.max_pool(x, "pool")
    for stage, (width, repeats, stride) in enumerate([(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]):
        for i in range(repeats):
            name, skip = f"s{stage}.{i}", x
            y = net.unary("Relu", net.bn(net.conv(x, width, 1, f"{name}.c1"), f"{name}.b1"), f"{name}.r1")
            step = stride if i == 0 else 1
            y = net.bn(net.conv(y, width, 3, f"{name}.c2", step), f"{name}.b2")
            y = net.unary("Relu", y, f"{name}.r2")
            y = net.bn(net.conv(y, 4 * width, 1, f"{name}.c3"), f"{name}.b3")
            if i == 0:
                skip = net.bn(net.conv(x, 4 * width, 1, f"{name}.down", step, pad=0), f"{name}.downbn")
            x = net.unary("Relu", net.add(y, skip, f"{name}.add"), f"{name}.r3")
    net.head(x, 1000)
    return net


def mobilenet_v2() -> Net:
    net = Net((1, 3, 224, 224), zeros=True)
    low, high = np.float32(0), np.float32(6)
    net.constant("low", np.asarray(low)), net.constant("high", np.asarray(high))

    def act(x: str, name: str) -> str:
        return net.unary("Clip", x, name, "low", "high")

    x = act(net.bn(net.conv("x", 32, 3, "stem", 2), "stem.bn"), "stem.act")
    settings = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for stage, (t, c, n, s) in enumerate([*settings, (6, 320, 1, 1)]):
        for i in range(n):
            name, skip, cin = f"s{stage}.{i}", x, net.channels[x]
            if t > 1:
                x = act(net.bn(net.conv(x, t * cin, 1, f"{name}.e"), f"{name}.eb"), f"{name}.ea")
            step = s if i == 0 else 1
            y = net.conv(x, t * cin, 3, f"{name}.d", step, depthwise=True)
            x = act(net.bn(y, f"{name}.db"), f"{name}.da")
            x = net.bn(net.conv(x, c, 1, f"{name}.p"), f"{name}.pb")
            if step == 1 and cin == c:
                x = net.add(skip, x, f"{name}.add")
    x = act(net.bn(net.conv(x, 1280, 1, "last"), "last.bn"), "last.act")
    net.head(x, 1000)
    return net


def residual(
    kept: Mapping[str, int] | None = None,
    skip_blocks: tuple[int, ...] = (),
    shape: tuple[int, ...] = (2, 3, 16, 16),
) -> Net:
    """Stem, three basic residual blocks (the second one strided), a depthwise block, head.

    `skip_blocks` builds the network without those residual blocks.
    """
    net = Net(shape, kept)
    a, b, e = ("a", 16), ("b", 24), ("e", 40)
    x = net.unary("Relu", net.bn(net.conv("x", a, 3, "stem"), "stem.bn"), "stem.relu")
    stages = [(("m0", 16), a, 1), (("m1", 24), b, 2), (("m2", 24), b, 1)]
    for index, (inner, out, stride) in enumerate(stages):
        if index in skip_blocks:
            x = net.unary("Relu", x, f"b{index}.out")
            continue
        y = net.conv(x, inner, 3, f"b{index}.c1", stride)
        y = net.unary("Relu", net.bn(y, f"b{index}.b1"), f"b{index}.r1")
        y = net.bn(net.conv(y, out, 3, f"b{index}.c2"), f"b{index}.b2")
        shortcut = x
        if net.channels[x] != out:
            shortcut = net.bn(net.conv(x, out, 1, f"b{index}.down", stride), f"b{index}.downbn")
        x = net.unary("Relu", net.add(y, shortcut, f"b{index}.add"), f"b{index}.out")
    y = net.unary("Relu", net.conv(x, e, 1, "dw.expand"), "dw.relu1")
    y = net.unary("Relu", net.conv(y, e, 3, "dw.depth", depthwise=True), "dw.relu2")
    x = net.add(net.conv(y, b, 1, "dw.project"), x, "dw.add")
    net.head(net.max_pool(x, "pool"), 10)
    return net


def residual_blocks() -> tuple[FakeBlock, ...]:
    def block(index: int, source: str) -> FakeBlock:
        parts = ("c1", "b1", "r1", "c2", "b2", "add")
        return FakeBlock(
            f"block{index}", tuple(f"n_b{index}.{p}" for p in parts), (source,), (f"b{index}.add",)
        )

    return block(0, "stem.relu"), block(2, "b1.out")
