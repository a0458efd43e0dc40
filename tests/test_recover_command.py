"""`sartor recover`: writes a better model, resumes, refuses without a trace, and runs in several processes."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from test_recovery_processes import torchrun
from test_recovery_sizes import Net, smooth

import sartor as package
from sartor.cli import main
from sartor.ir.plan import Plan
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan
from sartor.recovery import predictor
from sartor.recovery.processes import Processes
from sartor.recovery.training import Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The original, what was made of it, and data with the original's classes."""
    folder = tmp_path_factory.mktemp("recover")
    original = package.capture(Net().eval(), (torch.zeros(1, 3, 16, 16),))
    original.save(folder / "model.onnx")
    Pipeline.parse("prune-channels{ratio=0.5,criterion=l1}").run(original).program.save(folder / "small.onnx")
    loaded = package.load(folder / "model.onnx")
    (name,) = loaded.input_shapes
    plan = Plan(loaded.source.sha256, sizes={name: (1, 3, 8, 8)})
    apply_plan(loaded, plan).save(folder / "resized.onnx")
    x = smooth(160, 16, 1)
    labels = next(iter(predictor(original)({name: x}).values())).argmax(1)
    np.savez(folder / "data.npz", **{name: x, "labels": labels})
    return folder


@pytest.fixture
def sartor(capsys, monkeypatch):
    """Runs a command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(
        "os.sched_getaffinity", lambda pid: {0}
    )  # threads wait for each other beside other tests

    def run(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(folder, out, *more, pruned="small.onnx"):
    return [
        "recover", folder / pruned, "--original", folder / "model.onnx", "--data", folder / "data.npz", "--out", out,
        "--minutes", "2", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pruned", "more"),
    [
        ("small.onnx", []),
        ("resized.onnx", ["--features", "1", "--rat", "--precision", "bf16", "--temperature", "1"]),
        ("small.onnx", ["--teacher", "wrong"]),
        ("small.onnx", ["--teacher", "never"]),
    ],
)
def test_it_writes_a_better_model(folder, tmp_path, sartor, pruned, more):
    out = tmp_path / "out.onnx"
    code, text, err = sartor(*command(folder, out, "--steps", "40", *more, "--json", pruned=pruned))
    assert code == 0, err
    document = json.loads(text)
    score = document["score"]
    assert score["original"] == 1.0 and score["split"] == "test" and score["samples"] == 24
    assert score["after"] >= score["before"] and document["steps"] == 40 and document["processes"] == 1
    distances = [entry["distance"] for entry in document["history"]]
    assert min(distances) < 0.9 * distances[0]
    program = package.load(out)
    assert program.input_shapes == package.load(folder / pruned).input_shapes
    assert document["files"][0]["file"] == "out.onnx" and list(tmp_path.iterdir()) == [out]
    assert bool(document["sizes"]) == ("--rat" in more) == (document["training_macs"] is not None)
    assert (document["asked"] == 0) == ("never" in more)
    assert any("saved" in note for note in document["notes"]) == ("wrong" in more)


def test_a_person_reads_a_table(folder, tmp_path, sartor):
    code, text, _ = sartor(*command(folder, tmp_path / "out.onnx", "--steps", "2"))
    assert code == 0
    assert "score on 'test'" in text and "2 steps in" in text and "wrote " in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("original", "before", "after"))] == [
        "original", "before", "after",
    ]  # fmt: skip


def test_a_killed_run_is_resumed(folder, tmp_path, sartor, monkeypatch):
    more = ["--steps", "30", "--seed", "3"]
    whole, out = tmp_path / "whole.onnx", tmp_path / "out.onnx"
    assert sartor(*command(folder, whole, *more))[0] == 0
    judge, calls = Training._judge, []

    def interrupted(self, *arguments, **entry):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        judge(self, *arguments, **entry)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_judge", interrupted)
        assert sartor(*command(folder, out, *more))[0] == 130
    assert not out.exists() and (tmp_path / ".out.onnx.recovery").is_dir()
    resumed = []
    resume = Training._resume
    monkeypatch.setattr(
        Training, "_resume", lambda self, found: resumed.append(found.state["step"]) or resume(self, found)
    )
    assert sartor(*command(folder, out, *more))[0] == 0
    assert resumed and 0 < resumed[0] < 30
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "whole.onnx"]
    assert sartor(*command(folder, out, *more))[0] == 0 and len(resumed) == 1, "delivered: a new one begins"


def test_a_resumed_run_of_minutes_judges_on_the_same_samples(folder, tmp_path, sartor, monkeypatch):
    out = tmp_path / "out.onnx"
    arguments = command(folder, out)
    arguments[arguments.index("--minutes") + 1] = "0.05"
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert sartor(*arguments)[0] == 130
    (known,) = (tmp_path / ".out.onnx.recovery").glob("*/judged.json")
    assert json.loads(known.read_text()) >= 1
    assert sartor(*arguments)[0] == 0
    assert list(tmp_path.iterdir()) == [out]


def test_other_options_begin_anew(folder, tmp_path, sartor, monkeypatch):
    out = tmp_path / "out.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert sartor(*command(folder, out, "--steps", "5"))[0] == 130
    monkeypatch.setattr(
        Training, "_resume", lambda self, found: pytest.fail("it belongs to another recovery")
    )
    assert sartor(*command(folder, out, "--steps", "5", "--temperature", "4"))[0] == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--data": "none.npz"}, "none.npz"),
        ({"--rat": "1.5"}, "'rat' is 1.5"),
        ({"--features": "1", "--teacher": "never"}, "which teacher 'never' does not ask"),
        ({"--temperature": "0"}, "not a number greater than 0"),
        ({"--teacher": "sometimes"}, "sometimes"),
        ({"PRUNED": "other.onnx"}, "must be the same"),
        ({"--data": "unlabelled.npz", "--teacher": "wrong"}, "needs one class id"),
    ],
)
def test_refusals_leave_nothing_behind(folder, tmp_path, sartor, change, says):
    if not (folder / "other.onnx").exists():
        module = torch.nn.Sequential(torch.nn.Linear(4, 3))
        package.capture(module, (torch.zeros(1, 4),)).save(folder / "other.onnx")
        arrays = dict(np.load(folder / "data.npz"))
        arrays.pop("labels")
        np.savez(folder / "unlabelled.npz", **arrays)
    arguments = [str(a) for a in command(folder, tmp_path / "out.onnx", "--steps", "3")]
    for key, value in change.items():
        value = str(folder / value) if key in ("--data", "PRUNED") else value
        if key == "PRUNED":
            arguments[1] = value
        elif key in arguments:
            arguments[arguments.index(key) + 1] = value
        else:
            arguments += [key, value]
    code, text, err = sartor(*arguments)
    assert code == 2 and text == "" and says in err
    assert list(tmp_path.iterdir()) == []


SOURCE = """
import numpy as np
from pathlib import Path

calls = []

def metric(outputs, labels):
    calls.append(1)
    if len(calls) > 3:
        raise ValueError("lost")
    return 0.5

def splits(metric=None):
    arrays = np.load(Path(__file__).with_name("data.npz"))
    x = {k: v for k, v in arrays.items() if k != "labels"}
    def part(low, high):
        return [({k: v[low:high] for k, v in x.items()}, arrays["labels"][low:high])]
    found = {"calibration": part(0, 64), "evaluate": part(64, 96), "test": part(96, 160)}
    return found if metric is None else {**found, "metric": metric}

def failing():
    return splits(metric)
"""


def test_it_trains_on_what_is_for_training(folder, tmp_path, sartor, monkeypatch):
    (folder / "data.py").write_text(SOURCE)
    given = []
    from sartor import recovery

    distill = recovery.distill
    monkeypatch.setattr(
        recovery, "distill", lambda p, o, data, **more: given.append(data.name) or distill(p, o, data, **more)
    )
    for data in ("data.npz", "data.py:splits"):
        arguments = command(folder, tmp_path / "out.onnx", "--steps", "2", "--json")
        arguments[arguments.index("--data") + 1] = folder / data
        code, text, err = sartor(*arguments)
        assert code == 0, err
        assert ("recovery trained on 'calibration': there is no 'train'" in json.loads(text)["notes"]) == (
            data != "data.npz"
        )
    assert given == ["train", "calibration"]


def test_a_refusal_on_the_way_leaves_nothing_behind(folder, tmp_path, sartor):
    (folder / "data.py").write_text(SOURCE)
    arguments = command(folder, tmp_path / "out.onnx", "--steps", "30")
    arguments[arguments.index("--data") + 1] = f"{folder / 'data.py'}:failing"
    code, _, err = sartor(*arguments)
    assert code == 2 and "lost" in err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_write_one_model(folder, tmp_path, sartor):
    """Without the norm, whose batch statistics are those of a share, it is the model of one process."""
    program = package.load(folder / "model.onnx")
    Pipeline.parse("fold-batch-norm,prune-channels{ratio=0.5,criterion=l1}").run(program).program.save(
        tmp_path / "folded.onnx"
    )
    found = {}
    for name in ("one", "two"):
        out = tmp_path / f"{name}.onnx"
        arguments = [str(a) for a in command(folder, out, "--steps", "8", "--json")]
        arguments[1] = str(tmp_path / "folded.onnx")
        if name == "one":
            code, text, err = sartor(*arguments)
        else:
            done = torchrun("-m", "sartor", *arguments)
            code, text, err = done.returncode, done.stdout, done.stderr
        assert code == 0, err[-3000:]
        document = json.loads(text)
        assert document["processes"] == (1 if name == "one" else 2)
        found[name] = package.load(out)
    for key in found["one"].initializers:
        one, two = (program.initializer_array(key) for program in found.values())
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_of_a_refusal_in_all_processes_one_document_is_written(folder, tmp_path, sartor, monkeypatch):
    refused = [*command(folder, tmp_path / "x.onnx", "--rat", "2"), "--json"]
    for rank in (0, 1):
        found = Processes(rank, 2)
        monkeypatch.setattr(
            "sartor.recovery.processes.together", lambda found=found: contextlib.nullcontext(found)
        )
        code, text, err = sartor(*refused)
        assert code == 2 and "'rat' is 2.0" in err and not (tmp_path / "x.onnx").exists()
        assert text == "" if rank else json.loads(text)["exit_code"] == 2
