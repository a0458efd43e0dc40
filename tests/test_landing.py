"""A search lands just below its limit in three iterations, on a simulated target whose predictions are off."""

from __future__ import annotations

import numpy as np
import pytest

from sartor.ir.plan import Plan
from sartor.landing import INSIDE, NEAR, Landing, Seen
from sartor.strategies.space import Decision

BASELINE_S = 0.02
HALF_WIDTH = 0.003


class World:
    """Plans on a grid of predicted latencies; what is measured is biased, bends, wiggles and is noisy."""

    def __init__(self, bias, bend, wiggle, step, seed):
        self.bias, self.bend, self.step = bias, bend, step
        self.generator = np.random.default_rng(seed)
        self.wiggle = 1 + wiggle * self.generator.uniform(-1, 1, 4000)
        self.scale, self.measured = 1.0, 0

    def search(self, wanted):
        index = int(np.floor(wanted["latency"] / self.scale / BASELINE_S / self.step))
        plan = Plan("0" * 64, {}, (), {"index": index})
        return Decision(plan, (), {"latency": self.predict_index(index)}, index > 0)

    def predict_index(self, index):
        return index * self.step * BASELINE_S * self.scale

    def predict(self, decision):
        return self.predict_index(decision.plan.notes["index"])

    def true(self, decision):
        share = decision.plan.notes["index"] * self.step
        return BASELINE_S * self.bias * share**self.bend * self.wiggle[decision.plan.notes["index"]]

    def measure(self, decision, learn):
        self.measured += 1
        value = self.true(decision) * (1 + HALF_WIDTH / 3 * self.generator.standard_normal())
        if learn:  # half way, as ridge does
            self.scale *= (value / self.predict(decision)) ** 0.5
        return value


def land(world, share, learn, most=5):
    landing = Landing({"latency": share * BASELINE_S}, world.predict)

    def measure(decisions, iteration):
        world.iterations = iteration
        times = [world.measure(decision, learn) for decision in decisions]
        return [Seen({}, time, time * (1 + HALF_WIDTH)) for time in times]

    landing.run(world.search, measure, most)
    return landing


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(("bias", "bend"), [(1.0, 1.0), (0.85, 1.0), (1.2, 1.0), (1.05, 0.8), (0.95, 1.25)])
@pytest.mark.parametrize("wiggle", [0.003, 0.03])
def test_three_iterations_are_enough(bias, bend, learn, share, wiggle):
    """Nearly always where plans next to each other are off by 1.7 % (one standard deviation), as ResNet-18's were.

    What counts as near is 2.2 % wide then, so that a plan alone hits it four times in ten.
    """
    taken, measured, near = [], [], []
    for seed in range(30):
        world = World(bias, bend, wiggle=wiggle, step=0.004, seed=seed)
        landing = land(world, share, learn)
        assert landing.best is not None
        assert world.true(landing.best) * (1 + HALF_WIDTH) < share * BASELINE_S
        near.append(world.true(landing.best) > (NEAR - 0.005) * share * BASELINE_S)
        taken.append(world.iterations)
        measured.append(world.measured)
    assert np.mean(np.array(taken) <= 3) >= (0.99 if wiggle < 0.01 else 0.75), taken
    assert np.mean(near) >= (0.99 if wiggle < 0.01 else 0.9)
    assert max(measured) <= 13 and np.mean(measured) <= 7.5


def test_a_coarse_grid_ends_at_its_nearest_plan():
    for seed in range(20):
        world = World(1.1, 1.0, wiggle=0.0, step=0.06, seed=seed)
        landing = land(world, 0.5, False)
        tightest = max(i for i in range(20) if 1.1 * 0.06 * i * (1 + 2 * HALF_WIDTH) < INSIDE * 0.5)
        assert landing.best is not None and landing.best.plan.notes["index"] == tightest


def test_a_wild_target_never_ends_over_the_limit():
    """Neighbours differ by a tenth: whatever is delivered was seen inside."""
    for seed in range(50):
        world = World(1.0, 1.0, wiggle=0.1, step=0.004, seed=seed)
        landing = land(world, 0.6, True)
        assert landing.best is None or world.true(landing.best) < 0.6 * BASELINE_S


def test_other_limits_are_tightened_by_what_was_over():
    landing = Landing({"weight_bytes": 100.0}, lambda d: 0.0)
    decision = Decision(Plan("0" * 64), (), {"weight_bytes": 99.0}, True)
    excess = landing.excess({"weight_bytes": 110.0}, 0.0)
    assert excess == {"weight_bytes": pytest.approx(1.1)}
    assert landing.seen(decision, 0.0, excess) == "over by weight_bytes 10.0 %"
    assert landing.wanted["weight_bytes"] < 97.5 / 1.1
    assert landing.seen(decision, 0.0, {}) == "" and landing.best is decision


def test_a_search_that_found_nothing_feasible_is_not_repeated():
    landing = Landing({"latency": 1.0}, lambda d: 2.0)
    assert landing.seen(Decision(Plan("0" * 64), (), {"latency": 2.0}, False), 2.0, {"latency": 2.0}) == ""
    assert landing.best is None


def test_an_aim_is_raised_until_the_next_plan_is_surely_over():
    """Predictions are right here: the limit is 1.0, and a plan of 0.9 was measured."""
    landing = Landing({"latency": 1.0}, lambda d: d.predicted["latency"])
    assert not landing.higher()  # nothing was measured
    inside = Decision(Plan("0" * 64, notes={"at": 0.9}), (), {"latency": 0.9}, True)
    assert "further than needed" in landing.seen(inside, 0.9, {})
    aims = []
    while landing.higher():
        aims.append(landing.wanted["latency"])
    assert aims == sorted(aims) and 1.0 < aims[-1] < 1.02 and len(aims) <= 8
    over = Decision(Plan("0" * 64, notes={"at": 0.99}), (), {"latency": 0.99}, True)
    assert "over by" in landing.seen(over, 1.01, {"latency": 1.01})
    while landing.higher():
        assert landing.wanted["latency"] < 1.005
    assert landing.wanted["latency"] >= 0.9


def test_an_aim_is_raised_a_few_times_only():
    landing = Landing({"latency": 1.0}, lambda d: d.predicted["latency"])
    landing.seen(Decision(Plan("0" * 64), (), {"latency": 0.5}, True), 0.5, {})
    landing.wanted["latency"] = 0.5  # a search that ends far below, whatever it is asked for
    assert sum(landing.higher() for _ in range(100)) == 8
