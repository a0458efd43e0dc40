"""Loading: other exporters' files compute the same, hostile and broken files are refused in one sentence."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import ALL, captured
from onnx import TensorProto, helper
from onnx_files import if_model, random, run, save, tensor, torchscript, weights

from sartor.errors import ModelError, UnsupportedOperatorError, UsageError
from sartor.ir.batch import check_batch, relative_error
from sartor.ir.load import Limits, load
from sartor.ir.program import Program
from sartor.ir.verify import verify_program

node = helper.make_node


def same(path: Path, program: Program, inputs: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """The program computes what the file computes."""
    for expected, found in zip(run(path, inputs), run(program.to_bytes(), inputs), strict=True):
        assert relative_error(expected, found) <= tolerance


# ---- other exporters ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dynamic", [True, False])
def test_files_of_the_tracing_exporter(tmp_path: Path, family: str, dynamic: bool) -> None:
    module, example = ALL[family]()
    path = torchscript(tmp_path / "m.onnx", module, example, dynamic=dynamic)
    program = load(path)
    assert program.batch.symbolic, program.batch.reason
    assert check_batch(program) == ""
    assert [v.name for v in [*program.graph.inputs, *program.graph.outputs]] == ["input", "output"]
    x = random(3, *example[0].shape[1:])
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    assert relative_error(expected, run(program.to_bytes(), {"input": x})[0]) < 1e-5
    left = {n.op_type for n in program.nodes()}
    assert not left & {"Constant", "ConstantOfShape", "Identity", "Dropout"}
    assert sum(n.op_type == "Shape" for n in program.nodes()) <= 1  # the batch idiom asks once


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 20])
def test_every_opset_of_the_tracing_exporter(tmp_path: Path, opset: int) -> None:
    module, example = ALL["mobilenet"]()
    path = torchscript(tmp_path / "m.onnx", module, example, opset=opset)
    program = load(path)
    assert dict(program.model.opset_imports) == {"": 21}
    same(path, program, {"input": random(2, 3, 32, 32)})


@pytest.mark.parametrize("family", ["resnet", "unet", "vit"])
def test_our_own_files_load_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    program = captured(family)
    again = load(program.save(tmp_path / "m.onnx"))
    assert again.to_bytes() == program.to_bytes()
    assert again.batch == program.batch
    assert again.source.sha256 == hashlib.sha256(program.to_bytes()).hexdigest()


def test_channels_last_import(tmp_path: Path) -> None:
    """As converters from channels-last frameworks write it: Transposes, Pad nodes, SAME_UPPER, asymmetric."""
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        node("Pad", ["t", "pads", "zero"], ["p"]),
        node("Conv", ["p", "w1"], ["c1"], strides=[2, 2], auto_pad="VALID"),
        node("Clip", ["c1", "low", "high"], ["r"]),
        node("Conv", ["r", "w2"], ["c2"], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Conv", ["c2", "w3"], ["c3"], auto_pad="SAME_LOWER"),
        node("AveragePool", ["c3"], ["a"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("ConvTranspose", ["a", "w4"], ["u"], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Transpose", ["u"], ["back"], perm=[0, 2, 3, 1]),
        node("Reshape", ["back", "target"], ["y"]),
    ]
    constants = [
        tensor("pads", np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64)),
        tensor("zero", np.array(0, np.float32)),
        tensor("low", np.array(0, np.float32)),
        tensor("high", np.array(6, np.float32)),
        weights("w1", 8, 3, 3, 3),
        weights("w2", 6, 8, 3, 3),
        weights("w3", 5, 6, 2, 2),
        weights("w4", 5, 4, 3, 3),
        tensor("target", np.array([-1, 4 * 4 * 4], np.int64)),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["n", 16, 16, 3]}, {"y": ["n", 64]}, constants, opset=13)
    program = load(path)
    assert program.batch.symbolic, program.batch.reason
    same(path, program, {"x": random(3, 16, 16, 3)})
    pads = {
        n.inputs[1].name: list(n.attributes["pads"].as_ints()) for n in program.nodes() if "Conv" in n.op_type
    }
    assert pads["w2"] == [0, 0, 1, 1]
    assert pads["w3"] == [1, 1, 0, 0]
    assert all("auto_pad" not in n.attributes for n in program.nodes())
    reshape = next(n for n in program.nodes() if n.op_type == "Reshape")
    assert program.initializer_array(reshape.inputs[1].name).tolist() == [-1, 64] or (
        program.initializer_array(reshape.inputs[1].name).tolist() == [0, 64]
    )


OLD = {
    "axes attributes": (
        11,
        [
            node("ReduceMean", ["x"], ["m"], axes=[2], keepdims=0),
            node("Unsqueeze", ["m"], ["u"], axes=[1]),
            node("Squeeze", ["u"], ["s"], axes=[1]),
            node("Split", ["s"], ["a", "b"], axis=1, split=[1, 2]),
            node("Concat", ["b", "a"], ["y"], axis=1),
        ],
        ["N", 3, 4],
        ["N", 3],
    ),
    "softmax over trailing axes": (11, [node("Softmax", ["x"], ["y"], axis=1)], ["N", 3, 4], ["N", 3, 4]),
    "log-softmax default axis": (9, [node("LogSoftmax", ["x"], ["y"])], ["N", 3], ["N", 3]),
    "clip attributes": (10, [node("Clip", ["x"], ["y"], min=-0.5, max=0.25)], ["N", 3], ["N", 3]),
    "slice attributes": (
        9,
        [node("Slice", ["x"], ["y"], axes=[1], starts=[1], ends=[3])],
        ["N", 4],
        ["N", 2],
    ),
    "pad attributes": (10, [node("Pad", ["x"], ["y"], pads=[0, 1, 0, 2], value=1.5)], ["N", 4], ["N", 7]),
    "dropout ratio": (
        10,
        [node("Dropout", ["x"], ["d"], ratio=0.5), node("Relu", ["d"], ["y"])],
        ["N", 4],
        ["N", 4],
    ),
    "top-k attribute": (9, [node("TopK", ["x"], ["y", "i"], axis=1, k=2)], ["N", 4], ["N", 2]),
    "upsample attribute": (
        7,
        [node("Upsample", ["x"], ["y"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])],
        ["N", 2, 3, 3],
        ["N", 2, 6, 6],
    ),
    "split in equal parts": (
        13,
        [node("Split", ["x"], ["a", "b"], axis=1), node("Sub", ["a", "b"], ["y"])],
        ["N", 4],
        ["N", 2],
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_old_spellings(tmp_path: Path, case: str) -> None:
    opset, nodes, shape, result = OLD[case]
    path = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": result}, opset=opset, ir_version=4)
    program = load(path)
    assert program.batch.symbolic, program.batch.reason
    same(path, program, {"x": random(3, *shape[1:])})
    verify_program(program)


NEW = {
    "type extension": (22, [node("HardSwish", ["x"], ["y"])], ["HardSwish"]),
    "function body": (24, [node("Swish", ["x"], ["y"], alpha=1.5)], ["Mul", "Sigmoid", "Mul"]),
    "context-dependent body": (23, [node("RMSNormalization", ["x", "scale"], ["y"])], None),
    "neutral attribute": (25, [node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)], ["Cast"]),
}


@pytest.mark.parametrize("case", NEW)
def test_newer_opsets(tmp_path: Path, case: str) -> None:
    opset, nodes, expected = NEW[case]
    constants = [weights("scale", 5)] if "scale" in nodes[0].input else []
    types = {"y": TensorProto.DOUBLE} if case == "neutral attribute" else None
    path = save(
        tmp_path / "m.onnx",
        nodes,
        {"x": ["N", 5]},
        {"y": ["N", 5]},
        constants,
        opset=opset,
        ir_version=10,
        types=types,
    )
    program = load(path)
    assert expected is None or [n.op_type for n in program.nodes()] == expected
    same(path, program, {"x": random(2, 5)})


def test_operators_without_counterpart_are_refused(tmp_path: Path) -> None:
    axis = tensor("axis", np.array(1, np.int64))
    path = save(
        tmp_path / "m.onnx",
        [node("CumProd", ["x", "axis"], ["y"])],
        {"x": ["N", 5]},
        {"y": ["N", 5]},
        [axis],
        opset=26,
        ir_version=10,
    )
    with pytest.raises(UnsupportedOperatorError, match="CumProd"):
        load(path)
    cast = node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE, round_mode="down")
    path = save(
        tmp_path / "c.onnx",
        [cast],
        {"x": ["N", 5]},
        {"y": ["N", 5]},
        opset=25,
        ir_version=10,
        types={"y": TensorProto.DOUBLE},
    )
    with pytest.raises(UnsupportedOperatorError, match=r"round_mode.*opset 25"):
        load(path)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    path = save(
        tmp_path / "m.onnx",
        [node("Twice", ["x"], ["t"], domain="local"), node("Twice", ["t"], ["y"], domain="local")],
        {"x": ["N", 3]},
        {"y": ["N", 3]},
        functions=[function],
        domains=["local"],
    )
    program = load(path)
    assert [n.op_type for n in program.nodes()] == ["Add", "Add"]
    assert dict(program.model.opset_imports) == {"": 21}
    same(path, program, {"x": random(2, 3)})


def test_weights_listed_as_inputs_are_weights(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": [1, 3], "w": [3, 4]},
        {"y": [1, 4]},
        [weights("w", 3, 4)],
        opset=8,
        ir_version=3,
    )
    program = load(path)
    assert [v.name for v in program.graph.inputs] == ["x"]
    assert list(program.initializers) == ["w"]


def test_weights_in_constant_nodes_become_initializers(tmp_path: Path) -> None:
    constant = node("Constant", [], ["w"], value=weights("anything", 3, 4))
    path = save(
        tmp_path / "m.onnx", [constant, node("MatMul", ["x", "w"], ["y"])], {"x": ["b", 3]}, {"y": ["b", 4]}
    )
    program = load(path)
    assert list(program.initializers) == ["w"] and [n.op_type for n in program.nodes()] == ["MatMul"]
    same(path, program, {"x": random(2, 3)})


def test_if_passes_and_keeps_what_its_bodies_read(tmp_path: Path) -> None:
    path = if_model(tmp_path / "m.onnx")
    program = load(path)
    assert list(program.initializers) == ["w"]  # read only inside the bodies; 'dead' is gone
    assert not program.batch.symbolic and "choose" in program.batch.reason
    for condition in (True, False):
        same(path, program, {"x": random(1, 3), "c": np.array(condition)})


DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CONVERTED = sorted(p.parent for p in DATA.glob("pytorch-*/*/model.onnx"))


@pytest.mark.skipif(not CONVERTED, reason="this build of onnx carries no test data")
def test_onnx_own_converted_models() -> None:
    """The opset-6 files that ONNX's own tests use, with their inputs and expected outputs."""
    compared = 0
    for folder in CONVERTED:
        try:
            program = load(folder / "model.onnx")
        except UnsupportedOperatorError:
            continue
        sample = folder / "test_data_set_0"
        arrays = {
            kind: [
                onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
                for path in sorted(sample.glob(f"{kind}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            ]
            for kind in ("input", "output")
        }
        inputs = dict(zip((v.name for v in program.graph.inputs), arrays["input"], strict=True))
        found = run(program.to_bytes(), inputs)
        for a, b in zip(arrays["output"], found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=folder.name)
        compared += 1
    assert compared == len(CONVERTED)


@pytest.mark.parametrize(
    "name", ["light_squeezenet", "light_densenet121", "light_shufflenet", "light_resnet50"]
)
def test_onnx_light_models(name: str) -> None:
    path = DATA / "light" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("this build of onnx carries no light models")
    program = load(path)
    assert program.batch.symbolic, program.batch.reason
    same(path, program, {program.graph.inputs[0].name: random(1, 3, 224, 224)}, 1e-4)


# ---- shapes -------------------------------------------------------------------------------------
def relu(path: Path, shape: list, **extra) -> Path:
    return save(path, [node("Relu", ["x"], ["y"])], {"x": shape}, {"y": shape}, **extra)


def test_dynamic_dimensions_need_shape(tmp_path: Path) -> None:
    path = relu(tmp_path / "m.onnx", ["batch", 3, "height", None])
    with pytest.raises(ModelError, match=r"Dimension 2 of input 'x' \('height'\).*--shape x=1,3,224,224"):
        load(path)
    program = load(path, shapes={"x": (2, 3, 8, 9)})
    assert program.input_shapes == {"x": (2, 3, 8, 9)}
    assert program.batch.symbolic
    assert [str(d) for d in program.graph.inputs[0].shape] == ["N", "3", "8", "9"]


def test_unknown_rank_needs_shape(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": None}, {"y": None}, check=False)
    with pytest.raises(ModelError, match=r"declares no shape.*--shape x="):
        load(path)
    assert load(path, shapes={"x": (1, 5)}).input_shapes == {"x": (1, 5)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input": (1, 3)}, r"names input 'input', but the model's inputs are \['x'\]"),
        ({"x": (1, 3, 3)}, r"does not fit input 'x'"),
        ({"x": (1, 4)}, r"does not fit input 'x'"),
        ({"x": (0, 3)}, r"does not fit input 'x'"),
    ],
)
@pytest.mark.parametrize("first", [1, "batch"])
def test_shapes_that_do_not_fit(tmp_path: Path, shapes: dict, message: str, first: int | str) -> None:
    path = relu(tmp_path / "m.onnx", [first, 3])
    with pytest.raises(UsageError, match=message):
        load(path, shapes=shapes)


def test_shape_sets_the_batch_of_a_static_file(tmp_path: Path) -> None:
    program = load(relu(tmp_path / "m.onnx", [1, 3]), shapes={"x": (8, 3)})
    assert program.input_shapes == {"x": (8, 3)} and program.shapes()["y"] == (8, 3)


def test_a_dynamic_file_written_for_one_sample(tmp_path: Path) -> None:
    """Declared dynamic, but the Reshape in it fits batch 1 only: a common export mistake, repaired."""
    target = tensor("t", np.array([1, 12], np.int64))
    path = save(
        tmp_path / "m.onnx",
        [node("Reshape", ["x", "t"], ["y"])],
        {"x": ["batch", 3, 4]},
        {"y": ["batch", 12]},
        [target],
        check=False,
    )
    program = load(path)
    assert program.batch.symbolic
    assert run(program.to_bytes(), {"x": random(3, 3, 4)})[0].shape == (3, 12)


def test_inputs_that_share_a_symbol_share_its_size(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Add", ["a", "b"], ["y"])],
        {"a": ["batch", "tokens"], "b": ["batch", "tokens"]},
        {"y": ["batch", "tokens"]},
    )
    program = load(path, shapes={"a": (1, 7)})
    assert program.input_shapes == {"a": (1, 7), "b": (1, 7)} and program.batch.inputs == ("a", "b")


# ---- broken and hostile files -------------------------------------------------------------------
@pytest.mark.parametrize(
    "data", [b"", b"hello world\n" * 50, os.urandom(4096), b"\x08\x07", b"PK\x03\x04" + bytes(99)]
)
def test_not_onnx(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"'m.onnx' (is not an ONNX model|holds an empty graph)"):
        load(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path: Path, fraction: float) -> None:
    data = captured("resnet").to_bytes()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ModelError):
        load(path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_never_surface_as_another_error(tmp_path: Path, seed: int) -> None:
    """Flip bytes in a file: it loads, or is refused in our words."""
    data = captured("vgg").to_bytes()
    graph = data.index(b"node_conv2d")
    generator = np.random.default_rng(seed)
    path = tmp_path / "m.onnx"
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        for position in generator.integers(max(0, graph - 100), graph + 1500, size=generator.integers(1, 4)):
            damaged[position % len(data)] = generator.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            load(path)
        except UsageError as error:  # ModelError is one
            refused += 1
            assert len(str(error)) < 2000
    assert refused > 5


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "no.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


def broken(tmp_path: Path, nodes: list, message: str, error: type = ModelError, **extra) -> None:
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, check=False, **extra)
    with pytest.raises(error, match=message):
        load(path)


def test_missing_initializer(tmp_path: Path) -> None:
    broken(
        tmp_path, [node("Add", ["x", "w"], ["y"], name="n")], r"'n' \(Add\) reads value 'w', which is neither"
    )


def test_cycle(tmp_path: Path) -> None:
    broken(
        tmp_path,
        [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["a"], ["y"])],
        "cycle",
    )


def test_value_computed_twice(tmp_path: Path) -> None:
    broken(tmp_path, [node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], "'y' is computed twice")


def test_output_without_node(tmp_path: Path) -> None:
    broken(tmp_path, [node("Relu", ["x"], ["z"])], "Graph output 'y' is not computed")


def test_foreign_domain(tmp_path: Path) -> None:
    broken(
        tmp_path,
        [node("FusedConv", ["x"], ["y"], domain="com.vendor", name="f")],
        r"'f' \(FusedConv\) uses operator 'FusedConv' of domain 'com.vendor'",
        UnsupportedOperatorError,
        domains=["com.vendor"],
    )


def test_unsupported_operator(tmp_path: Path) -> None:
    broken(
        tmp_path,
        [node("NonZero", ["x"], ["y"], name="f")],
        r"'f' \(NonZero\).*outside the canonical",
        UnsupportedOperatorError,
        types={"y": TensorProto.INT64},
    )


def test_wrong_element_types(tmp_path: Path) -> None:
    w = tensor("w", np.zeros(3, np.float64))
    broken(
        tmp_path,
        [node("Add", ["x", "w"], ["y"], name="n")],
        r"'n' \(Add\) has type FLOAT on input 0 and DOUBLE on input 1",
        initializers=[w],
    )


def test_wrong_channels(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Conv", ["x", "w"], ["y"], name="n")],
        {"x": [1, 3, 8, 8]},
        {"y": None},
        [weights("w", 4, 5, 3, 3)],
        check=False,
    )
    with pytest.raises(ModelError, match=r"'n' \(Conv\).*has 3 channels.*expects 5|Shape inference failed"):
        load(path)


def test_opsets_out_of_range(tmp_path: Path) -> None:
    broken(tmp_path, [node("Relu", ["x"], ["y"])], "opset 3; the oldest", opset=3)
    broken(tmp_path, [node("Relu", ["x"], ["y"])], "opset 900; the newest", opset=900)


def test_damaged_tensor(tmp_path: Path) -> None:
    w = weights("w", 3)
    w.dims[0] = 1_000_000_000_000
    broken(
        tmp_path,
        [node("Add", ["x", "w"], ["y"])],
        r"'w' of shape \[1000000000000\] needs 4000000000000 bytes",
        initializers=[w],
    )
    w.dims[0] = -3
    broken(tmp_path, [node("Add", ["x", "w"], ["y"])], "impossible shape", initializers=[w])


def test_constant_bomb(tmp_path: Path) -> None:
    bomb = [
        node("ConstantOfShape", ["huge"], ["h"]),
        node("ReduceMax", ["h"], ["m"], keepdims=0),
        node("Add", ["x", "m"], ["y"]),
    ]
    huge = tensor("huge", np.array([1 << 20, 1 << 20], np.int64))
    started = time.perf_counter()
    broken(tmp_path, bomb, "ConstantOfShape", UnsupportedOperatorError, initializers=[huge])
    assert time.perf_counter() - started < 5


def test_deep_nesting(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [node("Relu", ["x"], ["o0"])], "g", [], [helper.make_tensor_value_info("o0", 1, [1])]
    )
    for depth in range(1, 12):
        inner = node("If", ["c"], [f"o{depth}"], then_branch=graph, else_branch=graph)
        if depth < 11:
            graph = helper.make_graph([inner], "g", [], [helper.make_tensor_value_info(f"o{depth}", 1, [1])])
    path = tmp_path / "m.onnx"
    model = helper.make_model(
        helper.make_graph(
            [inner],
            "g",
            [
                helper.make_tensor_value_info("x", 1, [1]),
                helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info("o11", 1, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="nest deeper than 4"):
        load(path, limits=Limits(depth=4))
    with pytest.raises(ModelError, match="more than 3 nodes"):
        load(path, limits=Limits(nodes=3))
    with pytest.raises(ModelError, match="the limit is 10"):
        load(path, limits=Limits(file_bytes=10))


# ---- external data ------------------------------------------------------------------------------
def external(folder: Path, location: str = "w.bin", **entries: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    w = weights("w", 3, 4)
    data = w.raw_data
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        w.external_data.add(key=key, value=str(value))
    path = save(
        folder / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ["N", 3]},
        {"y": ["N", 4]},
        [w],
        check=False,
    )
    (folder / "w.bin").write_bytes(data)
    return path


def test_external_data_ends_up_in_the_saved_program(tmp_path: Path) -> None:
    path = external(tmp_path / "a")
    program = load(path)
    same(path, program, {"x": random(2, 3)})
    moved = program.save(tmp_path / "alone.onnx")
    assert load(moved).to_bytes() == program.to_bytes()
    assert not any(t.external_data for t in onnx.load(moved, load_external_data=False).graph.initializer)


def test_external_data_counts_into_the_source_hash(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = load(path).source.sha256
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "w.bin").write_bytes(bytes(data))
    assert load(path).source.sha256 != before


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../w.bin", "sub/../../w.bin", "", "..\\w.bin", "C:\\w.bin"]
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    path = external(tmp_path / "a", location)
    (tmp_path / "w.bin").write_bytes(bytes(48))
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    path = external(tmp_path / "a", "link.bin")
    (tmp_path / "a" / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ModelError, match="link that leaves"):
        load(path)


@pytest.mark.parametrize("as_node", [True, False])
def test_external_data_of_a_body_in_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_node: bool
) -> None:
    path = external(tmp_path / "a")
    model = onnx.load(path, load_external_data=False)
    w = model.graph.initializer.pop()
    bodies = {}
    for key, operator in (("then_branch", "MatMul"), ("else_branch", "Gemm")):
        nodes = [node("Constant", [], ["w"], value=w)] if as_node else []
        nodes.append(node(operator, ["x", "w"], [key]))
        result = helper.make_tensor_value_info(key, TensorProto.FLOAT, None)
        bodies[key] = helper.make_graph(nodes, key, [], [result], [] if as_node else [w])
    chosen = [node("If", ["c"], ["y"], **bodies)]
    model.functions.append(helper.make_function("f", "F", ["x", "c"], ["y"], chosen, model.opset_import))
    model.opset_import.add(domain="f", version=1)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node[0].CopyFrom(node("F", ["x", "c"], ["y"], domain="f"))
    path.write_bytes(model.SerializeToString())
    x, stored = random(1, 3), (tmp_path / "a" / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(bytes(48))
    monkeypatch.chdir(tmp_path)  # where the same path means another file
    found = run(load(path).to_bytes(), {"x": x, "c": np.array(True)})[0]
    assert relative_error(x @ np.frombuffer(stored, np.float32).reshape(3, 4), found) < 1e-6
    path.write_bytes(path.read_bytes().replace(b"w.bin", b"../w."))
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


@pytest.mark.parametrize("entries", [{"offset": 4}, {"offset": -4}, {"length": 12}, {"length": 1 << 40}])
def test_external_data_of_the_wrong_size(tmp_path: Path, entries: dict) -> None:
    with pytest.raises(ModelError, match=r"'w' needs 48 bytes"):
        load(external(tmp_path, **entries))


def test_external_data_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'gone.bin' of tensor 'w' does not exist"):
        load(external(tmp_path, "gone.bin"))


def test_text_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1, 3])],
    )
    path = tmp_path / "text.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(ModelError, match="element type STRING"):
        load(path)
