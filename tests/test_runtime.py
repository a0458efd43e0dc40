"""Bundles: what is in them, what is refused, and that running one needs neither torch nor onnx."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes

from sartor import backends
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.errors import BackendError, ModelError, UsageError
from sartor.ir.files import file_sha256
from sartor.runtime import BundleDocument, Condition, Stage, load, read_bundle, write_bundle
from sartor.runtime.contract import per_sample

X = TensorSpec("x", "float32", ("N", 3, 16, 16))
Y = TensorSpec("y", "float32", ("N", 10))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A small and a large network as artifacts, in a folder of their own."""
    folder = tmp_path_factory.mktemp("artifacts")
    backend = backends.get("onnxruntime")
    made = {
        name: backend.lower(small_cnn(width, seed=width), folder / name, TargetOptions())
        for name, width in (("small", 4), ("large", 8))
    }
    return folder, made


def copy(artifacts, folder, *names):
    import shutil

    for name in names:
        shutil.copytree(artifacts[0] / name, folder / name)
    return folder


def cascade(folder, threshold):
    stages = [
        Stage("first", "small", {"x": "x"}, {"y": "y"}),
        Stage(
            "second",
            "large",
            {"x": "x"},
            {"y": "y"},
            Condition("y", "probability-difference", "below", threshold),
        ),
    ]
    return write_bundle(folder, [X], [Y], stages)


def batch(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def outputs(artifacts, name, x):
    artifact = artifacts[1][name]
    return backends.get("onnxruntime").load(artifact, TargetOptions()).run({"x": x})["y"]


def margin(y):
    p = np.exp(y.astype(np.float64))
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    return p[:, -1] - p[:, -2]


def test_one_stage(artifacts, tmp_path):
    copy(artifacts, tmp_path, "small")
    written = write_bundle(tmp_path, [X], [Y], [Stage.of(artifacts[1]["small"], "main", "small")])
    assert read_bundle(tmp_path) == written
    session = load(tmp_path)
    x = batch(5)
    assert np.array_equal(session.run({"x": x})["y"], outputs(artifacts, "small", x))
    assert session.ran == {"main": 5}


def test_a_stage_runs_for_the_samples_that_need_it(artifacts, tmp_path):
    x = batch(24)
    small, large = (outputs(artifacts, name, x) for name in ("small", "large"))
    threshold = float(np.median(margin(small)))
    cascade(copy(artifacts, tmp_path, "small", "large"), threshold)
    session = load(tmp_path)
    found = session.run({"x": x})["y"]
    unsure = margin(small) < threshold
    assert 0 < unsure.sum() < 24 and session.ran == {"first": 24, "second": unsure.sum()}
    assert np.allclose(found, np.where(unsure[:, None], large, small), atol=1e-6)
    for i in range(3):  # one by one the same
        assert np.allclose(session.run({"x": x[i : i + 1]})["y"], found[i : i + 1], atol=1e-6)


@pytest.mark.parametrize(("threshold", "runs"), [(0.0, 0), (1.1, 6)])
def test_a_stage_that_no_sample_needs_does_not_run(artifacts, tmp_path, threshold, runs):
    cascade(copy(artifacts, tmp_path, "small", "large"), threshold)
    session = load(tmp_path)
    x = batch(6)
    found = session.run({"x": x})["y"]
    assert session.ran["second"] == runs
    assert np.allclose(found, outputs(artifacts, "large" if runs else "small", x), atol=1e-6)


def test_a_stage_after_one_that_ran_for_some(artifacts, tmp_path):
    """The third reads what only the unsure samples have, so it runs for those at most."""
    copy(artifacts, tmp_path, "small", "large")
    x = batch(16)
    small, large = (outputs(artifacts, name, x) for name in ("small", "large"))
    one, two = float(np.median(margin(small))), float(np.median(margin(large)))
    stages = [
        Stage("first", "small", {"x": "x"}, {"y": "y"}),
        Stage(
            "second", "large", {"x": "x"}, {"y": "z"}, Condition("y", "probability-difference", "below", one)
        ),
        Stage(
            "third", "small", {"x": "x"}, {"y": "y"}, Condition("z", "probability-difference", "below", two)
        ),
    ]
    write_bundle(tmp_path, [X], [Y], stages)
    session = load(tmp_path)
    session.run({"x": x})
    second = margin(small) < one
    assert session.ran == {
        "first": 16,
        "second": second.sum(),
        "third": (second & (margin(large) < two)).sum(),
    }


@pytest.mark.parametrize(
    ("metric", "comparison", "expected"),
    [
        ("max-probability", "below", [True, False]),
        ("max-probability", "at-least", [False, True]),
        ("entropy", "at-least", [True, False]),
        ("probability-difference", "below", [True, False]),
    ],
)
def test_conditions(metric, comparison, expected):
    from sartor.runtime.session import _holds

    logits = np.array([[0.1, 0.2, 0.0], [0.0, 9.0, 0.0]])  # unsure, sure
    assert _holds(Condition("y", metric, comparison, 0.5), logits, 2).tolist() == expected
    level = Condition("level", "value", "equals", 2.0)
    assert _holds(level, np.array([2, 1, 2]), 3).tolist() == [True, False, True]
    with pytest.raises(UsageError, match="one number per sample"):
        _holds(level, logits, 2)


def test_running_imports_neither_torch_nor_onnx(artifacts, tmp_path):
    cascade(copy(artifacts, tmp_path, "small", "large"), 0.5)
    code = (
        "import sys, numpy as np, sartor.runtime as r\n"
        f"r.load({str(tmp_path)!r}).run({{'x': np.zeros((2, 3, 16, 16), np.float32)}})\n"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_output_of_the_batchs_size_is_not_taken_for_samples(tmp_path):
    """The mean over three samples has three numbers; the second stage needs all of them for each of its samples."""
    backend = backends.get("onnxruntime")
    axes = {"axes": np.array([0], np.int64)}
    first = program_from_nodes(
        [node("Relu", ["x"], ["y"], "relu"), node("ReduceMean", ["x", "axes"], ["m"], "mean", keepdims=0)],
        {"x": ("N", 3)},
        ["y", "m"],
        axes,
    )
    second = program_from_nodes([node("Mul", ["x", "m"], ["y"], "mul")], {"x": ("N", 3), "m": (3,)}, ["y"])
    for name, program in (("first", first), ("second", second)):
        backend.lower(program, tmp_path / name, TargetOptions())
    stages = [
        Stage("first", "first", {"x": "x"}, {"y": "y", "m": "m"}),
        Stage(
            "second",
            "second",
            {"x": "x", "m": "m"},
            {"y": "y"},
            Condition("y", "max-probability", "below", 0.9),
        ),
    ]
    samples = TensorSpec("x", "float32", ("N", 3))
    write_bundle(tmp_path, [samples], [TensorSpec("y", "float32", ("N", 3))], stages)
    x = np.array([[1, 2, 3], [0, 9, 0], [3, 2, 1]], np.float32)
    session = load(tmp_path)
    expected = np.where([[True], [False], [True]], x * x.mean(axis=0), x)
    assert np.allclose(session.run({"x": x})["y"], expected, atol=1e-6)
    assert session.ran == {"first": 3, "second": 2}


def test_a_session_that_forgets_samples_is_a_defect_of_its_backend(artifacts, tmp_path, monkeypatch):
    cascade(copy(artifacts, tmp_path, "small", "large"), 1.1)
    session = load(tmp_path)
    original = session._sessions["second"].run
    for wrong, says in (
        (lambda x: {"y": original(x)["y"][:1]}, r"for 4 samples.*\[1, 10\]"),
        (lambda x: {}, "nothing"),
    ):
        monkeypatch.setattr(session._sessions["second"], "run", wrong)
        with pytest.raises(BackendError, match=f"Stage 'second' was to give 'y'.*{says}"):
            session.run({"x": batch(4)})


# ---- what is refused -------------------------------------------------------------------------
def stage(**changes):
    fields = {"name": "main", "artifact": "small", "inputs": {"x": "x"}, "outputs": {"y": "y"}, "when": None}
    return Stage(**{**fields, **changes})


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "no stage"),
        ([stage(inputs={"x": "z"})], "reads 'z', which no earlier stage makes"),
        ([stage(), stage()], "Two stages"),
        ([stage(artifact="../elsewhere")], "outside the bundle"),
        ([stage(outputs={"y": "other"})], "Output 'y' of the bundle is not made"),
        ([stage(when=Condition("x", "luck", "below", 1.0))], "metrics are"),
        (
            [stage(when=Condition("x", "entropy", "below", 1.0))],
            "Output 'y' of the bundle is not made for every",
        ),
    ],
)
def test_stages_that_do_not_fit(artifacts, tmp_path, stages, says):
    copy(artifacts, tmp_path, "small")
    with pytest.raises(ModelError, match=says):
        write_bundle(tmp_path, [X], [Y], stages)
    assert not (tmp_path / "bundle.json").exists()


def edited(folder, change):
    path = folder / "bundle.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema="sartor.bundle/9"), "has the schema"),
        (lambda d: d.pop("stages"), "damaged"),
        (lambda d: d["stages"][0].update(artifact="/etc"), "outside the bundle"),
        (lambda d: d["stages"][0].update(when={"value": "x"}), "damaged"),
        (lambda d: d["files"].update({"../../x": "0"}), "outside the bundle"),
        (lambda d: d["files"].update({"small/model.onnx": "0"}), "does not match"),
        (lambda d: d["files"].update({"small/gone": "0"}), "missing"),
        (lambda d: d["files"].pop("small/artifact.json"), "no hash of 'small/artifact.json'"),
        (lambda d: d["stages"][0].update(outputs={"nothing": "y"}), "Name exactly its inputs"),
        (lambda d: d["stages"][0].update(inputs={"nothing": "x"}), "Name exactly its inputs"),
        (lambda d: d["inputs"][0].update(dtype="float64"), "gives 'x', which is float64"),
        (lambda d: d["inputs"][0].update(shape=["N", 3, 16, 17]), r"takes float32 \[N, 3, 16, 16\]"),
        (lambda d: d["outputs"][0].update(shape=["N", 11]), r"its stage makes float32 \[N, 10\]"),
    ],
)
def test_damaged_bundles(artifacts, tmp_path, change, says):
    copy(artifacts, tmp_path, "small")
    write_bundle(tmp_path, [X], [Y], [stage()])
    edited(tmp_path, change)
    with pytest.raises(ModelError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_stage_without_its_artifact(artifacts, tmp_path, place):
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ModelError, match=f"Stage 'main' has no artifact at '{place}'.*artifact.json"):
        write_bundle(tmp_path, [X], [Y], [stage(artifact=place)])
    assert not (tmp_path / "bundle.json").exists()


def test_an_artifact_that_was_changed_before_the_bundle_was_written(artifacts, tmp_path):
    copy(artifacts, tmp_path, "small")
    (tmp_path / "small" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(ModelError, match=r"Stage 'main': Artifact file 'model.onnx' does not match"):
        write_bundle(tmp_path, [X], [Y], [stage()])


def test_a_manifest_that_belongs_to_nothing_in_the_bundle(artifacts, tmp_path):
    """Every hash is right; what the manifest says is not."""
    copy(artifacts, tmp_path, "small")
    write_bundle(tmp_path, [X], [Y], [stage()])
    manifest = tmp_path / "small" / "artifact.json"
    document = json.loads(manifest.read_text())
    document["files"] = ["../../x"]
    manifest.write_text(json.dumps(document))
    edited(tmp_path, lambda d: d["files"].update({"small/artifact.json": file_sha256(manifest)}))
    with pytest.raises(ModelError, match=r"Stage 'main' has no artifact.*no file inside"):
        load(tmp_path)


def test_a_link_out_of_the_bundle(artifacts, tmp_path):
    copy(artifacts, tmp_path, "small")
    write_bundle(tmp_path, [X], [Y], [stage()])
    model = tmp_path / "small" / "model.onnx"
    model.rename(tmp_path.parent / f"{tmp_path.name}.onnx")
    model.symlink_to(tmp_path.parent / f"{tmp_path.name}.onnx")
    with pytest.raises(ModelError, match="outside the bundle"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "takes exactly"),
        ({"x": [[1.0]]}, "Input 'x' is a list; a session takes numpy arrays"),
        ({"x": np.float32(1)}, "is a float32; a session takes"),
        ({"z": None}, "Input 'z' is a NoneType; a session takes"),
        ({"x": np.zeros((1, 3, 16, 16))}, "Cast it first"),
        ({"x": np.zeros((1, 3, 16), np.float32)}, "cannot have shape"),
        ({"x": np.zeros((0, 3, 16, 16), np.float32)}, "at least 1"),
    ],
)
def test_wrong_inputs(artifacts, tmp_path, inputs, says):
    copy(artifacts, tmp_path, "small")
    write_bundle(tmp_path, [X], [Y], [stage()])
    with pytest.raises(UsageError, match=says):
        load(tmp_path).run(inputs)


# ---- which values are per sample -------------------------------------------------------------
def spec(name, *shape, dtype="float32"):
    return TensorSpec(name, dtype, shape)


def contract(inputs, outputs, **stages):
    """`per_sample` of a bundle whose stages are given as (inputs, outputs, condition), values named as in them."""
    made, found = [], {}
    for name, (taken, given, when) in stages.items():
        found[name] = Artifact("null", Path(), ("m",), {"m": "0"}, "f32", tuple(taken), tuple(given), {})
        same = [{tensor.name: tensor.name for tensor in tensors} for tensors in (taken, given)]
        made.append(Stage(name, name, same[0], same[1], when))
    document = BundleDocument(tuple(inputs), tuple(outputs), tuple(made), {})
    return per_sample(document, found)


def condition(value="y", metric="entropy"):
    return Condition(value, metric, "below", 1.0)


def test_shapes_are_followed_in_the_bundles_symbols():
    x, y = spec("x", "N", 3), spec("y", "N", 10)
    own = ([spec("x", "batch", 3)], [spec("y", "batch", 10), spec("k", "K"), spec("t", 10, "batch")], None)
    assert contract([x], [y], only=own) == {"x", "y"}
    assert contract([spec("x", 4, 3)], [spec("y", 4, 10)], only=own) == set()
    two = ([spec("x", "B", 3), spec("z", "B", 1)], [spec("y", "B", 10)], None)
    assert (
        contract([x, spec("z", "M", 1)], [], only=([spec("x", "B", 3)], [spec("y", "B", 10)], None)) == set()
    )
    assert contract([x, spec("z", "N", 1), spec("w", 5)], [y], only=two) == {"x", "y", "z"}
    with pytest.raises(ModelError, match=r"gives 'z', which is float32 \[M, 1\]"):
        contract([x, spec("z", "M", 1)], [y], only=two)
    with pytest.raises(ModelError, match=r"gives 'x', which is float32 \[N, 3\].*takes float32 \[1, 3\]"):
        contract([x], [y], only=([spec("x", 1, 3)], [spec("y", 1, 10)], None))


@pytest.mark.parametrize(
    ("first", "logits", "when", "says"),
    [
        ("N", ("N", 10), condition(), None),
        (1, (1, 10), condition(), None),
        ("N", ("N", 1), condition(metric="value"), None),
        ("N", ("N",), condition(metric="value"), None),
        (1, (1,), condition(metric="value"), None),
        (4, (), condition(metric="value"), None),
        (4, (4, 10), condition(), r"'entropy' of 'y', which is float32 \[4, 10\].*a call is one sample"),
        (4, (4, 1), condition(metric="value"), "one number per sample, and a call is one sample"),
        (4, (10,), condition(), r"logits of shape \[samples, classes\]"),
        ("N", (10,), condition(), "the axis of samples is 'N'"),
        ("N", ("N",), condition(), r"logits of shape \[samples, classes\]"),
        ("N", ("N", 4, 4), condition(), r"logits of shape \[samples, classes\]"),
        ("N", ("N", 2), condition(metric="value"), "one number per sample"),
        ("N", (1,), condition(metric="value"), "one number per sample"),
    ],
)
def test_conditions_are_decided_by_one_sample(first, logits, when, says):
    x, y = spec("x", first, 3), spec("y", *logits)
    out = spec("z", first, 2)
    stages = {"one": ([x], [y, out], None), "two": ([x], [out], when)}
    if says is None:
        assert ("y" in contract([x], [out], **stages)) == (first == "N")
    else:
        with pytest.raises(ModelError, match=f"Stage 'two' runs on the condition.*{says}"):
            contract([x], [out], **stages)


def test_what_a_conditional_stage_reads_and_makes_can_be_told_apart():
    x, y = spec("x", "N", 3), spec("y", "N", 10)
    one = ([x], [y, spec("t", 3, "N"), spec("m", 3)], None)
    contract([x], [y], one=one, two=([x, spec("m", 3)], [y], condition()))
    with pytest.raises(
        ModelError, match=r"Stage 'two' runs for some of the samples, and 't', of shape float32 \[3, N"
    ):
        contract([x], [y], one=one, two=([x, spec("t", 3, "N")], [y], condition()))
    with pytest.raises(ModelError, match="and 'm', of shape"):
        contract([x], [y], one=one, two=([x], [spec("m", 3)], condition()))
    with pytest.raises(ModelError, match="Stage 'three' runs for some"):  # since it reads what only some have
        two = ([x], [spec("z", "N", 2)], condition())
        contract([x], [y], one=one, two=two, three=([spec("z", "N", 2)], [spec("m", 3)], None))


def test_one_value_has_one_type_and_shape():
    x, y = spec("x", "N", 3), spec("y", "N", 10)
    for other in (spec("y", "N", 11), spec("y", "N", 10, dtype="float16"), spec("y", "N")):
        with pytest.raises(ModelError, match=r"Stage 'two' makes 'y' as .* One value has one type"):
            contract([x], [y], one=([x], [y], None), two=([x], [other], None))
