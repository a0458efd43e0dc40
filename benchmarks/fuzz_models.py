"""Small valid models, and the ways in which the fuzzer of the loader breaks them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


# ---- seeds -----------------------------------------------------------------------------------
def _weights(name: str, *shape: int) -> TensorProto:
    generator = np.random.default_rng([len(name), *shape])
    return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)


def _model(
    nodes: list[Any], initializers: list[TensorProto], shape: list[Any], opset: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def seeds() -> list[onnx.ModelProto]:
    """Small valid models: a residual CNN, attention, shape arithmetic, an If, opset 9."""
    node = helper.make_node
    i64 = lambda name, *v: numpy_helper.from_array(np.array(v, dtype=np.int64), name)  # noqa: E731
    cnn = _model(
        [
            node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1], name="conv"),
            node("BatchNormalization", ["a", "s", "t", "m", "v"], ["n"], name="norm"),
            node("Relu", ["n"], ["r"], name="relu"),
            node("Conv", ["r", "w2"], ["c"], pads=[1, 1, 1, 1], name="conv2"),
            node("Add", ["c", "n"], ["d"], name="add"),
            node("GlobalAveragePool", ["d"], ["p"], name="pool"),
            node("Flatten", ["p"], ["f"], name="flat"),
            node("Gemm", ["f", "fc"], ["y"], transB=1, name="fc_node"),
        ],
        [
            _weights("w", 8, 3, 3, 3),
            _weights("b", 8),
            *(_weights(n, 8) for n in "stm"),
            numpy_helper.from_array(np.ones(8, np.float32), "v"),
            _weights("w2", 8, 8, 3, 3),
            _weights("fc", 4, 8),
        ],
        ["N", 3, 8, 8],
        17,
    )
    attention = _model(
        [
            node("MatMul", ["x", "wq"], ["q0"], name="q"),
            node("Reshape", ["q0", "split"], ["q1"], name="rs"),
            node("Transpose", ["q1"], ["q2"], perm=[0, 2, 1, 3], name="tr"),
            node("Transpose", ["q1"], ["k2"], perm=[0, 2, 3, 1], name="tk"),
            node("MatMul", ["q2", "k2"], ["s0"], name="qk"),
            node("Softmax", ["s0"], ["s1"], axis=-1, name="sm"),
            node("MatMul", ["s1", "q2"], ["o0"], name="av"),
            node("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3], name="to"),
            node("Reshape", ["o1", "join"], ["o2"], name="rj"),
            node("MatMul", ["o2", "wo"], ["y"], name="out"),
        ],
        [_weights("wq", 8, 8), _weights("wo", 8, 3), i64("split", 0, 0, 2, 4), i64("join", 0, 0, 8)],
        [1, 5, 8],
        18,
    )
    shapes = _model(
        [
            node("Shape", ["x"], ["sh"], name="shape"),
            node("Gather", ["sh", "zero"], ["n0"], axis=0, name="gather"),
            node("Unsqueeze", ["n0", "axes"], ["n1"], name="unsq"),
            node("Concat", ["n1", "rest"], ["target"], axis=0, name="cat"),
            node("Reshape", ["x", "target"], ["flat"], name="reshape"),
            node("Slice", ["flat", "b0", "e0", "ax"], ["part"], name="slice"),
            node("Split", ["part", "sizes"], ["l", "r"], axis=1, name="split"),
            node("Mul", ["l", "r"], ["y"], name="mul"),
        ],
        [
            numpy_helper.from_array(np.array(0), "zero"),
            i64("axes", 0),
            i64("rest", -1),
            i64("b0", 0),
            i64("e0", 8),
            i64("ax", 1),
            i64("sizes", 4, 4),
        ],
        ["N", 3, 4],
        13,
    )
    branch = [
        helper.make_graph(
            [node(op, ["x"], [out], name=op)], op, [], [helper.make_empty_tensor_value_info(out)]
        )
        for op, out in (("Relu", "t"), ("Neg", "e"))
    ]
    conditional = _model(
        [node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1], name="if")],
        [numpy_helper.from_array(np.array(True), "c")],
        ["N", 4],
        16,
    )
    old = _model(
        [
            node("Conv", ["x", "w"], ["a"], name="conv"),
            node("Upsample", ["a", "scales"], ["u"], mode="nearest", name="up"),
            node("Dropout", ["u"], ["y"], ratio=0.5, name="drop"),
        ],
        [_weights("w", 4, 3, 1, 1), numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")],
        [1, 3, 4, 4],
        9,
    )
    return [cnn, attention, shapes, conditional, old]


# ---- mutations -------------------------------------------------------------------------------
def mutate(model: onnx.ModelProto, generator: np.random.Generator) -> bytes:
    """Mostly one structural change, at most three, then sometimes damaged bytes."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for _ in range(int(generator.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))):
        change = CHANGES[int(generator.integers(len(CHANGES)))]
        change(model.graph, model, generator)
    data = bytearray(model.SerializeToString())
    kind = generator.random()
    if kind < 0.05:
        del data[int(generator.integers(1, len(data))) :]
    elif kind < 0.2:
        for _ in range(int(generator.integers(1, 12))):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
    return bytes(data)


def _pick(items: Any, generator: np.random.Generator) -> Any:
    return items[int(generator.integers(len(items)))] if len(items) else None


def _drop_initializer(graph: Any, model: Any, g: np.random.Generator) -> None:
    if len(graph.initializer):
        del graph.initializer[int(g.integers(len(graph.initializer)))]


def _drop_node(graph: Any, model: Any, g: np.random.Generator) -> None:
    if len(graph.node):
        del graph.node[int(g.integers(len(graph.node)))]


def _rename(graph: Any, model: Any, g: np.random.Generator) -> None:
    """Another edge, maybe backwards: cycles, dangling names, values written twice."""
    node = _pick(graph.node, g)
    names = [n for other in graph.node for n in (*other.input, *other.output)] + ["", "nowhere"]
    if node is None:
        return
    side = node.input if g.random() < 0.7 else node.output
    if len(side):
        side[int(g.integers(len(side)))] = _pick(names, g)


def _operator(graph: Any, model: Any, g: np.random.Generator) -> None:
    node = _pick(graph.node, g)
    if node is not None:
        node.op_type = _pick(
            ["Loop", "Foo", "TopK", "Einsum", "LSTM", "NonZero", "Pad", "", "Resize", "Tile"], g
        )
        node.domain = _pick(["", "", "com.acme", "sartor"], g)


def _dims(graph: Any, model: Any, g: np.random.Generator) -> None:
    tensor = _pick(graph.initializer, g)
    if tensor is not None and len(tensor.dims):
        tensor.dims[int(g.integers(len(tensor.dims)))] = _pick([0, -1, 1, 7, 2**31, 2**62], g)


def _input_shape(graph: Any, model: Any, g: np.random.Generator) -> None:
    dims = graph.input[0].type.tensor_type.shape.dim
    if len(dims):
        dims[int(g.integers(len(dims)))].dim_value = _pick([0, -4, 2, 2**40, 3], g)


def _attribute(graph: Any, model: Any, g: np.random.Generator) -> None:
    node = _pick(graph.node, g)
    if node is None:
        return
    value = _pick([-1, 0, 99, 2**40, [1, 2, 3], [-5], 0.5, "text", [0] * 64], g)
    name = _pick(["axis", "group", "perm", "pads", "strides", "kernel_shape", "to", "mode", "epsilon"], g)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _constant(graph: Any, model: Any, g: np.random.Generator) -> None:
    tensor = _pick(
        [
            t
            for t in graph.initializer
            if t.data_type == TensorProto.INT64 and len(t.raw_data) == 8 * math.prod(t.dims)
        ],
        g,
    )
    if tensor is not None:
        array = numpy_helper.to_array(tensor).copy()
        if array.size:
            array.flat[int(g.integers(array.size))] = _pick([-(2**62), -7, 0, 1000, 2**33], g)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _element_type(graph: Any, model: Any, g: np.random.Generator) -> None:
    target = _pick([*graph.initializer, graph.input[0].type.tensor_type], g)
    kind = int(_pick([0, 1, 2, 6, 7, 8, 9, 10, 14, 16, 17, 22, 77], g))
    if isinstance(target, TensorProto):
        target.data_type = kind
    else:
        target.elem_type = kind


def _external(graph: Any, model: Any, g: np.random.Generator) -> None:
    tensor = _pick(graph.initializer, g)
    if tensor is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        paths = ["../canary", "/etc/hostname", "missing.bin", "link", ".", "", "sub/../../canary", "data.bin"]
        for key, value in (("location", _pick(paths, g)), ("offset", _pick(["0", "-1", "x", "9" * 30], g))):
            tensor.external_data.add(key=key, value=value)


def _nested(graph: Any, model: Any, g: np.random.Generator) -> None:
    """Branches within branches; at 24 the parser's own depth is nearly used up."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["i"])], "i", [], [onnx.ValueInfoProto(name="i")]
    )
    for depth in range(int(_pick([2, 10, 24], g))):
        out = f"i{depth}"
        node = helper.make_node("If", ["nowhere"], [out], then_branch=inner)
        inner = helper.make_graph([node], "i", [], [onnx.ValueInfoProto(name=out)])
    graph.node.extend([helper.make_node("If", ["x"], ["deep"], then_branch=inner, else_branch=inner)])


def _opset(graph: Any, model: Any, g: np.random.Generator) -> None:
    for entry in model.opset_import:
        entry.version = int(_pick([0, 1, 5, 7, 11, 24, 99, 2**40], g))


def _header(graph: Any, model: Any, g: np.random.Generator) -> None:
    kind = int(g.integers(4))
    if kind == 0:
        del model.opset_import[:]
    elif kind == 1:
        model.ir_version = int(_pick([0, 1, 999], g))
    elif kind == 2:
        del graph.output[:]
    else:
        graph.input.add(name="x" if g.random() < 0.5 else "unused")


CHANGES = [
    _drop_initializer,
    _drop_node,
    _rename,
    _rename,
    _operator,
    _dims,
    _input_shape,
    _attribute,
    _constant,
    _element_type,
    _external,
    _nested,
    _opset,
    _header,
]
