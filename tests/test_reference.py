"""The reference backend is the FX twin in float64, through the same protocol as every other target."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from backend_programs import small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error

from sartor import backends
from sartor.backends.artifact import open_artifact
from sartor.backends.measure import measure, profile
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError, UsageError
from sartor.ir.fx import run_twin

AT_BATCH_1 = TargetOptions(shapes={"x": (1, 3, 16, 16)})


@pytest.fixture(scope="module")
def program():
    return small_cnn()


@pytest.fixture(scope="module")
def artifact(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "artifact"
    return backends.get("reference").lower(program, folder, TargetOptions())


def load(artifact, options=AT_BATCH_1):
    return backends.get("reference").load(artifact, options)


def test_it_computes_in_float64_and_answers_in_the_type_of_the_program(program, artifact):
    feeds = random_inputs(program)
    exact = run_twin(program, feeds)["y"]
    result = load(artifact).run(feeds)["y"]
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, exact.astype(np.float32))  # the only rounding is the last one
    single = run_twin(program, feeds, dtype="float32")["y"]
    assert np.any(single != result)  # float32 throughout would not have passed


def test_the_artifact_is_the_canonical_onnx(program, artifact, tmp_path):
    assert artifact.main_file.read_bytes() == program.to_bytes()
    assert open_artifact(artifact.folder) == artifact
    again = backends.get("reference").lower(program, tmp_path / "again", TargetOptions())
    assert again.sha256 == artifact.sha256


def test_batch_and_compile(program, artifact):
    batch = np.random.default_rng(3).standard_normal((3, 3, 16, 16)).astype(np.float32)
    one = load(artifact)
    rows = np.concatenate([one.run({"x": batch[i : i + 1]})["y"] for i in range(3)])
    whole = load(artifact, TargetOptions()).run({"x": batch})
    assert relative_error({"y": rows}, whole) < 1e-6
    session = backends.get("reference").compile(program.to_bytes(), AT_BATCH_1)
    np.testing.assert_array_equal(session.run({"x": batch[:1]})["y"], rows[:1])
    assert [s.name for s in session.inputs] == ["x"] and session.inputs[0].dtype == "float32"


def test_outputs_are_not_shared_between_runs(program, artifact):
    feeds = random_inputs(program)
    session = load(artifact)
    first = session.run(feeds)["y"]
    kept = first.copy()
    session.run({"x": feeds["x"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_the_number_of_threads_of_the_caller_stays(program, artifact):
    before = torch.get_num_threads()
    load(artifact, TargetOptions(threads=before + 1, shapes=AT_BATCH_1.shapes)).run(random_inputs(program))
    assert torch.get_num_threads() == before


def test_measure_and_profile_in_a_subprocess(program, artifact):
    result = measure("reference", [artifact], AT_BATCH_1, min_rounds=3, max_rounds=3, visit_s=0.01)
    assert result.latencies[0].median > 0
    session = result.to_dict()["conditions"]["session"][0]
    assert session["compute_type"] == "float64" and session["input_shapes"] == {"x": [1, 3, 16, 16]}
    kernels = profile("reference", artifact, AT_BATCH_1, runs=3)
    assert [k.name for k in kernels] == [n.name for n in program.nodes()]
    assert [k.op_type for k in kernels] == [n.op_type for n in program.nodes()]
    assert all(k.nodes == (k.name,) and k.median_s > 0 and k.runs == 3 for k in kernels)


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "takes exactly 'x'"),
        ({"x": np.zeros((1, 3, 16, 16))}, "has type float64"),
        ({"x": np.zeros((1, 3, 16, 15), np.float32)}, "has shape"),
    ],
)
def test_wrong_inputs_are_named(artifact, feeds, text):
    with pytest.raises(UsageError, match=text):
        load(artifact).run(feeds)


def test_damage_and_what_is_no_model(artifact, program, tmp_path):
    mine = backends.get("reference").lower(program, tmp_path / "mine", TargetOptions())
    data = bytearray(mine.main_file.read_bytes())
    data[len(data) // 2] ^= 1
    mine.main_file.write_bytes(data)
    with pytest.raises(BackendError, match="does not match its manifest"):
        load(mine)
    with pytest.raises(BackendError, match="The reference cannot run the model"):
        backends.get("reference").compile(b"not a model", TargetOptions())
    with pytest.raises(UsageError, match="'bf16' is not supported by backend 'reference'"):
        load(artifact, TargetOptions(precision="bf16"))


def test_what_is_not_understood_is_illegal(tmp_path):
    program = program_from_nodes([node("Relu", ["x"], ["y"])], {"x": (2,)}, ["y"])
    next(iter(program.nodes())).domain = "com.example"
    report = backends.get("reference").legality(program, TargetOptions())
    assert [(f.node, f.rule, f.observed) for f in report.violations] == [
        ("node_y", "canonical-operator", "com.example::Relu")
    ]


def test_a_tail_is_illegal(tmp_path):
    import sartor

    nodes = [node("Relu", ["x"], ["h"], "relu"), node("NonZero", ["h"], ["y"], "where")]
    infos = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])]
    outs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)]
    graph = onnx.helper.make_graph(nodes, "main", infos, outs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    program = sartor.load(tmp_path / "m.onnx")
    assert program.tail is not None
    report = backends.get("reference").legality(program, TargetOptions())
    assert [f.rule for f in report.violations] == ["understood"]
    assert "'where'" in report.violations[0].observed


def quantized():
    """x, quantized, times a quantized matrix."""
    rng = np.random.default_rng(0)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xf"]),
        node("DequantizeLinear", ["w", "ws"], ["wf"], axis=1),
        node("MatMul", ["xf", "wf"], ["y"]),
    ]
    constants = {
        "s": np.float32([0.02]),
        "z": np.int8([5]),
        "w": rng.integers(-127, 128, (16, 4)).astype(np.int8),
        "ws": rng.uniform(0.01, 0.02, 4).astype(np.float32),
    }
    return program_from_nodes(nodes, {"x": ["N", 16]}, ["y"], constants)


def test_quantized_programs_are_computed_exactly(tmp_path):
    program, backend = quantized(), backends.get("reference")
    options = TargetOptions(precision="int8")
    feeds = random_inputs(program)
    session = backend.load(backend.lower(program, tmp_path / "out", options), options)
    found = session.run(feeds)["y"]
    np.testing.assert_array_equal(found, run_twin(program, feeds)["y"].astype(np.float32))
    c = {name: program.initializer_array(name) for name in ("s", "z", "w", "ws")}
    steps = np.clip(np.round(feeds["x"].astype(np.float64) / c["s"].astype(np.float64)) + 5, -128, 127) - 5
    by_hand = (steps * np.float64(c["s"])) @ (c["w"] * c["ws"].astype(np.float64))
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_the_form_of_the_program_and_the_precision_agree(program, artifact, tmp_path):
    backend = backends.get("reference")
    for wrong, precision in ((quantized(), "f32"), (program, "int8"), (program, "f16")):
        with pytest.raises(BackendError, match=r"\[precision\]"):
            backend.lower(wrong, tmp_path / "out", TargetOptions(precision=precision))
    with pytest.raises(UsageError, match="was lowered for precision 'f32'"):
        load(artifact, TargetOptions(precision="int8"))


def test_capabilities_are_plain_data():
    capabilities = backends.get("reference").capabilities()
    assert capabilities.control_flow and capabilities.version.startswith("torch ")
    json.dumps(capabilities.to_dict())
