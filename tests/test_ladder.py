"""The cost model of a profile against networks that are really smaller, on a machine whose law is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from cost_networks import FakeBlock, Net, residual, residual_blocks
from cost_profiles import CALL_S, STEP, gemm_spec, make_profile, true_s, with_samples

from sartor.cost_models import rates
from sartor.cost_models.features import family_of
from sartor.cost_models.fitting import fit_profile, networks_terms
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.law import FAMILIES
from sartor.cost_models.learned import as_signature
from sartor.cost_models.pricer import Pricer
from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample
from sartor.cost_models.protocol import CostModel
from sartor.cost_models.samples import kernels_of
from sartor.cost_models.signatures import signature_of
from sartor.errors import MetricUnavailableError, PlanError, UsageError
from sartor.ir.batch import Batch
from sartor.ir.extents import Extent
from sartor.ir.population import Population
from sartor.ir.workload import build_workload

GROUPS = {"a": 64, "b": 96, "e": 160, "m0": 64, "m1": 96, "m2": 96}


def wide(kept=None, skip=()):
    """`residual` with the widths of `GROUPS`."""
    return residual({**GROUPS, **(kept or {})}, skip)


def wide_workload():
    net = wide()
    extents = {
        name: tuple(Extent(tuple((c * (4 if g else 1), g) for c, g in e.terms)) for e in dims)
        for name, dims in net.extents.items()
    }
    return build_workload(net.program(("logits",)), extents, residual_blocks())


def network_s(kept=None, skip=(), scale=1.0):
    """What the machine takes for a network of these widths: its kernels, whatever they are called, and a call."""
    kernels = build_workload(wide(kept, skip).program(("logits",))).kernels
    signatures = [signature_of(k) for k in kernels]
    return scale * (CALL_S + sum(true_s(s.spec, [v.full for v in s.variables]) for s in signatures))


def sampled(workload, points=(0.25, 0.5, 1.0), leave_out=(), noise=0.0, seed=0):
    """A profile that timed every kernel of `workload` at some widths, and nothing else."""
    rng = np.random.default_rng(seed)
    found: dict[tuple, Sample] = {}
    for kernel in workload.kernels:
        s = signature_of(kernel)
        if kernel.op_type in leave_out:
            continue
        axes = [
            sorted({v.full, *(max(STEP, round(v.full * p / STEP) * STEP) for p in points if v.groups)})
            if s.kind == "contraction"
            else sorted({v.full * p for p in points if v.groups} | {v.full})
            for v in s.variables
        ]
        for at in itertools.product(*axes):
            factor = math.exp(noise * rng.standard_normal())
            seconds = true_s(s.spec, at) * factor
            entry = Sample(s.spec, tuple(map(float, at)), family_of(s.spec), seconds, noise)
            found[s.key, at] = entry
    grid = {"Conv": STEP, "Gemm": STEP}
    return DeviceProfile(
        {"name": "fake", "version": "1", "channel_grid": grid}, {}, {}, CALL_S, tuple(found.values())
    )


def random_plans(count, seed=1, step=STEP):
    rng = np.random.default_rng(seed)
    return [
        {g: int(min(s, max(step, round(rng.uniform(0.1, 1) * s / step) * step))) for g, s in GROUPS.items()}
        for _ in range(count)
    ]


def as_fractions(plans):
    return {g: np.array([p[g] / s for p in plans]) for g, s in GROUPS.items()}


def one_plan(plan):
    return {g: plan[g] / s for g, s in GROUPS.items()}


@pytest.fixture(scope="module")
def workload():
    return wide_workload()


@pytest.fixture()
def ladder(workload):
    return Ladder(sampled(workload))


@pytest.fixture(scope="module")
def fitted():
    return fit_profile(make_profile(400, networks=20))


# ---- truth recovered -----------------------------------------------------------------------------
def test_networks_that_are_really_smaller_are_predicted(workload, ladder):
    plans = random_plans(12)
    predicted = ladder.estimate_batch(workload, as_fractions(plans))
    np.testing.assert_allclose(predicted, [network_s(p) for p in plans], rtol=0.05)
    assert float(ladder.estimate_batch(workload)) == pytest.approx(network_s(), rel=0.01)
    assert isinstance(ladder, CostModel)


def test_what_laws_are_fitted_to_is_what_plans_are_priced_at(workload):
    """A law that is fitted to networks priced in another way corrects for the difference, which plans do not have.

    Seen: networks of a profile priced as carriers are, in which kernels take longer.
    """
    pytest.importorskip("lightgbm")
    profile = make_profile(400, in_models=True, noise=0.01)
    samples = tuple(
        dataclasses.replace(s, network=f"net-{i // 10}")
        if i % 2
        else dataclasses.replace(s, seconds=3 * s.seconds, carried=True)
        for i, s in enumerate(profile.samples)
    )
    ladder = Ladder(fit_profile(dataclasses.replace(profile, samples=samples)))
    kernels = tuple((s.spec, sizes, count) for s, sizes, count in kernels_of(workload, layout=True)[0])
    (as_fitted,) = networks_terms([NetworkTime("of-0", kernels, 1.0, (1.0, 1.0))], ladder.tiers, profile)
    expected, priced = (
        as_fitted.expected(ladder.law).seconds,
        ladder.terms(workload, Population({}, {})).seconds,
    )
    for family in ("conv", "depthwise", "gemm", "pool"):
        assert float(priced[family]) == pytest.approx(float(expected[family]), rel=0.1), family


def test_output_widths_between_two_steps_cost_as_the_upper_one_or_their_penalty():
    net = Net((1, 64, 16, 16))
    net.channels["x"] = ("c", 64)
    net.label("x", (1, ("c", 64), 16, 16))
    x = net.conv("x", ("c", 64), 3, "d", depthwise=True)
    workload = build_workload(net.program((x,)), net.extents)
    profile = sampled(workload, (0.25, 0.5, 0.75, 1.0))
    spec = signature_of(workload.kernels[0]).spec
    off = [
        Sample(spec, (float(c),), "depthwise", true_s(spec, (c,))) for c in (23, 30, 36, 47, 51, 54, 57, 60)
    ]
    model = Ladder(with_samples(profile, off))
    widths = (32, 36, 44, 46, 48, 49, 64)
    at = model.estimate_batch(workload, {"c": np.array(widths) / 64})
    np.testing.assert_allclose(at, [CALL_S + true_s(spec, (c,)) for c in widths], rtol=0.12)
    assert at[0] < at[1] == pytest.approx(at[2], rel=0.1) == pytest.approx(at[4], rel=0.1) and at[4] < at[6]
    assert at[3] > 1.5 * at[4]  # 46 channels are slower than 48: the penalty is seen, not smoothed away


def test_removed_blocks_are_recovered(workload, ladder):
    removed = {"block0": np.array([False, True, True]), "block2": np.array([False, False, True])}
    predicted = ladder.estimate_batch(workload, {}, removed)
    np.testing.assert_allclose(predicted, [network_s(None, skip) for skip in ((), (0,), (0, 2))], rtol=0.05)
    assert (np.diff(predicted) < 0).all()


def test_equal_kernels_in_different_blocks_go_one_by_one():
    net = Net((1, 16, 8, 8))
    first = net.conv("x", 16, 3, "c1")
    second = net.conv(first, 16, 3, "c2")
    last = net.conv(second, 16, 1, "c3")
    blocks = (FakeBlock("p", ("n_c1",), ("x",), (first,)), FakeBlock("q", ("n_c2",), (first,), (second,)))
    workload = build_workload(net.program((last,)), net.extents, blocks)
    model = Ladder(sampled(workload))
    removed = {"p": np.array([0, 1, 0, 1], bool), "q": np.array([0, 0, 1, 1], bool)}
    none, p, q, both = model.estimate_batch(workload, {}, removed)
    assert none > p == q > both
    assert none - p == pytest.approx(p - both)


def test_more_channels_are_never_cheaper_on_the_grid_even_with_noise(workload):
    model = Ladder(sampled(workload, noise=0.2))
    for group, size in GROUPS.items():
        steps = np.arange(STEP, size + 1, STEP) / size
        assert (np.diff(model.estimate_batch(workload, {group: steps})) >= -1e-15).all()
    for block in workload.blocks:
        assert model.estimate_batch(workload, {}, {block: True}) < model.estimate_batch(workload)


def test_a_population_is_priced_as_its_plans_one_by_one(workload, ladder):
    ladder.calibrate(workload, 3e-3)
    plans = random_plans(20, step=1)
    together = ladder.estimate_batch(workload, as_fractions(plans))
    for plan, seconds in zip(plans, together, strict=True):
        alone = ladder.estimate(workload, one_plan(plan))
        assert alone.latency_s == pytest.approx(seconds, rel=1e-12)
        parts = sum(k.latency_s for k in alone.kernels) + ladder.constant_s
        assert parts == pytest.approx(seconds, rel=1e-9)


# ---- tiers ---------------------------------------------------------------------------------------
def test_an_operator_that_was_not_timed_is_named_and_priced_by_the_roofline(workload):
    profile = sampled(workload, leave_out=("MaxPool",))
    pool = next(signature_of(k) for k in workload.kernels if k.op_type == "MaxPool")
    failure = {"spec": pool.spec, "reason": "the target crashed on it"}
    model = Ladder(DeviceProfile(**{**vars(profile), "failures": (failure,)}))
    estimate = model.estimate(workload)
    assert estimate.unmodelled == ("n_pool (MaxPool): the target crashed on it",)
    (cost,) = (k for k in estimate.kernels if k.name == "n_pool")
    assert cost.method == "roofline" and cost.latency_s > 0


def test_every_kernel_says_where_its_time_comes_from_and_how_sure_that_is(workload, fitted):
    profile = fitted
    signature = signature_of(next(k for k in workload.kernels if k.name == "n_stem"))
    at = [tuple(v.full * p for v in signature.variables[1:]) for p in (0.5, 1.0)]
    timed = [Sample(signature.spec, (3.0, c), "conv", true_s(signature.spec, (3.0, c))) for (c,) in at]
    estimate = Ladder(with_samples(profile, timed)).estimate(workload, {"b": 0.5})
    how = {k.name: k.method for k in estimate.kernels}
    assert how["n_stem"] == "interpolated" and how["n_b0.c2"] == "learned" and how["n_pool"] == "roofline"
    assert "n_pool (MaxPool): it was not sampled" in estimate.unmodelled[0]
    for cost in estimate.kernels:
        low, high = cost.interval
        assert low < cost.latency_s < high
        assert cost.bound in ("compute", "bandwidth", "launch")
    narrow = {k.name: math.log(k.interval[1] / k.interval[0]) for k in estimate.kernels}
    assert narrow["n_stem"] < narrow["n_b0.c2"] < narrow["n_pool"]
    smaller = Ladder(with_samples(profile, timed)).estimate(workload, {"a": 0.25})
    assert {k.name: k.method for k in smaller.kernels}["n_stem"] == "extrapolated"


def test_nothing_timed_at_all_is_an_error(workload):
    with pytest.raises(MetricUnavailableError, match="could be timed"):
        Ladder(DeviceProfile({}, {}, {}, 0.0))


def test_an_unknown_block_is_refused(workload, ladder):
    with pytest.raises(PlanError, match="'nope'"):
        ladder.estimate_batch(workload, {}, {"nope": np.array([True])})


def test_a_metric_that_is_not_known_is_absent(workload, ladder):
    with pytest.raises(MetricUnavailableError, match="'energy_j'"):
        ladder.estimate(workload).read("energy_j")


# ---- calibration inside a run --------------------------------------------------------------------
def test_calibration_recovers_a_slower_network_and_tells_its_error(workload, ladder):
    ladder.calibrate(workload, network_s(scale=1.7))
    assert ladder.estimate(workload).latency_s == pytest.approx(network_s(scale=1.7), rel=0.005)
    with pytest.raises(MetricUnavailableError, match="at least two"):
        _ = ladder.estimate(workload).interval
    plans = random_plans(6)
    for plan in plans[:4]:
        ladder.calibrate(workload, network_s(plan, scale=1.7), one_plan(plan))
    for plan in plans[4:]:
        estimate, truth = ladder.estimate(workload, one_plan(plan)), network_s(plan, scale=1.7)
        assert estimate.latency_s == pytest.approx(truth, rel=0.04)
        low, high = estimate.interval
        assert low < estimate.latency_s < high and low <= truth <= high
        assert high / low < 1.4
    assert ladder.scales["conv"] == pytest.approx(1.7, rel=0.1)
    assert set(ladder.scales) <= set(FAMILIES)


def test_how_far_off_it_is_only_careful_measurements_tell(workload, ladder):
    """The prunings that kernels were timed in agree with them."""
    ladder.calibrate(workload, network_s())
    for plan in random_plans(5):
        ladder.calibrate(workload, network_s(plan), one_plan(plan), sd=0.04)
    with pytest.raises(MetricUnavailableError, match="at least two"):
        _ = ladder.estimate(workload).interval
    (plan,) = random_plans(1, seed=3)
    ladder.calibrate(workload, 1.1 * network_s(plan), one_plan(plan))
    low, high = ladder.estimate(workload).interval
    assert high / low > 1.2


def test_a_careful_measurement_outweighs_a_rough_one(workload, fitted):
    (plan,) = random_plans(1)
    said = {}
    for sd in (0.015, 0.2):
        model = Ladder(fitted)
        model.calibrate(workload, 1.3 * network_s(plan), one_plan(plan), sd=sd)
        said[sd] = float(model.estimate_batch(workload, one_plan(plan)))
    assert network_s(plan) < 1.1 * said[0.2] < said[0.015] * 1.1 and said[0.2] < said[0.015]


def test_measured_steps_narrow_the_interval_of_a_profile_that_has_one(workload, fitted):
    model = Ladder(fitted)
    model_before = model.estimate(workload).interval
    for plan in random_plans(3):
        model.calibrate(workload, network_s(plan, scale=1.1), one_plan(plan))
    before, after = (math.log(high / low) for low, high in (model_before, model.estimate(workload).interval))
    assert after < before
    latency, low, high = model.intervals_batch(workload, as_fractions(random_plans(5)))
    assert (low < latency).all() and (latency < high).all()


@pytest.mark.parametrize("latency", [0.0, -1.0, math.nan, math.inf])
def test_a_latency_that_is_no_time_is_refused(workload, ladder, latency):
    with pytest.raises(UsageError, match="positive seconds"):
        ladder.calibrate(workload, latency)


# ---- files ---------------------------------------------------------------------------------------
def test_a_ladder_survives_its_file(workload, fitted, tmp_path):
    model = Ladder(fitted)
    model.calibrate(workload, 2e-3)
    model.calibrate(workload, 1e-3, {"m0": 0.5})
    again = Ladder.from_json(model.save(tmp_path / "ladder.json").read_text())
    assert again.to_json() == model.to_json()
    fractions = as_fractions(random_plans(5))
    np.testing.assert_array_equal(
        again.estimate_batch(workload, fractions), model.estimate_batch(workload, fractions)
    )
    assert again.target["name"] == "fake" and len(again.observations) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "other/1"}', '{"schema": "sartor.ladder/1"}'])
def test_other_files_are_refused(text):
    with pytest.raises(UsageError, match="cost model"):
        Ladder.from_json(text)


def test_a_profile_whose_models_do_not_belong_together_is_refused(fitted):
    document = json.loads(fitted.to_json())
    document["models"]["learned"]["conv"]["folds"][0]["right"][0] = 10**6
    with pytest.raises(UsageError, match="models of the device profile are malformed"):
        Ladder(DeviceProfile.from_json(json.dumps(document)))


# ---- input size and batch ------------------------------------------------------------------------
def test_input_sizes_and_batches_are_priced_as_networks_of_that_size():
    def network(edge, batch):
        net = Net((batch, 3, edge, edge))
        x = net.unary("Relu", net.conv("x", ("c", 64), 3, "c1"), "r1")
        return net, net.head(net.conv(x, 32, 1, "c2"), 10)

    net, _ = network(16, 1)
    shapes = [{"x": (1, 3, 16, 16)}, {"x": (1, 3, 32, 32)}]
    program = net.program(("logits",))
    program.batch = Batch(symbolic=True, inputs=("x",))
    workload = build_workload(program, net.extents, sizes=shapes)
    ladder = Ladder(make_profile(120))
    sizes, batches = np.array([0, 1, 1, 0]), np.array([1, 1, 4, 4])
    kept = {"c": np.array([1.0, 0.5, 0.25, 0.75])}
    together = ladder.estimate_batch(workload, kept, size=sizes, batch=batches)
    for i in range(4):
        other, _ = network((16, 32)[sizes[i]], int(batches[i]))
        alone = build_workload(other.program(("logits",)), other.extents)
        assert together[i] == pytest.approx(float(ladder.estimate_batch(alone, {"c": kept["c"][i]})))
        one = ladder.estimate(workload, {"c": kept["c"][i]}, size=int(sizes[i]), batch=int(batches[i]))
        assert one.latency_s == pytest.approx(together[i])
        tables = Pricer(ladder, workload, {"c": 64}, size=int(sizes[i]), batch=int(batches[i]))
        assert tables.estimate_batch(tables.fractions({"c": kept["c"][i]}))[0] == pytest.approx(together[i])
    assert together[2] > 2 * together[1]
    with pytest.raises(PlanError, match="not declared"):
        ladder.estimate_batch(workload, {}, size=2)


def test_products_of_several_rows_are_not_told_by_those_of_one():
    """One row waits for its weights, 200 ps per MAC; several hide that behind what they compute."""

    def sample(rows, c):
        seconds = 2e-6 + (200e-12 if rows == 1 else 20e-12) * rows * c * c
        return Sample(gemm_spec(rows), (float(c), float(c)), "gemm", seconds)

    known = [sample(rows, c) for rows in (1, 16, 64) for c in range(64, 1024, 48)]
    law = rates.fitted([*known, *(sample(1, c) for c in range(65, 2000, 4))])
    asked = sample(50, 768)
    seconds, _ = law.predict(as_signature(asked), [np.array(a) for a in asked.at])
    assert float(seconds) == pytest.approx(asked.seconds, rel=0.02)
