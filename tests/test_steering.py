"""A whole `sartor fit` on a synthetic machine: the cost model that steers it is the real one, times are computed."""

from __future__ import annotations

import json
import random

import pytest
from profile_machine import REFERENCE_S, Machine

from sartor.backends.measure import LatencyStats, Measurement, Ratio
from sartor.cli import main
from sartor.profiling import networks
from sartor.profiling.inside import InsideEffort
from sartor.selection import Selection
from sartor.workbench import Workbench

NOISE = 0.003


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Runs `sartor fit` on a generated network without data; gives the report."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    machine, generator = Machine(noise=NOISE), random.Random(0)

    def latency(artifact):
        (inside,) = machine([artifact.main_file.read_bytes()], InsideEffort(profile_s=0.0))
        return inside.latency.ratio * REFERENCE_S

    def measure(self, artifacts, seconds, seed=None):
        times = [latency(artifact) for artifact in artifacts]
        ratios = [t / times[0] * (1 + NOISE / 2 * generator.gauss(0, 1)) for t in times[1:]]
        return Measurement(
            {"name": "onnxruntime", "threads": 1, "precision": "f32"},
            {},
            tuple(LatencyStats(t, t, t) for t in times),
            tuple(Ratio(r, (r * (1 - NOISE), r * (1 + NOISE))) for r in ratios),
            (),
            "interval",
        )

    monkeypatch.setattr(Workbench, "measure", measure)
    monkeypatch.setattr(Workbench, "time_inside", lambda _, models, options, effort: machine(models, effort))

    def run(name, budget, *more):
        (tmp_path / "model.onnx").write_bytes(networks.network(name))
        command = ["fit", "model.onnx", "--target", "onnxruntime", "--budget", budget, "--recovery", "none"]
        code = main([*command, "--out", "out", "--json", *more])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return run


@pytest.mark.parametrize(("name", "budget"), [("residual-0-0", 0.4), ("inverted-2-2", 0.7)])
def test_a_budget_is_met_within_three_percent_in_three_iterations(fit, name, budget):
    report = fit(name, f"latency={budget}x")
    history = report["history"]
    assert history[-1]["iteration"] <= 3
    assert 0.965 * budget < report["ratio"]["latency"] and report["ratio"]["latency_ci95"][1] <= budget
    for entry in history:
        assert entry["scales"]["conv"] == pytest.approx(1.0, abs=0.2)
        predicted = entry["predicted_latency_s"] / report["baseline"]["latency_s"]["median"]
        assert predicted == pytest.approx(entry["measured_ratio"], rel=0.08)


@pytest.mark.slow
def test_every_measured_candidate_is_an_observation_of_the_model(fit, monkeypatch):
    """With its own plan, and at the latency that it was measured at."""
    monkeypatch.setattr("sartor.landing.NEAR", 2.0)  # never near enough: as many candidates as there may be
    models, tried = [], []
    attempt, build = Selection._try, Selection._cost_model

    def watch(selection, decisions, iteration):
        found = attempt(selection, decisions, iteration)
        for decision, seen in zip(decisions, found, strict=True):
            removed = {name: True for name in decision.plan.blocks}
            fractions = selection.analysis.fractions(decision.plan)
            said = float(selection.model.estimate_batch(selection.workload, fractions, removed))
            tried.append((seen.latency_s, said))
        assert selection.history[-1]["scales"].keys() == selection.model.scales.keys()
        assert selection.history[-1]["iteration"] == iteration
        return found

    def model_of(selection):
        models.append((model := build(selection), len(model.observations)))
        return model

    monkeypatch.setattr(Selection, "_try", watch)
    monkeypatch.setattr(Selection, "_cost_model", model_of)
    fit("inverted-2-2", "latency=0.5x")
    ((model, before),) = models
    careful = model.observations[before:]
    assert [one.latency_s for one in careful] == pytest.approx([measured for measured, _ in tried])
    assert len(careful) > 2 and all(one.sd == careful[0].sd < 0.04 for one in careful)
    for one, (measured, said) in zip(careful, tried, strict=True):  # terms of that plan, not of another
        assert sum(one.seconds.values()) == pytest.approx(measured, rel=0.1)
        assert said == pytest.approx(measured, rel=0.03)
