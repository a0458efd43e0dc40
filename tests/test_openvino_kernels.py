"""Kernels of OpenVINO: which nodes they compute, whatever the order of its layers, and how long they take."""

from __future__ import annotations

import datetime
import random
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from builders import node, program_from_nodes
from fusion_networks import NETWORKS

from sartor import backends
from sartor.backends.openvino import measure, run
from sartor.backends.openvino.executed import Layer, executed_nodes
from sartor.backends.origin import Origin
from sartor.backends.protocol import TargetOptions
from sartor.profiling.build import fusion_rules
from sartor.profiling.fusion_check import check_fusion
from sartor.profiling.inside_samples import workload_of
from sartor.profiling.networks import network


def origin_of(program):
    return Origin(onnx.load_from_string(program.to_bytes()).graph)


def shared():
    """What one Mul makes goes into two convolutions, and no layer lists it."""
    weight = np.ones((4, 4, 1, 1), np.float32)
    nodes = [
        node("Mul", ["x", "k"], ["m"], "m"),
        node("Conv", ["m", "w"], ["a"], "a"),
        node("Conv", ["m", "w"], ["b"], "b"),
        node("Add", ["a", "b"], ["y"], "y"),
    ]
    weights = {"w": weight, "k": np.full((1, 4, 1, 1), 2.0, np.float32)}
    program = program_from_nodes(nodes, {"x": [1, 4, 8, 8]}, ["y"], weights)
    layers = [
        Layer("x", "Input", ("x",), ()),
        Layer("a", "Convolution", ("a",), ("x",)),
        Layer("b", "Convolution", ("b",), ("x",)),
        Layer("y", "Eltwise", ("y",), ("a", "b")),
    ]
    return origin_of(program), layers


def test_what_belongs_to_two_layers_goes_to_the_first_in_the_program():
    origin, layers = shared()
    expected = {"x": (), "a": ("m", "a"), "b": ("b",), "y": ("y",)}
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        assert executed_nodes(origin, [layers[i] for i in order]) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_in_which_layers_are_listed_is_of_no_account(name, tmp_path):
    program = NETWORKS[name]()
    options = TargetOptions(shapes=dict(program.input_shapes))
    artifact = backends.get("openvino").lower(program, tmp_path / "a", options)
    layers = measure._layers(run.load(artifact, options, PERF_COUNT=True))
    origin = Origin.from_dict(artifact.metadata["origin"])
    expected = executed_nodes(origin, layers)
    assert sum(map(bool, expected.values())) > 5
    for seed in range(8):
        order = list(layers)
        random.Random(seed).shuffle(order)
        assert executed_nodes(origin, order) == expected


@pytest.mark.parametrize("name", ["vit-0-0", "windows-0-0", "inverted-0-0"])
def test_kernels_of_a_profile_s_networks_are_found_again(name, tmp_path):
    """Attention with its scale is one kernel, the parts of a normalization are, and equal projections are three."""
    backend = backends.get("openvino")
    program, workload = workload_of(network(name), fusion_rules(backend))
    options = TargetOptions(threads=1, shapes=dict(program.input_shapes))
    executed = backend.profile(backend.lower(program, tmp_path / "a", options), options, 2)
    report = check_fusion(program, workload, executed)
    assert report.agreement > 0.95, report.to_dict()
    assert set(report.inserted) <= {"Reorder", "ReduceMean"}
    softmax = [k for k in workload.kernels if any(f.op_type == "Softmax" for f in k.epilogue)]
    assert bool(softmax) == name.startswith("vit")


# ---- times ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [8, 40, 400])
@pytest.mark.parametrize("mean_us", [0.4, 3.0, 40.0, 900.0])
def test_the_time_of_a_run_is_recovered_from_averages_of_all(mean_us, count):
    """Neither runs before the model was warm nor interruptions of a millisecond are in it, as in a plain mean."""
    rng = np.random.default_rng(0)
    read = measure.readings(count)
    assert read[-1] - read[0] == count and read[0] >= count / 4
    for _ in range(20):
        runs = mean_us * rng.uniform(0.9, 1.1, read[-1])
        runs[: read[0]] *= np.linspace(8.0, 1.2, read[0])
        runs[rng.integers(read[0] + 2, read[-1], max(1, count // 200))] += 1000.0
        averages = np.floor(np.cumsum(runs) / np.arange(1, len(runs) + 1)).astype(int)
        found = measure.typical_of_averages({n: int(averages[n - 1]) for n in read}) * 1e6
        assert found == pytest.approx(mean_us, abs=3.0, rel=0.06 if count > 8 else 0.15)
    assert runs.mean() > mean_us + 2.0


def test_averages_that_fall_or_are_too_few_give_a_time():
    assert 0.0 <= measure.typical_of_averages({4: 9, 6: 3, 9: 0, 12: 0}) < 1e-6
    assert measure.typical_of_averages({3: 3, 4: 4}) * 1e6 == pytest.approx(7.5, abs=2.0)
    assert measure.typical_of_averages({1: 6}) * 1e6 == pytest.approx(6.5)


def test_a_kernel_that_takes_less_than_a_microsecond_is_one_and_what_never_ran_is_none(monkeypatch, tmp_path):
    """The counter then says that it did not run, from the second inference on."""
    program = NETWORKS["residual"]()
    options = TargetOptions(shapes=dict(program.input_shapes))
    artifact = backends.get("openvino").lower(program, tmp_path / "a", options)
    taken_us = {"long": [100.0] + [20.0] * 99, "short": [1.5] + [0.1] * 99, "free": [0.0] * 100}

    class Request:
        runs = 0

        def infer(self, inputs):
            self.runs += 1

        @property
        def profiling_info(self):
            return [self.entry(name, int(sum(t[: self.runs]) / self.runs)) for name, t in taken_us.items()]

        def entry(self, name, average):
            return SimpleNamespace(
                node_name=name,
                node_type="Reorder",
                exec_type="ref",
                status=f"Status.{'EXECUTED' if average else 'NOT_RUN'}",
                real_time=datetime.timedelta(microseconds=average),
            )

    compiled = SimpleNamespace(create_infer_request=Request)
    monkeypatch.setattr(run, "load", lambda *_, **__: SimpleNamespace(compiled=compiled))
    monkeypatch.setattr(measure, "_layers", lambda _: [])
    found = {k.name: k for k in measure.profile(artifact, options, 20)}
    assert set(found) == {"long", "short"}
    assert found["long"].median_s == pytest.approx(20e-6, abs=1e-6) and found["long"].runs == 20
    assert found["short"].median_s < 1e-6
