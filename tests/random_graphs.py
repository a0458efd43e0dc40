"""Small random networks from the operator table, with parameters that preserve variance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.ir.channels import ChannelAnalysis
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import (
    BATCH_SYMBOL,
    CANONICAL_IR_VERSION,
    CANONICAL_OPSET,
    DIALECT_DOMAIN,
    Batch,
    Program,
    Source,
)


class Net:
    """Builds a Program node by node: every method adds nodes and returns the name of their output.

    Shapes are tracked at batch 2, the batch axis of the input is symbolic, and every parameter is random.
    """

    def __init__(self, *shape: int, seed: int = 0, fixed_batch: bool = False):
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"x": (2, *shape)}
        self.inputs: dict[str, tuple[int, ...]] = {"x": (2, *shape)}
        self.generator = np.random.default_rng(seed)
        self.symbolic = not fixed_batch

    # ---- parameters ------------------------------------------------------------------------
    def constant(self, values: object, name: str = "") -> str:
        """An integer constant."""
        return self._add(np.array(values, np.int64), name or "c")

    def weight(self, *shape: int, name: str = "w", fan_in: int | None = None) -> str:
        """Weights ~ N(0, 2 / fan_in)."""
        fan = fan_in or int(np.prod(shape[1:]))
        return self._add(self.generator.standard_normal(shape) * np.sqrt(2.0 / max(fan, 1)), name)

    def scale(self, *shape: int, name: str = "g") -> str:
        """Positive values around one."""
        return self._add(self.generator.uniform(0.5, 1.5, shape), name)

    def shift(self, *shape: int, name: str = "b") -> str:
        """Values ~ N(0, 0.3)."""
        return self._add(self.generator.standard_normal(shape) * 0.3, name)

    def _add(self, array: np.ndarray, name: str) -> str:
        unique, number = name, 1
        while unique in self.arrays:
            number += 1
            unique = f"{name}{number}"
        self.arrays[unique] = array if array.dtype == np.int64 else array.astype(np.float32)
        return unique

    # ---- nodes -----------------------------------------------------------------------------
    def op(self, op_type: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: object):
        """One node; returns its output's name, or all names for several outputs."""
        base = name or f"{op_type.lower()}_{len(self.nodes)}"
        names = [base] if outputs == 1 else [f"{base}_{i}" for i in range(outputs)]
        item = helper.make_node(op_type, list(inputs), names, name=f"node_{base}", **attributes)
        self.nodes.append(item)
        self._infer(item)
        return names[0] if outputs == 1 else names

    def shape(self, value: str) -> tuple[int, ...]:
        """Shape at batch 2."""
        return self.shapes[value] if value in self.shapes else self.arrays[value].shape

    def _infer(self, item: onnx.NodeProto) -> None:
        infos = []
        constants = []
        for name in dict.fromkeys(item.input):
            if name in self.arrays:
                constants.append(onnx.numpy_helper.from_array(self.arrays[name], name))
            elif name:
                infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name]))
        graph = helper.make_graph([item], "one", infos, [], constants)
        opsets = [helper.make_opsetid("", CANONICAL_OPSET), helper.make_opsetid(DIALECT_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=CANONICAL_IR_VERSION)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for info in inferred.graph.value_info:
            self.shapes[info.name] = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)

    def conv(
        self, x: str, out: int, k: int = 1, *, groups: int = 1, bias: bool = False, w: str = "", **attributes
    ) -> str:
        """A convolution with equal padding over all spatial axes; `w` shares an existing weight."""
        shape = self.shape(x)
        w = w or self.weight(out, shape[1] // groups, *[k] * (len(shape) - 2))
        extra = [self.shift(out)] if bias else []
        attributes.setdefault("pads", [k // 2] * 2 * (len(shape) - 2))
        return self.op("Conv", x, w, *extra, group=groups, **attributes)

    def linear(self, x: str, out: int, *, bias: bool = True) -> str:
        """MatMul over the last axis, then a bias."""
        y = self.op("MatMul", x, self.weight(self.shape(x)[-1], out, fan_in=self.shape(x)[-1]))
        return self.op("Add", y, self.shift(out)) if bias else y

    def gemm(self, x: str, out: int, *, trans: bool = True) -> str:
        """A fully connected layer on [N, C]."""
        features = self.shape(x)[1]
        w = self.weight(*((out, features) if trans else (features, out)), fan_in=features)
        return self.op("Gemm", x, w, self.shift(out), transB=int(trans))

    def batch_norm(self, x: str) -> str:
        """BatchNormalization with random scale, shift and statistics."""
        c = self.shape(x)[1]
        return self.op(
            "BatchNormalization",
            x,
            self.scale(c),
            self.shift(c),
            self.shift(c, name="mean"),
            self.scale(c, name="var"),
        )

    def relu(self, x: str) -> str:
        """Relu."""
        return self.op("Relu", x)

    def reshape(self, x: str, *target: int) -> str:
        """Reshape; 0 copies the batch."""
        return self.op("Reshape", x, self.constant(target))

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        """Slice of one axis."""
        return self.op("Slice", x, self.constant([start]), self.constant([stop]), self.constant([axis]))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Split into parts of the given sizes."""
        return self.op("Split", x, self.constant(sizes), outputs=len(sizes), axis=axis)

    def shuffle(self, x: str, groups: int) -> str:
        """Channel shuffle: reshape, transpose, reshape."""
        _, c, *space = self.shape(x)
        y = self.reshape(x, 0, groups, c // groups, *space)
        y = self.op("Transpose", y, perm=[0, 2, 1, *range(3, 3 + len(space))])
        return self.reshape(y, 0, c, *space)

    def squeeze_excite(self, x: str, hidden: int) -> str:
        """x · sigmoid(conv(relu(conv(pool(x)))))."""
        y = self.op("GlobalAveragePool", x)
        y = self.conv(self.relu(self.conv(y, hidden, bias=True)), self.shape(x)[1], bias=True)
        return self.op("Mul", x, self.op("Sigmoid", y))

    def heads(self, x: str, heads: int, dims: int) -> str:
        """[N, T, heads·dims] → [N, heads, T, dims]."""
        y = self.reshape(x, 0, self.shape(x)[1], heads, dims)
        return self.op("Transpose", y, perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str) -> str:
        """softmax(q·kᵀ) v over [N, heads, T, dims], heads merged again: [N, T, heads·dims]."""
        _, heads, tokens, _ = self.shape(q)
        dims = self.shape(v)[-1]
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.reshape(self.op("Transpose", y, perm=[0, 2, 1, 3]), 0, tokens, heads * dims)

    # ---- the program -----------------------------------------------------------------------
    def program(self, *outputs: str, arrays: Mapping[str, np.ndarray] | None = None) -> Program:
        """The Program, checked by the ONNX checker and strict shape inference."""
        return build(self.nodes, self.inputs, outputs, arrays or self.arrays, symbolic=self.symbolic)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    *,
    symbolic: bool = True,
) -> Program:
    """A Program of `nodes` with reference shapes `inputs`; axis 0 of every input is the batch where asked."""

    def dims(shape: tuple[int, ...]) -> list[int | str]:
        return [BATCH_SYMBOL, *shape[1:]] if symbolic else list(shape)

    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, dims(v)) for k, v in inputs.items()]
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
    graph = helper.make_graph(list(nodes), "main", infos, [], constants)
    opsets = [helper.make_opsetid("", CANONICAL_OPSET), helper.make_opsetid(DIALECT_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=CANONICAL_IR_VERSION)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {info.name: info for info in [*inferred.graph.value_info, *infos]}
    model.graph.output.extend(known[name] for name in outputs)
    onnx.checker.check_model(model)
    batch = Batch(True, tuple(inputs)) if symbolic else Batch(False, reason="built so by the test")
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return Program(
        ir.from_proto(model), source=Source("onnx", "test.onnx", digest), input_shapes=inputs, batch=batch
    )


# ---- random networks -------------------------------------------------------------------------


class _Drawn:
    """Draws a network: a pool of feature maps [2, C, H, W] grows by one operator at a time."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        size = draw(st.sampled_from([4, 6]))
        self.net = Net(3, size, size, seed=draw(st.integers(0, 2**16)))
        self.pool = [self.net.conv("x", self.pick(4, 6, 8), 3, bias=self.flip())]

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def value(self) -> str:
        """A value of the pool, the newest first when shrinking."""
        return self.draw(st.sampled_from(self.pool[::-1]))

    def channels(self, value: str) -> int:
        return self.net.shape(value)[1]

    def divisors(self, *numbers: int) -> list[int]:
        return [d for d in range(1, max(numbers) + 1) if all(n % d == 0 for n in numbers)]

    def step(self) -> None:
        """Adds one random operator that fits; its output joins the pool."""
        name = self.draw(st.sampled_from(IMAGE_STEPS))
        made = getattr(self, f"_{name}")(self.value())
        values = [made] if isinstance(made, str) else made or []
        self.pool += [v for v in values if self.channels(v) <= 48 and min(self.net.shape(v)[2:]) >= 2]

    # ---- operators on feature maps ---------------------------------------------------------
    def _conv(self, x):
        return self.net.conv(x, self.pick(4, 6, 8), self.pick(1, 3), bias=self.flip())

    def _grouped(self, x):
        out = self.pick(4, 6, 8, 12)
        groups = self.pick(*self.divisors(self.channels(x), out))
        return self.net.conv(x, out, self.pick(1, 3), groups=groups, bias=self.flip())

    def _depthwise(self, x):
        c = self.channels(x)
        return self.net.conv(x, c * self.pick(1, 2, 3), 3, groups=c, bias=self.flip())

    def _transposed(self, x):
        c, out = self.channels(x), self.pick(4, 6, 8)
        groups = self.pick(*self.divisors(c, out))
        w = self.net.weight(c, out // groups, 2, 2, fan_in=c // groups)
        extra = [self.net.shift(out)] if self.flip() else []
        y = self.net.op("ConvTranspose", x, w, *extra, group=groups, strides=[2, 2])
        return self.net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])

    def _batch_norm(self, x):
        return self.net.batch_norm(x)

    def _group_norm(self, x):
        c = self.channels(x)
        groups = self.pick(*self.divisors(c))
        return self.net.op("GroupNormalization", x, self.net.scale(c), self.net.shift(c), num_groups=groups)

    def _activation(self, x):
        return self.net.op(self.pick("Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Softplus", "Exp"), x)

    def _affine(self, x):
        c = self.channels(x)
        y = self.net.op("Mul", x, self.net.scale(c, 1, 1))
        return self.net.op(self.pick("Add", "Sub"), y, self.net.shift(1, c, 1, 1))

    def _prelu(self, x):
        return self.net.op("PRelu", x, self.net.scale(self.channels(x), 1, 1))

    def _residual(self, x):
        y = self.net.conv(self.net.relu(self.net.conv(x, self.pick(4, 6), 3)), self.channels(x), 1)
        return self.net.op("Add", *([x, y] if self.flip() else [y, x]))

    def _join(self, x):
        alike = [v for v in self.pool if self.net.shape(v) == self.net.shape(x) and v != x]
        if not alike:
            return None
        return self.net.op(self.pick("Add", "Mul", "Max", "Sub"), x, self.draw(st.sampled_from(alike)))

    def _concat(self, x):
        alike = [v for v in [*self.pool, "x"] if self.net.shape(v)[2:] == self.net.shape(x)[2:]]
        others = [self.draw(st.sampled_from(alike)) for _ in range(self.pick(1, 2))]
        return self.net.op("Concat", *self.draw(st.permutations([x, *others])), axis=1)

    def _split(self, x):
        c = self.channels(x)
        if c < 2:
            return None
        cut = self.draw(st.integers(1, c - 1))
        return self.net.split(x, [cut, c - cut], 1)

    def _gated(self, x):
        if self.channels(x) % 2:
            return None
        half = self.channels(x) // 2
        a, b = self.net.split(x, [half, half], 1)
        return self.net.op("Mul", a, self.net.op("Sigmoid", b))

    def _slice(self, x):
        c = self.channels(x)
        start = self.draw(st.integers(0, c - 1))
        return self.net.slice(x, start, self.draw(st.integers(start + 1, c)), 1)

    def _gather(self, x):
        c = self.channels(x)
        picked = self.draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=c))
        return self.net.op("Gather", x, self.net.constant(picked), axis=1)

    def _pad(self, x):
        before, after = self.pick(0, 1, 2), self.pick(1, 2, 4)
        return self.net.op("Pad", x, self.net.constant([0, before, 0, 0, 0, after, 0, 0]))

    def _pad_and_add(self, x):
        y = self.net.op("Pad", x, self.net.constant([0, 0, 0, 0, 0, 2, 0, 0]))
        return self.net.op("Add", self.net.conv(x, self.channels(x) + 2, 3), y)

    def _tile(self, x):
        return self.net.op("Tile", x, self.net.constant([1, 2, 1, 1]))

    def _shuffle(self, x):
        return self.net.shuffle(x, self.pick(*self.divisors(self.channels(x))))

    def _squeeze_excite(self, x):
        return self.net.squeeze_excite(x, self.pick(2, 3))

    def _pooling(self, x):
        if self.flip():
            return self.net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        return self.net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def _pixel_shuffle(self, x):
        if self.channels(x) % 4 or self.net.shape(x)[2] > 6:
            return None
        mode = self.pick("DCR", "CRD")
        y = self.net.op("DepthToSpace", x, blocksize=2, mode=mode)
        return self.net.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])

    def _space_to_depth(self, x):
        return self.net.op("SpaceToDepth", x, blocksize=2) if self.net.shape(x)[2] % 2 == 0 else None

    def _resize(self, x):
        n, c, h, w = self.net.shape(x)
        sizes = self.net.constant([n, c, 2 * h, 2 * w])
        y = self.net.op("Resize", x, "", "", sizes, mode="nearest") if h <= 6 else x
        return self.net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]) if h <= 6 else None

    def _expand_groups(self, x):
        _, c, h, w = self.net.shape(x)
        y = self.net.op("Unsqueeze", x, self.net.constant([2]))
        y = self.net.op("Expand", y, self.net.constant([1, c, 2, h, w]))
        return self.net.reshape(y, 0, 2 * c, h, w)

    # ---- heads -----------------------------------------------------------------------------
    def classifier(self, x: str) -> str:
        """Flatten or pool, then one or two fully connected layers."""
        if self.flip():
            y = self.net.op("Flatten", x)
        else:
            y = self.net.op("ReduceMean", x, self.net.constant([2, 3]), keepdims=0)
        if self.flip():
            y = self.net.relu(self.net.gemm(y, self.pick(5, 8), trans=self.flip()))
        return self.net.gemm(y, 3, trans=self.flip())

    def transformer(self, x: str) -> str:
        """[N, C, H, W] as tokens, one attention block and one projection."""
        net = self.net
        _, c, h, w = net.shape(x)
        t = net.op("Transpose", net.reshape(x, 0, c, h * w), perm=[0, 2, 1])
        if self.flip():
            t = net.op("LayerNormalization", t, net.scale(c), net.shift(c), axis=-1)
        heads, dims = self.pick(2, 3, 4), self.pick(2, 4)
        kind = self.pick("separate", "split", "reshape", "grouped-query")
        if kind == "separate":
            q, k = (net.heads(net.linear(t, heads * dims, bias=self.flip()), heads, dims) for _ in range(2))
            wide = self.pick(3, 4)
            v = net.heads(net.linear(t, heads * wide), heads, wide)
        elif kind == "split":
            parts = net.split(net.linear(t, 3 * heads * dims), [heads * dims] * 3, 2)
            q, k, v = (net.heads(p, heads, dims) for p in parts)
        elif kind == "reshape":
            y = net.reshape(net.linear(t, 3 * heads * dims), 0, h * w, 3, heads, dims)
            y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
            q, k, v = (net.op("Gather", y, self._scalar(i), axis=0) for i in range(3))
        else:
            q = net.heads(net.linear(t, 2 * heads * dims), 2 * heads, dims)
            k, v = (self._repeat(net.heads(net.linear(t, heads * dims), heads, dims), 2) for _ in range(2))
        if self.flip():
            q = net.op("Mul", q, self._scalar(0.5))
        if self.flip() and kind != "split":
            d = net.shape(q)[-1]
            q, k = (net.op("LayerNormalization", p, net.scale(d), net.shift(d), axis=-1) for p in (q, k))
        elif self.flip():
            q, k = self._rotate(q), self._rotate(k)
        y = net.attend(q, k, v)
        y = net.linear(y, c)
        if self.flip():
            y = net.op("Add", y, t)
        return net.linear(net.op("Gelu", net.linear(y, self.pick(4, 6))), 3)

    def _scalar(self, value: float) -> str:
        array = np.array(value, np.int64 if isinstance(value, int) else np.float32)
        return self.net._add(array, "s")

    def _repeat(self, x: str, times: int) -> str:
        _, h, t, d = self.net.shape(x)
        y = self.net.op("Unsqueeze", x, self.net.constant([2]))
        y = self.net.op("Expand", y, self.net.constant([1, h, times, t, d]))
        return self.net.reshape(y, 0, h * times, t, d)

    def _rotate(self, x: str) -> str:
        """x·cos + rotate_half(x)·sin."""
        _, _, tokens, dims = self.net.shape(x)
        half = dims // 2
        a, b = self.net.slice(x, 0, half, 3), self.net.slice(x, half, dims, 3)
        turned = self.net.op("Concat", self.net.op("Neg", b), a, axis=3)
        cos, sin = self.net.scale(tokens, dims, name="cos"), self.net.scale(tokens, dims, name="sin")
        return self.net.op("Add", self.net.op("Mul", x, cos), self.net.op("Mul", turned, sin))


IMAGE_STEPS = tuple(
    """conv grouped depthwise transposed batch_norm activation affine prelu residual join concat split
    gated slice gather pad pad_and_add tile shuffle squeeze_excite pooling pixel_shuffle space_to_depth resize
    expand_groups""".split()
)


@st.composite
def programs(draw, max_steps: int = 7) -> Program:
    """A network of random operators on feature maps, with a classifier or a transformer on top."""
    drawn = _Drawn(draw)
    for _ in range(draw(st.integers(0, max_steps))):
        drawn.step()
    last = drawn.pool[-1]
    outputs = [drawn.transformer(last) if drawn.flip() else drawn.classifier(last)]
    if drawn.flip() and len(drawn.pool) > 1:
        outputs.append(drawn.net.conv(drawn.value(), 2) if drawn.flip() else drawn.value())
    return drawn.net.program(*outputs)


@st.composite
def legal_plans(draw, analysis: ChannelAnalysis) -> Plan:
    """A random plan over all groups that keeps a unit of every group and of every floor."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    groups = {}
    for group in analysis.groups:
        keep = generator.random(group.size) < draw(st.sampled_from([0.5, 0.2, 0.8, 1.0]))
        for floor in [np.arange(group.size), *group.floors]:
            if not keep[floor].any():
                keep[generator.choice(floor)] = True
        if not keep.all():
            groups[group.name] = GroupPlan(group.size, tuple(int(i) for i in np.flatnonzero(keep)))
    return Plan(analysis.program.source.sha256, groups)
