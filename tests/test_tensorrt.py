"""Target `tensorrt` without a GPU: legality, engines ahead of time, the record of layers, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import null_backend
import numpy as np
import onnx_node_cases as suite
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes
from onnx import TensorProto

import sartor
from sartor import backends
from sartor.backends import isolation
from sartor.backends.artifact import open_artifact, verify_files
from sartor.backends.protocol import TargetOptions
from sartor.backends.tensorrt import Settings, TensorRTBackend, builder, cuda, settings
from sartor.backends.tensorrt.lower import _at_fixed_shapes
from sartor.errors import BackendError, SartorError, UsageError

pytest.importorskip("tensorrt_rtx")

ONE = Settings(compute_capabilities=("8.6",), flavour="tensorrt_rtx")


@pytest.fixture(scope="module")
def program():
    return small_cnn()


@pytest.fixture(scope="module")
def backend():
    return TensorRTBackend(Settings(flavour="tensorrt_rtx"))


@pytest.fixture(scope="module")
def artifact(backend, program, tmp_path_factory):
    return backend.lower(program, tmp_path_factory.mktemp("tensorrt") / "artifact", TargetOptions())


# ---- the artifact ----------------------------------------------------------------------------------
def test_one_engine_per_compute_capability(artifact):
    assert artifact.files == (
        *("model.sm86.engine", "model.sm89.engine", "model.sm120.engine"),
        *("model.onnx", "layers.json"),
    )
    assert len(set(artifact.sha256.values())) == 5  # each is built for its own
    assert [entry["compute_capability"] for entry in artifact.metadata["engines"]] == ["8.6", "8.9", "12.0"]
    verify_files(artifact)
    assert open_artifact(artifact.folder) == artifact


def test_nothing_is_claimed_that_was_not_run(artifact):
    text = (artifact.folder / "artifact.json").read_text() + (artifact.folder / "layers.json").read_text()
    assert artifact.metadata["executed"] is False and artifact.metadata["not_executed_because"]
    assert "latency" not in text and '_s"' not in text
    assert str(artifact.folder) not in text


def test_the_contract_is_at_fixed_shapes(backend, program, artifact, tmp_path):
    assert artifact.inputs[0].shape == (1, 3, 16, 16) and artifact.outputs[0].shape == (1, 10)
    four = TensorRTBackend(ONE).lower(program, tmp_path / "four", TargetOptions(shapes={"x": (4, 3, 16, 16)}))
    assert four.inputs[0].shape == (4, 3, 16, 16) and four.outputs[0].shape == (4, 10)
    assert program.graph.outputs[0].shape[0] == "N"  # the program itself is as it was


def test_every_node_has_its_layers(artifact, program):
    record = json.loads((artifact.folder / "layers.json").read_text())
    assert record["schema"] == "sartor.tensorrt.layers/1" and record["rejected"] == 0
    layers = {entry["node"]: entry["layers"] for entry in record["nodes"]}
    assert list(layers) == [n.name for n in program.nodes()]
    assert layers["conv1"] == ["conv1"] and all(layers.values())
    assert ["w2", "CONSTANT"] in record["inserted"]
    (whole,) = record["fused"].values()  # this compiler makes one layer of it all
    assert set(whole) == set(layers)


def test_building_again_gives_the_same_bytes_in_this_process_and_in_another(artifact, program, tmp_path):
    """Not promised by the vendor: if this fails with another version, say so in docs/adr/0009."""
    again = TensorRTBackend(Settings(flavour="tensorrt_rtx")).lower(program, tmp_path / "a", TargetOptions())
    assert again.sha256 == artifact.sha256
    apart = isolation.lower("tensorrt", program, tmp_path / "b", TargetOptions())
    assert apart.sha256 == artifact.sha256


def test_precisions_are_properties_of_the_program(backend, program, artifact, tmp_path):
    from sartor.passes.base import Context
    from sartor.passes.pipeline import Pipeline

    draw = np.random.default_rng(0).standard_normal
    data = [({"x": draw((1, 3, 16, 16)).astype(np.float32)}, None) for _ in range(4)]
    context = Context(data={"calibration": data})
    quantized = Pipeline.parse("fold-batch-norm,quantize").run(program, context).program
    for made, precision in ((quantized, "int8"), (half(), "f16")):
        lowered = TensorRTBackend(ONE).lower(made, tmp_path / precision, TargetOptions(precision=precision))
        assert lowered.precision == precision
        for other in {"f32", "f16", "int8"} - {precision}:
            with pytest.raises(BackendError, match="precision that it is lowered for"):
                backend.lower(made, tmp_path / "wrong", TargetOptions(precision=other))
    text = (tmp_path / "int8" / "layers.json").read_text()
    assert json.loads(text)["rejected"] == 0 and '"QuantizeLinear"' in text
    assert not (tmp_path / "wrong").exists()


def half():
    """A float16 convolution between float32 inputs and outputs."""
    weights = {"w": np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float16)}
    nodes = [
        node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        node("Conv", ["a", "w"], ["b"]),
        node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    return program_from_nodes(nodes, {"x": ("N", 8, 8, 8)}, ["y"], weights)


# ---- legality --------------------------------------------------------------------------------------
def test_legality_calls_no_vendor_tool(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from backend_programs import small_cnn\n"
        "from sartor import backends\nfrom sartor.backends.protocol import TargetOptions\n"
        "assert backends.get('tensorrt').legality(small_cnn(8), TargetOptions()).ok\n"
        "assert not [m for m in sys.modules if m.startswith('tensorrt')], sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "tests"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def resize(**attributes):
    scales = attributes.pop("scales", [1, 1, 2, 2])
    shape = attributes.pop("shape", (1, 2, 4, 4))
    extra = {"roi": np.asarray(attributes.pop("roi"), np.float32)} if "roi" in attributes else {}
    nodes = [node("Resize", ["x", *(["roi"] if extra else [""]), "s"], ["y"], "here", **attributes)]
    return program_from_nodes(nodes, {"x": shape}, ["y"], {"s": np.asarray(scales, np.float32), **extra})


def one(op_type, shape=(2, 3, 8, 8), weights=None, dtype=TensorProto.FLOAT, inputs=("x",), **attributes):
    nodes = [node(op_type, [*inputs, *(weights or {})], ["y"], "here", **attributes)]
    return program_from_nodes(nodes, dict.fromkeys(inputs, shape), ["y"], weights, dtype=dtype)


def quantized_with(zero, axis=None):
    n = 3 if axis is not None else 1
    scale, zeros = np.full(n, 0.1, np.float32), np.full(n, zero, np.int8)
    extra = {"axis": axis} if axis is not None else {}
    weights = {"s": scale if n > 1 else scale[0], "z": zeros if n > 1 else zeros[0]}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "here", **extra),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], "dq", **extra),
    ]
    return program_from_nodes(nodes, {"x": (1, 3, 4)}, ["y"], weights)


ILLEGAL = {
    "unsupported-operator": lambda: one("BitwiseNot", dtype=TensorProto.INT32),
    "pool-dilations": lambda: one("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
    "lp-norm": lambda: one("LpPool", kernel_shape=[2, 2], p=3),
    "integer-mod": lambda: one("Mod", (2, 3), {"w": np.ones(3, np.float32)}, fmod=0),
    "scatter-reduction": lambda: one(
        "ScatterND", (4,), {"i": np.array([[1]]), "u": np.ones(1, np.float32)}, reduction="add"
    ),
    "reduced-type": lambda: one("ReduceMax", (2, 3), {"a": np.array([1])}, TensorProto.BOOL),
    "matmul-vector": lambda: program_from_nodes(
        [node("MatMul", ["x", "w"], ["y"], "here")], {"x": (3,)}, ["y"], {"w": np.ones((2, 3, 4), np.float32)}
    ),
    "zero-point": lambda: quantized_with(3, axis=1),
    "element-type": lambda: one("Relu", dtype=TensorProto.DOUBLE),
    "int8-arithmetic": lambda: one("Neg", dtype=TensorProto.INT8),
    "resize-coordinates": lambda: resize(
        coordinate_transformation_mode="tf_crop_and_resize", roi=[0, 0, 0.1, 0, 1, 1, 1, 1]
    ),
    "resize-antialias": lambda: resize(mode="linear", antialias=1, scales=[1, 1, 0.5, 0.5]),
    "resize-axes": lambda: resize(mode="linear", scales=[1, 2, 2, 2, 2], shape=(1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("rule", ILLEGAL)
def test_illegal_programs_are_stopped_by_their_rule_and_the_parser_agrees(rule, backend, tmp_path):
    program = ILLEGAL[rule]()
    precision = "int8" if rule == "zero-point" else "f32"
    broken = backend.legality(program, TargetOptions(precision=precision)).violations
    assert [(f.node, f.rule) for f in broken if f.node != "dq"] == [("here", rule)]
    with pytest.raises(BackendError, match=rf"\[{rule}\]"):
        backend.lower(program, tmp_path / "out", TargetOptions(precision=precision))
    assert not list(tmp_path.iterdir())
    if rule not in SILENT:
        backend.legalize(program).save(tmp_path / "model.onnx")
        with pytest.raises(BackendError, match="TensorRT"):
            builder.Parsed(builder.Vendor(settings.RTX), tmp_path / "model.onnx")


def test_model_rules():
    backend = TensorRTBackend(ONE)

    def broken(program):
        return [finding.rule for finding in backend.legality(program, TargetOptions()).violations]

    newer = small_cnn(8)
    newer.model.opset_imports[""] = 26
    assert broken(newer) == ["opset-version"]
    assert broken(one("Relu", (1,) * 9)) == ["tensor-rank"]
    big = {"w": np.array([2**40])}
    assert broken(one("Add", (2,), big, TensorProto.INT64)) == ["int64-range"]
    assert not broken(one("Add", (2,), {"w": np.array([2**31 - 1])}, TensorProto.INT64))


def test_an_operator_of_nobody_is_found_by_its_node():
    nodes = [
        node("Relu", ["x"], ["r"], "strange"),
        node(
            "Resize", ["r", "", "s"], ["y"], "here", mode="linear", antialias=1
        ),  # one that surgery looks at
    ]
    weights = {"s": np.float32([1, 1, 2, 2])}
    program = program_from_nodes(nodes, {"x": (1, 2, 4, 4)}, ["y"], weights)
    next(program.nodes()).domain = "com.example"
    found = TensorRTBackend(ONE).legality(program, TargetOptions()).violations
    assert ("strange", "operator-domain") in [(f.node, f.rule) for f in found]


def test_turing_has_no_float32_products(program, tmp_path):
    turing = TensorRTBackend(Settings(compute_capabilities=("7.5", "8.6"), flavour="tensorrt_rtx"))
    assert [(f.node, f.rule) for f in turing.legality(program, TargetOptions()).violations] == [
        ("linear", "turing-gemm")
    ]
    convolution = one("Conv", weights={"w": np.ones((4, 3, 3, 3), np.float32)})
    lowered = turing.lower(convolution, tmp_path / "out", TargetOptions())
    assert "model.sm75.engine" in lowered.files


def test_an_uint8_image_is_taken():
    backend = TensorRTBackend(ONE)
    assert backend.legality(one("Cast", dtype=TensorProto.UINT8, to=1), TargetOptions()).ok
    nodes = [node("Identity", ["x"], ["y"])]
    program = program_from_nodes(nodes, {"x": (2,)}, ["y"], dtype=TensorProto.UINT8)
    assert not backend.legality(program, TargetOptions()).ok


@pytest.fixture(scope="module")
def vendor():
    return builder.Vendor(settings.RTX)


SAMPLE = (
    *("AveragePool", "BitShift", "Clip", "Col2Im", "DFT", "Gather", "GridSample", "LayerNormalization"),
    *("MatMul", "MaxPool", "Mod", "RNN", "ReduceMax", "Resize", "ScatterElements", "Slice", "Where"),
)


SILENT = {"element-type", "int8-arithmetic", "precision"}  # the parser takes it for something else


def test_rules_say_what_the_parser_says(vendor, tmp_path):
    """Of ONNX's node tests: a legal one is parsed, and one that breaks a rule about nodes is not."""
    backend = TensorRTBackend(ONE)
    counts = {True: 0, False: 0}
    for op_type in SAMPLE:
        for case in suite.node_cases([op_type])[::6]:
            program = _loaded(case, tmp_path)
            if program is None:
                continue
            report = backend.legality(program, TargetOptions())
            _at_fixed_shapes(backend.legalize(program), TargetOptions()).save(tmp_path / "legal.onnx")
            try:
                builder.Parsed(vendor, tmp_path / "legal.onnx")
                taken = True
            except BackendError:
                taken = False
            rules = {finding.rule for finding in report.violations} - SILENT
            assert taken or not report.ok, f"{case.name} is legal and refused"
            assert not (taken and rules), f"{case.name} breaks {rules} and is taken"
            counts[taken] += 1
    assert counts[True] > 15 and counts[False] > 8, counts


def _loaded(case, folder):
    positions = {"Slice": (1, 2, 3, 4), "Resize": (1, 2, 3), "Clip": (1, 2), "ReduceMax": (1,), "DFT": (1, 2)}
    model = suite.bake(case, suite.static_operands(case, {**positions, "Col2Im": (1, 2)}))
    (folder / "case.onnx").write_bytes(model.SerializeToString())
    shapes = {value.name: case.inputs[value.name].shape for value in model.graph.input}
    try:
        return sartor.load(folder / "case.onnx", shapes=shapes)
    except SartorError:
        return None


# ---- refusals of parser and builder ----------------------------------------------------------------
def test_the_parser_s_refusals_are_recorded_node_by_node(vendor, tmp_path):
    nodes = [
        node("Relu", ["x"], ["a"], "first"),
        node("MaxPool", ["a"], ["b"], "dilated", kernel_shape=[2, 2], dilations=[2, 2]),
        node("LpPool", ["b"], ["y"], "third norm", kernel_shape=[2, 2], p=3),
    ]
    program_from_nodes(nodes, {"x": (1, 2, 8, 8)}, ["y"]).save(tmp_path / "model.onnx")
    with pytest.raises(
        BackendError, match=r"does not take 2 of 3 nodes. Node 'dilated' \(MaxPool\)"
    ) as caught:
        builder.Parsed(vendor, tmp_path / "model.onnx")
    assert any(note.startswith("Node 'third norm' (LpPool)") for note in caught.value.__notes__)


def test_the_builder_s_refusal_carries_its_log(program, tmp_path, monkeypatch):
    from sartor.backends.tensorrt import legality

    monkeypatch.setattr(legality, "_TURING", "none")  # as if there were no rule
    turing = TensorRTBackend(Settings(compute_capabilities=("7.5",), flavour="tensorrt_rtx"))
    with pytest.raises(BackendError, match=r"capability 7\.5: .*FP32 GEMM is not supported") as caught:
        turing.lower(program, tmp_path / "out", TargetOptions())
    assert "Last lines of its log" in caught.value.__notes__[0] and "[INFO]" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_settings_are_validated(tmp_path):
    for bad in ((), ("9.0",), ("8.6", "8.6")):
        with pytest.raises(UsageError, match=r"list each once, from 7\.5"):
            Settings(compute_capabilities=bad)
    with pytest.raises(UsageError, match="Unknown TensorRT flavour 'trt'"):
        Settings(flavour="trt")
    with pytest.raises(UsageError, match="times nothing"):
        Settings(flavour="tensorrt_rtx", timing_cache=settings.TimingCache(tmp_path, "0"))


def test_a_timing_cache_is_pinned_by_its_digest(program, tmp_path):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"kernels")
    digest = "c1bd3e2e0eb7e2f3a3fb7ed3c6a1cf8ad2f8a0e3c0c5ae1f3bd3bd10b7ef3a2a"
    with pytest.raises(
        UsageError, match=r"is not the pinned one: its SHA-256 is [0-9a-f]{64}, expected c1bd"
    ):
        settings.TimingCache(path, digest).read()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        settings.TimingCache(tmp_path / "none", digest).read()
    pinned = Settings(timing_cache=settings.TimingCache(path, digest))
    with pytest.raises(UsageError, match="times nothing"):  # `auto` has chosen the flavour without one
        TensorRTBackend(pinned).lower(program, tmp_path / "out", TargetOptions())


def test_a_missing_package_is_one_line(monkeypatch, program, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    backend = TensorRTBackend(ONE)
    assert backend.legality(program, TargetOptions()).ok
    for call in (backend.capabilities, lambda: backend.lower(program, tmp_path / "out", TargetOptions())):
        with pytest.raises(UsageError, match=r"pip install 'sartor\[tensorrt\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_capabilities_and_grid(backend):
    found = backend.capabilities()
    assert found.name == "tensorrt" and found.version.startswith("tensorrt_rtx 1.")
    assert backend.channel_grid("Conv", "int8") == 32 and backend.channel_grid("Conv", "f16") == 8
    assert backend.channel_grid("Relu", "int8") == 1
    text = " ".join(found.notes)
    assert "proprietary" in text and "untested" in text and "not measured" in text
    assert found.not_run_here == cuda.why_not(settings.DEFAULT_CAPABILITIES)


# ---- targets of one's own --------------------------------------------------------------------------
def test_an_instance_with_other_settings_is_another_target(tmp_path, monkeypatch, program):
    (tmp_path / "site").mkdir()
    source = (
        "from sartor.backends.tensorrt import Settings, TensorRTBackend\n"
        "board = TensorRTBackend(Settings(compute_capabilities=('8.9',)), name='board')\n"
    )
    null_backend.install(tmp_path / "site", {"board": "board_target:board"})
    (tmp_path / "site" / "board_target.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    backends.REGISTRY.refresh()
    try:
        lowered = isolation.lower("board", program, tmp_path / "out", TargetOptions())
    finally:
        monkeypatch.undo()
        backends.REGISTRY.refresh()
    assert lowered.target == "board" and lowered.files[0] == "model.sm89.engine"


def test_without_a_gpu_loading_says_what_is_missing(backend, artifact, program):
    if not cuda.why_not(()):
        pytest.skip("this machine has an NVIDIA GPU")
    for call in (
        lambda: backend.load(artifact, TargetOptions()),
        lambda: backend.profile(artifact, TargetOptions(), 2),
        lambda: backend.compile(program.to_bytes(), TargetOptions(shapes={"x": (1, 3, 16, 16)})),
    ):
        with pytest.raises(BackendError, match="run on an NVIDIA GPU, and its driver 'libcuda"):
            call()
    with pytest.raises(UsageError, match="lowered for precision 'f32', not 'f16'"):
        backend.load(artifact, TargetOptions(precision="f16"))
    wrong = dataclasses.replace(artifact, sha256={**artifact.sha256, "model.onnx": "0"})
    with pytest.raises(BackendError, match="does not match its manifest"):
        backend.load(wrong, TargetOptions())
