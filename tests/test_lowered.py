"""An artifact is compared with its program on its own target, and the first node that differs is named."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from backend_programs import small_cnn

import sartor
from sartor import lowered
from sartor.backends import isolation
from sartor.backends.protocol import TargetOptions
from sartor.cli.main import main
from sartor.errors import UsageError, VerificationError
from sartor.ir.load import load
from sartor.ir.verify import verify_program
from sartor.passes.base import Context


def lower(program, folder, target="onnxruntime"):
    return isolation.lower(target, program, folder, TargetOptions())


def damaged(artifact, change):
    """The artifact with another model in its file, and a manifest that fits it."""
    model = onnx.load(str(artifact.main_file))
    change(model)
    artifact.main_file.write_bytes(model.SerializeToString())
    digest = hashlib.sha256(artifact.main_file.read_bytes()).hexdigest()
    return dataclasses.replace(artifact, sha256={artifact.files[0]: digest})


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_good_artifact_passes(target, tmp_path):
    program = small_cnn(8)
    result = lowered.verify(program, lower(program, tmp_path / "a", target), TargetOptions())
    assert result.passed and result.samples == lowered.SAMPLES and result.inputs == "random"
    assert 0 < result.max_rel_error < 1e-5 and result.tolerance == 1e-4
    assert result.first_divergent_node is None
    lowered.require(result)


def test_every_value_as_an_output(tmp_path):
    program = small_cnn(8)
    tapped, makers = lowered.with_taps(program)
    verify_program(tapped)
    assert tapped.graph.outputs[0].name == program.graph.outputs[0].name
    assert len(makers) == len(tapped.graph.outputs) == len(list(program.nodes()))
    result = lowered.verify(tapped, lower(tapped, tmp_path / "a"), TargetOptions())
    assert result.passed and set(result.compared) == set(makers)


def test_the_first_node_that_differs_is_named(tmp_path, monkeypatch):
    """A runtime that computes one weight wrongly does so in the artifact and in the one with all values."""
    program = small_cnn(8)
    wrong = program.clone()
    name = next(n for n in wrong.nodes() if n.name == "conv1").inputs[1].name
    array = wrong.initializer_array(name).copy()
    array[0] += 0.5
    wrong.initializers[name].const_value = ir.tensor(array, name=name)

    def lower_wrongly(target, given, folder, options):
        clone = given.clone()
        clone.initializers[name].const_value = ir.tensor(array, name=name)
        return original(target, clone, folder, options)

    original = isolation.lower
    artifact = lower(wrong, tmp_path / "a")
    monkeypatch.setattr(isolation, "lower", lower_wrongly)
    result = lowered.verify(program, artifact, TargetOptions())
    assert not result.passed and result.max_rel_error > 1e-2
    assert result.first_divergent_node.startswith("'conv1' (Conv)")
    with pytest.raises(VerificationError, match=r"first node that differs: 'conv1'"):
        lowered.require(result)


def test_a_damaged_artifact_alone_is_found_though_no_node_is_to_blame(tmp_path):
    program = small_cnn(8)

    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name.startswith("w1"))
        array = onnx.numpy_helper.to_array(tensor) * 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))

    result = lowered.verify(program, damaged(lower(program, tmp_path / "a"), change), TargetOptions())
    assert not result.passed and result.first_divergent_node is None
    assert "no node differs" in result.note


def with_softmax(program):
    """The program, ending in a Softmax of large numbers: nearly all of it is one."""
    model = program.to_proto()
    (output,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("Softmax", ["scaled"], ["probabilities"], name="softmax"))
    model.graph.node.insert(
        len(model.graph.node) - 1,
        onnx.helper.make_node("Mul", [output.name, "factor"], ["scaled"], name="scale"),
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(300.0, np.float32), "factor"))
    output.name = "probabilities"
    return model


def test_what_a_softmax_hides_is_compared_before_it(tmp_path):
    onnx.save(with_softmax(small_cnn(8)), tmp_path / "m.onnx")
    program = load(tmp_path / "m.onnx")
    artifact = lower(program, tmp_path / "a")
    result = lowered.verify(program, artifact, TargetOptions())
    assert result.passed and set(result.compared) == {"probabilities", "scaled"}


class Calibration:
    """What `verify` reads of data."""

    def __init__(self, *sizes):
        draw = np.random.default_rng(0).standard_normal
        self.calibration = [({"x": draw((n, 3, 16, 16)).astype(np.float32)}, None) for n in sizes]


def test_real_samples_are_cut_to_the_shape_of_the_artifact(tmp_path):
    program = small_cnn(8)
    artifact = lower(program, tmp_path / "a")
    result = lowered.verify(program, artifact, TargetOptions(), data=Calibration(1, 2), samples=5)
    assert result.passed and result.inputs == "calibration" and result.samples == 3
    wide = small_cnn(8)
    wide.input_shapes["x"] = (4, 3, 16, 16)
    with pytest.raises(UsageError, match=r"no batch of the reference shapes 'x' \[4, 3, 16, 16\]"):
        lowered.verify(wide, artifact, TargetOptions(), data=Calibration(1, 2))


def test_lower_writes_nothing_that_differs(tmp_path, monkeypatch, capsys):
    small_cnn(8).save(tmp_path / "m.onnx")
    command = ["lower", str(tmp_path / "m.onnx"), "--target", "onnxruntime", "-o", str(tmp_path / "a")]
    assert main(command) == 0
    assert "verified: relative error" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(lowered, "lowered_tolerance", lambda *_: 1e-12)
    assert main(command) == 5
    assert "first node that differs" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert main([*command, "--no-verify"]) == 0
    assert "NOT verified" in capsys.readouterr().out


# ---- quantized programs ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def quantized():
    program = small_cnn(8)
    draw = np.random.default_rng(3).standard_normal
    calibration = [({"x": draw((1, 3, 16, 16)).astype(np.float32)}, None) for _ in range(4)]
    pipeline = sartor.Pipeline.parse("fold-batch-norm,quantize")
    return pipeline.run(program, Context(data={"calibration": calibration})).program


INT8 = TargetOptions(precision="int8")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_quantized_values_are_compared_step_by_step(quantized, target, tmp_path):
    artifact = isolation.lower(target, quantized, tmp_path / "a", INT8)
    result = lowered.verify(quantized, artifact, INT8)
    assert result.passed and result.quantized_steps <= 1 and "within" in result.summary()


def test_a_quantized_value_that_is_off_is_named(quantized, tmp_path, monkeypatch):
    """A runtime with another zero point for one value: three steps of 255, which the outputs hardly show."""
    name = next(
        n.inputs[2].name for n in quantized.nodes() if n.op_type == "QuantizeLinear" and "add1" not in n.name
    )

    def change(program):
        wrong = program.clone()
        for n in list(wrong.nodes()):  # of the QuantizeLinear alone: not a mere change of scale
            if n.op_type == "QuantizeLinear" and n.inputs[2].name == name:
                array = wrong.initializer_array(name) + 3
                value = ir.Value(name="off", const_value=ir.tensor(array.astype(np.int8), name="off"))
                wrong.graph.register_initializer(value)
                n.replace_input_with(2, value)
        wrong.invalidate()
        return wrong

    original = isolation.lower
    artifact = original("onnxruntime", change(quantized), tmp_path / "a", INT8)
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, change(p), f, o))
    result = lowered.verify(quantized, artifact, INT8)
    assert not result.passed and result.quantized_steps >= 3
    assert "QuantizeLinear" in result.first_divergent_node
