"""Static costs of whole programs, and estimates that refuse what they do not know."""

from __future__ import annotations

import numpy as np
import pytest
from cost_networks import Net, make_program, mobilenet_v2, residual, resnet50
from onnx import helper

from sartor.cost_models.protocol import CostEstimate
from sartor.cost_models.static import static_cost
from sartor.errors import MetricUnavailableError


def test_resnet50():
    cost = static_cost(resnet50().program(("logits",)))
    assert cost.macs == 4_089_184_256
    assert cost.parameters == 25_557_032
    statistics = 2 * 26_560  # running mean and variance of all BatchNormalizations
    assert cost.weight_bytes == 4 * (cost.parameters + statistics)
    # the input, and stem.bn with its own input at 112 px
    assert cost.peak_activation_bytes == 4 * (3 * 224**2 + 256 * 56**2 * 3)


def test_mobilenet_v2():
    cost = static_cost(mobilenet_v2().program(("logits",)))
    assert (cost.macs, cost.parameters) == (300_774_272, 3_504_872)


def test_what_counts_as_a_parameter():
    net = Net((1, 4, 8, 8))
    x = net.bn(net.conv("x", 6, 3, "c"), "bn")
    net.constant("low", np.asarray(0, np.float32)), net.constant("high", np.asarray(6, np.float32))
    x = net.unary("Clip", x, "clip", "low", "high")
    net.constant("scale", np.asarray(0.5, np.float32))
    net.nodes.append(helper.make_node("Mul", [x, "scale"], ["m"], name="m"))
    net.constant("one", np.asarray([2], np.float32)), net.constant("slope", np.asarray([[[0.1]]], np.float32))
    net.nodes.append(helper.make_node("Div", ["m", "one"], ["d"], name="d"))
    net.nodes.append(helper.make_node("PRelu", ["d", "slope"], ["p"], name="p"))
    net.constant("target", np.array([1, -1]))
    net.nodes.append(helper.make_node("Reshape", ["p", "target"], ["y"], name="y"))
    cost = static_cost(net.program(("y",)))
    assert cost.parameters == 6 * 4 * 9 + 2 * 6 + 1  # the slope is trained, bounds and factors are not
    assert cost.weight_bytes == 4 * (6 * 4 * 9 + 4 * 6 + 5) + 2 * 8


def test_a_weight_read_twice_counts_once():
    net = Net((1, 8, 4, 4))
    net.conv("x", 8, 3, "c1")
    net.nodes.append(helper.make_node("Conv", ["c1", "c1.weight"], ["c2"], name="c2", pads=[1] * 4))
    cost = static_cost(net.program(("c2",)))
    assert cost.parameters == 8 * 8 * 9
    assert cost.macs == 2 * 8 * 8 * 9 * 16


def test_half_precision_weights_count_half():
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], name="a", to=10),
        helper.make_node("Gemm", ["a", "w"], ["y"], name="g"),
    ]
    program = make_program(nodes, {"x": (2, 4)}, ["y"], {"w": np.zeros((4, 3), np.float16)}, {"y": 10})
    cost = static_cost(program)
    assert (cost.parameters, cost.weight_bytes, cost.macs) == (12, 24, 24)
    assert cost.peak_activation_bytes == 2 * 4 * 4 + 2 * 4 * 2 + 2 * 3 * 2


def test_reading_an_absent_metric_raises():
    estimate = CostEstimate("a test", {"macs": 5.0})
    assert estimate.read("macs") == 5.0
    assert not estimate.knows("latency_s")
    with pytest.raises(MetricUnavailableError, match=r"'latency_s'.*'a test'.*macs"):
        _ = estimate.latency_s
    with pytest.raises(MetricUnavailableError, match="error of metric 'latency_s'"):
        _ = estimate.interval


def test_widths_change_every_static_cost():
    wide, narrow = (static_cost(residual(k).program(("logits",))) for k in (None, {"a": 4, "b": 6}))
    for metric in ("macs", "parameters", "weight_bytes", "peak_activation_bytes"):
        assert getattr(narrow, metric) < getattr(wide, metric)
