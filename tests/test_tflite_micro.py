"""TensorFlow Lite Micro: the same file, its numbers, and the arena that its allocator plans."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.backends.tflite import legality as tflite
from sartor.backends.tflite_micro import arena, legality
from sartor.errors import BackendError, UsageError
from sartor.ir.fx import run_twin

F32 = TargetOptions()


pytestmark = pytest.mark.usefixtures("cache_of_its_own")


@pytest.fixture(scope="module")
def program():
    return small_cnn()


@pytest.fixture(scope="module")
def lowered(program, tmp_path_factory):
    return backends.get("tflite-micro").lower(program, tmp_path_factory.mktemp("micro") / "artifact", F32)


def test_it_equals_the_reference_and_is_the_file_of_tflite(program, lowered, tmp_path):
    backend = backends.get("tflite-micro")
    session = backend.load(lowered, F32)
    once = session.prepare(random_inputs(program, seed=1))
    for seed in (3, 4):
        feeds = random_inputs(program, seed=seed)
        assert relative_error(run_twin(program, feeds), session.run(feeds)) < 1e-5
        once()  # writes its own inputs each time
    again = session.run(random_inputs(program, seed=3))
    assert relative_error(run_twin(program, random_inputs(program, seed=3)), again) < 1e-5
    other = backends.get("tflite").lower(program, tmp_path / "out", F32)
    assert other.sha256 == lowered.sha256


def test_the_arena_is_what_the_activations_need(lowered):
    """conv1 reads and conv0 keeps [1, 16, 16, 32] floats for the addition: three of them at once."""
    found = lowered.metadata["arena_bytes"]
    assert found["total"] == found["head"] + found["tail"]
    assert found["head"] == 3 * 16 * 16 * 32 * 4
    assert 0 < found["tail"] < 8192
    session = backends.get("tflite-micro").load(lowered, F32)
    assert session.settings["arena_bytes"] == found["total"]


def test_an_arena_that_is_too_small_is_an_error(lowered):
    with pytest.raises(BackendError, match="TensorFlow Lite Micro could not load the model") as raised:
        arena.create(lowered.main_file.read_bytes(), 4096)
    assert raised.value.__notes__[0]


def test_what_it_has_no_kernel_for_fails_lowering(tmp_path, monkeypatch):
    """By a rule, before anything is converted; and where no rule says it, by the allocator."""
    nodes = [node("Pow", ["x", "e"], ["y"], "power")]
    program = program_from_nodes(nodes, {"x": (1, 4)}, ["y"], {"e": np.float32(2.7)})
    backend = backends.get("tflite-micro")
    with pytest.raises(BackendError, match=r"Node 'power': The exponent is the constant 2.*\[square\]"):
        backend.lower(program, tmp_path / "out", F32)
    monkeypatch.setattr(legality, "rules", lambda: tflite.RULES)
    with pytest.raises(BackendError, match=r"TensorFlow Lite Micro could not load the model: .*POW"):
        backend.lower(program, tmp_path / "out", F32)
    assert not (tmp_path / "out").exists()


SPELLED = (
    *(("Gelu", {}), ("Gelu", {"approximate": "tanh"}), ("HardSigmoid", {}), ("Elu", {"alpha": 0.7})),
    *(("Softplus", {}), ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 0]})),
    ("Pad", {"mode": "reflect"}),
)


def test_operators_that_are_spelled_otherwise(tmp_path):
    """What has no kernel under its own name computes the same under others: one conversion for all."""
    nodes = [
        node(op_type, ["x", *(["pads"] if op_type == "Pad" else [])], [f"y{i}"], f"n{i}", **attributes)
        for i, (op_type, attributes) in enumerate(SPELLED)
    ]
    outputs = [f"y{i}" for i in range(len(SPELLED))]
    pads = np.array([0, 0, 1, 2, 0, 0, 2, 1])
    program = program_from_nodes(nodes, {"x": (1, 3, 5, 6)}, outputs, {"pads": pads})
    backend = backends.get("tflite-micro")
    artifact = backend.lower(program, tmp_path / "out", F32)
    feeds = {"x": 3 * np.random.default_rng(0).standard_normal((1, 3, 5, 6)).astype(np.float32)}
    expected, found = run_twin(program, feeds), backend.load(artifact, F32).run(feeds)
    for (op_type, _), name in zip(SPELLED, outputs, strict=True):
        assert relative_error({name: expected[name]}, {name: found[name]}) < 1e-5, op_type
    kinds = {o["op_type"] for o in artifact.metadata["operators"]}
    assert "SELECT_V2" in kinds and "MAXIMUM" in kinds
    assert not {"SELECT", "GELU", "RELU_0_TO_1", "STABLEHLO_REDUCE_WINDOW"} & kinds


def test_batch_and_precision(program, lowered, tmp_path):
    backend = backends.get("tflite-micro")
    with pytest.raises(BackendError, match=r"The batch is 1.*'x' has shape \[2, 3, 16, 16\]"):
        backend.lower(program, tmp_path / "out", TargetOptions(shapes={"x": (2, 3, 16, 16)}))
    with pytest.raises(UsageError, match="'f16' is not supported by backend 'tflite-micro'"):
        backend.lower(program, tmp_path / "out", TargetOptions(precision="f16"))
    with pytest.raises(UsageError, match="has type float64"):
        backend.load(lowered, F32).run({"x": np.zeros((1, 3, 16, 16))})


def test_profile_is_of_the_whole_model(lowered):
    (kernel,) = backends.get("tflite-micro").profile(lowered, F32, 3)
    assert {"conv0", "conv1", "linear"} <= set(kernel.nodes) and kernel.runs == 3 and kernel.median_s > 0


def test_a_missing_extra_says_what_to_install(lowered, monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite_micro.python.tflite_micro.runtime", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[tflite-micro\]'"):
        backends.get("tflite-micro").load(lowered, F32)
