"""The tables of the pricer against the ladder's own evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cost_networks import Net, residual_blocks
from cost_profiles import make_profile
from test_ladder import GROUPS, sampled, wide_workload

from sartor.cost_models import pricer as module
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.pricer import PlanBatch, Pricer
from sartor.errors import PlanError, UsageError
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.workload import build_workload

BLOCKS = ("block0", "block2")


@pytest.fixture(scope="module")
def workload():
    return wide_workload()


def with_periods(profile):
    """The profile of a machine on which a kernel takes the longer, the longer ago it last ran."""
    slower = [
        dataclasses.replace(s, seconds=factor * s.seconds + extra, period_s=period_s)
        for s in profile.samples
        for period_s, factor, extra in ((1e-6, 1.0, 0.0), (1e-5, 1.3, 5e-7), (1e-4, 1.6, 1e-6))
    ]
    return dataclasses.replace(profile, samples=tuple(slower))


def random_batch(pricer, count=200, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.array([pricer.sizes[g] for g in pricer.groups])
    kept = rng.integers(1, sizes + 1, (count, len(sizes)))
    kept[0] = sizes
    return PlanBatch(kept, rng.random((count, len(pricer.workload.blocks))) < 0.3)


def slowly(ladder, workload, pricer, batch):
    fractions = {g: batch.kept[:, i] / pricer.sizes[g] for i, g in enumerate(pricer.groups)}
    removed = {b: batch.removed[:, i] for i, b in enumerate(workload.blocks)}
    return ladder.estimate_batch(workload, fractions, removed)


@pytest.mark.parametrize("periods", [False, True])
@pytest.mark.parametrize("cells", [1 << 16, 500, 10])
def test_tables_say_what_the_ladder_says(workload, monkeypatch, periods, cells):
    monkeypatch.setattr(module, "_MOST_CELLS", cells)  # with few cells, kernels stay on their knots
    alone = sampled(workload, noise=0.1)
    ladder = Ladder(with_periods(alone) if periods else alone)
    pricer = Pricer(ladder, workload, {**GROUPS, "of another output": 3})
    kinds = {type(part).__name__ for parts in pricer._parts.values() for part in parts}
    assert kinds == {1 << 16: {"_Dense"}, 500: {"_Dense", "_Knotted"}, 10: {"_Knotted", "_Direct"}}[cells]
    batch = random_batch(pricer)
    expected = slowly(ladder, workload, pricer, batch)
    np.testing.assert_allclose(pricer.estimate_batch(batch), expected, rtol=1e-12)
    if periods:  # make a difference, or the test would not see them
        assert expected[0] > 1.1 * float(Ladder(alone).estimate_batch(workload))


def test_kernels_of_equal_groups_in_removable_blocks(workload):
    net = Net((1, 16, 8, 8))
    x = "x"
    for name in ("c1", "c2", "c3"):
        x = net.conv(x, ("g", 16), 3, name)
    net.label("x", (1, ("g", 16), 8, 8))
    workload = build_workload(net.program((x,)), net.extents, residual_blocks()[:0])
    ladder = Ladder(sampled(workload))
    pricer = Pricer(ladder, workload, {"g": 16})
    batch = random_batch(pricer)
    np.testing.assert_allclose(
        pricer.estimate_batch(batch), slowly(ladder, workload, pricer, batch), rtol=1e-12
    )


def test_a_calibrated_ladder_changes_what_its_pricer_says(workload):
    ladder = Ladder(sampled(workload))
    pricer = Pricer(ladder, workload, GROUPS)
    before = pricer.estimate_batch(batch := random_batch(pricer))
    ladder.calibrate(workload, 5e-3)
    after = pricer.estimate_batch(batch)
    np.testing.assert_allclose(after, slowly(ladder, workload, pricer, batch), rtol=1e-12)
    assert (after > 2 * before).all()


def test_plans_and_fractions_become_the_same_columns(workload):
    pricer = Pricer(Ladder(sampled(workload)), workload, GROUPS)
    plans = [
        Plan("0" * 64),
        Plan("0" * 64, {"a": GroupPlan(64, (0, 3, 5)), "e": GroupPlan(160, tuple(range(17)))}, ("block2",)),
    ]
    batch = pricer.batch(plans)
    again = pricer.fractions(
        {"a": np.array([1.0, 3 / 64]), "e": np.array([1.0, 17 / 160])}, {"block2": [0, 1]}
    )
    np.testing.assert_array_equal(batch.kept, again.kept)
    np.testing.assert_array_equal(batch.removed, again.removed)
    assert dict(zip(pricer.groups, batch.kept[1], strict=True)) == {**GROUPS, "a": 3, "e": 17}
    np.testing.assert_array_equal(pricer.estimate_batch(plans), pricer.estimate_batch(again))
    assert pricer.estimate_batch([]).shape == (0,)


def test_plans_of_another_model_are_refused(workload):
    pricer = Pricer(Ladder(sampled(workload)), workload, GROUPS)
    with pytest.raises(PlanError, match=r"'a' 32 units.*64"):
        pricer.batch([Plan("0" * 64, {"a": GroupPlan(32, (0,))})])
    with pytest.raises(PlanError, match="no such group"):
        pricer.batch([Plan("0" * 64, {"z": GroupPlan(32, (0,))})])
    with pytest.raises(PlanError, match="'nope'"):
        pricer.batch([Plan("0" * 64, {}, ("nope",))])
    kept = np.array([[0, *list(GROUPS.values())[1:]]])
    with pytest.raises(PlanError, match="Plan 0 keeps 0 units of group 'a'"):
        pricer.estimate_batch(PlanBatch(kept, np.zeros((1, 2), bool)))
    with pytest.raises(UsageError, match=r"groups \['e'\]"):
        Pricer(Ladder(sampled(workload)), workload, {g: s for g, s in GROUPS.items() if g != "e"})


def test_a_profile_with_learned_models_is_priced_alike(workload):
    ladder = Ladder(make_profile(120))
    pricer = Pricer(ladder, workload, GROUPS)
    batch = random_batch(pricer, 20)
    np.testing.assert_allclose(
        pricer.estimate_batch(batch), slowly(ladder, workload, pricer, batch), rtol=1e-12
    )
