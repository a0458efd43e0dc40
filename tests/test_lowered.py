"""An artifact is compared with its program on its own target, and the first node that differs is named."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes

import sartor
from sartor import lowered, oracle
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
    return dataclasses.replace(artifact, sha256={**artifact.sha256, artifact.files[0]: digest})


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


def test_what_a_softmax_hides_is_compared_before_its_cast(tmp_path):
    """`cast` leaves Cast behind the last node; the numbers before the Softmax stay float32 outputs."""
    onnx.save(with_softmax(small_cnn(8)), tmp_path / "m.onnx")
    half = sartor.Pipeline.parse("fold-batch-norm,cast").run(load(tmp_path / "m.onnx")).program
    options = TargetOptions(precision="f16")
    result = lowered.verify(half, isolation.lower("onnxruntime", half, tmp_path / "a", options), options)
    assert result.passed and len(result.compared) == 2
    (name,) = set(result.compared) - {"probabilities"}
    assert name.startswith("scaled") and oracle.before_softmax(half).graph.outputs[0].dtype.name == "FLOAT"


def segmentation(seed=0):
    """A 1x1 convolution to 19 classes, and the best of them for 64x64 pixels."""
    draw = np.random.default_rng(seed).standard_normal
    return program_from_nodes(
        [
            node("Conv", ["x", "w", "b"], ["scores"], "classify"),
            node("ArgMax", ["scores"], ["y"], "best", axis=1),
        ],
        {"x": (1, 3, 64, 64)},
        ["y"],
        {"w": draw((19, 3, 1, 1)).astype(np.float32), "b": 0.1 * draw(19).astype(np.float32)},
    )


@pytest.fixture(scope="module", params=["f16", "int8"])
def decided(request, tmp_path_factory):
    """Segmentation in a precision, its options and its artifact."""
    spec = "cast" if request.param == "f16" else "quantize"
    draw = np.random.default_rng(3).standard_normal
    calibration = [({"x": draw((1, 3, 64, 64)).astype(np.float32)}, None) for _ in range(2)]
    program = (
        sartor.Pipeline.parse(spec).run(segmentation(), Context(data={"calibration": calibration})).program
    )
    options = TargetOptions(precision=request.param)
    folder = tmp_path_factory.mktemp(request.param) / "a"
    return program, options, isolation.lower("onnxruntime", program, folder, options)


def test_indices_are_held_to_how_close_they_were(decided):
    """Of 4096 pixels some have two classes within the last bit of the precision."""
    program, options, artifact = decided
    result = lowered.verify(program, artifact, options)
    assert result.passed and len(result.compared) == 2
    assert 0 <= result.decided["y"] < 0.05
    if result.decided["y"]:
        assert "% of 'y' decided otherwise" in result.summary()


def test_what_decides_nothing_is_seen_in_the_numbers(decided, monkeypatch):
    """Scores that are all a third too large have the same best class."""
    program, options, artifact = decided
    original = isolation.lower

    def lower_wrongly(target, given, folder, wanted):
        wrong = given.clone()
        for reader in wrong.nodes():
            name = reader.inputs[1].name if reader.op_type in ("DequantizeLinear", "Conv") else ""
            if name in ("w", "w/scale", "b/scale"):
                array = wrong.initializer_array(name)
                value = ir.Value(name=f"{name}/wrong", const_value=ir.tensor(array * array.dtype.type(1.3)))
                wrong.graph.register_initializer(value)
                reader.replace_input_with(1, value)
        wrong.invalidate()
        return original(target, wrong, folder, wanted)

    monkeypatch.setattr(isolation, "lower", lower_wrongly)
    result = lowered.verify(program, artifact, options)
    assert not result.passed and result.worst != "y"


def test_other_indices_fail(decided):
    """The artifact of another network, with the same contract."""
    program, options, artifact = decided
    other = program.clone()
    for name in ("w", "w/quantized"):
        if name in other.initializers:
            array = other.initializer_array(name)
            other.initializers[name].const_value = ir.tensor(array[::-1].copy(), name=name)
    result = lowered.verify(other, artifact, options)
    assert not result.passed and result.max_rel_error > 0.1


def limited(program, name, most):
    """The program with `name` cut off above `most`, for whoever reads it."""
    wrong = program.clone()
    maker = next(n for n in wrong.graph if n.outputs[0].name == name)
    value = maker.outputs[0]
    limit = ir.Value(name="most", const_value=ir.tensor(np.array(most, np.float32), name="most"))
    wrong.graph.register_initializer(limit)
    readers = list(value.uses())
    cut = ir.node("Min", [value, limit], num_outputs=1, name="cut")
    cut.outputs[0].name = "cut"
    wrong.graph.insert_after(maker, cut)
    for reader, index in readers:
        reader.replace_input_with(index, cut.outputs[0])
    wrong.invalidate()
    return wrong


def test_the_first_node_is_looked_for_on_the_sample_that_shows_it(tmp_path, monkeypatch):
    """An error above a threshold that the first of three samples does not reach."""
    program = small_cnn(8)
    data = Calibration(1, 1, 1)
    for scale, (inputs, _) in zip((0.01, 1.0, 0.01), data.calibration, strict=True):
        inputs["x"] *= np.float32(scale)
    original = isolation.lower
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, limited(p, "c1", 1.0), f, o))
    artifact = isolation.lower("onnxruntime", program, tmp_path / "a", TargetOptions())
    result = lowered.verify(program, artifact, TargetOptions(), data=data)
    assert not result.passed and result.first_divergent_node.startswith("'add1' (Add)")
