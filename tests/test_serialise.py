"""The bytes of a model: the same in parts as in one piece, beyond one file, and from weights on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import node, program_from_nodes
from onnx_files import run, tensor

import sartor
from sartor import oracle
from sartor.backends.onnxruntime import OnnxRuntimeBackend
from sartor.backends.protocol import TargetOptions
from sartor.errors import InternalError, ModelError, UsageError
from sartor.ir import deferred, external_data, fx_run, serialise
from sartor.ir.channels import channel_groups
from sartor.ir.files import write_all
from sartor.ir.fx import run_twin
from sartor.ir.program import Program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels
from sartor.strategies.gates import gate_gradients

HIDDEN = 96


def mlp(layers: int = 3) -> Program:
    """A chain of `layers` layers of 96 units, and a scalar."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) for i in range(layers)}
    weights["half"] = np.float32(0.5).reshape(())
    nodes = []
    for i in range(layers):
        nodes += [
            node("MatMul", [f"v{i}", f"w{i}"], [f"m{i}"]),
            node("Relu", [f"m{i}"], [f"v{i + 1}"]),
        ]
    nodes.append(node("Mul", [f"v{layers}", "half"], ["y"]))
    return program_from_nodes(nodes, {"v0": ["N", HIDDEN]}, ["y"], weights)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which these little models are large."""
    monkeypatch.setattr(serialise, "SINGLE_FILE_BYTES", 20_000)
    monkeypatch.setattr(deferred, "SMALLEST_BYTES", 4096)
    monkeypatch.setattr(external_data, "SMALLEST_BYTES", 4096)


def reference(program: Program) -> bytes:
    """What protobuf itself writes."""
    proto = program.to_proto()
    assert [t.name for t in proto.graph.initializer] == sorted(program.initializers)
    return proto.SerializeToString(deterministic=True)


# ---- in parts ------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 126, 127, 128, 16_383, 16_384, 70_000])
def test_parts_are_the_bytes_of_protobuf(size: int) -> None:
    """Sizes around those at which the length of a length changes."""
    rng = np.random.default_rng(size)
    program = program_from_nodes(
        [node("Add", ["x", "a"], ["s"]), node("Mul", ["s", "b"], ["y"])],
        {"x": ["N", size]},
        ["y"],
        {"b": rng.standard_normal(size).astype(np.float32), "a": np.ones((1, size), np.float32)},
    )
    assert program.to_bytes() == reference(program)
    assert program.serialised_bytes() == len(reference(program))
    assert program.sha256() == hashlib.sha256(reference(program)).hexdigest()


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    program = program_from_nodes(
        [node("Concat", ["x", "none"], ["c"], axis=1), node("Mul", ["c", "half"], ["y"])],
        {"x": ["N", 3]},
        ["y"],
        {"none": np.zeros((1, 0), np.float32), "half": np.float32(0.5).reshape(())},
    )
    assert program.to_bytes() == reference(program)
    path = program.save(tmp_path / "m.onnx")
    assert path.read_bytes() == reference(program) and list(tmp_path.iterdir()) == [path]


# ---- external data -------------------------------------------------------------------------------
def test_a_model_beyond_one_file_has_external_data(small_limits: None, tmp_path: Path) -> None:
    program = mlp()
    path = program.save(tmp_path / "m.onnx")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["m.onnx", f"m.onnx.{program.sha256()[:12]}.data"]
    onnx.checker.check_model(str(path), full_check=True)
    x = np.random.default_rng(1).standard_normal((2, HIDDEN)).astype(np.float32)
    expected = run(program.to_proto().SerializeToString(), {"v0": x})[0]
    np.testing.assert_array_equal(run(path, {"v0": x})[0], expected)
    back = sartor.load(path)
    assert back.source.sha256 == program.sha256() == back.sha256()
    assert all(deferred.is_deferred(back.initializers[f"w{i}"].const_value) for i in range(3))
    assert not deferred.is_deferred(back.initializers["half"].const_value)
    with pytest.raises(UsageError, match="more than a protobuf holds"):
        program.to_bytes()


def test_a_changed_weight_changes_the_hash_and_the_name(small_limits: None, tmp_path: Path) -> None:
    program = mlp()
    path = program.save(tmp_path / "m.onnx")
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".data")
    before = sartor.load(path).source.sha256
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    changed = sartor.load(path)
    assert changed.source.sha256 != before
    changed.save(path)  # over the file it was read from
    assert len([p for p in tmp_path.iterdir() if p.suffix == ".data"]) == 2
    assert sartor.load(path).sha256() == changed.sha256()


def test_a_data_file_that_is_written_into_is_an_error(small_limits: None, tmp_path: Path) -> None:
    path = mlp().save(tmp_path / "m.onnx")
    loaded = sartor.load(path)
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".data")
    os.truncate(data, 100)
    for read in (loaded.sha256, lambda: loaded.initializer_array("w2")):
        with pytest.raises(ModelError, match="was changed after the model was loaded"):
            read()


def test_weights_of_branches_in_the_same_file_count(tmp_path: Path) -> None:
    """A tensor of a body shares its data file with one of the main graph."""
    hashes = []
    for number in (1.0, 2.0):
        folder = tmp_path / str(number)
        folder.mkdir()
        arrays = {"w": np.ones(600, np.float32), "inner": np.full(600, number, np.float32)}
        (folder / "d.bin").write_bytes(arrays["w"].tobytes() + arrays["inner"].tobytes())
        stored = {}
        for index, name in enumerate(arrays):
            stored[name] = onnx.TensorProto(name=name, data_type=1, dims=[600], data_location=1)
            for key, entry in (("location", "d.bin"), ("offset", str(2400 * index)), ("length", "2400")):
                stored[name].external_data.add(key=key, value=entry)
        info = onnx.helper.make_tensor_value_info
        then, other = (
            onnx.helper.make_graph(
                [onnx.helper.make_node("Mul", ["x", weight], [f"{weight}_out"])],
                weight,
                [],
                [info(f"{weight}_out", 1, ["N", 600])],
                [stored["inner"]] if weight == "inner" else [],
            )
            for weight in ("inner", "w")
        )
        nodes = [
            onnx.helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            onnx.helper.make_node("Cast", ["top"], ["c"], to=9),
            onnx.helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        ]
        graph = onnx.helper.make_graph(
            nodes, "g", [info("x", 1, ["N", 600])], [info("y", 1, ["N", 600])], [stored["w"]]
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, folder / "m.onnx")
        hashes.append(sartor.load(folder / "m.onnx").source.sha256)
    assert hashes[0] != hashes[1]


def test_weights_outlive_their_file(small_limits: None, tmp_path: Path) -> None:
    program = mlp()
    path = program.save(tmp_path / "m.onnx")
    loaded = sartor.load(path)
    for file in list(tmp_path.iterdir()):
        file.unlink()
    assert loaded.sha256() == program.sha256()


def test_many_files_are_reopened_and_a_change_is_an_error(
    small_limits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "_HELD_FILES", 0)
    path = mlp().save(tmp_path / "m.onnx")
    loaded = sartor.load(path)
    assert loaded.sha256() == mlp().sha256()
    data = next(p for p in tmp_path.iterdir() if p.suffix == ".data")
    os.utime(data, (1, 1))
    with pytest.raises(ModelError, match=r"'m\.onnx\..*\.data' was changed after the model was loaded"):
        loaded.initializer_array("w0")


def test_tensors_in_attributes_and_bodies_are_read(tmp_path: Path) -> None:
    """External tensors that are no initializers of the main graph must not stay references."""
    array = np.arange(600, dtype=np.float32)
    (tmp_path / "c.bin").write_bytes(array.tobytes())
    value = tensor("c", array)
    value.ClearField("raw_data")
    value.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", "c.bin"), ("offset", "0"), ("length", str(array.nbytes))):
        value.external_data.add(key=key, value=entry)
    constant = onnx.helper.make_node("Constant", [], ["c"], name="c")
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(value)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [constant, onnx.helper.make_node("Add", ["x", "c"], ["y"], name="add")],
        "g",
        [info("x", 1, ["N", 600])],
        [info("y", 1, ["N", 600])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    program = sartor.load(tmp_path / "m.onnx")
    x = np.ones((1, 600), np.float32)
    np.testing.assert_array_equal(run(program.to_bytes(), {"x": x})[0], x + array)


def test_an_artifact_beyond_one_file_runs(small_limits: None, tmp_path: Path) -> None:
    program, backend, options = mlp(), OnnxRuntimeBackend(), TargetOptions(threads=1)
    artifact = backend.lower(program, tmp_path / "a", options)
    assert len(artifact.files) == 2
    x = {"v0": np.ones((1, HIDDEN), np.float32)}
    found = backend.load(artifact, options).run(x)["y"]
    np.testing.assert_allclose(found, run_twin(program, x)["y"], rtol=1e-4)


# ---- on disk until needed ------------------------------------------------------------------------
def test_weights_on_disk_and_in_memory_give_the_same_programs(small_limits: None, tmp_path: Path) -> None:
    program = mlp()
    path = program.save(tmp_path / "m.onnx")
    loaded = sartor.load(path)
    again = sartor.Program(
        program.model, source=loaded.source, input_shapes=loaded.input_shapes, batch=loaded.batch
    )
    analysis = channel_groups(loaded)
    plan = PruneChannels(ratio=0.5).run(loaded).plan
    for one, other in (
        (apply_plan(loaded, plan), apply_plan(again, plan)),
        (masked(loaded, plan)[0], masked(again, plan)[0]),
        (oracle.randomise(loaded, analysis, 3), oracle.randomise(again, channel_groups(again), 3)),
    ):
        assert deferred.is_deferred(one.initializers["w1"].const_value)
        assert not deferred.is_deferred(other.initializers["w1"].const_value)
        assert one.sha256() == other.sha256()
    result = oracle.check(loaded, plan)
    assert result.verdict == "passed" and result == oracle.check(again, plan)


def test_segments_give_the_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, small_limits: None, tmp_path: Path
) -> None:
    program = mlp(layers=6)
    analysis = channel_groups(program)
    data = [({"v0": np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(np.float32)}, None)]
    whole = gate_gradients(program, analysis, (), data)
    monkeypatch.setattr(fx_run, "SEGMENT_BYTES", HIDDEN * HIDDEN * 8)
    monkeypatch.setattr(fx_run, "WHOLE_BYTES", 0)
    counted: list[int] = []
    original = fx_run.Runner._run_segments
    monkeypatch.setattr(
        fx_run.Runner,
        "_run_segments",
        lambda self, segments, tensors: counted.append(len(segments)) or original(self, segments, tensors),
    )
    parts = gate_gradients(program, analysis, (), data)
    assert counted and counted[0] >= 3
    for name, gradient in whole.groups.items():
        np.testing.assert_allclose(parts.groups[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_deferred_tensor_that_lies_about_its_shape_is_an_error() -> None:
    tensor = deferred.deferred("w", (2, 3), np.dtype("f4"), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(InternalError, match=r"'w' became float32 \[3, 2\], not float32 \[2, 3\]"):
        tensor.numpy()


def test_parts_that_fail_leave_nothing(tmp_path: Path) -> None:
    def parts():
        yield b"half"
        raise ModelError("The weights are gone.")

    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(ModelError, match="gone"):
        write_all({tmp_path / "other": b"whole", tmp_path / "m": parts()})
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and (tmp_path / "m").read_bytes() == b"old"
