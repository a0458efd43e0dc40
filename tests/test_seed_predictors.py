"""Predictors of the source documents: known coefficients are found again, planted errors are seen, files are exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_networks import residual, residual_blocks

from sartor.cost_models.roofline import Roofline
from sartor.cost_models.roofline_law import RooflineConstants
from sartor.cost_models.seeds import (
    KINDS,
    AccuracyCurve,
    Bilinear,
    DimensionLinear,
    FlopsProportional,
    PowerLaw,
    RandomGuess,
    TileLinear,
    UnifiedStatistic,
    load_predictor,
)
from sartor.cost_models.seeds.base import nonnegative_least_squares
from sartor.cost_models.seeds.bilinear import kernel_products
from sartor.cost_models.seeds.unified_statistic import network_statistics
from sartor.errors import UsageError
from sartor.ir.workload import build_workload

RNG = np.random.default_rng(7)


# ---- TECO --------------------------------------------------------------------------------------
SLOPES, OFFSETS, MACS = np.array([2.5, 1.4, 2.2]), np.array([0.35, 4.86, 1.58]), 4.1


def along_one(count=10, offsets=OFFSETS):
    rows, values = [], []
    for s in range(3):
        for removed in np.linspace(0.2, 3.0, count):
            rows.append(removed * np.eye(3)[s])
            values.append(SLOPES[s] * (MACS - removed) + offsets[s])
    return np.array(rows), np.array(values)


def test_dimension_lines_are_found_and_units_are_priced_by_them():
    model = DimensionLinear(MACS).update(*along_one())
    assert model.coefficients["a"] == pytest.approx(SLOPES)
    assert model.coefficients["c"] == pytest.approx(OFFSETS)
    assert model.latency_removed("width", 0.5) == pytest.approx(0.7)  # (5.5)
    assert model.predict([[1.0, 0, 0]]) == pytest.approx([2.5 * 3.1 + 0.35])


def test_a_mixed_plan_is_the_sum_of_its_cuts():
    """Lines that meet at the whole network: then the order of the cuts does not matter."""
    meeting = 12.0 - SLOPES * MACS
    model = DimensionLinear(MACS).update(*along_one(offsets=meeting))
    assert model.predict([[0, 0, 0]]) == pytest.approx([12.0])
    assert model.predict([[0.4, 0.2, 0.6]]) == pytest.approx([12.0 - SLOPES @ [0.4, 0.2, 0.6]])


def test_dimensions_that_were_never_seen_are_refused():
    rows, values = along_one()
    only_width = rows[:, [0, 2]].sum(axis=1) == 0
    model = DimensionLinear(MACS).update(rows[only_width], values[only_width])
    assert model.predict([[0, 1.0, 0]]) == pytest.approx([1.4 * 3.1 + 4.86])
    with pytest.raises(UsageError, match=r"\['depth'\] alone"):
        model.predict([[0.5, 0.5, 0]])
    with pytest.raises(UsageError, match=r"\['resolution'\] alone"):
        model.latency_removed("resolution", 1.0)
    with pytest.raises(UsageError, match="'height' is not one"):
        model.latency_removed("height", 1.0)
    with pytest.raises(UsageError, match="one dimension alone"):
        DimensionLinear(MACS).update([[0.5, 0.5, 0], [0.1, 0.2, 0]], [1, 2])
    with pytest.raises(UsageError, match="MACs of the whole network"):
        DimensionLinear(0)


# ---- TICO --------------------------------------------------------------------------------------
def statistics(count, weights=(0.2, 0.5, 0.3), noise=0.0):
    rows = RNG.uniform(0.1, 1.0, (count, 3)) * [4e9, 25e6, 44e6]
    rows[0] = [4e9, 25e6, 44e6]
    s = rows / [4e9, 25e6, 44e6] @ weights
    return rows, 3.0 + 20.0 * s + 6.0 * s**2 + noise * RNG.standard_normal(count)


def test_unified_statistic_finds_weights_and_polynomial_on_the_sources_sample_sizes():
    model = UnifiedStatistic(degree=2).update(*statistics(100, noise=0.02))
    assert model.coefficients["lambda"] == pytest.approx([0.2, 0.5, 0.3], abs=0.02)
    assert model.coefficients["lambda"].sum() == pytest.approx(1.0)
    rows, values = statistics(50)
    assert np.abs(model.predict(rows) / values - 1).max() < 0.02
    rows, values = statistics(50, weights=(0.8, 0.1, 0.1))  # another metric: another predictor
    assert np.abs(model.predict(rows) / values - 1).max() > 0.1


def test_one_statistic_alone_is_a_corner_of_the_simplex():
    model = UnifiedStatistic(degree=1).update(*[part for part in statistics(40, weights=(0, 0, 1))])
    assert model.coefficients["lambda"] == pytest.approx([0, 0, 1], abs=0.03)


def test_the_degree_is_chosen_on_networks_that_were_held_out():
    rows, _ = statistics(90)
    s = rows / [4e9, 25e6, 44e6] @ [0.2, 0.5, 0.3]
    values = 5.0 + 40.0 * (s - 0.5) ** 3 + 0.001 * RNG.standard_normal(90)
    assert UnifiedStatistic.chosen(rows, values).degree == 3
    with pytest.raises(UsageError, match="degree of at least 1"):
        UnifiedStatistic(degree=0)
    with pytest.raises(UsageError, match="above 0 somewhere"):
        UnifiedStatistic().update(np.zeros((9, 3)), np.ones(9))


def test_statistics_of_a_population():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    rows = network_statistics(workload, {"a": np.array([1.0, 0.5])}, {"block0": np.array([False, True])})
    assert rows.shape == (2, 3) and np.all(rows[0] > rows[1])
    assert rows[0, 0] == float(workload.evaluate().macs)
    assert network_statistics(workload).shape == (1, 3)


# ---- NeuLens -----------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["level", "work"])
def test_tile_regressors_find_weights_of_tiles_and_loads(basis):
    weights = np.array([1.0, -2.0, -1.5, -3.0, -0.5, 4.0])
    levels = RNG.choice([0, 0.25, 0.5, 0.75, 1.0], (40, 4))
    loads = RNG.uniform(0, 1, (40, 1))
    cut = levels if basis == "level" else (1 - levels) ** 2
    values = 30.0 + np.concatenate([np.ones((40, 1)), cut, loads], axis=1) @ weights
    model = TileLinear(2, ("gpu_use",), basis, rest=30.0).update(np.concatenate([levels, loads], 1), values)
    assert model.coefficients["w"] == pytest.approx(weights)
    assert model.columns == ("level_0_0", "level_0_1", "level_1_0", "level_1_1", "gpu_use")
    other = "work" if basis == "level" else "level"
    wrong = TileLinear(2, ("gpu_use",), other, rest=30.0).update(np.concatenate([levels, loads], 1), values)
    assert np.abs(wrong.predict(np.concatenate([levels, loads], 1)) - values).max() > 0.05


def test_tile_refusals():
    model = TileLinear(2)
    with pytest.raises(UsageError, match="5 coefficients, but 3 networks"):
        model.update([[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]], [1, 2, 3])
    with pytest.raises(UsageError, match="outside 0 to 1"):
        model.update(np.full((6, 4), 2.0), np.ones(6))
    with pytest.raises(UsageError, match="basis of"):
        TileLinear(2, basis="cubic")


# ---- ECC ---------------------------------------------------------------------------------------
def test_bilinear_finds_its_coefficients_and_none_is_negative():
    truth = np.array([5.0, 0.02, 0.0, 0.5, 0.03])
    widths = RNG.integers(1, 65, (60, 5)).astype(float)
    products = widths[:, :-1] * widths[:, 1:]
    values = truth[0] + products @ truth[1:]
    model = Bilinear().update(widths, values)
    assert model.coefficients["a"] == pytest.approx(truth, abs=1e-6)
    noisy = Bilinear().update(widths, values + 20 * RNG.standard_normal(60))
    assert noisy.coefficients["a"].min() >= 0
    assert noisy.predict(widths) == pytest.approx(values, rel=0.2)
    linear = Bilinear(chain=False).update(widths, values)  # a planted error: widths in place of products
    assert np.abs(linear.predict(widths) - values).mean() > 10 * np.abs(noisy.predict(widths) - values).mean()
    with pytest.raises(UsageError, match="5 coefficients, but saw 3 networks"):
        Bilinear().update(widths[:3], values[:3])


def test_nonnegative_least_squares_against_its_conditions():
    design, values = RNG.standard_normal((30, 6)), RNG.standard_normal(30)
    found = nonnegative_least_squares(design, values)
    gradient = design.T @ (values - design @ found)
    assert (found >= 0).all() and (found == 0).any() and (gradient <= 1e-8).all()
    assert np.abs(gradient[found > 0]).max() < 1e-8


def test_bilinear_is_right_about_a_compute_bound_network_and_groups():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    plans = {
        g: RNG.integers(1, n + 1, 80) / n for g, n in {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24}.items()
    }
    latency = Roofline(RooflineConstants(1e9, 1e18)).estimate_batch(workload, plans)
    products = kernel_products(workload, plans)
    assert products.shape == (80, 12)
    model = Bilinear(chain=False).update(products[:60], latency[:60])
    assert model.predict(products[60:]) == pytest.approx(latency[60:], rel=1e-3)
    full = kernel_products(workload)
    assert sorted(full[0])[:2] == [40, 3 * 16]  # the depthwise convolution counts its channels once
    assert kernel_products(workload, {}, {"block0": True}).sum() == full.sum() - 2 * 16 * 16


# ---- curves ------------------------------------------------------------------------------------
def test_power_law_is_fitted_to_values_and_not_to_their_logarithms():
    widths = np.array([[16.0], [24], [32], [48], [64], [96]])
    exact = 0.3 * widths[:, 0] ** -0.7
    model = PowerLaw().update(widths, exact)
    assert (model.coefficients["a"], model.coefficients["b"]) == (pytest.approx(0.3), pytest.approx(-0.7))
    noisy = exact * np.exp(0.2 * RNG.standard_normal(6))
    model = PowerLaw().update(widths, noisy)
    a, b = float(model.coefficients["a"]), float(model.coefficients["b"])
    slopes = np.stack([widths[:, 0] ** b, a * np.log(widths[:, 0]) * widths[:, 0] ** b])
    assert slopes @ (model.predict(widths) - noisy) == pytest.approx([0, 0], abs=1e-9)  # least squares
    with pytest.raises(UsageError, match="above 0"):
        PowerLaw().update([[0.0], [1.0]], [1.0, 2.0])
    with pytest.raises(UsageError, match="channels above 0"):
        model.predict([[0.0]])


def test_accuracy_curve_passes_through_the_whole_network():
    macs = np.array([[1.0], [2.0], [3.0]])
    values = -1.5 * (macs[:, 0] - 4.1) ** 2 + 0.8 * (macs[:, 0] - 4.1) + 76.8
    model = AccuracyCurve(4.1, 76.8).update(macs, values)
    assert model.coefficients["ab"] == pytest.approx([-1.5, 0.8])
    assert model.predict([[4.1]]) == pytest.approx([76.8])
    with pytest.raises(UsageError, match="MACs of the whole network"):
        AccuracyCurve(0, 1)


# ---- baselines and the protocol ----------------------------------------------------------------
def test_flops_proportional_is_the_median_rate():
    model = FlopsProportional().update([[1e9], [2e9], [4e9], [1e9]], [1.0, 2.0, 4.0, 50.0])
    assert model.predict([[3e9]]) == pytest.approx([3.0])
    with pytest.raises(UsageError, match="MACs above 0"):
        FlopsProportional().update([[0.0]], [1.0])


def test_a_random_guess_knows_the_values_and_nothing_else():
    model = RandomGuess(seed=3).update(np.arange(100.0)[:, None], np.arange(100.0))
    guess = model.predict(np.arange(100.0)[:, None])
    assert set(guess) <= set(range(100)) and abs(np.corrcoef(guess, np.arange(100))[0, 1]) < 0.3
    assert np.array_equal(guess, model.predict(np.zeros((100, 1))))
    assert not np.array_equal(guess, RandomGuess(seed=4).update(np.zeros((100, 1)), np.arange(100.0)).predict(
        np.zeros((100, 1))
    ))  # fmt: skip


def some(kind):
    rows = RNG.uniform(0.05, 1.0, (30, 3))
    if kind == "dimension-linear":
        return DimensionLinear(MACS), *along_one()
    if kind == "tile-linear":
        return TileLinear(1, ("a", "b")), rows, rows @ [1, 2, 3]
    if kind == "accuracy-curve":
        return AccuracyCurve(1.0, 70.0), rows[:, :1], 70 + (rows[:, 0] - 1) ** 2
    if kind == "power-law":
        return PowerLaw(), rows[:, :1], rows[:, 0] ** 0.5
    if kind == "flops-proportional":
        return FlopsProportional(), rows[:, :1], rows[:, 0] * 2
    return KINDS[kind](), rows, rows @ [1, 2, 3]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_predictor_updates_saves_loads_and_refuses(kind):
    empty, rows, values = some(kind)
    with pytest.raises(UsageError, match="learned nothing yet"):
        empty.predict(rows)
    first = empty.update(rows, values)
    again = load_predictor(json.loads(json.dumps(first.save(), allow_nan=False)))
    assert type(again) is type(first) and np.array_equal(again.predict(rows), first.predict(rows))
    half = len(rows) // 2 if kind != "dimension-linear" else 20
    stepwise = empty.update(rows[:half], values[:half]).update(rows[half:], values[half:])
    assert stepwise.predict(rows) == pytest.approx(first.predict(rows))
    assert len(again.update(rows[:4], values[:4]).seen_values) == len(rows) + 4
    for wrong in (rows[:, 0], np.full_like(rows, np.nan), np.hstack([rows, rows])):
        with pytest.raises(UsageError, match=f"'{kind}' got rows of shape"):
            first.predict(wrong)
    with pytest.raises(UsageError, match="one finite number per row"):
        first.update(rows, values[:-1])
    with pytest.raises(UsageError, match="malformed"):
        load_predictor({"kind": kind, "options": {}})
    with pytest.raises(UsageError, match="found 'oracle'"):
        load_predictor({"kind": "oracle"})
