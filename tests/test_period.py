"""A kernel takes the longer, the longer ago it, or its code, last ran; a network decides itself how long that is."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from cost_profiles import PERIODS, conv_spec, depthwise_spec, gemm_spec, make_profile, with_samples

from sartor.cost_models import displacement, rates
from sartor.cost_models.features import family_of, features, names_of
from sartor.cost_models.fitting import fit_profile, networks_terms
from sartor.cost_models.items import settled_shares, shares_at
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.law import Law
from sartor.cost_models.learned import as_signature
from sartor.cost_models.profile import Company, DeviceProfile, Sample
from sartor.cost_models.tiers import Tiers
from sartor.cost_models.work import work_of_spec
from sartor.errors import UsageError
from sartor.profiling.shapes import moving

LAUNCH, PER_MAC, PER_BYTE = 2e-6, 1 / 40e9, 1 / 15e9
FIXED, PER_WEIGHT = 1e-6, 1 / 8e9


PAUSES = (PERIODS[0] / 8, PERIODS[1])


def seconds_of(spec, at, period_s, alike=1, displaced=PERIODS):
    found = work_of_spec(spec, at)
    weights, moved = float(found.weight_bytes), float(found.moved)
    waiting = FIXED * float(displacement.share_of(period_s / alike, PAUSES))
    waiting += PER_WEIGHT * weights * float(displacement.share_of(period_s, displaced))
    return LAUNCH + PER_MAC * float(found.macs) + PER_BYTE * moved + waiting


def timed(spec, at, period_s, factor=1.0, alike=1, displaced=PERIODS):
    at, seconds = tuple(map(float, at)), seconds_of(spec, at, period_s, alike, displaced)
    return Sample(spec, at, family_of(spec), seconds * factor, period_s=period_s, alike=alike)


def drawn(count, seed=0, noise=0.0, displaced=PERIODS):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        spec = conv_spec(int(rng.choice([7, 14, 28])), int(rng.choice([1, 3])))
        at = [16 * int(rng.integers(1, 32)) for _ in range(2)]
        period_s = math.exp(rng.uniform(*np.log(PERIODS)))
        factor, alike = math.exp(noise * rng.standard_normal()), int(rng.integers(1, 9))
        found.append(timed(spec, at, period_s, factor, alike, displaced))
    return found


# ---- kernels -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.01), (0.03, 0.6)])
def test_what_waiting_costs_is_recovered_beside_everything_else_that_a_kernel_takes(noise, tolerance):
    law = rates.fitted(drawn(800, noise=noise), periods=PERIODS, pauses=PAUSES).laws["conv/Conv"]
    expected = (LAUNCH, PER_MAC, PER_BYTE, 0.0, 0.0, 0.0, FIXED, PER_WEIGHT)
    assert law.coefficients == pytest.approx(expected, rel=tolerance)
    assert min(law.waiting_s, law.waiting_per_weight_s) > 0


def test_the_ends_of_the_periods_are_those_of_the_models_that_were_timed():
    low, high = displacement.periods_of(drawn(400))
    assert PERIODS[0] < low < 1.5 * PERIODS[0] and PERIODS[1] / 1.5 < high < PERIODS[1]
    first, last = displacement.pauses_of(drawn(400))
    assert PAUSES[0] < first < low / 1.5 and first < last < high
    alone = [dataclasses.replace(s, period_s=0.0) for s in drawn(20)]
    assert displacement.periods_of(alone) == displacement.pauses_of(alone) == (0.0, 0.0)


def test_between_which_periods_weights_are_displaced_is_found():
    """A cache loses them in a fraction of the periods that a profile sees."""
    samples = drawn(600, noise=0.03, displaced=tuple(np.geomspace(*PERIODS, 7)[[3, 5]]))
    found = rates.fitted(samples)
    assert found.displaced == pytest.approx(tuple(np.geomspace(*found.periods, 7)[[3, 5]]))
    everywhere = rates.fitted(samples, displaced=found.periods)
    assert found.laws["conv/Conv"].waiting_per_weight_s == pytest.approx(PER_WEIGHT, rel=0.2)
    errors = [
        np.std(
            [
                np.log(fit.predict(as_signature(s), s.at, s.period_s, s.company)[0] / s.seconds)
                for s in samples
            ]
        )
        for fit in (found, everywhere)
    ]
    assert errors[0] < 0.035 < 0.04 < errors[1]
    loaded = rates.Rates.load(json.loads(json.dumps(found.save())), {})
    assert loaded == found
    light = [s for s in samples if work_of_spec(s.spec, s.at).weight_bytes < 1 << 19]
    assert rates.fitted(light).displaced == rates.fitted(light).periods  # there is nothing to tell it by


def test_of_ends_that_fit_about_as_well_the_earliest_counts(monkeypatch):
    """Behind it nothing more is displaced: a network that is longer than any of the profile's waits no longer."""
    knots = np.geomspace(1.0, 64.0, 7)
    sd = {(1, 2): 0.30, (2, 3): 0.105, (1, 3): 0.108, (2, 4): 0.10, (2, 6): 0.099}
    asked = []

    def waiting(rows, period, pair):
        asked.append(tuple(int(np.argmin(np.abs(knots - end))) for end in pair))
        return rows

    monkeypatch.setattr(displacement, "waiting", waiting)
    monkeypatch.setattr(displacement, "fit_logarithm", lambda *_: (None, sd.get(asked[-1], 0.5)))
    rows = np.full((100, 10), 1e6)
    found = displacement.displaced_between(rows, np.ones(100), ["way"] * 100, (1.0, 64.0))
    assert found == pytest.approx((knots[2], knots[3]))


def test_the_share_that_is_displaced_is_nothing_at_one_end_and_all_at_the_other():
    found = displacement.share_of(np.array([0.0, 1e-4, 1e-3, 1e-2, 1.0]), (1e-4, 1e-2))
    np.testing.assert_allclose(found, [0.0, 0.0, 0.5, 1.0, 1.0])
    np.testing.assert_array_equal(displacement.share_of(np.array([1e-3, 1.0]), (0.0, 0.0)), [0.0, 0.0])


def test_kernels_that_ran_alone_know_no_waiting():
    alone = [dataclasses.replace(s, period_s=0.0) for s in drawn(200)]
    law = rates.fitted(alone)
    assert all(one.waiting_s == one.waiting_per_weight_s == 0.0 for one in law.laws.values())
    signature, at = as_signature(alone[0]), [np.array([v]) for v in alone[0].at]
    assert law.predict(signature, at, 1.0)[0] == law.predict(signature, at)[0]


def test_a_kernel_of_which_there_are_many_waits_less_for_its_code():
    """And no less for its weights, which are its own."""
    laws = rates.fitted(drawn(800), periods=PERIODS, pauses=PAUSES)
    sample = timed(conv_spec(14), (64, 64), PERIODS[1])
    signature, at = as_signature(sample), [np.array([v]) for v in sample.at]
    one, many = (float(laws.predict(signature, at, PERIODS[1], Company(alike))[0][0]) for alike in (1, 30))
    truth = [seconds_of(sample.spec, sample.at, PERIODS[1], alike) for alike in (1, 30)]
    assert one - many == pytest.approx(truth[0] - truth[1], rel=0.05) and one > many
    spec = moving("Relu", [[1, "*", 14, 14]], [[1, "*", 14, 14]])
    rows = [features(spec, [[1e5]], 1e-3, Company(alike))[0] for alike in (1, 10)]
    assert [row[names_of(spec).index("log_pause")] for row in rows] == pytest.approx(np.log([1e3, 1e2]))


def test_a_way_of_which_no_sample_has_many_weights_does_not_say_how_long_one_waits_for_them():
    """Kernels of images: in two networks of their own, the longer of which is slower by half for whatever reason."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(40):
        place = int(rng.integers(2))
        sample = timed(conv_spec(28), (3, 16 * int(rng.integers(1, 5))), PERIODS[place], 1 + 0.5 * place)
        images.append(sample)
    laws = rates.fitted([*drawn(400), *images], periods=PERIODS, pauses=PAUSES)
    assert "conv/Conv/image window" in laws.laws
    spec, at = conv_spec(28), (3.0, 4096.0)
    large = as_signature(timed(spec, at, PERIODS[1]))
    early, late = (float(laws.predict(large, [np.array([v]) for v in at], p)[0][0]) for p in PERIODS)
    assert 0 < late - early < 3 * (seconds_of(spec, at, PERIODS[1]) - seconds_of(spec, at, PERIODS[0]))


def test_memory_that_is_told_by_what_is_moved_bounds_what_one_waits_for_weights():
    """Where a law at large takes all of it for moving, a way may still say that it waits."""
    rows = np.zeros((60, 10))
    rng = np.random.default_rng(0)
    weights = rng.uniform(1e4, 1e6, 60)
    rows[:, 0], rows[:, 2], rows[:, 7], rows[:, 9] = 1.0, weights, weights * rng.uniform(0, 1, 60), 1.0
    wide = rates.Rate(1e-6, 0.0, 1e-10, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1)
    for waiting, kept in ((3e-10, True), (3e-8, False)):
        rows[:, 8] = 1e-6 + 1e-10 * rows[:, 2] + waiting * rows[:, 7]
        found = rates._fit(rows, wide).waiting_per_weight_s
        assert found == (pytest.approx(waiting, rel=0.01) if kept else 0.0)
        assert rates._fit(rows).waiting_per_weight_s == pytest.approx(waiting, rel=0.01)


def test_what_a_kernel_is_bound_by_includes_what_it_waits_for():
    laws = rates.fitted(
        [*drawn(800), *(timed(gemm_spec(), (64 * i, 512), p) for i in range(1, 9) for p in PERIODS)]
    )
    spec, at = gemm_spec(), (512.0, 512.0)
    found = work_of_spec(spec, at)
    macs, moved, weights = float(found.macs), float(found.moved), float(found.weight_bytes)
    assert laws.bound("conv", "Conv", macs, moved, weights, PERIODS[1]) == "bandwidth"
    assert laws.bound("conv", "Conv", 40 * macs, moved, 0.0, PERIODS[0]) == "compute"


def test_laws_survive_their_file_with_the_periods():
    laws = rates.fitted(drawn(100), {"Conv": 16})
    again = rates.Rates.load(json.loads(json.dumps(laws.save())), laws.grid)
    assert again == laws
    profile = fit_profile(make_profile(200, in_models=True), learned=False)
    broken = {**profile.models, "roofline": {"laws": profile.models["roofline"]["laws"]}}
    with pytest.raises(UsageError, match="malformed"):
        Tiers.of(dataclasses.replace(profile, models=broken))


def test_trees_are_told_the_period_of_kernels_with_weights_only():  # and the pause of all
    """What others read has just been made; in long networks maps are large, which trees would take for the same."""
    spec, relu = conv_spec(14), moving("Relu", [[1, "*", 14, 14]], [[1, "*", 14, 14]])
    rows = {p: features(spec, [[16.0, 32.0], [16.0, 16.0]], p) for p in (0.0, 1e-3)}
    place = names_of(spec).index("log_period")
    assert (rows[0.0][:, place] == 0).all() and rows[1e-3][:, place] == pytest.approx(math.log(1e3))
    assert features(spec, [[16.0, 32.0], [16.0, 16.0]], np.array([1e-3, 0.0]))[:, place] == pytest.approx(
        [math.log(1e3), 0.0]
    )
    pause = names_of(relu).index("log_pause")
    short, long = (np.delete(features(relu, [[1e5]], p)[0], pause) for p in (0.0, 1e-3))
    np.testing.assert_array_equal(short, long)


# ---- networks ------------------------------------------------------------------------------------
STATES = np.geomspace(1e-4, 1e-2, 5)


def test_a_period_lies_between_two_states_by_its_logarithm():
    np.testing.assert_allclose(shares_at(1e-3, STATES), [0, 0, 1, 0, 0], atol=1e-12)
    between = shares_at(np.sqrt(STATES[0] * STATES[1]), STATES)
    np.testing.assert_allclose(between, [0.5, 0.5, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(shares_at([0.0, 1e-6, 1.0], STATES), np.eye(5)[[0, 0, 4]], atol=1e-12)
    np.testing.assert_array_equal(shares_at(np.ones((2, 3)), np.zeros(1)), np.ones((2, 3, 1)))


def test_the_period_of_a_network_is_what_it_takes():
    """With a time of `a + b · log(period)`, against bisection."""
    for a, b in ((1e-3, 1e-4), (3e-4, 2e-5), (5e-5, 1e-5), (0.1, 1e-3)):
        times = a + b * np.log(STATES / STATES[0])
        found = float((settled_shares(times, STATES) * times).sum())
        low, high = 1e-9, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            takes = a + b * np.clip(np.log(middle / STATES[0]), 0, np.log(100))
            low, high = (middle, high) if takes > middle else (low, middle)
        assert found == pytest.approx(middle, rel=1e-4)
    batch = np.stack([times, 2 * times])
    np.testing.assert_allclose(settled_shares(batch, STATES)[0], settled_shares(times, STATES))


@pytest.mark.slow
def test_networks_are_predicted_with_the_waiting_that_they_cause():
    """Held-out networks; and worse, if nobody had noted how long ago kernels ran."""
    pytest.importorskip("lightgbm")
    profile = make_profile(1200, networks=30, noise=0.01, bias=0.0, in_models=True)
    samples = tuple(dataclasses.replace(s, period_s=0.0) for s in profile.samples)
    forgetful = dataclasses.replace(profile, samples=samples)
    known, not_known = (fit_profile(one).errors for one in (profile, forgetful))
    assert known["kernels"]["mape"] < 0.75 * not_known["kernels"]["mape"]
    assert known["networks"]["mape"] < 0.85 * not_known["networks"]["mape"]


def test_how_long_a_network_took_is_not_looked_at_when_it_is_predicted():
    profile = make_profile(300, networks=4, in_models=True)
    slow = tuple(dataclasses.replace(n, latency_s=9.0, ci95=(8.0, 10.0)) for n in profile.networks)
    tiers, law = Tiers.of(profile), Law.prior()
    first, second = (networks_terms(nets, tiers, profile) for nets in (profile.networks, slow))
    for one, other in zip(first, second, strict=True):
        expected = [law.predict(terms.expected(law).seconds) for terms in (one, other)]
        assert expected[0] == expected[1]
        assert law.predict(one.seen().seconds) < law.predict(other.seen().seconds)
        assert float(one.expected(law).shares.sum()) == pytest.approx(1.0)


def test_the_same_kernel_costs_more_in_a_longer_network():
    from cost_networks import Net, residual_blocks

    from sartor.ir.workload import build_workload

    def workload(layers):
        net = Net((1, 64, 14, 14))
        x = "x"
        for number in range(layers):
            x = net.conv(x, ("g", 64), 3, f"c{number}")
        net.label("x", (1, ("g", 64), 14, 14))
        return build_workload(net.program((x,)), net.extents, residual_blocks()[:0])

    ladder = Ladder(with_samples(make_profile(600, in_models=True, noise=0.0), drawn(200)))
    one, many = (ladder.estimate(workload(layers)) for layers in (1, 60))
    assert many.kernels[30].latency_s > 1.05 * one.kernels[0].latency_s
    assert many.latency_s > 60 * 1.05 * one.kernels[0].latency_s
    total = sum(kernel.latency_s for kernel in many.kernels)
    assert total + ladder.constant_s == pytest.approx(many.latency_s, rel=1e-9)


def test_a_measured_network_says_how_long_its_kernels_had_to_wait():
    from test_ladder import sampled, wide_workload

    workload = wide_workload()
    profile = sampled(workload)
    periods = (1e-4, 1e-3, 1e-2)
    samples = tuple(
        dataclasses.replace(s, seconds=factor * s.seconds, period_s=period)
        for s in profile.samples
        for factor, period in zip((1.0, 1.5, 2.0), periods, strict=True)
    )
    ladder = Ladder(dataclasses.replace(profile, samples=samples))
    ladder.calibrate(workload, 2e-4)
    ladder.calibrate(workload, 5e-3)
    short, long = (sum(o.seconds.values()) for o in ladder.observations)
    assert long > 1.3 * short


def test_a_profile_of_the_format_before_is_refused_with_what_to_do():
    text = json.loads(make_profile(3).to_json())
    with pytest.raises(UsageError, match=r"device-profile/6'.*device-profile/5'"):
        DeviceProfile.from_json(json.dumps({**text, "schema": "sartor.device-profile/5"}))


def test_channels_that_are_begun_one_by_one_are_told_from_weights_that_are_waited_for():
    """Of a depthwise kernel both grow with the channels; taken for the other, the one was missing in short networks."""
    rng = np.random.default_rng(0)
    per_channel, samples = 3e-7, []
    for _ in range(300):
        spec = depthwise_spec(int(rng.choice([7, 14, 28])))
        at, alike = (float(2 * rng.integers(4, 200) + 1),), int(rng.integers(1, 9))
        period = math.exp(rng.uniform(*np.log(PERIODS)))
        seconds = (
            seconds_of(spec, at, 0.0)
            + per_channel * at[0]
            + FIXED * float(displacement.share_of(period / alike, PAUSES))
        )
        samples.append(Sample(spec, at, family_of(spec), seconds, period_s=period, alike=alike))
    law = rates.fitted(samples, periods=PERIODS, pauses=PAUSES).laws["depthwise/Conv/unblocked window"]
    assert law.per_group_s == pytest.approx(per_channel, rel=0.05) and law.waiting_per_weight_s == 0.0
    short = max(samples, key=lambda s: s.at[0])
    columns = rates.columns_of(groups=short.at[0])
    assert float(law.seconds(columns)) > 0.9 * per_channel * short.at[0]
    assert rates.columns_of(groups=1.0)[4] == 0.0  # one group is the kernel itself
