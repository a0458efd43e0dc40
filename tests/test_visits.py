"""Visits on a machine that drifts, is interrupted, and is noisy: what is left of them is the truth."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import onnx
import pytest

from sartor.backends import quiet
from sartor.backends.onnxruntime import measure
from sartor.backends.origin import Origin
from sartor.backends.visits import Visit, median_of_microseconds, summarise, visit_all

REFERENCE_S = 3e-4


class Machine:
    """Runs take their true time, times a slow drift, noise, and now and then an interruption."""

    def __init__(self, seed=0, noise=0.01, drift=0.3, interrupted=0.05):
        self.random, self.noise, self.drift, self.interrupted = random.Random(seed), noise, drift, interrupted
        self.now = 0.0

    def run(self, seconds: float) -> float:
        self.now += 0.01
        factor = 1 + self.drift * (1 - math.cos(self.now / 0.3)) / 2
        factor *= 1 + abs(self.random.gauss(0, self.noise))
        if self.random.random() < self.interrupted:
            factor *= 1 + 3 * self.random.random()
        return seconds * factor

    def visits(self, truth, **options):
        settings = {"half_width": 0.01, "fewest": 3, "most": 12, "deadline": math.inf, "seed": 1, **options}
        subjects = {i: (lambda s=s: self.run(s)) for i, s in enumerate(truth)}
        return visit_all(subjects, lambda: self.run(REFERENCE_S), clock=lambda: self.now, **settings)


TRUTH = [3e-6 * 1.7**i for i in range(12)]


def errors(machine, **options):
    found = machine.visits(TRUTH, **options)
    return [summarise(found[i]).ratio * REFERENCE_S / s - 1 for i, s in enumerate(TRUTH)]


def test_the_truth_is_recovered_through_drift_and_interruptions():
    found = [e for seed in range(8) for e in errors(Machine(seed))]
    assert statistics.median(map(abs, found)) < 0.005
    assert sorted(map(abs, found))[int(0.95 * len(found))] < 0.02


def test_without_the_reference_drift_would_remain():
    machine = Machine(drift=0.6, interrupted=0)
    visits = machine.visits(TRUTH, fewest=6, most=6)
    plain = [statistics.median(v.own_s for v in visits[i]) / s - 1 for i, s in enumerate(TRUTH)]
    divided = [summarise(visits[i]).ratio * REFERENCE_S / s - 1 for i, s in enumerate(TRUTH)]
    assert max(map(abs, divided)) < 0.03 < max(map(abs, plain))


def test_the_interval_covers_the_truth():
    covered = total = 0
    for seed in range(40):
        machine = Machine(seed, noise=0.03, drift=0.1, interrupted=0)
        visits = machine.visits(TRUTH, fewest=8, most=8)
        for index, seconds in enumerate(TRUTH):
            summary = summarise(visits[index])
            covered += abs(summary.ratio * REFERENCE_S / seconds - 1) <= summary.half_width
            total += 1
    assert 0.85 < covered / total <= 1.0


def test_one_interrupted_visit_and_one_with_a_changing_reference_are_thrown_away():
    good = [Visit(1e-3 * (1 + e), 1e-4, 1e-4) for e in (0.0, 0.002, -0.002, 0.001, -0.001)]
    disturbed = [Visit(2e-3, 1e-4, 1e-4), Visit(1.4e-3, 1e-4, 1.6e-4)]
    summary = summarise([*good, *disturbed])
    assert summary.ratio == pytest.approx(10.0, rel=1e-3)
    assert (summary.used, summary.visits) == (5, 7)
    assert summary.half_width < 0.005


def test_a_whole_slow_phase_is_no_measurement_while_there_are_better_ones():
    slow = [Visit(2.4e-3, 2e-4, 2e-4)] * 3  # twice as slow a reference, and the kernel slowed by more
    good = [Visit(1e-3, 1e-4, 1e-4)] * 3
    assert summarise([*slow, *good], level_s=1e-4).ratio == pytest.approx(10.0)
    assert summarise(slow, level_s=1e-4).ratio == pytest.approx(12.0)  # better than nothing


def test_two_visits_have_no_interval():
    assert summarise([Visit(1.0, 1.0, 1.0)] * 2).half_width == math.inf


def test_what_agrees_is_visited_no_more_and_a_deadline_ends_the_rest():
    quiet = Machine(noise=0.0005, drift=0, interrupted=0)
    visits = quiet.visits(TRUTH)
    assert {len(v) for v in visits.values()} == {3}
    noisy = Machine(noise=0.2, drift=0, interrupted=0)
    assert statistics.median(len(v) for v in noisy.visits(TRUTH).values()) == 12
    late = Machine(noise=0.2, drift=0, interrupted=0)
    assert {len(v) for v in late.visits(TRUTH, deadline=0.0).values()} == {1}


def test_the_median_of_whole_microseconds_is_between_them():
    """By how many lie below: kernels of 3 us differ by less than one."""
    of = [3e-6] * 6 + [4e-6] * 6
    assert median_of_microseconds(of) == pytest.approx(3.5e-6)
    assert (
        2.5e-6 < median_of_microseconds([3e-6] * 9 + [4e-6]) < median_of_microseconds([3e-6] * 5 + [4e-6] * 4)
    )
    draw = random.Random(0)
    for true_us in (2.2, 3.4, 40.6):
        taken = [round(draw.gauss(true_us, 0.7)) * 1e-6 for _ in range(400)]
        assert median_of_microseconds(taken) * 1e6 == pytest.approx(true_us, abs=0.15)
    assert median_of_microseconds([5e-6] * 3 + [900e-6]) == pytest.approx(5e-6, abs=0.5e-6)


# ---- quiet moments -------------------------------------------------------------------------------
class Shared(Machine):
    """Another tenant is busy for 60 % of the time, half a second at once, and slows the reference down by less."""

    def run(self, seconds: float) -> float:
        own = super().run(seconds)
        busy = (self.now / 0.5) % 2 < 1.2
        return own * ((1.15 if seconds == REFERENCE_S else 1.5) if busy else 1.0)


def shared_errors(monkeypatch, near):
    monkeypatch.setattr(quiet, "NEAR", near)
    machines = [Shared(seed, noise=0.005, drift=0, interrupted=0) for seed in range(4)]
    return [abs(e) for machine in machines for e in errors(machine, fewest=6)]


def test_in_quiet_moments_a_neighbour_that_slows_kernels_unlike_the_reference_does_no_harm(monkeypatch):
    assert statistics.median(shared_errors(monkeypatch, quiet.NEAR)) < 0.01
    assert statistics.median(shared_errors(monkeypatch, math.inf)) > 0.1  # a ratio does not cancel it


def looks_at(times, patience_s=10.0, **options):
    """Quiet moments of a reference that takes these seconds, a look each hundredth of a second."""
    seconds, clock = iter(times), (0.01 * tick for tick in itertools.count())
    return quiet.Quiet(lambda: next(seconds), patience_s=patience_s, clock=lambda: next(clock), **options)


def test_patience_ends_and_a_level_that_is_past_is_forgotten():
    looking = looks_at([1.2] * 40_000, patience_s=0.1, level_s=1.0)
    assert looking.wait() == 1.2 and looking.level_s == pytest.approx(1.0)  # it has waited in vain
    waits = next(number for number in range(1000) if looking.now(looking.wait()))
    assert 5 < waits < 200 and looking.level_s == pytest.approx(1.2)
    assert looks_at([1.05], level_s=1.0).wait() == 1.05  # near enough


def test_lucky_moments_are_no_measure_of_the_others():
    """A clock that was higher for a few runs: the least of all looks would make every ordinary moment a busy one."""
    draw = random.Random(0)
    times = [0.8 if i % 40 == 7 else 1 + abs(draw.gauss(0, 0.01)) for i in range(4000)]
    looking = looks_at(times)
    looking.learn()
    assert looking.level_s == pytest.approx(1.0, abs=0.02)
    assert looking.now(1.01) and not looking.now(0.8)
    first = next(i for i, seconds in enumerate(times) if seconds == 0.8)
    beginner = looks_at(times[first:])
    beginner.look()
    assert beginner.now(0.8)  # it knows no other
    beginner.learn()
    assert beginner.now(1.01) and not beginner.now(0.8)


def test_the_level_is_that_of_quiet_moments_however_rare_they_are():
    draw = random.Random(0)
    for busy in (0.0, 0.5, 0.8):
        looks = [
            1.1 + draw.random() if draw.random() < busy else 1 + abs(draw.gauss(0, 0.01)) for _ in range(2000)
        ]
        assert quiet.level(looks) == pytest.approx(1.0, abs=0.02)
    assert quiet.level([3.0]) == pytest.approx(3.0)


def test_a_visit_beside_a_lucky_reference_is_thrown_away():
    steady = [Visit(2.0, 1.0, 1.0)] * 5
    lucky = [Visit(2.0, 0.8, 0.8)] * 4  # what it measured did not become faster
    assert summarise([*steady, *lucky], 1.0).ratio == pytest.approx(2.0)
    assert summarise([*steady, *lucky], 1.0).used == 5
    assert summarise([*lucky, *steady[:1]], 1.0).visits == 5


def test_kernels_are_those_of_the_fastest_inferences_and_a_branch_has_no_say():
    first, second = [10e-6] * 6 + [30e-6] * 6, [50e-6] * 6 + [20e-6] * 6  # the last six are the faster ones
    events = [
        {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "dur": s * 1e6,
            "args": {"node_index": i, "op_name": "X"},
        }
        for i, (name, times) in enumerate({"a": first, "b": second, "branch": [7e-6]}.items())
        for s in times
    ]
    names = {name: (name,) for name in ("a", "b", "branch")}
    found = {k.name: k.median_s for k in measure._collect(events, Origin(onnx.GraphProto()), names, 12)}
    assert found == pytest.approx({"a": 30e-6, "b": 20e-6, "branch": 7e-6}, abs=0.6e-6)
