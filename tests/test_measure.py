"""Rounds and intervals by simulation, and one real comparison per backend."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from backend_programs import small_cnn
from processes import children, ends

from sartor import backends
from sartor.backends.inputs import random_inputs
from sartor.backends.many_models import time_models
from sartor.backends.measure import measure, profile
from sartor.backends.protocol import TargetOptions, TensorSpec
from sartor.backends.rounds import (
    FEWEST_ROUNDS,
    Round,
    median_interval,
    ratios,
    run_rounds,
    schedule,
)
from sartor.errors import BackendError, MetricUnavailableError, UsageError

NAMES = ("onnxruntime", "openvino")


class Machine:
    """Synthetic timings: drift, correlated speed, visit noise, outliers."""

    def __init__(self, seconds, seed, noise=0.03, drift=0.05, outliers=0.1):
        self.generator = np.random.default_rng(seed)
        self.seconds, self.noise, self.drift, self.outliers = seconds, noise, drift, outliers
        self.phase, self.now, self.state = self.generator.uniform(0, 6.28), 0.0, 0.0

    def clock(self):
        return self.now

    def visit(self, index):
        self.now += 0.06
        self.state = 0.9 * self.state + self.generator.normal() * 0.02
        speed = (1 + 0.2 * np.sin(self.phase + self.now / 3)) * (1 + self.drift * self.now)
        seconds = self.seconds[index] * speed * np.exp(self.state + self.noise * self.generator.normal())
        if self.generator.random() < self.outliers:
            seconds *= self.generator.uniform(1.2, 4)
        return seconds


def simulate(machine, seed=0, **changes):
    settings = {"min_rounds": 12, "max_rounds": 60, "time_limit_s": 1e9, "target_half_width": 0.02}
    return run_rounds(
        machine.visit,
        len(machine.seconds),
        seed=seed,
        clock=machine.clock,
        **{**settings, **changes},
    )


def coverage(statistic, trials=150):
    hits = 0
    for seed in range(trials):
        rounds, _ = simulate(Machine((1e-3, 0.5e-3), seed), seed)
        low, high = statistic(rounds)
        hits += low <= 0.5 <= high
    return hits / trials


def test_the_interval_covers_the_true_ratio_under_drift_and_outliers():
    assert coverage(lambda rounds: median_interval(ratios(rounds, 1))) >= 0.90


def test_the_coverage_check_can_fail():
    """A plausible but wrong estimate, from the candidate's and the baseline's own medians."""

    def unpaired(rounds):
        own = [np.median([r.seconds(i) for r in rounds]) for i in (0, 1)]
        low, high = median_interval(ratios(rounds, 1))
        ratio, width = own[1] / own[0], (high - low) / 4
        return ratio - width, ratio + width

    assert coverage(unpaired, trials=60) < 0.85


@pytest.mark.parametrize("count", [6, 7, 12, 25, 60])
def test_the_interval_has_its_nominal_coverage_on_any_distribution(count):
    generator = np.random.default_rng(count)
    samples = generator.standard_cauchy((4000, count))  # no mean, no variance
    hits = sum(low <= 0 <= high for low, high in map(median_interval, samples))
    assert 0.945 <= hits / 4000 <= 1.0


def test_too_few_samples_have_no_interval():
    with pytest.raises(ValueError, match="5 samples are too few"):
        median_interval([1.0] * (FEWEST_ROUNDS - 1))
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)


def test_linear_drift_cancels_within_a_round():
    machine = Machine((1e-3, 0.7e-3), 0, noise=0.0, outliers=0.0)
    at = itertools.count()
    machine.visit = lambda index: machine.seconds[index] * (1 + 0.01 * next(at))
    rounds, ended_by = simulate(machine)
    assert ended_by == "interval"
    # A B B A: both visits of each artifact are centred on the same instant.
    assert np.allclose(ratios(rounds, 1), 0.7, rtol=1e-12)


def test_orders_are_mirrored_balanced_and_seeded():
    for count in (2, 3, 5):
        orders = [next_order for next_order, _ in zip(schedule(count, 7), range(20), strict=False)]
        assert all(order == order[::-1] and sorted(set(order)) == list(range(count)) for order in orders)
        assert orders == [o for o, _ in zip(schedule(count, 7), range(20), strict=False)]
        assert len({order[0] for order in orders}) > 1
    firsts = [order[0] for order, _ in zip(schedule(2, 1), range(100), strict=False)]
    assert sum(firsts) == 50
    starts = {tuple(o for o, _ in zip(schedule(2, seed), range(4), strict=False)) for seed in range(8)}
    assert len(starts) > 1
    assert next(schedule(1, 0)) == (0,)


def test_what_ends_the_rounds():
    quiet = lambda: Machine((1e-3, 0.5e-3), 1, noise=1e-4, drift=0.0, outliers=0.0)  # noqa: E731
    noisy = lambda: Machine((1e-3, 0.5e-3), 1, noise=0.2)  # noqa: E731
    rounds, ended_by = simulate(quiet(), target_half_width=0.05)
    assert (len(rounds), ended_by) == (12, "interval")
    rounds, ended_by = simulate(quiet(), target_half_width=0.05, min_rounds=20)
    assert (len(rounds), ended_by) == (20, "interval")
    rounds, ended_by = simulate(noisy(), target_half_width=1e-3, max_rounds=15)
    assert (len(rounds), ended_by) == (15, "max_rounds")
    rounds, ended_by = simulate(noisy(), target_half_width=1e-3, time_limit_s=2.4)
    assert (len(rounds), ended_by) == (10, "time_limit")
    rounds, ended_by = simulate(noisy(), target_half_width=1e-3, time_limit_s=0.0)
    assert (len(rounds), ended_by) == (FEWEST_ROUNDS, "time_limit")
    rounds, ended_by = simulate(
        Machine((1e-3,), 1, noise=1e-4, drift=0.0, outliers=0.0), target_half_width=0.3
    )
    assert ended_by == "interval" and all(r.order == (0,) for r in rounds)


def test_round_seconds_are_per_artifact():
    done = Round((0, 1, 1, 0), (1.0, 5.0, 7.0, 3.0))
    assert (done.seconds(0), done.seconds(1)) == (2.0, 6.0)
    assert ratios([done], 1) == [3.0]


def test_random_inputs_are_seeded_typed_and_normal():
    specs = [
        TensorSpec("f", "float32", (4, 5)),
        TensorSpec("i", "int64", (100,)),
        TensorSpec("u", "uint8", (2000,)),
        TensorSpec("b", "bool", (100,)),
        TensorSpec("n", "float64", ("N", 3)),
    ]
    made = random_inputs(specs, {"n": (2, 3)}, seed=4)
    again = random_inputs(specs, {"n": (2, 3)}, seed=4)
    assert all(
        (made[k] == again[k]).all() and made[k].dtype.name == s.dtype
        for k, s in zip(made, specs, strict=True)
    )
    assert set(made["i"]) == {0, 1} and set(made["b"]) == {False, True} and made["u"].max() > 200
    assert np.abs(made["f"]).min() > np.finfo(np.float32).tiny and made["n"].shape == (2, 3)
    assert (random_inputs(specs, {"n": (2, 3)}, seed=5)["f"] != made["f"]).any()
    with pytest.raises(UsageError, match=r"'n'.*not concrete"):
        random_inputs(specs, {}, seed=0)
    with pytest.raises(UsageError, match="type str"):
        random_inputs([TensorSpec("s", "str", (1,))], {}, seed=0)


@pytest.fixture(scope="module", params=NAMES)
def lowered(request, tmp_path_factory):
    """A network, and one of a third of its width."""
    backend = backends.get(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, [
        backend.lower(small_cnn(width, size=24), folder / str(width), TargetOptions()) for width in (96, 32)
    ]


def test_a_smaller_network_measures_faster_with_everything_on_record(lowered):
    name, artifacts = lowered
    seen = []
    result = measure(
        name, artifacts, min_rounds=8, time_limit_s=3, visit_s=0.02, seed=3, on_round=seen.append
    )
    low, high = result.ratio.latency_ci95
    assert 0.05 < low <= result.ratio.latency <= high < 0.6  # a ninth of the work
    assert tuple(seen) == result.rounds and len(seen) >= 8
    document = json.loads(json.dumps(result.to_dict()))
    assert document["schema"] == "sartor.measure/1"
    assert document["target"] | {"version": ""} == {
        "name": name,
        "version": "",
        "threads": 1,
        "precision": "f32",
        "shapes": {"x": [1, 3, 24, 24]},
    }
    for side in ("baseline", "candidate"):
        latency = document[side]["latency_s"]
        assert 0 < latency["p10"] <= latency["median"] <= latency["p90"] < 0.1
    first = document["rounds"][0]
    assert first["order"] in (
        ["baseline", "candidate", "candidate", "baseline"],
        ["candidate", "baseline", "baseline", "candidate"],
    )
    recomputed = np.median([r["candidate_s"] / r["baseline_s"] for r in document["rounds"]])
    assert recomputed == pytest.approx(document["ratio"]["latency"])
    conditions = document["conditions"]
    assert len(conditions["session"]) == 2 and conditions["session"][0]["denormals"] == "flushed to zero"
    assert (
        conditions["loads"] > 1
        and min(conditions["inner_runs"]) >= 3
        and min(conditions["warm_up_runs"]) >= 5
    )
    assert {"cpu", "governor", "load_average", "runtime", "seed", "statistic"} <= set(conditions)
    assert document["ended_by"] in ("interval", "time_limit", "max_rounds")


def test_one_artifact_has_latency_and_no_ratio(lowered):
    name, artifacts = lowered
    result = measure(name, artifacts[:1], min_rounds=6, time_limit_s=1, visit_s=0.01)
    assert result.baseline.median > 0
    assert not {"candidate", "ratio", "others"} & set(result.to_dict())
    for read in (lambda: result.ratio, lambda: result.candidate):
        with pytest.raises(MetricUnavailableError, match="one artifact"):
            read()


def test_three_artifacts_and_given_inputs():
    backend = backends.get("onnxruntime")
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        artifacts = [
            backend.lower(small_cnn(width), Path(folder) / str(width), TargetOptions())
            for width in (64, 32, 16)
        ]
        inputs = {"x": np.full((1, 3, 16, 16), 0.5, np.float32)}
        result = measure("onnxruntime", artifacts, max_rounds=6, min_rounds=6, visit_s=0.01, inputs=inputs)
        assert result.ratios[1].latency < result.ratios[0].latency < 1
        assert len(result.to_dict()["others"]) == 1 and result.conditions["inputs"] == "given"
        with pytest.raises(UsageError, match="takes exactly 'x'"):
            measure("onnxruntime", artifacts, inputs={"z": inputs["x"]})
        with pytest.raises(UsageError, match="cannot have shape"):
            measure("onnxruntime", artifacts, TargetOptions(shapes={"x": (1, 3, 16, 17)}))
    with pytest.raises(UsageError, match="No artifact"):
        measure("onnxruntime", [])


def test_profile_in_a_subprocess(lowered):
    name, artifacts = lowered
    kernels = profile(name, artifacts[0], runs=25)
    assert "conv1" in max(kernels, key=lambda kernel: kernel.median_s).nodes  # 97 % of the work


def product(size: int) -> bytes:
    """An ONNX model of one matrix product of `size`."""
    from builders import node, program_from_nodes

    weights = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32) / size**0.5
    return program_from_nodes(
        [node("MatMul", ["x", "w"], ["y"])], {"x": (64, size)}, ["y"], {"w": weights}
    ).to_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_many_models_are_timed_and_failures_kept_apart(name, tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(product(384))
    broken = onnx.load_model_from_string(product(8))
    broken.graph.node[0].op_type = "NoSuchOperator"
    models = [product(128), b"not onnx", file, broken.SerializeToString(), product(256)]
    times = time_models(name, models, repeats=3)
    assert len(times) == 5 and set(times.failures) == {1, 3}
    assert 0 < times[0] < times[4] < times[2] == times[-3] < 0.1
    assert times[0:1] == [times[0]] and times.reference_s > 0 and times.conditions["repeats"] == 3
    with pytest.raises(MetricUnavailableError, match="Model 1 has no time: BackendError"):
        times[1]
    with pytest.raises(IndexError):
        times[5]


def test_models_beyond_the_time_limit_are_failures_with_that_reason():
    times = time_models("onnxruntime", [product(16)] * 3, time_limit_s=0.0)
    assert set(times.failures) == {0, 1, 2} and "time limit" in times.failures[0]


def test_a_worker_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    """`kill -9` leaves the parent no time to end it; it would measure on for minutes, beside the next run."""
    (tmp_path / "m.onnx").write_bytes(product(64))
    code = (
        "from sartor.backends.many_models import time_models\n"
        f"time_models('onnxruntime', [open({str(tmp_path / 'm.onnx')!r}, 'rb').read()] * 20, repeats=10**6)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    workers = children(parent.pid, 30)
    time.sleep(2.0)  # it measures
    parent.kill()
    parent.wait()
    assert workers and all(ends(worker, 30) for worker in workers)


def test_no_models_is_no_error():
    assert len(time_models("onnxruntime", [])) == 0


def test_a_worker_error_is_a_backend_error():
    with pytest.raises((UsageError, BackendError), match="Unknown backend 'nothing'"):
        time_models("nothing", [product(16)])
