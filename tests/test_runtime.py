"""Bundles: what is in them, what is refused, and that running one needs neither torch nor onnx."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from backend_programs import small_cnn

from sartor import backends
from sartor.backends.protocol import TargetOptions, TensorSpec
from sartor.errors import ModelError, UsageError
from sartor.runtime import Condition, Stage, load, read_bundle, write_bundle

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
    ],
)
def test_damaged_bundles(artifacts, tmp_path, change, says):
    copy(artifacts, tmp_path, "small")
    write_bundle(tmp_path, [X], [Y], [stage()])
    edited(tmp_path, change)
    with pytest.raises(ModelError, match=says):
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
