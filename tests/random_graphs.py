"""Small random networks from the operator table, with parameters that preserve variance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

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
