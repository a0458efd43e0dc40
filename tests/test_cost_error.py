"""The truth harness of predictions: its statistics against hand-made cases, its plans, its resuming."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cost_error
import error_statistics
import interleaved
from cost_networks import residual, residual_blocks

from sartor.cost_models.profile import DeviceProfile, NetworkTime
from sartor.ir.channels import channel_groups
from sartor.passes.prune import apply_plan
from sartor.profiling.networks import anchors


def rows(errors, networks=20, width=0.1, noise=0.005):
    """Plans of networks whose sizes span a decade; `errors[i]` of the i-th plan of every network."""
    found = []
    for network in range(networks):
        for plan, error in enumerate(errors):
            measured = 1e-3 * 10 ** (network / networks) * (1 - 0.08 * plan)
            predicted = measured * (1 + error)
            found.append(
                {
                    "network": f"net{network}",
                    "plan": plan,
                    "measured_s": measured,
                    "ci95": [measured * (1 - noise), measured * (1 + noise)],
                    "predicted_s": predicted,
                    "interval": [predicted / (1 + width), predicted * (1 + width)],
                    "flops_s": measured * (2 if network % 2 else 0.5),
                    "roofline_s": measured * 1.2,
                }
            )
    return found


def test_errors_are_what_was_planted():
    summary = error_statistics.summarise(rows([0.04, -0.04, 0.12, 0.0]))
    assert summary["mape"] == pytest.approx(0.05)
    assert summary["within_10"] == 0.75
    assert summary["coverage_90"] == 0.75  # 12 % is outside an interval of 10 %
    assert summary["networks"] == 20 and summary["n"] == 80
    assert summary["truth_half_width_median"] == pytest.approx(0.005)
    assert summary["roofline"]["mape"] == pytest.approx(0.2) and summary["roofline"]["spearman"] == 1.0
    assert summary["flops"]["mape"] == pytest.approx(0.75) and summary["flops"]["spearman"] < 0.8
    assert summary["flops"]["spearman_within"] == 1.0
    assert "coverage" in error_statistics.table(summary)


def test_an_order_that_is_wrong_within_networks_is_seen_although_all_together_look_right():
    summary = error_statistics.summarise(rows([-0.2, 0.0, 0.2]))
    assert summary["spearman_within"] == -1.0 < 0.8 < summary["spearman"]


def test_wilson_is_the_textbook_interval():
    low, high = error_statistics.wilson(81, 90)
    assert (low, high) == (pytest.approx(0.8208, abs=1e-3), pytest.approx(0.9466, abs=1e-3))
    assert error_statistics.wilson(10, 10)[1] == 1.0 and error_statistics.wilson(0, 10)[0] == 0.0


def test_plans_of_one_network_are_not_counted_as_independent():
    """Half of the networks wrong in all plans: the interval over networks is wider than over plans."""
    good, bad = rows([0.0] * 8, networks=10), rows([0.5] * 8, networks=10)
    for row in bad:
        row["network"] = "bad" + row["network"]
    summary = error_statistics.summarise([*good, *bad])
    plans = summary["coverage_90_wilson"][1] - summary["coverage_90_wilson"][0]
    networks = summary["coverage_90_by_network"][1] - summary["coverage_90_by_network"][0]
    assert summary["coverage_90"] == 0.5 and networks > 1.5 * plans


def test_plans_are_on_the_grid_next_to_it_and_without_blocks():
    net = residual({g: 64 for g in ("a", "b", "e", "m0", "m1", "m2")})
    program = net.program(("logits",))
    analysis, blocks = channel_groups(program), residual_blocks()
    plans = cost_error.random_plans(program, analysis, [], 8, 12, "seed")
    again = cost_error.random_plans(program, analysis, [], 8, 12, "seed")
    assert plans == again and plans != cost_error.random_plans(program, analysis, [], 8, 12, "other")
    kept = [[len(g.keep) for g in plan.groups.values()] for plan in plans]
    assert all(c % 8 == 0 for even in kept[::2] for c in even)
    assert any(c % 8 for odd in kept[1::2] for c in odd)
    with_blocks = cost_error.random_plans(program, analysis, blocks, 8, 30, "seed")
    assert any(plan.blocks for plan in with_blocks[2::3])
    assert not any(plan.blocks for plan in with_blocks[::3])
    for plan in plans[:4]:
        apply_plan(program, plan, analysis)


def test_references_are_of_different_kinds_and_stay_when_what_generates_them_changes(tmp_path, monkeypatch):
    from sartor.profiling import networks

    names = anchors(interleaved.SEED)
    assert len({name.partition("-")[0] for name in names}) == len(names) >= 3
    first = interleaved.references_of(tmp_path)
    assert first == {name: networks.network(name) for name in names}
    monkeypatch.setattr(networks, "network", lambda name: b"others")
    assert interleaved.references_of(tmp_path) == first
    (tmp_path / "references" / "plain-0-0.onnx").unlink()
    assert interleaved.references_of(tmp_path) == {**first, "plain-0-0": b"others"}


def test_what_references_take_is_measured_anew_where_a_profile_has_other_networks(tmp_path, monkeypatch):
    """Of the same names: a network of ratio 2 that takes 6 ms says that the references take 3."""
    from sartor.journal import Journal
    from sartor.profiling import networks

    asked = []

    def repeated(models, options, references):
        asked.append(len(models))
        return [[math.log(2.0)] * 4 for _ in models]

    monkeypatch.setattr(interleaved, "repeated", repeated)
    monkeypatch.setattr(networks, "network", lambda name: f"{version} of {name}".encode())
    times = tuple(
        NetworkTime(f"{kind}-{interleaved.SEED}-{number}", (), 6e-3, (5.9e-3, 6.1e-3))
        for kind in networks.KINDS
        for number in range(4)
    )
    profile = DeviceProfile({}, {}, {}, 0.0, networks=times)
    measuring, told = (argparse.Namespace(predict_only=only) for only in (False, True))
    with Journal(tmp_path / "truth.jsonl", {}) as journal:
        version = "one"
        assert interleaved.scale_of(profile, journal, measuring, {}) == pytest.approx(3e-3)
        assert interleaved.scale_of(profile, journal, told, {}) == pytest.approx(3e-3)
        assert len(asked) == 3
        version = "another"
        with pytest.raises(SystemExit, match="does not say what the reference networks take"):
            interleaved.scale_of(profile, journal, told, {})
        assert interleaved.scale_of(profile, journal, measuring, {}) == pytest.approx(3e-3)
        assert len(asked) == 6
        strange = dataclasses.replace(
            profile, networks=tuple(dataclasses.replace(n, sha256="0" * 64) for n in times)
        )
        with pytest.raises(SystemExit, match="not those that this version generates"):
            interleaved.scale_of(strange, journal, measuring, {})
        with pytest.raises(SystemExit, match="of seed 0"):
            interleaved.scale_of(DeviceProfile({}, {}, {}, 0.0), journal, measuring, {})


def test_repetitions_of_an_earlier_run_are_gone_on_with_until_the_interval_is_narrow(monkeypatch):
    """Two references of 1 and 4 units, whose geometric mean is 2, and a model of 6 that scatters."""
    from sartor.backends.visits import Summary
    from sartor.profiling import timing

    class Timer:
        asked = 0

        def __init__(self, *_):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

        def __call__(self, models, effort):
            Timer.asked += 1
            wobble = 1.01 if Timer.asked % 2 else 1 / 1.01
            ratios = (1.0, 4.0, 6.0 * wobble)[: len(models)]
            return timing.Batch(tuple(timing.Timed(Summary(r, 0.0, 4, 4)) for r in ratios), 1.0, {})

    monkeypatch.setattr(timing, "KernelTimer", Timer)
    options = argparse.Namespace(target="onnxruntime", threads=1, half_width=0.02, seconds=1e9)
    references = {"a": b"a", "b": b"b"}
    (first,) = interleaved.repeated([b"model"], options, references)
    assert interleaved.ratio_of(first)["ratio"] == pytest.approx(3.0, rel=0.01) and len(first) >= 4
    (same,) = interleaved.repeated([b"model"], options, references, [first])
    assert same == first
    (more,) = interleaved.repeated([b"model"], options, references, [first], fewest=len(first) + 2)
    assert more[: len(first)] == first and len(more) == len(first) + 2
    options.half_width = 0.008
    (longer,) = interleaved.repeated([b"model"], options, references, [first])
    assert longer[: len(first)] == first and len(longer) > len(first)
    assert interleaved.enough([longer], 0.008) and not interleaved.enough([longer[:-1]], 0.008)


def test_none_of_the_measured_networks_is_in_a_profile():
    from sartor.profiling.networks import KINDS

    assert len(cost_error.NETWORKS) >= 20 and len(set(cost_error.NETWORKS)) == len(cost_error.NETWORKS)
    assert not {name.partition("/")[2].partition("@")[0] for name in cost_error.NETWORKS} & set(KINDS)
    assert all(64 <= int(name.partition("@")[2]) <= 256 for name in cost_error.NETWORKS)


def test_a_summary_is_json():
    summary = error_statistics.summarise(rows([0.01, 0.02, 0.03]))
    assert json.loads(json.dumps(summary, allow_nan=False))["mape"] == pytest.approx(0.02)
    assert math.isfinite(summary["bias"]) and np.isfinite(summary["spearman"])
