"""What static shapes and constants decide: Before/Expected, and equal outputs on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_files import random, run, save, tensor, weights
from test_canonicalize import ints, text

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir.fx import run_twin
from sartor.ir.load import Limits, load
from sartor.ir.verify import verify_program
from sartor.ir.workload import is_parameter

node = helper.make_node


def branches(result: str = "r") -> dict[str, onnx.GraphProto]:
    """Then: x w + c with c in the body; else: -x."""
    info = [helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, 3])]
    bias = node("Constant", [], ["bias"], value=weights("c", 3, seed=3))
    then_nodes = [bias, node("Mul", ["x", "w"], ["m"]), node("Add", ["m", "bias"], [result])]
    return {
        "then_branch": helper.make_graph(then_nodes, "then", [], info),
        "else_branch": helper.make_graph([node("Neg", ["x"], [result])], "else", [], info),
    }


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_constant_condition_takes_its_branch(tmp_path: Path, flag: bool, last: bool) -> None:
    nodes = [node("If", ["c"], ["y" if last else "t"], name="choose", **branches())]
    nodes += [] if last else [node("Relu", ["t"], ["y"])]
    arrays = [tensor("c", np.array(flag)), weights("w", 3)]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 3]}, {"y": [1, 3]}, arrays)
    program = load(path)
    found = [n.op_type for n in program.nodes()]
    assert "If" not in found and set(found) <= {"Mul", "Add", "Neg", "Relu", "Identity"}
    assert ("Mul" in found) == flag
    x = {"x": random(1, 3)}
    np.testing.assert_allclose(run(path, x)[0], run(program.to_bytes(), x)[0], rtol=1e-6)
    verify_program(program)


def test_a_condition_that_shapes_decide(tmp_path: Path) -> None:
    """What the tracing exporter writes for `squeeze`: a branch on the length of an axis."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Equal", ["n", "one"], ["c"]),
        node("If", ["c"], ["y"], name="choose", **branches()),
    ]
    arrays = [tensor("zero", np.array(0)), tensor("one", np.array(1)), weights("w", 3)]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 3]}, {"y": [1, 3]}, arrays)
    assert "If" not in [n.op_type for n in load(path).nodes()]


def test_a_branch_inside_a_branch(tmp_path: Path) -> None:
    inner = node("If", ["d"], ["q"], **branches("p"))
    info = [helper.make_tensor_value_info("q", TensorProto.FLOAT, [1, 3])]
    other = helper.make_graph([node("Identity", ["x"], ["q"])], "o", [], info)
    outer = node("If", ["c"], ["y"], then_branch=helper.make_graph([inner], "i", [], info), else_branch=other)
    arrays = [tensor("c", np.array(True)), tensor("d", np.array(True)), weights("w", 3)]
    path = save(tmp_path / "m.onnx", [outer], {"x": [1, 3]}, {"y": [1, 3]}, arrays)
    program = load(path)
    x = {"x": random(1, 3)}
    np.testing.assert_allclose(run(path, x)[0], run(program.to_bytes(), x)[0], rtol=1e-6)
    assert "If" not in [n.op_type for n in program.nodes()]


def test_a_condition_that_depends_on_data_stays(tmp_path: Path) -> None:
    nodes = [node("If", ["c"], ["y"], name="choose", **branches())]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": [1, 3], "c": []}, {"y": [1, 3]}, [weights("w", 3)],
        types={"c": TensorProto.BOOL},
    )  # fmt: skip
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["If"]
    for flag in (True, False):
        inputs = {"x": random(1, 3), "c": np.array(flag)}
        np.testing.assert_allclose(run_twin(program, inputs)["y"], run(path, inputs)[0], rtol=1e-6)


def test_mask_of_an_inactive_dropout(tmp_path: Path) -> None:
    nodes = [node("Dropout", ["x"], ["y", "m"], name="drop")]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": [2, 3]}, {"y": [2, 3], "m": [2, 3]}, types={"m": TensorProto.BOOL}
    )
    program = load(path)
    assert text(program) == ["%m = Identity(%drop.mask)", "%y = Identity(%x)"]
    assert program.initializer_array("drop.mask").all()


def test_compress_by_a_constant(tmp_path: Path) -> None:
    arrays = [tensor("c", np.array([True, False, True]))]
    path = save(
        tmp_path / "a.onnx",
        [node("Compress", ["x", "c"], ["y"], axis=1)],
        {"x": [2, 3]},
        {"y": None},
        arrays,
        check=False,
    )
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["Gather"]
    x = {"x": random(2, 3)}
    np.testing.assert_array_equal(run(path, x)[0], run(program.to_bytes(), x)[0])
    path = save(
        tmp_path / "f.onnx",
        [node("Compress", ["x", "c"], ["y"])],
        {"x": [2, 3]},
        {"y": None},
        arrays,
        check=False,
    )
    np.testing.assert_array_equal(run(path, x)[0], run(load(path).to_bytes(), x)[0])
    path = save(
        tmp_path / "d.onnx", [node("Compress", ["x", "c"], ["y"], axis=1)], {"x": [2, 3], "c": [3]}, {"y": None},
        types={"c": TensorProto.BOOL}, check=False)  # fmt: skip
    with pytest.raises(UnsupportedOperatorError, match="the shape of its result depends on data"):
        load(path)


def test_empty_operands_and_results_go(tmp_path: Path) -> None:
    """A rotary embedding of full width splits off nothing, and joins it again."""
    nodes = [
        node("Split", ["x", "sizes"], ["a", "nothing"], axis=1),
        node("Relu", ["a"], ["b"]),
        node("Concat", ["b", "nothing"], ["y"], axis=1),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, {"y": [2, 4]}, [ints("sizes", 4, 0)], check=False)
    program = load(path)
    assert text(program) == ["%y = Relu(%x)"]
    nodes[0] = node("Split", ["x", "sizes"], ["a", "nothing", "c"], axis=1)
    nodes[2] = node("Concat", ["b", "nothing", "c"], ["y"], axis=1)
    path = save(
        tmp_path / "t.onnx", nodes, {"x": [2, 4]}, {"y": [2, 4]}, [ints("sizes", 3, 0, 1)], check=False
    )
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["Split", "Relu", "Concat"]
    x = {"x": random(2, 4)}
    np.testing.assert_array_equal(run(path, x)[0], run(program.to_bytes(), x)[0])


def test_generators_fold_or_are_parameters(tmp_path: Path) -> None:
    """A weight keeps its name and is a parameter; a mask becomes a constant, triangle and all."""
    nodes = [
        node("ConstantOfShape", ["ws"], ["w"], value=tensor("v", np.array([0.5], np.float32))),
        node("ConstantOfShape", ["ms"], ["full"], value=tensor("v", np.array([-9.0], np.float32))),
        node("Trilu", ["full", "k"], ["mask"]),
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("MatMul", ["a", "wt"], ["b"]),
        node("Add", ["b", "mask"], ["y"]),
    ]
    arrays = [ints("ws", 3, 3), ints("ms", 3, 3), tensor("k", np.array(1))]
    path = save(tmp_path / "m.onnx", nodes, {"x": [3, 3]}, {"y": [3, 3]}, arrays)
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["MatMul", "Transpose", "MatMul", "Add"]
    assert set(program.initializers) == {"w", "mask"} and is_parameter(program.initializers["w"])
    x = {"x": random(3, 3)}
    np.testing.assert_allclose(run(path, x)[0], run(program.to_bytes(), x)[0], rtol=1e-6)


def test_generated_elements_are_limited(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", ["ws"], ["w"], name="huge"), node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 64]}, {"y": [1, 64]}, [ints("ws", 64, 64)])
    load(path, limits=Limits(generated_elements=4096))
    with pytest.raises(
        UnsupportedOperatorError, match=r"'huge' \(ConstantOfShape\) generates.*4096.*limit is 4095"
    ):
        load(path, limits=Limits(generated_elements=4095))
    nodes = [node("Range", ["a", "b", "c"], ["r"], name="far"), node("Add", ["x", "r"], ["y"])]
    bounds = [tensor(n, np.array(v, np.float32)) for n, v in (("a", 0), ("b", 64), ("c", 1))]
    path = save(tmp_path / "r.onnx", nodes, {"x": [1, 64]}, {"y": [1, 64]}, bounds)
    assert [n.op_type for n in load(path).nodes()] == ["Add"]
    with pytest.raises(ModelError, match=r"'far' \(Range\)"):
        load(path, limits=Limits(generated_elements=63))


def test_eye_like_and_size_need_shapes_only(tmp_path: Path) -> None:
    nodes = [
        node("EyeLike", ["x"], ["e"], k=1, dtype=TensorProto.FLOAT),
        node("Size", ["x"], ["n"]),
        node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["e", "f"], ["g"]),
        node("Add", ["x", "g"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, {"y": [3, 4]})
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["Add"]
    np.testing.assert_array_equal(program.initializer_array("g"), np.eye(3, 4, 1) * 12)


def test_constant_outputs_keep_their_names(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Range", ["a", "b", "c"], ["steps"])]
    bounds = [tensor(n, np.array(v)) for n, v in (("a", 0), ("b", 4), ("c", 1))]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        {"x": [2, 3]},
        {"y": [2, 3], "steps": [4]},
        bounds,
        types={"steps": TensorProto.INT64},
    )
    program = load(path)
    assert [v.name for v in program.graph.outputs] == ["y", "steps"]
    np.testing.assert_array_equal(run(program.to_bytes(), {"x": random(2, 3)})[1], [0, 1, 2, 3])


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT16])
def test_sixteen_bit_floats_of_newer_opsets(tmp_path: Path, kind: int) -> None:
    """Celu takes them from opset 28 on; at opset 21 it works in float32, between two Casts."""
    nodes = [node("Celu", ["x"], ["a"], alpha=2.0), node("Mul", ["a", "a"], ["y"])]
    kinds = {"x": kind, "y": kind}
    path = save(
        tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, opset=28, ir_version=14, types=kinds
    )
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["Cast", "Celu", "Cast", "Mul"]
    assert program.types()["y"] == kind and program.batch.symbolic
    x = np.array([[-1.5, 0.25, 2.0]]).astype(ir.DataType(kind).numpy())
    got = run_twin(program, {"x": x}, dtype=None)["y"]
    exact = np.where(x.astype(float) < 0, 2 * np.expm1(x.astype(float) / 2), x.astype(float)) ** 2
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got.astype(float), exact, rtol=2e-2)


def test_max_unpool_to_a_given_shape(tmp_path: Path) -> None:
    nodes = [
        node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxUnpool", ["p", "i", "shape"], ["y"], kernel_shape=[2, 2], strides=[2, 2], name="un"),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": [1, 1, 4, 4]}, {"y": None}, [ints("shape", 1, 1, 5, 6)], check=False
    )
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["MaxPool", "MaxUnpool", "Pad"]
    x = {"x": random(1, 1, 4, 4)}
    want = np.zeros((1, 1, 5, 6), np.float32)
    want[..., :4, :4] = run_twin(load(save(
        tmp_path / "s.onnx", [nodes[0], node("MaxUnpool", ["p", "i"], ["y"], kernel_shape=[2, 2], strides=[2, 2])],
        {"x": [1, 1, 4, 4]}, {"y": None}, check=False)), x, dtype=None)["y"]  # fmt: skip
    np.testing.assert_array_equal(run_twin(program, x, dtype=None)["y"], want)


def test_crop_leaves_the_batch_out_of_its_axes(tmp_path: Path) -> None:
    """With all axes spelled, the rule of the batch axis used to drop some and keep the whole region."""
    nodes = [
        node(
            "Resize",
            ["x", "roi", "", "sizes"],
            ["y"],
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        )
    ]
    arrays = [
        tensor("roi", np.array([0, 0, 0.4, 0.6, 1, 1, 0.6, 0.8], np.float32)),
        ints("sizes", 1, 2, 3, 3),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 2, 4, 4]}, {"y": None}, arrays, check=False)
    program = load(path)
    (resize,) = program.nodes()
    assert tuple(resize.attributes["axes"].as_ints()) == (2, 3) and program.batch.symbolic
    x = {"x": random(1, 2, 4, 4)}
    np.testing.assert_allclose(run_twin(program, x)["y"], run(path, x)[0], rtol=1e-5, atol=1e-6)


def test_split_of_a_constant(tmp_path: Path) -> None:
    nodes = [
        node("Split", ["sizes"], ["a", "b"], axis=0, num_outputs=2),
        node("Concat", ["b", "a"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [2, 3]}, {"y": [3, 2]}, [ints("sizes", 2, 3)], opset=18)
    assert text(load(path)) == ["%y = Reshape(%x, %Reshape_y.shape)"]
    nodes = [node("Split", ["w"], ["a", "b"], axis=1, num_outputs=2), node("MatMul", ["x", "a"], ["y"])]
    nodes.append(node("MatMul", ["x", "b"], ["z"]))
    path = save(
        tmp_path / "p.onnx", nodes, {"x": [2, 3]}, {"y": [2, 2], "z": [2, 2]}, [weights("w", 3, 4)], opset=18
    )
    assert [n.op_type for n in load(path).nodes()] == ["Split", "MatMul", "MatMul"]  # a parameter stays whole
