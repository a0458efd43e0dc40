"""Both built-in backends against the ONNX reference, and every refusal of the protocol."""

from __future__ import annotations

import gc
import json
import sys

import null_backend
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from backend_programs import quantized, small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error, run_reference

from sartor import backends
from sartor.backends import host
from sartor.backends.artifact import MANIFEST, open_artifact
from sartor.backends.onnxruntime import run
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.errors import BackendError, UsageError
from sartor.ir.dialect import insert_channel_gate

NAMES = ("onnxruntime", "openvino")
AT_BATCH_1 = TargetOptions(shapes={"x": (1, 3, 16, 16)})


@pytest.fixture(scope="module")
def program():
    return small_cnn()


@pytest.fixture(scope="module", params=NAMES)
def lowered(request, program, tmp_path_factory):
    backend = backends.get(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "artifact"
    return backend, backend.lower(program, folder, TargetOptions())


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """The out-of-tree backends of `null_backend`, registered."""
    null_backend.install(tmp_path / "site", null_backend.ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    backends.REGISTRY.refresh()
    yield
    monkeypatch.undo()
    backends.REGISTRY.refresh()


def test_lowered_equals_the_reference(lowered, program):
    backend, artifact = lowered
    feeds = random_inputs(program)
    expected = run_reference(program, feeds)
    for options in (TargetOptions(), AT_BATCH_1, TargetOptions(threads=2)):
        assert relative_error(expected, backend.load(artifact, options).run(feeds)) < 1e-5
    # The tolerance can fail: one weight in three hundred of another model is enough.
    other = small_cnn(seed=1)
    assert relative_error(run_reference(other, feeds), backend.load(artifact, AT_BATCH_1).run(feeds)) > 1e-2


def test_any_batch_runs_sample_by_sample(lowered, program):
    backend, artifact = lowered
    batch = np.random.default_rng(3).standard_normal((5, 3, 16, 16)).astype(np.float32)
    single = backend.load(artifact, AT_BATCH_1)
    rows = np.concatenate([single.run({"x": batch[i : i + 1]})["y"] for i in range(5)])
    free = backend.load(artifact, TargetOptions())
    fixed = backend.load(artifact, TargetOptions(shapes={"x": (5, 3, 16, 16)}))
    for session in (free, fixed):
        assert relative_error({"y": rows}, session.run({"x": batch})) < 1e-5


def test_prepared_runs_compute_the_same(lowered, program, monkeypatch):
    """What is timed is the inference of these inputs, whatever their layout, and also once they are gone."""
    backend, artifact = lowered
    session = backend.load(artifact, AT_BATCH_1)
    feeds = {name: np.asfortranarray(array) for name, array in random_inputs(program).items()}
    expected = run_reference(program, feeds)
    bindings = []
    if backend.name == "onnxruntime":  # its runs return nothing: fetching results would be timed, too
        run = session._session.run_with_iobinding
        monkeypatch.setattr(
            session._session, "run_with_iobinding", lambda binding: (run(binding), bindings.append(binding))
        )
    once = session.prepare(feeds)
    feeds.clear()
    gc.collect()
    for _ in range(2):
        results = once()
        found = bindings.pop().copy_outputs_to_cpu()[0] if backend.name == "onnxruntime" else results[0]
        assert relative_error(expected, {"y": found}) < 1e-5


def test_compile_needs_no_artifact(lowered, program):
    backend, _ = lowered
    feeds = random_inputs(program)
    session = backend.compile(program.to_bytes(), AT_BATCH_1)
    assert relative_error(run_reference(program, feeds), session.run(feeds)) < 1e-5


def test_settings_record_the_options(lowered):
    backend, artifact = lowered
    text = json.dumps([dict(backend.load(artifact, TargetOptions(threads=t)).settings) for t in (1, 2)])
    assert 'hreads": 1' in text and 'hreads": 2' in text and "kept" in text


def test_onnxruntime_is_specialised_for_the_shape(program, tmp_path):
    backend = backends.get("onnxruntime")
    artifact = backend.lower(program, tmp_path / "out", TargetOptions())
    fixed, free = backend.load(artifact, AT_BATCH_1), backend.load(artifact, TargetOptions())
    assert fixed.settings["input_shapes"] == {"x": [1, 3, 16, 16]}
    assert free.settings["input_shapes"] == {"x": ["N", 3, 16, 16]}


def test_the_optimised_graph_lies_beside_the_artifact(program, tmp_path):
    backend = backends.get("onnxruntime")
    artifact = backend.lower(program, tmp_path / "out", TargetOptions(threads=2))
    assert artifact.files == ("model.onnx", "model.optimized.onnx")
    assert artifact.main_file.read_bytes() == program.to_bytes()
    optimized = onnx.load(artifact.folder / "model.optimized.onnx")
    assert next(n.op_type for n in optimized.graph.node if "Conv" in n.op_type) == "FusedConv"
    assert "BatchNormalization" not in {n.op_type for n in optimized.graph.node}
    assert optimized.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert artifact.metadata["optimized_graph"] == {
        "file": "model.optimized.onnx",
        "graph_optimization_level": "extended",
        "execution_mode": "sequential",
        "provider": "CPUExecutionProvider",
        "intra_op_threads": 2,
        "inter_op_threads": 1,
    }
    feeds = random_inputs(program)
    session = backend.compile(optimized.SerializeToString(), TargetOptions())
    assert relative_error(run_reference(program, feeds), session.run(feeds)) < 1e-5


def test_a_graph_that_cannot_be_kept_stops_nothing(program, tmp_path, monkeypatch):
    def refused(model, options):
        (tmp_path / "seen").write_text(model)
        raise BackendError("planted")

    monkeypatch.setattr(run, "create", refused)
    artifact = backends.get("onnxruntime").lower(program, tmp_path / "out", TargetOptions())
    assert artifact.files == ("model.onnx",) and (tmp_path / "seen").exists()
    assert artifact.metadata["optimized_graph"] == {"reason": "planted"}
    assert {p.name for p in artifact.folder.iterdir()} == {"model.onnx", MANIFEST}


def test_legality_needs_no_vendor(program, monkeypatch):
    for module in (
        "onnxruntime",
        "openvino",
        "ai_edge_litert",
        "litert_torch",
        "tflite_micro",
        "tensorrt_rtx",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    for name in (*NAMES, "tflite", "tflite-micro", "reference"):
        assert backends.get(name).legality(program, TargetOptions()).ok, name


def test_bfloat16_is_told_by_the_processor_s_flags():
    openvino = pytest.importorskip("openvino")
    told = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert host.bfloat16() == ("BF16" in told)


def test_artifact_round_trips_without_any_path(lowered, tmp_path):
    _, artifact = lowered
    read = open_artifact(artifact.folder)
    assert read == artifact
    text = (artifact.folder / MANIFEST).read_text()
    assert str(artifact.folder) not in text and "/tmp" not in text
    assert Artifact.from_dict(json.loads(text), artifact.folder) == artifact
    assert set(artifact.files) | {MANIFEST} == {p.name for p in artifact.folder.iterdir()}


def test_lowering_again_gives_the_same_bytes(lowered, program, tmp_path):
    backend, artifact = lowered
    again = backend.lower(program, tmp_path / "again", TargetOptions())
    assert again.sha256 == artifact.sha256
    assert backend.lower(program, tmp_path / "again", TargetOptions()) == again  # replaces its own kind
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_folder_with_other_content_is_never_overwritten(lowered, program, tmp_path):
    backend, _ = lowered
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="holds no artifact"):
        backend.lower(program, tmp_path, TargetOptions())
    with pytest.raises(UsageError, match="is a file"):
        backend.lower(program, tmp_path / "mine.txt", TargetOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_lowering_leaves_nothing_and_keeps_the_old_one(lowered, program, tmp_path, monkeypatch):
    backend, _ = lowered
    good = backend.lower(program, tmp_path / "out", TargetOptions())
    broken = program.clone()

    def planted():
        raise BackendError("planted")

    monkeypatch.setattr(broken, "_parts", planted)
    with pytest.raises(BackendError, match="planted"):
        backend.lower(broken, tmp_path / "out", TargetOptions())
    assert open_artifact(tmp_path / "out") == good
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_changed_file_is_refused(lowered, program, tmp_path):
    backend, _ = lowered
    artifact = backend.lower(program, tmp_path / "out", TargetOptions())
    path = artifact.folder / artifact.files[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BackendError, match="does not match its manifest"):
        backend.load(artifact, TargetOptions())
    path.unlink()
    with pytest.raises(BackendError, match="missing"):
        backend.load(artifact, TargetOptions())


def test_open_artifact_refuses_other_folders(tmp_path):
    with pytest.raises(UsageError, match="not an artifact folder"):
        open_artifact(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(UsageError, match="its schema is None"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "takes exactly 'x'"),
        ({"x": np.zeros((1, 3, 16, 16), np.float32), "z": np.zeros(1, np.float32)}, "takes exactly 'x'"),
        ({"x": np.zeros((1, 3, 16, 16))}, "has type float64"),
        ({"x": np.zeros((1, 3, 16, 15), np.float32)}, r"has shape \[1, 3, 16, 15\]"),
        ({"x": np.zeros((3, 16, 16), np.float32)}, "has shape"),
        ({"x": np.zeros((2, 3, 16, 16), np.float32)}, r"takes \[1, 3, 16, 16\]"),
    ],
)
def test_wrong_inputs_are_named(lowered, feeds, text):
    backend, artifact = lowered
    session = backend.load(artifact, AT_BATCH_1)
    with pytest.raises(UsageError, match=text):
        session.run(feeds)


@pytest.mark.parametrize("shapes", [{"z": (1,)}, {"x": (1, 3, 16)}, {"x": (1, 4, 16, 16)}])
def test_wrong_shapes_are_named(lowered, shapes):
    backend, artifact = lowered
    with pytest.raises(UsageError, match=r"Input 'x' cannot|input 'z', which"):
        backend.load(artifact, TargetOptions(shapes=shapes))


def test_a_precision_that_the_program_is_not_written_in_is_refused(lowered, program, tmp_path):
    backend, artifact = lowered
    for precision in ("f16", "int8"):
        options = TargetOptions(precision=precision)
        with pytest.raises(BackendError, match=r"Observed: f32 \(nothing is quantized"):
            backend.lower(program, tmp_path / "out", options)
        for call in (backend.load, backend.profile):
            with pytest.raises(
                UsageError, match=f"lowered for precision 'f32' and cannot run in '{precision}'"
            ):
                call(artifact, options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"), [({"threads": 0}, "'threads' is 0"), ({"precision": "fp32"}, "'fp32'")]
)
def test_options_are_validated(options, text):
    with pytest.raises(UsageError, match=text):
        TargetOptions(**options)


def test_openvino_bf16_is_another_arithmetic(program, tmp_path):
    backend = backends.get("openvino")
    if "bf16" not in backend.capabilities().precisions:
        pytest.skip("this CPU has no bf16 instructions")
    artifact = backend.lower(program, tmp_path / "out", TargetOptions())
    feeds = random_inputs(program)
    expected = run_reference(program, feeds)
    session = backend.load(artifact, TargetOptions(precision="bf16", shapes=AT_BATCH_1.shapes))
    assert session.settings["precision"] == session.settings["precision_hint"] == "bf16"
    assert 1e-5 < relative_error(expected, session.run(feeds)) < 5e-2


def test_profile_names_the_nodes(lowered):
    backend, artifact = lowered
    kernels = backend.profile(artifact, AT_BATCH_1, 5)
    named = {name for kernel in kernels for name in kernel.nodes}
    assert {"conv0", "conv1", "linear"} <= named
    assert all(kernel.runs == 5 and kernel.median_s >= 0 for kernel in kernels)


def test_gated_programs_run_on_both(program, tmp_path):
    gated = program.clone()
    gate = insert_channel_gate(gated, "r1")
    closed = np.random.default_rng(5).uniform(0.2, 2.0, 32).astype(np.float32)
    gated.initializers[gate].const_value = ir.Tensor(closed, name=gate)
    gated.invalidate()
    feeds = random_inputs(program)
    results = {}
    for name in NAMES:
        backend = backends.get(name)
        artifact = backend.lower(gated, tmp_path / name, TargetOptions())
        results[name] = backend.load(artifact, AT_BATCH_1).run(feeds)
    assert any(n.domain == "sartor" for n in gated.nodes())  # legalize worked on a copy
    assert relative_error(results["onnxruntime"], results["openvino"]) < 1e-5
    assert relative_error(run_reference(program, feeds), results["onnxruntime"]) > 1e-2
    assert relative_error(run_reference(gated, feeds, float64=False), results["openvino"]) < 1e-5


def test_legality_names_rule_and_observed(lowered, program, tmp_path):
    backend, _ = lowered
    report = backend.legality(program, TargetOptions())
    assert report.ok and {f.rule for f in report.findings} >= {"opset-version", "operator-domain"}
    newer = program.clone()
    newer.model.opset_imports[""] = 99
    report = backend.legality(newer, TargetOptions())
    assert report.violations[0].rule == "opset-version"
    with pytest.raises(BackendError, match=r"The opset is between.*opset 99.*\[opset-version\]"):
        backend.lower(newer, tmp_path / "out", TargetOptions())
    foreign = program.clone()
    next(iter(foreign.nodes())).domain = "com.example"
    report = backend.legality(foreign, TargetOptions())
    assert [(f.node, f.rule) for f in report.violations if f.node] == [("conv0", "operator-domain")]


def test_legality_looks_into_branches():
    from onnx import helper

    inner = helper.make_graph(
        [helper.make_node("Strange", ["x"], ["t"], name="strange", domain="com.example")],
        "then",
        [],
        [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["e"], name="relu")],
        "else",
        [],
        [helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, None)],
    )
    program = program_from_nodes([node("Relu", ["x"], ["y"])], {"x": (2,)}, ["y"])
    model = program.to_proto()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "c"))
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], name="choice", then_branch=inner, else_branch=other)
    )
    branched = program.clone()
    branched.model = ir.from_proto(model)
    branched.shapes = lambda: {"x": (2,)}  # inference refuses the operator; legality must not need it
    report = backends.get("onnxruntime").legality(branched, TargetOptions())
    assert [f.node for f in report.violations] == ["strange"]


def test_channel_grid_is_what_capabilities_say(lowered):
    backend, _ = lowered
    grid = backend.capabilities().channel_grid
    assert grid[("Conv", "f32")] in (8, 16)
    for (op_type, precision), step in grid.items():
        assert backend.channel_grid(op_type, precision) == step
    assert backend.channel_grid("Relu", "f32") == 1
    document = backend.capabilities().to_dict()
    assert document["channel_grid"]["Conv"]["f32"] == grid[("Conv", "f32")]
    json.dumps(document)


def test_an_out_of_tree_backend_works_like_a_built_in(vendor, program, tmp_path):
    assert "null" in backends.available()
    backend = backends.get("null")
    artifact = backend.lower(program, tmp_path / "out", TargetOptions())
    assert open_artifact(tmp_path / "out") == artifact
    assert backend.load(artifact, TargetOptions()).run(random_inputs(program))["y"].shape == (1,)
    with pytest.raises(UsageError, match=r"'incomplete'.*lacks capabilities\(\)"):
        backends.get("incomplete")


def test_models_that_are_not_onnx_end_in_one_sentence(lowered):
    backend, _ = lowered
    with pytest.raises(BackendError) as raised:
        backend.compile(b"not a model", TargetOptions())
    assert len(str(raised.value)) < 700


def test_a_quantized_model_is_compiled_for_the_batches_that_come(tmp_path):
    """OpenVINO's int8 with a free batch is another computation, and a wrong one for transformers."""
    program = quantized(small_cnn(width=8))
    options = TargetOptions(precision="int8")
    backend = backends.get("openvino")
    session = backend.load(backend.lower(program, tmp_path / "out", options), options)
    assert session.settings["compiled"] == "for each shape of its inputs"
    x = np.random.default_rng(5).standard_normal((6, 3, 16, 16)).astype(np.float32)
    whole = session.run({"x": x})["y"]
    for size in (1, 2, 3, 4, 5, 1):
        assert np.array_equal(session.run({"x": x[:size]})["y"], whole[:size])
        assert session._model({"x": x[:size]})[0].input(0).partial_shape == [size, 3, 16, 16]
    assert len(session._models) == 4
    assert np.array_equal(session.computed(session.prepare({"x": x[:2]}))["y"], whole[:2])
    floats = backend.load(
        backend.lower(small_cnn(width=8), tmp_path / "f32", TargetOptions()), TargetOptions()
    )
    assert "compiled" not in floats.settings
