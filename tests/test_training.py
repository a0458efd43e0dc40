"""A step of training by hand, and the share of resolution-adaptive training against the source's table 5.11."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cost_networks import Net, residual, residual_blocks

from sartor.cost_models.roofline import Roofline
from sartor.cost_models.roofline_law import RooflineConstants
from sartor.cost_models.training import TrainingModel, adaptive_share, epoch_resolutions
from sartor.errors import MetricUnavailableError, UsageError
from sartor.ir.program import Batch
from sartor.ir.workload import build_workload

TABLES = json.loads((Path(__file__).parent / "fixtures" / "thesis_tables.json").read_text())["tables"]
FORWARD = Roofline(RooflineConstants(macs_per_s=1e10, bytes_per_s=1e12))


def small(norm: bool):
    net = Net((2, 3, 8, 8))
    y = net.conv("x", ("a", 16), 3, "c1")
    y = net.unary("Relu", net.bn(y, "b1") if norm else y, "r1")
    y = net.conv(y, 4, 1, "c2")
    return build_workload(net.program((y,)), net.extents)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("optimiser", "states"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_memory_and_macs_by_hand(norm, optimiser, states):
    cost = TrainingModel(FORWARD, batch=10, optimiser=optimiser).evaluate(small(norm))
    macs = 10 * 64 * (3 * 9 * 16 + 16 * 4)
    weights = 4 * (3 * 9 * 16 + 16 * 4 + (4 * 16 if norm else 0))
    assert float(cost.macs) == 3 * macs
    assert float(cost.state_bytes) == weights * (2 + states)
    assert float(cost.activation_bytes) == 4 * 10 * 64 * (16 * (2 if norm else 1) + 4)
    assert float(cost.step_bytes) == float(cost.state_bytes) + float(cost.activation_bytes)
    assert float(cost.step_s) == pytest.approx(3 * macs / 1e10 + weights * (3 + 2 * states) / 1e12, rel=1e-9)


def test_populations_are_plans_one_by_one_and_removed_blocks_keep_nothing():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    model = TrainingModel(FORWARD, batch=64)
    plans = {"a": np.array([1.0, 0.5, 0.25]), "e": np.array([0.5, 1.0, 0.1])}
    removed = {"block0": np.array([False, True, False])}
    together = model.evaluate(workload, plans, removed)
    for i in range(3):
        alone = model.evaluate(
            workload, {g: v[i] for g, v in plans.items()}, {"block0": bool(removed["block0"][i])}
        )
        for name in ("step_s", "macs", "state_bytes", "activation_bytes"):
            assert float(getattr(alone, name)) == pytest.approx(getattr(together, name)[i]), name
    full, less = (model.evaluate(workload, {}, {"block0": gone}) for gone in (False, True))
    assert less.activation_bytes < full.activation_bytes and less.step_s < full.step_s


def test_the_batch_scales_activations_and_time_but_not_state():
    one, two = (TrainingModel(FORWARD, batch=n).evaluate(small(True)) for n in (32, 64))
    assert two.activation_bytes == 2 * one.activation_bytes and two.state_bytes == one.state_bytes
    assert float(two.step_s) == pytest.approx(2 * float(one.step_s), rel=1e-2)


def test_of_several_input_sizes_the_first_is_priced():
    net = residual(shape=(1, 3, 16, 16))
    program = net.program(("logits",))
    program.batch = Batch(symbolic=True, inputs=("x",))
    sizes = [{"x": (1, 3, 24, 24)}, {"x": (1, 3, 16, 16)}]
    other = residual(shape=(1, 3, 24, 24))
    model = TrainingModel(FORWARD, batch=8)
    found = model.evaluate(build_workload(program, net.extents, sizes=sizes))
    real = model.evaluate(build_workload(other.program(("logits",)), other.extents))
    assert float(found.activation_bytes) == float(real.activation_bytes)
    assert float(found.macs) == float(real.macs) and float(found.step_s) == pytest.approx(float(real.step_s))


def test_metrics_have_names_and_latency_is_not_one_of_them():
    estimate = TrainingModel(FORWARD).estimate(small(True))
    assert estimate.read("train_step_s") > 0 and estimate.read("train_step_bytes") > 0
    assert "the framework's own memory" in estimate.unmodelled and "batch 128" in estimate.method
    with pytest.raises(MetricUnavailableError):
        _ = estimate.latency_s


def test_resolutions_rise_to_the_last_and_their_share_is_that_of_the_source():
    schedule = epoch_resolutions(32, 200)
    assert schedule[0] == 16 and schedule[-1] == 32 and np.all(np.diff(schedule) >= 0)
    assert adaptive_share(32, 200, start=1.0) == 1.0
    (table,) = [t for t in TABLES if t["table"] == "5.11"]
    macs = {(model, method): value for model, method, value, *_ in table["rows"]}
    for model in ("AlexNet", "ResNet110", "DenseNet40"):
        share = macs[model, "RAT"] / macs[model, "Baseline"]
        assert adaptive_share(32, 200) == pytest.approx(share, rel=6e-3), model
        assert adaptive_share(32, 200, start=0.6) != pytest.approx(share, rel=3e-2)


def test_refusals():
    with pytest.raises(UsageError, match="Optimiser 'lion'"):
        TrainingModel(FORWARD, optimiser="lion")
    with pytest.raises(UsageError, match="batch of 0"):
        TrainingModel(FORWARD, batch=0)
    with pytest.raises(UsageError, match="0 epochs"):
        epoch_resolutions(32, 0)
