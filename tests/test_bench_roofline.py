"""Generated models, the envelope of their times, and the laws fitted to it."""

from __future__ import annotations

import dataclasses
import itertools
import re

import bench_backends
import numpy as np
import pytest
from bench_fixtures import (
    QUICK,
    named,
    vendor_fixture,  # noqa: F401
)

from sartor.bench import family, run_bench
from sartor.bench.family import Member, ladder
from sartor.bench.protocol import RUNS
from sartor.bench.roofline import envelope, fit
from sartor.cost_models.static import static_cost
from sartor.report import charts
from sartor.report.bench_page import render
from sartor.report.bench_table import summary
from sartor.report.charts import Point


def test_a_member_has_the_operations_of_its_formula():
    for member in (Member(1, 8, 8, 1), Member(3, 16, 9, 3), Member(2, 8, 12, 5)):
        assert member.flop == 2 * static_cost(member.build()).macs
    assert Member(2, 8, 16, 3).flop == 2 * (16 * 16 * 9 * (3 * 8 + 8 * 8) + 10 * 8)


def test_the_ladder_sees_the_whole_range_first_and_is_repeatable():
    members = ladder(1e9)
    flops = [m.flop for m in members]
    first = next(i for i in range(1, len(flops)) if flops[i] < flops[i - 1])
    assert flops[:first] == sorted(flops[:first]) and flops[0] < 2e5 and 1e9 < flops[first - 1] <= 4e9
    assert all(b / a < 100 for a, b in itertools.pairwise(flops[:first]))
    assert members == ladder(1e9) and len(set(members)) == len(members)


def test_the_envelope_is_below_every_point_and_rises():
    generator = np.random.default_rng(0)
    flops = 10 ** generator.uniform(4, 9, 80)
    points = [(float(f), float((2e-5 + f / 5e10) * generator.uniform(1, 3))) for f in flops]
    line = envelope(points)
    works, times = zip(*line.vertices, strict=True)
    assert list(works) == sorted(works) and list(times) == sorted(times) and len(works) > 5
    assert all(line.latency_s(f) <= s * (1 + 1e-9) for f, s in points)
    probes = [line.latency_s(f) for f in np.geomspace(1e3, max(works), 200)]
    assert probes == sorted(probes)
    with pytest.raises(ValueError, match="beyond the envelope"):
        line.latency_s(2 * max(works))
    # The check can fail: an envelope of the slower half lies above the other half.
    half = envelope([p for p in points if p[1] > 1.8 * (2e-5 + p[0] / 5e10)])
    assert any(half.latency_s(min(f, half.vertices[-1][0])) > s for f, s in points)


@pytest.mark.parametrize("law", ["sum", "max"])
def test_a_planted_law_is_fitted_with_its_residuals(law):
    floor, rate = 3e-5, 2e10
    works = np.geomspace(1e4, 1e9, 16)
    times = (
        floor + works / rate if law == "sum" else np.maximum(floor * (1 + 1e-3 * np.arange(16)), works / rate)
    )
    found, _ = fit(list(zip(works.tolist(), times.tolist(), strict=True)))
    assert found.law == law and found.floor_s == pytest.approx(floor, rel=0.05)
    assert found.rate_flop_per_s == pytest.approx(rate, rel=0.05) and found.worst_residual_fraction < 0.05
    assert found.saturation_flop == pytest.approx(floor * rate, rel=0.08)
    noisy = times * np.random.default_rng(0).uniform(0.8, 1.25, 16)
    rough, _ = fit(list(zip(works.tolist(), noisy.tolist(), strict=True)))
    assert rough.rms_residual_fraction > 5 * found.rms_residual_fraction


def test_too_few_points_have_no_law():
    found, reason = fit([(1e5, 1e-4), (1e6, 2e-4)])
    assert found is None and "2 sizes over a factor of 10" in reason


def test_a_planted_backend_shows_the_roofline_that_was_planted(vendor, monkeypatch):
    monkeypatch.setattr(family, "MOST", 14)
    floor, rate = bench_backends.FLOOR_S, bench_backends.RATE_FLOP_PER_S
    settings = dataclasses.replace(QUICK, family_limit_s=20.0, batch_limit=1)
    for _ in range(3):  # other processes may take the processor in the middle of a planted wait
        report = run_bench([named(width=8)], ["planted"], settings)
        law = report["rooflines"][0]["fit"]
        observed = law["floor_s"] / floor, law["rate_flop_per_s"] / rate
        if all(0.8 < ratio < 1.2 for ratio in observed):
            break
    assert observed == (pytest.approx(1, rel=0.2), pytest.approx(1, rel=0.2)), law
    assert law["law"] == "max" and 0.5 < law["saturation_flop"] / (floor * rate) < 1.5
    points = [p for p in report["rooflines"][0]["points"] if "latency" in p]
    assert len(points) == 14 and all(p["latency"]["runs"] == RUNS for p in points)
    (row,) = report["rows"]
    assert row["roofline"]["share_fraction"] == pytest.approx(1, rel=0.2)
    assert render(report).count("<svg") == 3 and "launch floor" in render(report)
    assert "saturated from" in summary(report)


@pytest.mark.parametrize("tick", ["1", "1.00 ms", "123.45 GFLOPS"])
def test_ticks_do_not_lie_on_the_title_of_their_axis(tick):
    chart = charts.scatter(
        [Point(0.0, 0.0), Point(1.0, 1.0)], x_title="x", y_title="y", x_format=str, y_format=lambda _: tick
    )
    ends = [float(x) for x in re.findall(r'<text class="tick end" x="([\d.]+)"', chart)]
    title = float(re.search(r"translate\(([\d.]+) ", chart)[1])
    assert ends and min(ends) - 7 * len(tick) > title + 4  # characters of 12 px are hardly wider than 7
