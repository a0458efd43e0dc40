"""Metrics of memory: exact for a plan, the same for a population, and told in a report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_networks import make_program, mobilenet_v2, residual, residual_blocks
from onnx import helper

from sartor.cost_models.memory import memory_model, memory_report
from sartor.cost_models.static import static_cost
from sartor.errors import MetricUnavailableError
from sartor.inspection import inspect_program
from sartor.ir.memory import PLAIN, Rules, schedule
from sartor.ir.workload import build_workload
from sartor.report.tree import describe

METRICS = (
    *("peak_activation_bytes", "min_peak_activation_bytes", "arena_bytes"),
    *("flash_bytes", "traffic_bytes"),
)
KEPT = {"a": 8, "b": 6, "m0": 4, "m2": 12, "e": 10}
SIZES = {"a": 16, "b": 24, "m0": 16, "m2": 24, "e": 40}


def diamond(size=256):
    """Two long values are made before either is summed; one after the other they need half."""
    edges = [("Softmax", "x", "a"), ("Softmax", "x", "b"), ("ReduceSum", "a", "s"), ("ReduceSum", "b", "t")]
    nodes = [helper.make_node(op, list(i), [o], name=o) for op, i, o in [*edges, ("Add", "st", "y")]]
    return make_program(nodes, {"x": (1, size)}, ["y"], {})


def test_a_plan_has_the_metrics_of_the_smaller_network():
    net = residual()
    for rules in (PLAIN, Rules(), Rules(depthwise=True, inputs_held=False)):
        model = memory_model(net.program(("logits",)), rules, net.extents, residual_blocks())
        whole = memory_model(residual(KEPT).program(("logits",)), rules).estimate()
        plan = model.estimate({group: n / SIZES[group] for group, n in KEPT.items()})
        assert dict(plan.metrics) == dict(whole.metrics) and set(plan.metrics) == set(METRICS)
        without = memory_model(residual(skip_blocks=(2,)).program(("logits",)), rules).estimate()
        assert dict(model.estimate({}, {"block2": True}).metrics) == dict(without.metrics)


def test_a_population_has_the_numbers_of_its_plans():
    net = residual()
    model = memory_model(net.program(("logits",)), Rules(), net.extents, residual_blocks())
    rng = np.random.default_rng(0)
    widths = {group: rng.integers(1, size + 1, 40) / size for group, size in SIZES.items()}
    gone = {"block0": rng.random(40) < 0.5, "block2": rng.random(40) < 0.5}
    together = model.estimate_batch(widths, gone)
    for i in range(40):
        one = model.estimate({k: v[i] for k, v in widths.items()}, {k: v[i] for k, v in gone.items()})
        for metric, values in together.items():
            assert values[i] == one.read(metric), (metric, i)


def test_the_order_of_metrics():
    model = memory_model(mobilenet_v2().program(("logits",)))
    found = model.estimate().metrics
    assert found["min_peak_activation_bytes"] <= found["peak_activation_bytes"] <= found["arena_bytes"]
    assert found["traffic_bytes"] > found["flash_bytes"] > 0
    best = schedule(model.buffers.graph())
    in_order = model.estimate_batch(order=best.order)["peak_activation_bytes"]
    assert in_order == found["min_peak_activation_bytes"]


def test_plain_rules_are_the_static_cost():
    net = residual()
    program = net.program(("logits",))
    estimate = memory_model(program, PLAIN).estimate()
    assert estimate.read("peak_activation_bytes") == static_cost(program).peak_activation_bytes
    assert estimate.read("flash_bytes") == static_cost(program).weight_bytes
    workload = build_workload(program).evaluate()
    fused = memory_model(program).estimate()
    assert fused.read("flash_bytes") == static_cost(program).weight_bytes
    moved = float(workload.bytes_read + workload.bytes_written)
    assert fused.read("traffic_bytes") == pytest.approx(moved, rel=0.02)
    with pytest.raises(MetricUnavailableError, match="Metric 'latency_s' is not part"):
        _ = estimate.latency_s


def test_the_report_says_where_the_peak_is_and_what_another_order_needs():
    report = memory_report(diamond())
    assert json.loads(json.dumps(report)) == report
    assert report["peak"] == {
        "bytes": 3 * 1024 + 4,
        "at": "s",
        "live": [{"value": v, "bytes": n} for v, n in (("x", 1024), ("a", 1024), ("b", 1024), ("s", 4))],
    }
    assert report["best_order"] == {
        "peak_bytes": 2 * 1024 + 8,
        "lower_bound_bytes": 2 * 1024 + 8,
        "optimal": True,
        "moved": 2,
    }
    assert report["arena_bytes"] >= report["peak"]["bytes"] and report["flash_bytes"] == 0
    assert report["rules"] == "kernels fused, elementwise in place, inputs held by the caller"


def test_inspect_tells_it():
    document = inspect_program(diamond())
    assert document["memory"] == memory_report(diamond())
    text = " ".join(describe(document, width=200).split())
    assert (
        "memory: 3.08 kB at its peak, at 's'; in another order of the nodes 2.06 kB; 3.09 kB in one arena"
        in text
    )
    text = " ".join(describe(inspect_program(mobilenet_v2().program(("logits",))), width=200).split())
    assert "and no order of the nodes needs less" in text
    del document["memory"]  # of an earlier version
    assert "memory:" not in describe(document)
