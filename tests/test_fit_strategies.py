"""Whole fits by other strategies: resized inputs, larger networks, refusals, resumption, fronts. Nothing is timed."""

from __future__ import annotations

import importlib
import json

import onnx
import pytest
from fit_fakes import without_timing
from models import captured

from sartor.budget import Limit
from sartor.cli import main
from sartor.journal import read
from sartor.judge import Judge
from sartor.pareto import as_shares, dominated, eased

DATA = """
import numpy as np
X = np.random.default_rng(0).standard_normal({shape}).astype("float32")
Y = np.arange(32) % 10

def split():
    return [({{"{name}": X[i : i + 16]}}, Y[i : i + 16]) for i in (0, 16)]

def load():
    return {{"train": split(), "evaluate": split(), "test": split()}}
"""
FAST = "compound-shrink{samples=2}"


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    without_timing(monkeypatch)
    captured("resnet").save(tmp_path / "model.onnx")
    ((name, shape),) = captured("resnet").input_shapes.items()
    (tmp_path / "data.py").write_text(DATA.format(name=name, shape=(32, *shape[1:])))

    def run(strategy, budget, *more, data=True):
        options = ["--target", "onnxruntime", "--budget", budget, "--recovery", "none", "--max-drop", "100"]
        options += ["--strategy", strategy, "--out", "out", "--json", *more]
        options += ["--data", "data.py:load"] if data else []
        code = main(["fit", "model.onnx", *options])
        printed = capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    return run


def test_smaller_inputs_are_delivered_proven_and_scored(fit, tmp_path):
    code, report, error = fit("compound-shrink{samples=2}", "macs=0.3x")
    assert code in (0, 3), error
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    ((name, shape),) = plan["scale"]["inputs"].items()
    assert report["inputs"] == {name: shape} and shape[-1] < 32
    delivered = onnx.load(tmp_path / "out/model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in delivered[1:]] == shape[1:]
    assert report["oracle"]["verdict"] == "passed" and report["result"]["score_n"] == 32
    assert report["result"]["macs"] <= 0.3 * report["baseline"]["macs"]
    assert any("callers resize" in line for line in report["decisions"])
    assert {entry["kind"] for entry in read(tmp_path / "out/journal.jsonl")} >= {"judged-plan", "measured"}


def test_a_network_that_may_cost_more_grows(fit, tmp_path):
    code, report, error = fit("hacscale{samples=2,alpha=0.1}", "macs=1.5x")
    assert code == 0, error
    assert report["baseline"]["macs"] < report["result"]["macs"] <= 1.5 * report["baseline"]["macs"]
    assert report["oracle"]["verdict"] == "passed" and report["oracle"].get("note") != "nothing was removed"
    assert any(width["after"] > width["before"] for width in report["widths"])
    assert json.loads((tmp_path / "out/plan.json").read_text())["scale"]["groups"]


def test_a_resumed_fit_judges_nothing_twice(fit, tmp_path, monkeypatch):
    judged = []
    answers = Judge._answers
    monkeypatch.setattr(Judge, "_answers", lambda self, plan: judged.append(plan) or answers(self, plan))
    run = importlib.import_module("sartor.fit")._Fit  # `sartor.fit` alone is the function
    deliver = run._deliver

    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(run, "_deliver", killed)
    assert fit(FAST, "macs=0.5x")[0] == 70
    first = len(judged)
    assert first
    monkeypatch.setattr(run, "_deliver", deliver)
    code, report, error = fit(FAST, "macs=0.5x")
    assert code in (0, 3), error
    assert len(judged) == first and report["result"]["macs"] <= 0.5 * report["baseline"]["macs"]


@pytest.mark.parametrize(
    ("strategy", "budget", "data", "message"),
    [
        ("teco", "macs=0.5x", False, "judges candidates on data, and there are none"),
        ("tecoo", "macs=0.5x", True, "Did you mean 'teco'"),
        ("teco{step=7}", "macs=0.5x", True, "must be float"),
        ("layerprune", "macs=0.01x", True, "is below the feasible floor"),
        ("uniform", "weight_bytes=0.001x", True, "most of it weight"),
    ],
)
def test_refusals_come_before_anything_is_written(fit, tmp_path, strategy, budget, data, message):
    code, document, _ = fit(strategy, budget, data=data)
    assert code == 2 and message in document["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.py", "model.onnx"]


def test_a_front_is_a_bundle_per_point(fit, tmp_path):
    code, front, error = fit("uniform", "macs=0.25x", "--pareto", "3")
    assert code in (0, 3), error
    macs = [point["macs"] for point in front["points"]]
    full = front["baseline"]["macs"]
    assert [point["budget"]["macs"]["value"] for point in front["points"]] == pytest.approx(
        [0.25, 0.25 ** (2 / 3), 0.25 ** (1 / 3)]
    )
    assert all(m <= p["budget"]["macs"]["value"] * full for m, p in zip(macs, front["points"], strict=True))
    for point in front["points"]:
        assert json.loads((tmp_path / "out" / point["folder"] / "report.json").read_text())["oracle"][
            "verdict"
        ]
    page = (tmp_path / "out/pareto.html").read_text()
    assert "point-1" in page and "<svg" in page
    assert json.loads((tmp_path / "out/pareto.json").read_text()) == front
    assert not list(tmp_path.glob(".*"))


def test_a_front_goes_on_where_it_stopped(fit, tmp_path, monkeypatch):
    import sartor.pareto as module

    started = []
    whole = module.fit

    def some(program, options, data, folder, *more, **named):
        started.append(folder.name)
        if len(started) == 2:
            raise RuntimeError("killed")
        return whole(program, options, data, folder, *more, **named)

    monkeypatch.setattr(module, "fit", some)
    code, *_ = fit("uniform", "macs=0.25x", "--pareto", "2")
    assert code not in (0, 3) and (tmp_path / "out/point-1/report.json").exists()
    code, front, error = fit("uniform", "macs=0.25x", "--pareto", "2")
    assert code in (0, 3), error
    assert started == ["point-1", "point-2", "point-2"] and len(front["points"]) == 2
    code, document, _ = fit("uniform", "macs=0.25x", "--pareto", "2")
    assert code == 2 and "is not empty" in document["error"]


def test_limits_between_and_points_that_others_beat():
    budget = {"latency": Limit(0.25, True), "macs": Limit(1e6, False)}
    assert eased(budget, 1.0) == budget
    shares = as_shares(budget, {"baseline": {"latency_s": {"median": 2.0}, "macs": 4e6}})
    assert shares == {"latency": Limit(0.25, True), "macs": Limit(0.25, True)}
    assert eased(shares, 0.5)["macs"].value == 0.5
    assert dominated([(0.3, 0.9), (0.5, 0.9), (0.5, 0.95), (0.7, 0.94)]) == [False, True, False, True]
