"""TensorFlow Lite is verified as the other targets are. Artifacts with all values are cached, so each is made once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from backend_programs import small_cnn

import sartor
from sartor import lowered
from sartor.backends import isolation
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError
from sartor.lowered.probes import with_taps
from sartor.passes.base import Context

F32, INT8 = TargetOptions(), TargetOptions(precision="int8")


pytestmark = pytest.mark.usefixtures("cache_of_its_own")


TARGETS = ("tflite", "tflite-micro")


@pytest.fixture(scope="module")
def tapped():
    """A program whose outputs are all of its values: the probe of it is itself."""
    return with_taps(small_cnn(8))[0]


@pytest.fixture(scope="module")
def quantized():
    """The same in int8."""
    draw = np.random.default_rng(3).standard_normal
    calibration = [({"x": draw((1, 3, 16, 16)).astype(np.float32)}, None) for _ in range(4)]
    pipeline = sartor.Pipeline.parse("fold-batch-norm,quantize")
    return pipeline.run(small_cnn(8), Context(data={"calibration": calibration})).program


@pytest.mark.parametrize("target", TARGETS)
def test_floats_pass(tapped, target, tmp_path):
    artifact = isolation.lower(target, tapped, tmp_path / "a", F32)
    result = lowered.verify(tapped, artifact, F32, samples=2)
    assert result.passed and result.target == target and 0 < result.max_rel_error < 1e-4


def test_the_first_node_that_differs_is_named(tapped, tmp_path, monkeypatch):
    """The program has another weight than what the target computes."""
    artifact = isolation.lower("tflite", tapped, tmp_path / "a", F32)
    other = tapped.clone()
    array = other.initializer_array("w1").copy()
    array[0] += 0.5
    other.initializers["w1"].const_value = ir.tensor(array, name="w1")
    original = isolation.lower
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, tapped, f, o))
    result = lowered.verify(other, artifact, F32, samples=1)
    assert not result.passed and result.first_divergent_node.startswith("'conv1' (Conv)")


@pytest.mark.parametrize("target", TARGETS)
def test_int8_passes_and_says_that_its_steps_were_not_seen(quantized, target, tmp_path, monkeypatch):
    """litert-torch 0.10 converts no program whose outputs are integers; it is asked for one of those here."""
    artifact = isolation.lower(target, quantized, tmp_path / "a", INT8)
    original = isolation.lower

    def lower(name, program, folder, options):
        if name == "tflite-micro" or folder.name == "quantized-2":
            raise BackendError("litert-torch could not convert the model.")
        return original(name, program, folder, options)

    monkeypatch.setattr(isolation, "lower", lower)
    result = lowered.verify(quantized, artifact, INT8, samples=2)
    assert result.passed and result.quantized_steps is None and 0 < result.max_rel_error < 0.05
    assert "quantized values were not compared" in result.note
    assert "litert-torch could not convert" in result.note
