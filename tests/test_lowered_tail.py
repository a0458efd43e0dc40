"""A model with a part that is not understood is verified as it is shipped, that part included."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import save, weights

from sartor import lowered
from sartor.backends import isolation
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError
from sartor.ir.load import load
from sartor.lowered import tail_outputs

node = helper.make_node
CORE = [
    node("Conv", ["x", "w1"], ["a"], name="first"),
    node("Relu", ["a"], ["y"], name="relu"),
    node("Conv", ["x", "w2"], ["t"], name="before"),
]


def program_with(tmp_path, nodes, z):
    """`y` is understood; `z` is not."""
    path = save(
        tmp_path / "m.onnx",
        [*CORE, *nodes],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": None},
        [
            weights("w1", 4, 3, 1, 1),
            weights("w2", 8, 3, 1, 1),
            onnx.numpy_helper.from_array(np.array(3), "times"),
        ],
        check=False,
    )
    model = onnx.load(path)
    model.graph.output[1].CopyFrom(z)
    onnx.save(model, path)
    program = load(path)
    assert program.tail is not None
    return program


def non_zero(tmp_path, read="t"):
    z = helper.make_tensor_value_info("z", TensorProto.INT64, [4, "places"])
    nodes = [node("Relu", [read], ["positive"]), node("NonZero", ["positive"], ["z"], name="op")]
    return program_with(tmp_path, nodes if read != "x" else [node("NonZero", ["x"], ["z"], name="op")], z)


def loop(tmp_path):
    """Three times t, added up."""
    info, kinds = helper.make_tensor_value_info, TensorProto
    body = helper.make_graph(
        [node("Identity", ["cond"], ["again"]), node("Add", ["state", "t"], ["next"])],
        "body",
        [
            info("i", kinds.INT64, []),
            info("cond", kinds.BOOL, []),
            info("state", kinds.FLOAT, [1, 8, 4, 4]),
        ],
        [info("again", kinds.BOOL, []), info("next", kinds.FLOAT, [1, 8, 4, 4])],
    )
    made = node("Loop", ["times", "", "t"], ["z"], name="loop", body=body)
    return program_with(tmp_path, [made], info("z", kinds.FLOAT, [1, 8, 4, 4]))


def lower(program, folder):
    return isolation.lower("onnxruntime", program, folder, TargetOptions())


def with_file(artifact, content):
    artifact.main_file.write_bytes(content)
    digest = {**artifact.sha256, artifact.files[0]: hashlib.sha256(content).hexdigest()}
    return dataclasses.replace(artifact, sha256=digest)


def with_weights(artifact, name, factor):
    model = onnx.load(str(artifact.main_file))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    return with_file(artifact, model.SerializeToString())


@pytest.mark.parametrize("make", [non_zero, loop])
def test_the_whole_artifact_is_run_and_compared(make, tmp_path):
    program = make(tmp_path)
    artifact = lower(program, tmp_path / "a")
    result = lowered.verify(program, artifact, TargetOptions())
    assert result.passed and {"y", "z"} < set(result.compared) and not result.not_compared
    assert "NOT compared" not in result.summary()
    with pytest.raises(BackendError, match="could not load"):
        lowered.verify(program, with_file(artifact, b"x"), TargetOptions())


@pytest.mark.parametrize(("make", "worst"), [(non_zero, "z"), (loop, "z")])
def test_an_error_that_only_the_tail_shows_is_found(make, worst, tmp_path):
    program = make(tmp_path)
    artifact = with_weights(lower(program, tmp_path / "a"), "w2", -1.0)
    result = lowered.verify(program, artifact, TargetOptions())
    assert not result.passed and result.worst == worst


def test_a_tail_that_is_computed_wrongly_is_found_on_the_target_s_own_values(tmp_path, monkeypatch):
    """Two rounds of the loop for three, wherever it is lowered."""
    program = loop(tmp_path)
    original = isolation.lower

    def lower_wrongly(target, given, folder, options):
        wrong = given.clone()
        if wrong.tail is not None:
            times = {k: v for k, v in wrong.tail.weights.items()}
            (name,) = [k for k in times if k.startswith("times")]
            import onnx_ir as ir

            times[name] = ir.tensor(np.array(2), name=name)
            wrong.tail = dataclasses.replace(wrong.tail, weights=times)
        return original(target, wrong, folder, options)

    monkeypatch.setattr(isolation, "lower", lower_wrongly)
    result = lowered.verify(
        program, lower_wrongly("onnxruntime", program, tmp_path / "a", TargetOptions()), TargetOptions()
    )
    assert not result.passed and result.worst == "z" and result.max_rel_error == pytest.approx(0.25, abs=0.01)


def test_a_tail_that_reads_graph_inputs_only(tmp_path):
    program = non_zero(tmp_path, read="x")
    result = lowered.verify(program, lower(program, tmp_path / "a"), TargetOptions())
    assert result.passed and set(result.compared) == {"y", "z"}


def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch):
    program = non_zero(tmp_path)
    artifact = lower(program, tmp_path / "a")

    def refuse(model):
        raise RuntimeError("no kernel\nof that name")

    monkeypatch.setattr(tail_outputs, "_session", refuse)
    result = lowered.verify(program, artifact, TargetOptions())
    assert result.passed and list(result.not_compared) == ["z"] and "z" not in result.compared
    assert "NOT compared: 'z', ONNX Runtime does not take it alone: no kernel;"[:-1] in result.summary()
    wide = dataclasses.replace(artifact.outputs[1], shape=(5, "places"))
    result = lowered.verify(
        program, dataclasses.replace(artifact, outputs=(artifact.outputs[0], wide)), TargetOptions()
    )
    assert not result.passed and result.worst == "z"


def test_distances():
    a = np.array([1.0, -2.0])
    assert tail_outputs.distance(a, np.array([1.0, -2.2])) == pytest.approx(0.1)
    assert tail_outputs.distance(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 400])) == 0.25
    assert tail_outputs.distance(a, a[:1]) == tail_outputs.distance(a, None) == np.inf
