"""Canonicalization: Before/Expected on small graphs, by the text of the nodes; names and signature stay."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import captured
from onnx import TensorProto, helper
from onnx_files import random, run, save, tensor, weights

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir.batch import relative_error
from sartor.ir.canonicalize import CANONICAL_OPS, canonicalize
from sartor.ir.load import load
from sartor.ir.program import Program
from sartor.ir.text import node_lines
from sartor.ir.verify import verify_program

node = helper.make_node


def ints(name: str, *values: int) -> TensorProto:
    return tensor(name, np.array(values, np.int64))


def operators(program: Program) -> list[str]:
    return [n.op_type for n in program.nodes()]


def text(program: Program) -> list[str]:
    """Nodes as `out = Op(in, ...)`, without attributes and node names."""
    return [re.sub(r" (\{.*\} )?# .*", "", line) for line in node_lines(program)]


def check(
    tmp_path: Path, nodes: list, initializers: list, shape: list, result: list, expected: list[str], **extra
) -> Program:  # type: ignore[no-untyped-def]
    path = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": result}, initializers, **extra)
    program = load(path)
    assert text(program) == expected
    x = random(*(3 if isinstance(d, str) else d for d in shape))
    for a, b in zip(run(path, {"x": x}), run(program.to_bytes(), {"x": x}), strict=True):
        assert relative_error(a, b) < 1e-6
    verify_program(program)
    assert [v.name for v in program.graph.inputs] == ["x"]
    assert "y" in [v.name for v in program.graph.outputs]
    return program


NOTHING = {
    "identity": ([node("Identity", ["x"], ["a"]), node("Relu", ["a"], ["y"])], []),
    "identity chain at the output": (
        [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["b"]), node("Identity", ["b"], ["y"])],
        [],
    ),
    "dropout": ([node("Dropout", ["x"], ["a"]), node("Relu", ["a"], ["y"])], []),
    "dropout with its ratio": (
        [node("Dropout", ["x", "r", "t"], ["a"]), node("Relu", ["a"], ["y"])],
        [tensor("r", np.float32(0.3)), tensor("t", np.array(False))],
    ),
    "cast to the same type": (
        [node("Cast", ["x"], ["a"], to=TensorProto.FLOAT), node("Relu", ["a"], ["y"])],
        [],
    ),
    "cast-like": ([node("CastLike", ["x", "x"], ["a"]), node("Relu", ["a"], ["y"])], []),
    "reshape to the same shape": (
        [node("Reshape", ["x", "t"], ["a"]), node("Relu", ["a"], ["y"])],
        [ints("t", 0, 3, -1)],
    ),
    "expand to the same shape": (
        [node("Expand", ["x", "t"], ["a"]), node("Relu", ["a"], ["y"])],
        [ints("t", 1, 3, 4)],
    ),
    "transpose by the identity": (
        [node("Transpose", ["x"], ["a"], perm=[0, 1, 2]), node("Relu", ["a"], ["y"])],
        [],
    ),
    "concat of one": ([node("Concat", ["x"], ["a"], axis=1), node("Relu", ["a"], ["y"])], []),
    "pad of nothing": (
        [node("Pad", ["x", "t"], ["a"]), node("Relu", ["a"], ["y"])],
        [ints("t", 0, 0, 0, 0, 0, 0)],
    ),
    "whole slice": (
        [node("Slice", ["x", "s", "e", "a0"], ["a"]), node("Relu", ["a"], ["y"])],
        [ints("s", 0), ints("e", 2**31 - 1), ints("a0", 1)],
    ),
    "tile once": ([node("Tile", ["x", "t"], ["a"]), node("Relu", ["a"], ["y"])], [ints("t", 1, 1, 1)]),
    "clip without bounds": ([node("Clip", ["x"], ["a"]), node("Relu", ["a"], ["y"])], []),
    "sum of one": ([node("Sum", ["x"], ["a"]), node("Relu", ["a"], ["y"])], []),
    "empty reduction": (
        [node("ReduceSum", ["x"], ["a"], noop_with_empty_axes=1), node("Relu", ["a"], ["y"])],
        [],
    ),
    "dead code": (
        [node("Relu", ["x"], ["y"]), node("Exp", ["x"], ["a"]), node("Add", ["a", "w"], ["b"])],
        [weights("w", 4)],
    ),
    "shape chain": (
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"], axis=0),
            node("Unsqueeze", ["n", "axis"], ["n1"]),
            node("Concat", ["n1", "rest"], ["t"], axis=0),
            node("Reshape", ["x", "t"], ["a"]),
            node("Relu", ["a"], ["y"]),
        ],
        [tensor("zero", np.array(0, np.int64)), ints("axis", 0), ints("rest", 3, 4)],
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_operators_that_do_nothing_are_removed(tmp_path: Path, case: str) -> None:
    nodes, initializers = NOTHING[case]
    program = check(tmp_path, nodes, initializers, ["N", 3, 4], ["N", 3, 4], ["%y = Relu(%x)"])
    assert not program.initializers


SOMETHING = {
    "reversing slice": [node("Slice", ["x", "s", "e", "a0", "st"], ["a"]), node("Relu", ["a"], ["y"])],
    "cast that rounds": [
        node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
    ],
    "softmax": [node("Softmax", ["x"], ["a"], axis=1), node("Mul", ["a", "one"], ["y"])],
}


@pytest.mark.parametrize("case", SOMETHING)
def test_operators_that_do_something_stay(tmp_path: Path, case: str) -> None:
    initializers = [
        ints("s", -1),
        ints("e", -(2**31)),
        ints("a0", 1),
        ints("st", -1),
        tensor("one", np.float32(1)),
    ]
    path = save(tmp_path / "m.onnx", SOMETHING[case], {"x": ["N", 3]}, {"y": ["N", 3]}, initializers)
    program = load(path)
    assert len(operators(program)) == 2
    x = random(2, 3)
    np.testing.assert_array_equal(run(path, {"x": x})[0], run(program.to_bytes(), {"x": x})[0])


def test_input_passed_through_keeps_both_names(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            node("Identity", ["x"], ["y"]),
            node("Dropout", ["x"], ["z"]),
            node("Relu", ["x"], ["a"]),
            node("Identity", ["a"], ["p"]),
            node("Identity", ["a"], ["q"]),
        ],
        {"x": ["N", 3]},
        {name: ["N", 3] for name in "yzpq"},
    )
    program = load(path)
    assert [v.name for v in program.graph.outputs] == ["y", "z", "p", "q"]
    assert sorted(operators(program)) == ["Identity"] * 3 + ["Relu"]
    x = random(2, 3)
    for a, b in zip(run(path, {"x": x}), run(program.to_bytes(), {"x": x}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_constant_output(tmp_path: Path) -> None:
    constant = node("Constant", [], ["y"], value=weights("v", 2, 3))
    path = save(
        tmp_path / "m.onnx",
        [constant, node("Relu", ["x"], ["z"])],
        {"x": ["N", 3]},
        {"y": [2, 3], "z": ["N", 3]},
    )
    program = load(path)
    assert text(program) == ["%y = Identity(%y.value)", "%z = Relu(%x)"]


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    nodes = [
        node("Identity", ["w"], ["w2"]),
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["a", "w2"], ["y"]),
    ]
    program = check(
        tmp_path,
        nodes,
        [weights("w", 3, 3)],
        ["N", 3],
        ["N", 3],
        ["%a = MatMul(%x, %w)", "%y = MatMul(%a, %w)"],
    )
    assert list(program.initializers) == ["w"]


def test_parameters_are_never_folded(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    check(
        tmp_path,
        nodes,
        [weights("w", 4, 3)],
        ["N", 3],
        ["N", 4],
        ["%t = Transpose(%w)", "%y = MatMul(%x, %t)"],
    )


def test_constant_arithmetic_folds(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], ["d"], value_float=64.0),
        node("Sqrt", ["d"], ["r"]),
        node("Constant", [], ["one"], value_float=1.0),
        node("Div", ["one", "r"], ["scale"]),
        node("Mul", ["x", "scale"], ["y"]),
    ]
    program = check(tmp_path, nodes, [], ["N", 3], ["N", 3], ["%y = Mul(%x, %scale)"])
    assert program.initializer_array("scale") == np.float32(0.125)
    assert program.initializer_array("scale").shape == ()


def test_zero_bias_of_an_exporter_goes_a_real_one_stays(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], ["z"], value=tensor("z", np.zeros(4, np.float32))),
        node("Conv", ["x", "w", "z"], ["a"]),
        node("Conv", ["a", "w2", "b"], ["y"]),
    ]
    initializers = [weights("w", 4, 3, 1, 1), weights("w2", 4, 4, 1, 1), tensor("b", np.zeros(4, np.float32))]
    check(
        tmp_path,
        nodes,
        initializers,
        ["N", 3, 2, 2],
        ["N", 4, 2, 2],
        ["%a = Conv(%x, %w)", "%y = Conv(%a, %w2, %b)"],
    )


def test_dead_initializers_and_optional_outputs(tmp_path: Path) -> None:
    nodes = [node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2], strides=[2, 2])]
    program = check(
        tmp_path, nodes, [weights("unused", 3)], ["N", 3, 4, 4], ["N", 3, 2, 2], ["%y = MaxPool(%x)"]
    )
    assert not program.initializers


def test_defaults_are_spelled_out(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Softmax", ["c"], ["s"]),
        node("Transpose", ["s"], ["t"]),
        node("Split", ["t"], ["a", "b"], num_outputs=2),
        node("Add", ["a", "b"], ["d"]),
        node("ReduceSum", ["d"], ["y"]),
    ]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        {"x": [2, 3, 4, 4]},
        {"y": [1, 1, 1, 1]},
        [weights("w", 5, 3, 3, 3)],
        opset=18,
    )
    program = load(path)
    found = {n.op_type: n for n in program.nodes()}
    assert {
        k: list(a.value) if isinstance(a.value, tuple) else a.value
        for k, a in found["Conv"].attributes.items()
    } == {
        "dilations": [1, 1],
        "group": 1,
        "kernel_shape": [3, 3],
        "pads": [0, 0, 0, 0],
        "strides": [1, 1],
    }
    assert found["Softmax"].attributes["axis"].as_int() == -1
    assert list(found["Transpose"].attributes["perm"].as_ints()) == [3, 2, 1, 0]
    assert program.initializer_array(found["Split"].inputs[1].name).tolist() == [1, 1]
    assert "num_outputs" not in found["Split"].attributes
    assert program.initializer_array(found["ReduceSum"].inputs[1].name).tolist() == [0, 1, 2, 3]


def test_shape_operands_belong_to_one_node(tmp_path: Path) -> None:
    nodes = [
        node("Squeeze", ["x", "axes"], ["a"]),
        node("Unsqueeze", ["a", "axes"], ["b"]),
        node("Squeeze", ["b", "axes"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 1, 3]}, {"y": ["N", 3]}, [ints("axes", 1)])
    program = load(path)
    names = [n.inputs[1].name for n in program.nodes()]
    assert len(set(names)) == 3 and "axes" not in program.initializers


def test_sequences_become_split(tmp_path: Path) -> None:
    nodes = [
        node("SplitToSequence", ["x", "size"], ["s"], axis=1),
        node("SequenceAt", ["s", "i1"], ["a"]),
        node("SequenceAt", ["s", "last"], ["b"]),
        node("Sub", ["a", "b"], ["y"]),
    ]
    constants = [
        tensor("size", np.array(2, np.int64)),
        tensor("i1", np.array(1, np.int64)),
        tensor("last", np.array(-1, np.int64)),
    ]
    program = check(
        tmp_path,
        nodes,
        constants,
        ["N", 6],
        ["N", 2],
        ["%s.0, %s.1, %s.2 = Split(%x, %SplitToSequence_s.split)", "%y = Sub(%s.1, %s.2)"],
    )
    assert program.initializer_array("SplitToSequence_s.split").tolist() == [2, 2, 2]


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [node("Relu", ["a"], ["y"]), node("Neg", ["x"], ["a"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, check=False)
    assert text(load(path)) == ["%a = Neg(%x)", "%y = Relu(%a)"]


def test_duplicate_and_missing_node_names(tmp_path: Path) -> None:
    nodes = [
        node("Neg", ["x"], ["a"], name="n"),
        node("Abs", ["a"], ["b"], name="n"),
        node("Relu", ["b"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, {"y": ["N", 3]})
    names = [n.name for n in load(path).nodes()]
    assert len(set(names)) == 3 and names[0] == "n" and all(names)


def test_it_is_idempotent() -> None:
    program = captured("vit").clone()
    before = program.to_bytes()
    again = program.clone()
    canonicalize(again.model, {"x": (29, 3, 16, 16)}, parameters=set(again.initializers))
    # At batch 29 the symbolic spelling is replaced by numbers; nothing else may change.
    assert [n.op_type for n in again.nodes() if n.op_type not in ("Shape", "Concat", "Expand")] == [
        n.op_type for n in program.nodes() if n.op_type not in ("Shape", "Concat", "Expand")
    ]
    assert program.to_bytes() == before


def test_training_graphs_are_refused(tmp_path: Path) -> None:
    parameters = [weights(n, 3) for n in "sbm"] + [tensor("v", np.ones(3, np.float32))]
    nodes = [
        node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "m2", "v2"], training_mode=1, name="bn")
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 2, 2]}, {"y": ["N", 3, 2, 2]}, parameters)
    with pytest.raises(ModelError, match=r"'bn' \(BatchNormalization\) runs in training mode"):
        load(path)
    nodes = [node("Dropout", ["x", "r", "t"], ["y"], name="drop")]
    path = save(
        tmp_path / "d.onnx",
        nodes,
        {"x": ["N", 3]},
        {"y": ["N", 3]},
        [tensor("r", np.float32(0.5)), tensor("t", np.array(True))],
    )
    with pytest.raises(ModelError, match=r"'drop' \(Dropout\) runs in training mode"):
        load(path)


@pytest.mark.parametrize("op_type", ["NonZero", "RandomNormalLike", "Unique", "Det"])
def test_outside_the_table(tmp_path: Path, op_type: str) -> None:
    types = {"y": TensorProto.INT64} if op_type == "NonZero" else None
    path = save(
        tmp_path / "m.onnx",
        [node(op_type, ["x"], ["y"], name="odd")],
        {"x": [3, 3]},
        {"y": None},
        types=types,
        check=False,
    )
    with pytest.raises(
        UnsupportedOperatorError, match=rf"Node 'odd' \({op_type}\).*outside the canonical table"
    ):
        load(path)


def test_the_table_is_of_the_canonical_opset() -> None:
    assert len(CANONICAL_OPS) > 100
    for name in CANONICAL_OPS:
        schema = onnx.defs.get_schema(name, 21, "")
        assert not schema.deprecated


class TestZeroPoints:
    """QuantizeLinear and DequantizeLinear without a zero point: zeros, which say the type of the integers."""

    def nodes(self, **attributes: int) -> list[onnx.NodeProto]:
        return [
            node("Relu", ["x"], ["r"]),
            node("QuantizeLinear", ["r", "s"], ["q"], name="quantize", **attributes),
            node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
            node("DequantizeLinear", ["t", "s"], ["d"], name="activation"),
            node("DequantizeLinear", ["w", "ws"], ["v"], name="weight", axis=1),
            node("MatMul", ["d", "v"], ["y"], name="linear"),
        ]

    @pytest.mark.parametrize(("output_dtype", "kind"), [(0, np.uint8), (TensorProto.INT8, np.int8)])
    def test_become_explicit(self, tmp_path: Path, output_dtype: int, kind: type) -> None:
        constants = [
            tensor("s", np.float32(0.02)),
            tensor("w", np.array([[3, -5], [7, 100], [-128, 4]], np.int8)),
            tensor("ws", np.array([0.1, 0.2], np.float32)),
        ]
        attributes = {"output_dtype": int(output_dtype)} if output_dtype else {}
        program = check(
            tmp_path,
            self.nodes(**attributes),
            constants,
            [2, 3, 4],
            [2, 4, 2],
            [
                "%r = Relu(%x)",
                "%q = QuantizeLinear(%r, %s, %quantize.y_zero_point)",
                "%t = Transpose(%q)",
                "%d = DequantizeLinear(%t, %s, %activation.x_zero_point)",
                "%v = DequantizeLinear(%w, %ws, %weight.x_zero_point)",
                "%y = MatMul(%d, %v)",
            ],
            opset=21,
            ir_version=10,
        )
        found = {n: program.initializer_array(n) for n in program.initializers if n.endswith("zero_point")}
        assert {n: (a.dtype, a.shape, a.any()) for n, a in found.items()} == {
            "quantize.y_zero_point": (kind, (), False),
            "activation.x_zero_point": (kind, (), False),
            "weight.x_zero_point": (np.int8, (2,), False),
        }
        assert (
            next(n for n in program.nodes() if n.op_type == "QuantizeLinear")
            .attributes["output_dtype"]
            .as_int()
            == 0
        )
