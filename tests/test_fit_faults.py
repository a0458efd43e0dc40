"""What a fit does when the author's data fail, when it is interrupted, and when nothing has to go.

Measurements and the kernel table are replaced by MACs, so that a whole fit takes a second and always ends alike.
"""

from __future__ import annotations

import importlib
import json

import pytest
from fit_fakes import without_timing
from test_cli import tiny

from sartor import runtime
from sartor.cli import main
from sartor.journal import Journal, read
from sartor.recovery import RecoveryOptions
from sartor.recovery.training import Training
from sartor.selection import Selection
from sartor.strategies.budgeted_greedy import Greedy

Fit = importlib.import_module("sartor.fit")._Fit  # `sartor.fit` alone is the function

DATA = """
import numpy as np
X = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype("float32")
Y = np.arange(40) % 4

def split(labels=None, x=X):
    return [({"x": x[i : i + 20]}, None if labels is None else labels[i : i + 20]) for i in (0, 20)]

class Late:
    def __iter__(self):
        yield {"x": X}, None
        raise RuntimeError("late\\nboom")

def fail(outputs, labels):
    raise ValueError("nope")

def leave(outputs, labels):
    raise SystemExit(7)

def nan(outputs, labels):
    return next(iter(outputs.values())).mean() * float("nan")

def constant(outputs, labels):
    import torch
    return torch.zeros(())

def whole(outputs, labels):
    return 3

def made(**changes):
    return {"train": split(), "evaluate": split(), "test": split()} | changes
"""
FAULTS = {
    "split": ("{'evaluate': Late()}", "Batch 1 of split 'evaluate' of 'data.py:load' failed: RuntimeError: late boom"),
    "metric": ("made(metric=fail)", "The metric of 'data.py:load' failed: ValueError: nope (data.py:15)."),
    "metric that exits": ("made(metric=leave)", "The metric of 'data.py:load' failed: it called sys.exit(7)"),
    "metric without a number": ("made(metric=lambda o, y: None)", "metric returned a value of type 'NoneType'"),
    "loss": ("made(loss=fail)", "The loss of 'data.py:load' failed: ValueError: nope (data.py:15)."),
    "loss that is NaN": ("made(loss=nan)", "The loss of 'data.py:load' has NaN or infinite gradients"),
    "constant loss": ("made(loss=constant)", "The loss of 'data.py:load' has a gradient of 0 for every unit"),
    "loss that is no tensor": ("made(loss=whole)", "loss returned a value of type 'int'"),
    "NaN labels": (
        "made(evaluate=split(np.full((40, 4), np.nan, 'float32')))",
        "Batch 0 of split 'evaluate' of 'data.py:load' has labels with NaN",
    ),
    "negative labels": ("made(evaluate=split(Y - 1))", "The labels go down to -1"),
    "labels too high": ("made(evaluate=split(Y + 1))", "The labels go up to 4"),
    "some labels": ("{'evaluate': [split(Y)[0], split()[1]]}", "Batch 1 of split 'evaluate' of 'data.py:load' has no"),
    "exit": ("exit(7)", "failed: it called sys.exit(7) (data.py:"),
}  # fmt: skip


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Fits a tiny network with `load` of a data file; returns (exit code, document, standard error, measured)."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    model = tiny("tiny.onnx")
    (tmp_path / "out").mkdir()
    measured = without_timing(monkeypatch)

    def run(load="made()", budget="macs=0.7x", recovery="none", source=model):
        (tmp_path / "data.py").write_text(f"{DATA}\ndef load():\n    return {load}\n")
        measured.clear()
        data = [] if load is None else ["--data", "data.py:load"]
        options = [
            "--budget",
            budget,
            "--recovery",
            recovery,
            "--max-drop",
            "100",
            "--out",
            "out/o",
            "--json",
        ]
        code = main(["fit", source, "--target", "onnxruntime", *options, *data])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err, len(measured)

    return run


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


# ---- the author's code -----------------------------------------------------------------------------
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_in_the_data_is_one_sentence_exit_2_and_nothing_written(case, fit, tmp_path):
    load, message = FAULTS[case]
    code, document, err, _ = fit(load)
    assert code == 2 and message in document["error"], document
    assert err == f"sartor: error: {document['error']}\n" and "\n" not in document["error"]
    assert written(tmp_path) == []


def test_sys_exit_of_a_model_is_no_exit_code_of_ours(fit, tmp_path):
    (tmp_path / "model.py").write_text("import sys\n\ndef make():\n    sys.exit(3)\n")
    code, document, _, _ = fit(source="model.py:make")
    assert (
        code == 2 and "'model.py:4' failed while making the model: it called sys.exit(3)" in document["error"]
    )
    assert written(tmp_path) == []


def test_labels_that_only_a_metric_reads_are_a_reason_for_weights(fit):
    load = "made(train=split(np.zeros((40, 2, 5))), metric=lambda o, y: 0.5)"
    code, report, _, _ = fit(load)
    assert code == 0 and "importance by criterion 'l2'" in report["decisions"]
    assert any("'taylor' does not apply" in line and "[20, 2, 5]" in line for line in report["decisions"])
    assert "importance by criterion 'taylor'" in fit("made(train=split(Y))")[1]["decisions"]


# ---- journal and checkpoints -----------------------------------------------------------------------
def test_the_journal_ends_in_the_bundle_and_the_next_run_starts_afresh(fit, tmp_path):
    runs = [fit() for _ in range(2)]
    assert [run[0] for run in runs] == [0, 0] and runs[0][3] == runs[1][3] > 2
    assert written(tmp_path) == ["o"]
    bundle = tmp_path / "out" / "o"
    assert read(bundle / "journal.jsonl")[-1]["kind"] == "delivered"
    listed = [entry["file"] for entry in json.loads((bundle / "manifest.json").read_text())["files"]]
    assert {"journal.jsonl", "bundle.json", "artifact/artifact.json"} <= set(listed)
    assert runtime.load(bundle).inputs  # `--out` is relative here
    # Killed between delivery and clean-up, the journal of a finished run is left beside the bundle.
    (tmp_path / "out" / ".o.journal.jsonl").write_bytes((bundle / "journal.jsonl").read_bytes())
    assert fit()[3] == runs[0][3] and written(tmp_path) == ["o"]


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_bundle_and_is_resumed(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Fit, "_deliver", interrupt)
        code, document, err, measured = fit()
    assert code == 130 and measured > 1 and written(tmp_path) == [".o.journal.jsonl"]
    assert "out/.o.journal.jsonl" in document["notes"][0] and document["notes"][0] in err
    code, _, _, again = fit()
    assert code == 0 and again == 1, "only the final measurement"
    assert written(tmp_path) == ["o"]


def test_an_interrupt_before_any_measurement_leaves_nothing(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "_select", interrupt)
    assert fit()[0] == 130 and written(tmp_path) == []


def test_a_bug_says_where_the_journal_is(fit, tmp_path, monkeypatch):
    def broken(*arguments):
        raise KeyError("lost")

    monkeypatch.setattr(Fit, "_deliver", broken)
    code, document, err, _ = fit()
    assert code == 70 and "out/.o.journal.jsonl" in err and "out/.o.journal.jsonl" in document["notes"][0]


def test_an_interrupted_recovery_stands_in_nobodys_way(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train", interrupt)
        assert fit(recovery="minutes=0.02")[0] == 130
    assert written(tmp_path) == [".o.journal.jsonl", ".o.recovery"]
    resumed = []
    resume = Training._resume
    monkeypatch.setattr(Training, "_resume", lambda self, found: resumed.append(1) or resume(self, found))
    code, report, _, _ = fit(recovery="minutes=0.06", budget="macs=0.5x")
    assert code == 0 and not resumed, "another plan has nothing to resume"
    assert any(line.startswith("recovered by distillation") for line in report["decisions"])
    assert written(tmp_path) == ["o"]
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_train", interrupt)
        fit(recovery="minutes=0.02")
    assert fit(recovery="minutes=0.02")[0] == 0 and resumed and written(tmp_path) == ["o"]


# ---- how it is recovered ---------------------------------------------------------------------------
def test_options_of_recovery_arrive(fit, monkeypatch):
    given = []
    execute = Training.execute
    monkeypatch.setattr(Training, "execute", lambda self: given.append(self.options) or execute(self))
    text = "minutes=0.02,teacher=wrong,temperature=4,features=0.5,rat=0.75,precision=bf16"
    code, report, err, _ = fit("made(train=split(Y))", recovery=text)
    assert code == 0, err
    options = {"teacher": "wrong", "temperature": 4.0, "features": 0.5, "rat": 0.75, "precision": "bf16"}
    assert given == [RecoveryOptions(**options)] and report["recovery"]["options"] == options
    steps = report["recovery"]["steps"]  # none, where the machine is very busy
    assert steps == 0 or any("samples:" in line and "saved" in line for line in report["decisions"])
    assert any("resolution-adaptive training does not apply" in line for line in report["decisions"])
    code, report, _, _ = fit("made(train=split(Y))", recovery="minutes=0.02,teacher=never")
    assert given[-1] == RecoveryOptions(teacher="never")
    steps = report["recovery"]["steps"]
    assert steps == 0 or any(line.startswith("recovered by fine-tuning") for line in report["decisions"])


@pytest.mark.parametrize(
    ("load", "options", "says"),
    [
        ("made()", "teacher=wrong", "have no labels. Use teacher 'always'"),
        ("made(train=split(np.zeros((40, 7), int)))", "teacher=wrong", "labels of shape [1, 7]"),
        ("made()", "teacher=never", "needs labels on all training data, or a loss"),
        ("made(train=split(Y))", "teacher=never,features=1", "which teacher 'never' does not ask"),
    ],
)
def test_labels_that_recovery_needs_are_missed_before_anything_is_measured(
    fit, tmp_path, load, options, says
):
    code, document, _, measured = fit(load, recovery=f"minutes=1,{options}")
    assert code == 2 and says in document["error"] and measured == 0 and written(tmp_path) == []


# ---- what is said of scores, limits and steps ------------------------------------------------------
@pytest.mark.parametrize("repair", ["yes", "no"])
def test_recovery_begins_with_least_squares_unless_told_otherwise(fit, repair):
    _, report, _, _ = fit(recovery=f"minutes=0.05,repair={repair}")
    said = [line for line in report["decisions"] if "least squares" in line]
    assert len(said) == (repair == "yes"), report["decisions"]


def test_the_report_says_what_was_scored_and_trained_on(fit):
    cases = {
        "made()": ("test", []),
        "{'evaluate': split(), 'test': split()}": ("test", ["recovery trained on 'evaluate'"]),
        "{'evaluate': split(), 'calibration': split(), 'test': split()}": (
            "test",
            ["recovery trained on 'calibration'"],
        ),
        "{'train': split(), 'evaluate': split()}": ("evaluate", ["the score is on 'evaluate'"]),
        "{'evaluate': split()}": (
            "evaluate",
            ["the score is on 'evaluate'", "WARNING: recovery trained on the s"],
        ),
    }
    for load, (scored_on, lines) in cases.items():
        _, report, _, _ = fit(load, recovery="minutes=0.01")
        assert report["score_split"] == scored_on and report["data"]["source"] == "data.py:load"
        assert report["strategy"] == "budgeted-greedy" and report["seed"] == 0
        assert report["recovery"]["limit_s"] == 0.6 and report["recovery"]["seconds"] > 0
        assert len(report["data"]["fingerprint"]) == 64
        said = [d for d in report["decisions"] if "the score is on" in d or "trained on" in d]
        assert len(said) == len(lines) and all(d.startswith(x) for d, x in zip(said, lines, strict=True)), (
            said
        )
        kept = report["result"]["macs"] / report["baseline"]["macs"]  # what the prediction is made of here
        predicted = report["predicted"]["latency_s"] / report["baseline"]["latency_s"]["median"]
        assert kept < 0.9 and predicted == pytest.approx(kept)  # of the result, not of the baseline


def test_an_original_within_its_limits_meets_them(fit, tmp_path):
    code, report, _, _ = fit(budget="latency=1x", recovery="minutes=0.05")
    assert report["ratio"]["latency_ci95"][1] > 1.0, "the noise stays on record"
    assert (code, report["status"]) == (0, "met") and report["blocks_removed"] == []
    assert not any("recover" in line for line in report["decisions"])
    bundle = tmp_path / "out" / "o"
    assert (bundle / "model.onnx").read_bytes() == (bundle / "pruned.onnx").read_bytes()


def test_a_search_that_comes_back_to_a_plan_is_over(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("sartor.landing.NEAR", 2.0)  # never near enough
    found, calls = [], []
    search = Greedy.search

    def two(self, limits):
        calls.append(limits)
        if len(found) < 2:
            found.append(search(self, {"latency": limits["latency"] * (0.95, 0.8)[len(found)]}))
        return found[(len(calls) - 1) % 2]

    monkeypatch.setattr(Greedy, "search", two)
    tries = []
    attempt = Selection._try
    monkeypatch.setattr(Selection, "_try", lambda self, *those: tries.append(1) or attempt(self, *those))
    _, report, _, _ = fit(budget="latency=0.8x")
    assert found[0].plan != found[1].plan
    measured = [r for r in read(tmp_path / "out" / "o" / "journal.jsonl") if r["kind"] == "measured"]
    assert len(tries) == len(measured) == 2 < len(calls)
    assert [entry["step"] for entry in report["history"]] == list(range(1, len(measured) + 1))


def test_a_journal_in_use_is_left_alone(fit, tmp_path):
    with Journal(tmp_path / "out" / ".o.journal.jsonl", {}):
        code, document, _, _ = fit()
        assert code == 2 and "another process" in document["error"]
    assert written(tmp_path) == [".o.journal.jsonl"]
