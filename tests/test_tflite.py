"""TensorFlow Lite: numbers against the float64 reference, the program's own quantization, names, cache and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backend_programs import draw, mixed_cnn, quantized, small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error
from onnx import TensorProto

from sartor import backends
from sartor.backends.artifact import open_artifact
from sartor.backends.protocol import TargetOptions
from sartor.backends.tflite import cache, lower, measure, profiler
from sartor.backends.tflite.flatbuffer import Flatbuffer
from sartor.errors import BackendError, UsageError
from sartor.ir.fx import run_twin

F32, F16, INT8 = (TargetOptions(precision=p) for p in ("f32", "f16", "int8"))


pytestmark = pytest.mark.usefixtures("cache_of_its_own")


@pytest.fixture(scope="module")
def program():
    return small_cnn()


@pytest.fixture(scope="module")
def lowered(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f32") / "artifact"
    return backends.get("tflite").lower(program, folder, F32)


@pytest.fixture(scope="module")
def int8_program():
    return quantized(mixed_cnn())


@pytest.fixture(scope="module")
def int8(int8_program, tmp_path_factory):
    return backends.get("tflite").lower(int8_program, tmp_path_factory.mktemp("int8") / "artifact", INT8)


# ---- numbers -------------------------------------------------------------------------------------
def test_f32_equals_the_reference(program, lowered):
    session = backends.get("tflite").load(lowered, F32)
    feeds = random_inputs(program, seed=3)
    expected = run_twin(program, feeds)
    assert relative_error(expected, session.run(feeds)) < 1e-5
    assert (
        relative_error(run_twin(small_cnn(seed=1), feeds), session.run(feeds)) > 1e-2
    )  # the tolerance can fail


def test_prepared_runs_keep_their_inputs(program, lowered):
    session = backends.get("tflite").load(lowered, TargetOptions(threads=2))
    assert session.settings["threads"] == 2
    first, second = random_inputs(program, seed=3), random_inputs(program, seed=4)
    expected = session.run(second)
    session.run(first)
    once = session.prepare(second)
    for _ in range(3):
        once()
    index = session._output_index["y"]
    assert np.array_equal(session._interpreter.get_tensor(index), expected["y"])
    kept = session.run(first)["y"]
    before = kept.copy()
    session.run(second)
    assert np.array_equal(kept, before)  # outputs are copies


def test_int8_runs_as_calibrated(int8_program, int8):
    """Within a few steps of the output's scale, which another calibration is far outside of."""
    session = backends.get("tflite").load(int8, INT8)
    for seed in range(4):
        feeds = {"x": draw(1, 3, 8, 8, seed=seed + 20)}
        expected, found = run_twin(int8_program, feeds), session.run(feeds)
        for name in ("y", "q"):
            step = float(int8_program.initializers[f"{name}/scale"].const_value.numpy())
            assert np.abs(found[name] - expected[name]).max() <= 2.01 * step
            assert expected[name].std() > 5 * step


def test_int8_weights_per_tensor_and_a_softmax_that_fits_stay_int8(tmp_path):
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "qx"),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dx"),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "dw"),
        node("MatMul", ["xd", "wd"], ["h"], "product"),
        node("QuantizeLinear", ["h", "hs", "xz"], ["hq"], "qh"),
        node("DequantizeLinear", ["hq", "hs", "xz"], ["hd"], "dh"),
        node("Softmax", ["hd"], ["s"], "softmax", axis=-1),
        node("QuantizeLinear", ["s", "ss", "sz"], ["sq"], "qs"),
        node("DequantizeLinear", ["sq", "ss", "sz"], ["y"], "dy"),
    ]
    integers = np.random.default_rng(0).integers(-127, 128, (12, 6)).astype(np.int8)
    constants = {
        **{"xs": np.float32(0.02), "xz": np.int8(3), "w": integers, "ws": np.float32(0.01), "wz": np.int8(0)},
        **{"hs": np.float32(0.05), "ss": np.float32(1 / 256), "sz": np.int8(-128)},
    }
    program = program_from_nodes(nodes, {"x": (4, 12)}, ["y"], constants)
    artifact = backends.get("tflite").lower(program, tmp_path / "out", INT8)
    kinds = [o["op_type"] for o in artifact.metadata["operators"]]
    assert kinds.count("DEQUANTIZE") == 1 and "SOFTMAX" in kinds  # that of the output alone
    feeds = {"x": draw(4, 12, seed=3)}
    found = backends.get("tflite").load(artifact, INT8).run(feeds)
    assert np.abs(found["y"] - run_twin(program, feeds)["y"]).max() <= 2.01 / 256


def test_int8_constants_with_a_zero_point(tmp_path):
    """An addend has one like any activation; the weights of a layer have none."""
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "qx"),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dx"),
        node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], "addend"),
        node("Add", ["xd", "bd"], ["s"], "bias"),
        node("QuantizeLinear", ["s", "ss", "xz"], ["sq"], "qs"),
        node("DequantizeLinear", ["sq", "ss", "xz"], ["y"], "ds"),
    ]
    integers = np.random.default_rng(0).integers(-100, 100, 6).astype(np.int8)
    constants = {
        **{"xs": np.float32(0.02), "xz": np.int8(3), "ss": np.float32(0.06)},
        **{"b": integers, "bs": np.float32(0.03), "bz": np.int8(17)},
    }
    program = program_from_nodes(nodes, {"x": (4, 6)}, ["y"], constants)
    backend = backends.get("tflite")
    artifact = backend.lower(program, tmp_path / "out", INT8)
    assert [o["op_type"] for o in artifact.metadata["operators"]] == ["QUANTIZE", "ADD", "DEQUANTIZE"]
    feeds = {"x": draw(4, 6, seed=3)}
    found = backend.load(artifact, INT8).run(feeds)
    assert np.abs(found["y"] - run_twin(program, feeds)["y"]).max() <= 1.01 * 0.06
    weights = {**constants, "b": integers.reshape(6, 1)}
    product = [*nodes[:3], node("MatMul", ["xd", "bd"], ["s"], "product"), *nodes[4:]]
    report = backend.legality(program_from_nodes(product, {"x": (4, 6)}, ["y"], weights), INT8)
    assert [(f.node, f.rule) for f in report.violations] == [("addend", "stored-parameters")]


def test_f16_halves_the_file(tmp_path):
    wide = small_cnn(64)
    narrow = wide.clone()
    arrays = {name: v.const_value.numpy() for name, v in narrow.initializers.items()}
    cast = [node("Cast", ["x"], ["x16"], "down", to=10), node("Cast", ["y16"], ["y"], "up", to=1)]
    proto = narrow.to_proto()
    middle = [
        node(
            n.op_type,
            [{"x": "x16"}.get(i, i) for i in n.input],
            [{"y": "y16"}.get(o, o) for o in n.output],
            n.name,
            **{a.name: (list(a.ints) or a.f or a.i) for a in n.attribute if a.name != "auto_pad"},
        )
        for n in proto.graph.node
    ]
    constants = {name: a.astype(np.float16) for name, a in arrays.items()}
    half = program_from_nodes([cast[0], *middle, cast[1]], {"x": (1, 3, 16, 16)}, ["y"], constants)
    backend = backends.get("tflite")
    artifact = backend.lower(half, tmp_path / "f16", F16)
    assert artifact.main_file.stat().st_size < 0.56 * sum(a.nbytes for a in arrays.values())
    feeds = random_inputs(wide)
    found = backend.load(artifact, F16).run(feeds)
    assert found["y"].dtype == np.float32
    assert relative_error(run_twin(half, feeds), found) < 2e-3


def test_pixels_that_are_repeated_are_one_operator(tmp_path):
    """By the rule of PyTorch's upsampling; another rounding of the positions takes the twin's own way."""
    floor = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        node("Resize", ["x", "", "two"], ["a"], "twice", **floor),
        node("Resize", ["x", "", "", "sizes"], ["b"], "ceiled", **{**floor, "nearest_mode": "ceil"}),
    ]
    constants = {"two": np.array([1, 1, 2, 3], np.float32), "sizes": np.array([1, 3, 8, 10], np.int64)}
    program = program_from_nodes(nodes, {"x": (1, 3, 4, 5)}, ["a", "b"], constants)
    backend = backends.get("tflite")
    artifact = backend.lower(program, tmp_path / "out", F32)
    kinds = [o["op_type"] for o in artifact.metadata["operators"] if o["nodes"] == ["twice"]]
    assert "RESIZE_NEAREST_NEIGHBOR" in kinds and not any(k.startswith("GATHER") for k in kinds)
    feeds = {"x": draw(1, 3, 4, 5, seed=4)}
    assert relative_error(run_twin(program, feeds), backend.load(artifact, F32).run(feeds)) < 1e-6


TRANSPOSED = {
    "appended": {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    "unequal": {"strides": [2, 2], "pads": [0, 1, 2, 0]},
    "unequal and appended": {"strides": [3, 2], "pads": [0, 1, 1, 0], "output_padding": [2, 1]},
    "beyond the kernel": {"strides": [4, 4], "output_padding": [3, 2]},
}


@pytest.fixture(scope="module")
def transposed_program():
    """One input for each of `TRANSPOSED`, which differ in what is cut off or appended."""
    nodes = [
        node("ConvTranspose", ["x", f"w{i}", f"b{i}"], [name.replace(" ", "_")], name, **attributes)
        for i, (name, attributes) in enumerate(TRANSPOSED.items())
    ]
    outputs = [name.replace(" ", "_") for name in TRANSPOSED]
    weights = {f"w{i}": draw(4, 3, 3, 3, seed=i) for i in range(len(TRANSPOSED))}
    weights |= {f"b{i}": draw(3, seed=i) + 0.5 for i in range(len(TRANSPOSED))}
    return program_from_nodes(nodes, {"x": ("N", 4, 5, 6)}, outputs, weights)


def test_transposed_convolutions_with_output_padding(transposed_program, tmp_path):
    backend = backends.get("tflite")
    artifact = backend.lower(transposed_program, tmp_path / "out", F32)
    feeds = {"x": draw(1, 4, 5, 6, seed=4)}
    expected = run_twin(transposed_program, feeds)
    found = backend.load(artifact, F32).run(feeds)
    for name, output in expected.items():
        assert relative_error({name: output}, {name: found[name]}) < 1e-5, name
    kinds = [o["op_type"] for o in artifact.metadata["operators"]]
    assert kinds.count("TRANSPOSE_CONV") == len(TRANSPOSED)


def test_transposed_convolutions_in_int8(transposed_program, tmp_path):
    backend = backends.get("tflite")
    program = quantized(transposed_program)
    artifact = backend.lower(program, tmp_path / "out", INT8)
    feeds = {"x": draw(1, 4, 5, 6, seed=4)}
    expected, found = run_twin(program, feeds), backend.load(artifact, INT8).run(feeds)
    for name, output in expected.items():
        step = float(program.initializers[f"{name}/scale"].const_value.numpy())
        assert np.abs(found[name] - output).max() <= 2.01 * step and output.std() > 5 * step, name


# ---- border --------------------------------------------------------------------------------------
def test_channel_last_files_keep_the_program_s_contract(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["y"], "relu"),
    ]
    program = program_from_nodes(nodes, {"x": (1, 3, 6, 9)}, ["y"], {"w": draw(4, 3, 3, 3)})
    feeds = {"x": draw(1, 3, 6, 9, seed=2)}
    expected = run_twin(program, feeds)
    counts = {}
    for name in ("tflite", "tflite-channel-last"):
        backend = backends.get(name)
        artifact = backend.lower(program, tmp_path / name, F32)
        counts[name] = artifact.metadata["transposes"]
        session = backend.load(artifact, F32)
        assert relative_error(expected, session.run(feeds)) < 1e-5
        shapes = [tuple(d["shape"]) for d in session._interpreter.get_input_details()]
        assert shapes == [(1, 6, 9, 3) if "channel" in name else (1, 3, 6, 9)]
        assert session.inputs[0].shape == (1, 3, 6, 9)
    assert counts["tflite"] == {"total": 2, "at_inputs": 1, "at_outputs": 1}
    assert counts["tflite-channel-last"] == {"total": 0, "at_inputs": 0, "at_outputs": 0}


def test_float16_at_the_border(tmp_path):
    """The file computes in float32; what goes in and comes out is what the program declares."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["y"], "relu"),
    ]
    weights = {"w": draw(16, 3, 3, 3).astype(np.float16)}
    program = program_from_nodes(nodes, {"x": (1, 3, 6, 9)}, ["y"], weights, dtype=TensorProto.FLOAT16)
    feeds = {"x": draw(1, 3, 6, 9, seed=2).astype(np.float16)}
    for name in ("tflite", "tflite-channel-last"):
        backend = backends.get(name)
        artifact = backend.lower(program, tmp_path / name, F16)
        session = backend.load(artifact, F16)
        assert session.inputs[0].dtype == "float16"
        found = session.run(feeds)
        assert found["y"].dtype == np.float16
        assert relative_error(run_twin(program, feeds), found) < 2e-3
        session.prepare(feeds)()
        with pytest.raises(UsageError, match="has type float32"):
            session.run({"x": feeds["x"].astype(np.float32)})
    assert backends.get("tflite").profile(open_artifact(tmp_path / "tflite"), F16, 2)


def test_images_of_uint8(tmp_path):
    """An input that is cast at once; between other operators there is no uint8."""
    nodes = [
        node("Cast", ["x"], ["f"], "widen", to=TensorProto.FLOAT),
        node("Conv", ["f", "w"], ["y"], "conv", pads=[1, 1, 1, 1]),
    ]
    weights = {"w": draw(4, 3, 3, 3)}
    program = program_from_nodes(nodes, {"x": (1, 3, 6, 9)}, ["y"], weights, dtype=TensorProto.UINT8)
    backend = backends.get("tflite")
    feeds = {"x": np.random.default_rng(0).integers(0, 256, (1, 3, 6, 9)).astype(np.uint8)}
    found = backend.load(backend.lower(program, tmp_path / "out", F32), F32).run(feeds)
    assert relative_error(run_twin(program, feeds), found) < 1e-5
    inside = [node("Max", ["x", "x"], ["m"], "most"), *nodes]
    inside[1] = node("Cast", ["m"], ["f"], "widen", to=TensorProto.FLOAT)
    other = program_from_nodes(inside, {"x": (1, 3, 6, 9)}, ["y"], weights, dtype=TensorProto.UINT8)
    report = backend.legality(other, F32)
    assert [(f.rule, "'x' is uint8" in f.observed) for f in report.violations] == [("element-types", True)]
    micro = backends.get("tflite-micro").legality(program, F32)  # its TRANSPOSE has no uint8
    assert [f.rule for f in micro.violations] == ["boundary-types"]


def test_integers_of_64_bits_and_single_numbers(tmp_path):
    nodes = [
        node("Gather", ["table", "i"], ["g"], "gather", axis=0),
        node("Mul", ["g", "s"], ["y"], "scale"),
        node("Add", ["i", "one"], ["next"], "count"),
    ]
    made = program_from_nodes(
        nodes[:2], {"s": ()}, ["y"], {"table": draw(7, 4), "i": np.array([3, 1], np.int64)}
    )
    found = backends.get("tflite").compile(made.to_bytes(), F32).run({"s": np.float32(2).reshape(())})
    assert relative_error(run_twin(made, {"s": np.float32(2).reshape(())}), found) < 1e-6
    ints = program_from_nodes(nodes[2:], {"i": (2,)}, ["next"], {"one": np.array(1, np.int64)}, dtype=7)
    backend = backends.get("tflite")
    session = backend.load(backend.lower(ints, tmp_path / "out", F32), F32)
    results = session.run({"i": np.array([5, -9], np.int64)})
    assert results["next"].dtype == np.int64 and results["next"].tolist() == [6, -8]
    with pytest.raises(
        UsageError, match=r"Input 'i' holds 4294967301; the flatbuffer's integers have 32 bits"
    ):
        session.run({"i": np.array([5, 2**32 + 5], np.int64)})


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "takes exactly 'x'"),
        ({"x": np.zeros((1, 3, 16, 16))}, "has type float64"),
        ({"x": np.zeros((2, 3, 16, 16), np.float32)}, r"takes \[1, 3, 16, 16\]"),
    ],
)
def test_wrong_inputs_are_named(lowered, feeds, text):
    with pytest.raises(UsageError, match=text):
        backends.get("tflite").load(lowered, F32).run(feeds)


def test_an_artifact_has_one_precision_and_one_shape(lowered):
    backend = backends.get("tflite")
    with pytest.raises(UsageError, match="lowered for precision 'f32'"):
        backend.load(lowered, INT8)
    with pytest.raises(UsageError, match=r"cannot have shape \[2, 3, 16, 16\]"):
        backend.load(lowered, TargetOptions(shapes={"x": (2, 3, 16, 16)}))


def test_damaged_files_are_refused(program, tmp_path):
    backend = backends.get("tflite")
    artifact = backend.lower(program, tmp_path / "out", F32)
    path = artifact.main_file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackendError, match="does not match its manifest"):
        backend.load(artifact, F32)


# ---- names and times -----------------------------------------------------------------------------
def test_operators_know_their_nodes(lowered):
    assert [(o["op_type"], sorted(o["nodes"])) for o in lowered.metadata["operators"]] == [
        ("TRANSPOSE", []),
        ("CONV_2D", ["conv0", "norm0", "relu0"]),
        ("CONV_2D", ["conv1"]),
        ("ADD", ["add1", "relu1"]),
        ("MEAN", ["pool"]),
        ("FULLY_CONNECTED", ["flatten", "linear"]),
    ]
    names = {t.name.decode() for t in Flatbuffer(lowered.main_file.read_bytes()).graph.tensors}
    assert {"x", "y", "relu0/value", "conv1/constant"} <= names and not any("torch" in n for n in names)


def test_nodes_that_lost_their_names_go_with_what_they_read(program):
    from sartor.backends.tflite.flatbuffer import Operator

    told = [
        Operator("TRANSPOSE", (), ("t",)),
        Operator("CONV_2D", ("conv0",), ("a",)),
        Operator("ADD", ("add1",), ("b",)),
    ]
    found = lower._completed(told, program)
    assert [o.nodes for o in found] == [
        (),
        ("conv0", "norm0", "relu0", "conv1"),
        ("add1", "relu1", "pool", "flatten", "linear"),
    ]


def test_profile_names_the_nodes(lowered):
    kernels = backends.get("tflite").profile(lowered, F32, 5)
    assert {"conv0", "conv1", "linear"} <= {name for kernel in kernels for name in kernel.nodes}
    assert all(k.runs == 5 and 0 <= k.median_s < 1 for k in kernels)
    convolutions = [k for k in kernels if k.op_type == "CONV_2D"]
    assert [k.implementation.startswith("Convolution") for k in convolutions] == [True, True]


def test_kernels_are_aligned_with_operators():
    def event(name, operator=-1):
        return profiler.Event(name, 0.0, operator)

    op_types = ["TRANSPOSE", "CONV_2D", "RESHAPE", "ADD", "TOPK_V2", "CONV_2D"]
    events = [
        event("Copy (NC, X32)"),  # of the delegate's own: nothing before it
        event("Transpose (ND, X32) Transpose"),
        event("Convolution (NHWC, F32) IGEMM"),
        event("Add (ND)"),
        event("Clamp (NC)"),  # the activation of the addition
        event("TOPK_V2", 4),
        event("Convolution (NHWC, F32) DWConv"),
    ]
    assert measure.assigned(events, op_types) == [-1, 0, 1, 3, 3, 4, 5]


def test_files_are_equal_and_aligned(program, lowered, tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "another"))
    again = backends.get("tflite").lower(program, tmp_path / "again", F32)
    assert again.sha256 == lowered.sha256 and open_artifact(tmp_path / "again") == again
    content = again.main_file.read_bytes()
    flatbuffer = Flatbuffer(content)
    for buffer in flatbuffer.model.buffers:
        if buffer.data is not None and len(buffer.data):
            data = bytes(buffer.data)
            starts = [i for i in range(0, len(content), 16) if content[i : i + len(data)] == data]
            assert starts, f"{len(data)} bytes at no multiple of 16"


# ---- cache ---------------------------------------------------------------------------------------
def conversion(content=b"abc"):
    return content, {"operators": []}


def no_conversion():
    raise AssertionError("converted although it is kept")


def test_conversions_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    key = cache.key_of("0" * 64, {"precision": "f32"})
    assert cache.kept(key, conversion) == conversion()
    assert cache.kept(key, no_conversion) == conversion()
    assert (
        cache.key_of("0" * 64, {"precision": "int8"}) != key != cache.key_of("1" * 64, {"precision": "f32"})
    )
    monkeypatch.setattr(cache, "_version", lambda package: "0")
    assert cache.key_of("0" * 64, {"precision": "f32"}) != key


def test_what_conversions_depend_on_is_hashed(tmp_path, monkeypatch):
    root = Path(cache.__file__).parents[2]
    for name in cache._SOURCES:
        assert (root / name).exists(), name
    before = cache._sources_sha256()
    cache._sources_sha256.cache_clear()
    monkeypatch.setattr(cache, "_SOURCES", cache._SOURCES[:-1])
    assert cache._sources_sha256() != before
    cache._sources_sha256.cache_clear()


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:50] + b"x" + d[51:], lambda d: d[:20]]
)
def test_damaged_entries_are_replaced(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    cache.kept("k", conversion)
    entry = next(tmp_path.rglob("*.tflite-entry"))
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache.kept("k", lambda: conversion(b"new")) == conversion(b"new")
    assert cache.kept("k", no_conversion) == conversion(b"new")


def test_the_cache_is_bounded_and_never_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LIMIT_BYTES", 2500)
    for number in range(4):
        cache.kept(f"k{number}", lambda: conversion(bytes(1000)))
        cache.kept("k0", lambda: conversion(bytes(1000)))  # used again and again
    assert sorted(p.name for p in (tmp_path / "tflite").iterdir()) == ["k0.tflite-entry", "k3.tflite-entry"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "file"))
    assert cache.kept("k", conversion) == conversion()


def test_a_hit_imports_no_converter(program, lowered, tmp_path):
    """The second lowering of a program takes neither torch nor litert-torch."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from backend_programs import small_cnn\n"
        "from sartor import backends\nfrom sartor.backends.protocol import TargetOptions\n"
        "backends.get('tflite').lower(small_cnn(), Path(sys.argv[2]), TargetOptions())\n"
        "assert not {'torch', 'litert_torch', 'jax'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120)
    assert open_artifact(tmp_path / "out").sha256 == lowered.sha256


# ---- refusals ------------------------------------------------------------------------------------
def test_a_missing_extra_says_what_to_install(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[tflite\]'"):
        backends.get("tflite").lower(program, tmp_path / "out", F32)
    assert not (tmp_path / "out").exists()


def test_precisions_must_agree(program, int8_program, tmp_path):
    backend = backends.get("tflite")
    with pytest.raises(BackendError, match=r"written in the precision.*\[precision\]"):
        backend.lower(program, tmp_path / "out", INT8)
    with pytest.raises(BackendError, match=r"written in the precision.*\[precision\]"):
        backend.lower(int8_program, tmp_path / "out", F32)
    with pytest.raises(UsageError, match="'bf16' is not supported by backend 'tflite'"):
        backend.lower(program, tmp_path / "out", TargetOptions(precision="bf16"))


def test_illegal_programs_are_refused_before_the_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(lower, "_convert", lambda *_: pytest.fail("the converter was called"))
    nodes = [node("Hardmax", ["x"], ["y"], "pick", axis=-1)]
    program = program_from_nodes(nodes, {"x": (2, 4)}, ["y"])
    report = backends.get("tflite").legality(program, F32)
    assert [(f.node, f.rule) for f in report.violations] == [("pick", "not-converted")]
    with pytest.raises(BackendError, match=r"cannot run this program\. Node 'pick'"):
        backends.get("tflite").lower(program, tmp_path / "out", F32)


def test_converter_errors_are_one_sentence(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    import litert_torch

    def broken(*_, **__):
        raise RuntimeError("first line\n" + "x" * 5000)

    monkeypatch.setattr(litert_torch, "convert", broken)
    with pytest.raises(
        BackendError, match="litert-torch could not convert the model: RuntimeError: first line"
    ) as e:
        backends.get("tflite").lower(program, tmp_path / "out", F32)
    assert len(str(e.value)) < 700 and not (tmp_path / "out").exists()


def test_capabilities_are_plain_data():
    found = backends.get("tflite").capabilities()
    assert found.name == "tflite" and "int8" in found.precisions and not found.control_flow
    json.dumps(found.to_dict())
