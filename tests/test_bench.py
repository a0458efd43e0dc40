"""`sartor bench`: protocols, envelopes, derived numbers, sensors, imported results, and what a kill leaves."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_backends
import null_backend
import numpy as np
import pytest
from backend_programs import small_cnn

from sartor import backends
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.bench import family, read_report, run_bench, target, write_report
from sartor.bench.device import Runs
from sartor.bench.document import finish
from sartor.bench.family import Member, ladder
from sartor.bench.power import Rapl, Sampler, find_sensor
from sartor.bench.preparation import describe
from sartor.bench.protocol import RUNS, VISITS, WARM_UP_RUNS, Settings
from sartor.bench.roofline import envelope, fit
from sartor.bench.throughput import throughput
from sartor.bench.vendor import CONDITIONS, emit_config, merge, read_results
from sartor.cli import main
from sartor.cost_models.static import static_cost
from sartor.data import load_data
from sartor.errors import BackendError, InternalError, UsageError
from sartor.ir.batch import as_fixed
from sartor.report.bench_page import render
from sartor.report.bench_table import summary

QUICK = Settings(batch_limit=16, time_limit_s=2.0, family_limit_s=0.0)


def named(name="net", **changes):
    program = small_cnn(**changes)
    program.source = dataclasses.replace(program.source, name=name)
    return program


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    """The planted backends, registered here and in subprocesses."""
    site = tmp_path_factory.mktemp("site")
    crash = {"crash": null_backend.ENTRIES["crash"]}
    null_backend.install(site, {**bench_backends.ENTRIES, **crash}, "plantedvendor")
    sys.path.insert(0, str(site))
    backends.REGISTRY.refresh()
    yield site
    sys.path.remove(str(site))
    backends.REGISTRY.refresh()


@pytest.fixture(scope="module")
def report(vendor):
    """A benchmark of one model on four planted backends."""
    return run_bench([named("small", width=8)], ["planted", "picky", "not-here", "crash"], QUICK)


def rows_of(report, name):
    return [row for row in report["rows"] if row["target"] == name]


# ---- family and roofline -------------------------------------------------------------------------
def test_a_member_has_the_operations_of_its_formula():
    for member in (Member(1, 8, 8, 1), Member(3, 16, 9, 3), Member(2, 8, 12, 5)):
        assert member.flop == 2 * static_cost(member.build()).macs
    assert Member(2, 8, 16, 3).flop == 2 * (16 * 16 * 9 * (3 * 8 + 8 * 8) + 10 * 8)


def test_the_ladder_sees_the_whole_range_first_and_is_repeatable():
    members = ladder(1e9)
    flops = [m.flop for m in members]
    first = next(i for i in range(1, len(flops)) if flops[i] < flops[i - 1])
    assert flops[:first] == sorted(flops[:first]) and flops[0] < 2e5 and 1e9 < flops[first - 1] <= 4e9
    assert all(b / a < 100 for a, b in itertools.pairwise(flops[:first]))
    assert members == ladder(1e9) and len(set(members)) == len(members)


def test_the_envelope_is_below_every_point_and_rises():
    generator = np.random.default_rng(0)
    flops = 10 ** generator.uniform(4, 9, 80)
    points = [(float(f), float((2e-5 + f / 5e10) * generator.uniform(1, 3))) for f in flops]
    line = envelope(points)
    works, times = zip(*line.vertices, strict=True)
    assert list(works) == sorted(works) and list(times) == sorted(times) and len(works) > 5
    assert all(line.latency_s(f) <= s * (1 + 1e-9) for f, s in points)
    probes = [line.latency_s(f) for f in np.geomspace(1e3, max(works), 200)]
    assert probes == sorted(probes)
    with pytest.raises(ValueError, match="beyond the envelope"):
        line.latency_s(2 * max(works))
    # The check can fail: an envelope of the slower half lies above the other half.
    half = envelope([p for p in points if p[1] > 1.8 * (2e-5 + p[0] / 5e10)])
    assert any(half.latency_s(min(f, half.vertices[-1][0])) > s for f, s in points)


@pytest.mark.parametrize("law", ["sum", "max"])
def test_a_planted_law_is_fitted_with_its_residuals(law):
    floor, rate = 3e-5, 2e10
    works = np.geomspace(1e4, 1e9, 16)
    times = (
        floor + works / rate if law == "sum" else np.maximum(floor * (1 + 1e-3 * np.arange(16)), works / rate)
    )
    found, _ = fit(list(zip(works.tolist(), times.tolist(), strict=True)))
    assert found.law == law and found.floor_s == pytest.approx(floor, rel=0.05)
    assert found.rate_flop_per_s == pytest.approx(rate, rel=0.05) and found.worst_residual_fraction < 0.05
    assert found.saturation_flop == pytest.approx(floor * rate, rel=0.08)
    noisy = times * np.random.default_rng(0).uniform(0.8, 1.25, 16)
    rough, _ = fit(list(zip(works.tolist(), noisy.tolist(), strict=True)))
    assert rough.rms_residual_fraction > 5 * found.rms_residual_fraction


def test_too_few_points_have_no_law():
    found, reason = fit([(1e5, 1e-4), (1e6, 2e-4)])
    assert found is None and "2 sizes over a factor of 10" in reason


def test_a_planted_backend_shows_the_roofline_that_was_planted(vendor, monkeypatch):
    monkeypatch.setattr(family, "MOST", 14)
    floor, rate = bench_backends.FLOOR_S, bench_backends.RATE_FLOP_PER_S
    settings = dataclasses.replace(QUICK, family_limit_s=20.0, batch_limit=1)
    for _ in range(3):  # other processes may take the processor in the middle of a planted wait
        report = run_bench([named(width=8)], ["planted"], settings)
        law = report["rooflines"][0]["fit"]
        observed = law["floor_s"] / floor, law["rate_flop_per_s"] / rate
        if all(0.8 < ratio < 1.2 for ratio in observed):
            break
    assert observed == (pytest.approx(1, rel=0.2), pytest.approx(1, rel=0.2)), law
    assert law["law"] == "max" and 0.5 < law["saturation_flop"] / (floor * rate) < 1.5
    points = [p for p in report["rooflines"][0]["points"] if "latency" in p]
    assert len(points) == 14 and all(p["latency"]["runs"] == RUNS for p in points)
    (row,) = report["rows"]
    assert row["roofline"]["share_fraction"] == pytest.approx(1, rel=0.2)
    assert render(report).count("<svg") == 3 and "launch floor" in render(report)
    assert "saturated from" in summary(report)


# ---- protocols -----------------------------------------------------------------------------------
class FakeDevice:
    """Answers as a device with a law: a millisecond, and a quarter more for every sample beyond the first.

    Attributes:
        log: `(device, what, ...)` of every request.
        most: samples; more of them do not fit.
    """

    def __init__(self, *arguments, **options):
        self.options, self.samples = TargetOptions(), 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load(self, key, artifact, shapes=None):
        self.samples = (shapes or {"x": (1,)})["x"][0]
        if self.samples > self.most:
            raise BackendError(self.complaint)
        return {}

    def runs(self, key, *, warm_up_runs, runs, limit_s, fewest=3):
        self.log.append((self, warm_up_runs, runs))
        seconds = 1e-3 * max(1.0, self.samples / self.saturated)
        return Runs((seconds,) * (runs - 1) + (2 * seconds,), warm_up_runs)


@pytest.fixture
def fake(monkeypatch):
    """The class, with its law and its log fresh."""
    for name, value in {
        "log": [],
        "most": 1 << 20,
        "saturated": 1 << 20,
        "complaint": "std::bad_alloc",
    }.items():
        monkeypatch.setattr(FakeDevice, name, value, raising=False)
    return FakeDevice


def throughput_of(fake, program=None, sensor=None, **changes):
    """Of a program on the fake device."""
    program = program or named()
    spec = TensorSpec("x", "float32", ("N", 3, 16, 16))
    artifact = Artifact("fake", Path(), (), {}, "f32", (spec,), (), {})
    return throughput(fake(), artifact, program, dataclasses.replace(QUICK, **changes), Path(), sensor)


def batches(found):
    return [entry["batch_samples"] for entry in found["batches"]]


def test_latency_is_taken_in_turn_with_the_runs_of_the_protocol(vendor, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(target, "Device", fake)
    here = target.Target("planted", "f32", QUICK, tmp_path)
    subjects = [here.subject(named(str(i)), None) for i in range(3)]
    for subject in subjects:
        subject.artifact = "not looked at"
    here.latencies(subjects, [], lambda _: None)
    runs = fake.log
    assert len(runs) == 3 * VISITS and {count for *_, count in runs} == {RUNS // VISITS}
    for visit in range(VISITS):
        visited = runs[3 * visit : 3 * visit + 3]
        assert len({id(device) for device, *_ in visited}) == 3  # each once, before any comes again
        assert all(warm_up == (WARM_UP_RUNS if visit == 0 else 1) for _, warm_up, _ in visited)
    latency = subjects[0].row["latency"]
    assert latency["runs"] == RUNS == 50 and latency["warm_up_runs"] == 10 and latency["batch_samples"] == 1
    assert latency["mean_s"] == pytest.approx(1.1e-3) and latency["median_s"] == pytest.approx(1e-3)


def test_throughput_is_that_of_the_best_batch(fake):
    fake.saturated = 4
    found, power, _ = throughput_of(fake, batch_limit=1024)
    assert batches(found) == [1, 2, 4, 8, 16] and found["ended_by"] == "no_growth" and power is None
    assert found["batch_samples"] == 4 and found["samples_per_s"] == pytest.approx(4 / 1.02e-3)
    assert {(warm_up, runs) for _, warm_up, runs in fake.log} == {(10, 50)}


def test_what_ends_the_growth_of_the_batch(fake):
    found, *_ = throughput_of(fake, batch_limit=12)
    assert batches(found) == [1, 2, 4, 8] and found["ended_by"] == "batch_limit"
    found, *_ = throughput_of(fake, time_limit_s=1e-9)
    assert batches(found) == [1] and found["ended_by"] == "time_limit"
    found, *_ = throughput_of(fake, as_fixed(named(), "the test says so"))
    assert batches(found) == [1] and found["ended_by"] == "batch_fixed" and "the test says" in found["reason"]
    fake.most = 4
    found, *_ = throughput_of(fake)
    assert batches(found) == [1, 2, 4] and found["ended_by"] == "memory" and "batch 8: std" in found["reason"]
    fake.complaint = "kernel missing"
    assert throughput_of(fake)[0]["ended_by"] == "failed"
    fake.most = 0
    assert throughput_of(fake) == (None, None, "batch 1: kernel missing")


def test_a_batch_for_which_there_is_no_memory_is_not_tried(fake, monkeypatch):
    module = sys.modules["sartor.bench.throughput"]
    peak = static_cost(named()).peak_activation_bytes
    monkeypatch.setattr(module, "_available_bytes", lambda: 10 * peak)
    found, *_ = throughput_of(fake)
    assert (
        batches(found) == [1, 2, 4] and found["ended_by"] == "memory" and "batch 8 needs" in found["reason"]
    )


def test_memory_that_a_target_runs_out_of_ends_the_growth(report):
    row = rows_of(report, "planted")[0]
    assert batches(row["throughput"]) == [1, 2] and row["throughput"]["ended_by"] == "memory"
    assert "cannot hold 4 samples" in row["throughput"]["reason"]
    assert all(
        b["samples_per_s"] == pytest.approx(b["batch_samples"] / b["mean_s"])
        for b in row["throughput"]["batches"]
    )


def test_derived_numbers_follow_from_the_measured_ones(report):
    for model in report["models"]:
        assert model["operations_flop"] == 2 * model["macs"]
    flops = {model["name"]: model["operations_flop"] for model in report["models"]}
    # conv 3→8 and 8→8 at 16×16 with 3×3 and at 14×14, linear 8→10: counted by hand
    assert flops["small"] == 2 * (16 * 16 * 9 * 3 * 8 + 16 * 16 * 9 * 8 * 8 + 8 * 10)
    for row in rows_of(report, "planted"):
        assert row["achieved_flop_per_s"] == pytest.approx(
            row["throughput"]["samples_per_s"] * flops[row["model"]]
        )
    changed = copy.deepcopy(report)
    rows_of(changed, "planted")[0]["throughput"]["samples_per_s"] *= 2
    before = rows_of(report, "planted")[0]["achieved_flop_per_s"]
    assert rows_of(finish(changed), "planted")[0]["achieved_flop_per_s"] == pytest.approx(2 * before)


def test_what_a_target_does_not_take_is_a_row_and_not_an_end(report):
    assert len(report["rows"]) == 4
    for row in rows_of(report, "picky"):
        assert row["state"] == "not-taken" and "Convolutions are not taken" in row["reason"]
        assert "conversion_s" not in row  # no vendor tool was called
    for row in rows_of(report, "not-here"):
        assert row["state"] == "not-run-here" and row["conversion_s"] > 0 and "latency" not in row
    for row in rows_of(report, "crash"):
        assert row["state"] == "failed" and "SIGABRT" in row["reason"] and "planted last words" in row["log"]
    text = summary(report)
    assert "not-taken: small on picky f32: " in text and "mean" in text


def test_absent_precisions_and_unknown_targets(vendor):
    (row,) = run_bench([named()], ["planted"], dataclasses.replace(QUICK, precisions=("int8",)))["rows"]
    assert row["state"] == "not-taken" and "no int8" in row["reason"]
    with pytest.raises(UsageError, match="'no-such'"):
        run_bench([named()], ["no-such"], QUICK)
    with pytest.raises(UsageError, match="two are named 'net'"):
        run_bench([named(), named()], ["planted"], QUICK)
    with pytest.raises(UsageError, match="each once"):
        Settings(precisions=("f32", "f32"))


def test_accuracy_is_that_of_the_artifact_on_the_whole_test_split(tmp_path):
    from sartor.ir.fx import run_twin

    program = named()
    images = np.random.default_rng(0).standard_normal((10, 3, 16, 16)).astype(np.float32)
    labels = run_twin(program, {"x": images})["y"].argmax(axis=1)
    labels[:3] = (labels[:3] + 1) % 10
    np.savez(tmp_path / "data.npz", x=images, labels=labels)
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def splits():\n"
        "    data = np.load(Path(__file__).with_name('data.npz'))\n"
        "    batches = [({'x': data['x'][i:i+4]}, data['labels'][i:i+4]) for i in (0, 4, 8)]\n"
        "    return {'evaluate': batches[:1], 'test': batches}\n"
    )
    data = load_data(f"{tmp_path / 'data.py'}:splits", ["x"], program=program)
    rows = []
    for precision in ("f32", "int8"):
        here = target.Target("onnxruntime", precision, QUICK, tmp_path)
        subject = here.subject(program, data)
        here.convert(subject, 0)
        here.accuracy(subject)
        rows.append(subject.row)
    exact = {"score_fraction": pytest.approx(0.7), "samples": 10, "split": "test", "compared_with": "labels"}
    assert rows[0]["accuracy"] == exact and "calibration" not in rows[0]
    assert rows[1]["calibration"] == "data" and 0.3 <= rows[1]["accuracy"]["score_fraction"] <= 1.0
    assert rows[1]["artifact_bytes"] < rows[0]["artifact_bytes"] and rows[1]["preparation_s"] > 0


# ---- power ---------------------------------------------------------------------------------------
def rapl(root, energy="1000000", name="package-0"):
    zone = root / "class/powercap/intel-rapl:0"
    (zone / "intel-rapl:0:0").mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", "5000000")):
        (zone / file).write_text(text + "\n")
    return zone


def jetson(root, rail="VDD_IN", current="2000"):
    monitor = root / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4"
    monitor.mkdir(parents=True)
    for file, text in (("in1_label", rail), ("in1_input", "5000"), ("curr1_input", current)):
        (monitor / file).write_text(text + "\n")
    return monitor


def test_rapl_gives_the_mean_since_the_last_reading_and_wraps(tmp_path, monkeypatch):
    zone = rapl(tmp_path)
    now = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    sensor, _ = find_sensor(tmp_path)
    assert isinstance(sensor, Rapl) and sensor.read() is None
    (zone / "energy_uj").write_text("4000000")
    assert sensor.read() == pytest.approx(1.5)
    (zone / "energy_uj").write_text("1000000")  # 5 J at most: 2 J more, modulo that
    assert sensor.read() == pytest.approx(2.0)


def test_sensors_that_cannot_be_read_are_reasons(tmp_path):
    assert find_sensor(tmp_path) == (None, "no INA3221 monitor; no RAPL package below class/powercap")
    rapl(tmp_path, energy="locked")
    assert "RAPL cannot be read: not a number" in find_sensor(tmp_path)[1]
    other = tmp_path / "other"
    jetson(other, rail="VDD_GPU")
    assert "VDD_GPU feeds the whole board" in find_sensor(other)[1]  # a part of the whole is not its power


def test_the_sampler_keeps_the_highest_reading():
    class Ramp:
        name = "ramp"
        values = iter([None, 3.0, 9.0, 5.0])

        def read(self):
            return next(self.values, 1.0)

    with Sampler(Ramp(), interval_s=0.005) as sampler:
        time.sleep(0.15)
    assert sampler.highest_w == 9.0


def test_power_and_efficiency_come_with_a_sensor_only(fake, report, tmp_path):
    jetson(tmp_path)
    sensor, _ = find_sensor(tmp_path)
    found, power, _ = throughput_of(fake, sensor=sensor)
    assert (
        power["highest_w"] == pytest.approx(10.0) and "VDD_IN" in power["sensor"] and power["readings"] >= 1
    )
    measured = copy.deepcopy(report)
    row = rows_of(measured, "planted")[0]
    assert "no RAPL package" in row["absent"]["power"] or "power" in row
    row["throughput"], row["power"] = found, power
    finish(measured)
    assert row["efficiency_samples_per_s_per_w"] == pytest.approx(found["samples_per_s"] / 10.0)
    assert "/s/W" in summary(measured)


# ---- elsewhere -----------------------------------------------------------------------------------
def filled(report, **changes):
    """Results of an engineer who followed the instructions."""
    models = {m["name"]: m for m in report["models"]}
    result = {
        "model": "small",
        "sha256": models["small"]["sha256"],
        "precision": "int8",
        "latency": {"mean_s": 2e-3, "runs": 50, "warm_up_runs": 10, "batch_samples": 1},
        "throughput": {"samples_per_s": 900.0, "batch_samples": 8, "runs": 50, "warm_up_runs": 10},
        "power": {"highest_w": 3.0, "sensor": "external meter"},
        "accuracy": {"score_fraction": 0.5, "samples": 100},
        "conversion_s": 12.0,
    }
    document = {
        "schema": "sartor.bench-results/1",
        "target": "npu",
        "conditions": dict.fromkeys(CONDITIONS, "said"),
        "results": [result | changes.pop("result", {})],
    }
    return document | changes


def stored(tmp_path, document):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    return path


def test_results_from_elsewhere_are_merged_and_marked(report, tmp_path):
    merged = merge(report, read_results(stored(tmp_path, filled(report))))
    (row,) = rows_of(merged, "npu")
    flop = report["models"][0]["operations_flop"]
    assert row["state"] == "imported" and row["achieved_flop_per_s"] == pytest.approx(900 * flop)
    assert row["efficiency_samples_per_s_per_w"] == pytest.approx(300) and "departures" not in row
    assert len(merged["rows"]) == 5 and merged["imports"][0]["conditions"]["device"] == "said"
    assert "npu (imported)" in summary(merged) and "npu (imported)" in render(merged)
    quick = {"latency": {"mean_s": 1e-3, "runs": 5, "warm_up_runs": 10, "batch_samples": 1}}
    again = merge(merged, read_results(stored(tmp_path, filled(report, result=quick))))
    (row,) = rows_of(again, "npu")  # in place of the first
    assert row["departures"] == ["latency: 5 runs instead of 50"] and len(again["imports"]) == 1
    assert "5 runs instead of 50" in render(again)


LATENCY = {"mean_s": 2e-3, "runs": 50, "warm_up_runs": 10, "batch_samples": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other/1"}, "schema 'other/1'"),
        ({"conditions": {"device": "x"}}, "lacks 'toolchain'"),
        ({"results": []}, "at least one result"),
        ({"extra": 1}, "'extra'"),
        ({"result": {"latency": {"mean_ms": 2.0, "runs": 50, "batch_samples": 1}}}, "lacks 'mean_s'"),
        ({"result": {"latency": LATENCY | {"mean_ms": 2.0}}}, "units are part of the keys"),
        ({"result": {"latency": LATENCY | {"mean_s": -1}}}, "greater than 0"),
        ({"result": {"latency": LATENCY | {"runs": 0}}}, "at least 1"),
        ({"result": {"latency": LATENCY | {"mean_s": "2 ms"}}}, "a finite number"),
        ({"result": {"latency": LATENCY | {"p10_s": 3.0, "p90_s": 1.0}}}, "do not rise"),
        ({"result": {"accuracy": {"score_fraction": 93.5, "samples": 10}}}, "from 0 to 1"),
        ({"result": {"precision": "int4"}}, "'int4' is none of"),
        ({"result": {"conversion_s": True}}, "greater than 0"),
        ({"result": {"sha256": "0" * 64}}, "with SHA-256 0000"),
        ({"result": {"model": "other"}}, "'other', which the report does not have"),
        ({"target": "planted"}, "was measured here"),
    ],
)  # fmt: skip
def test_wrong_results_are_refused_in_one_sentence(report, tmp_path, changes, message):
    write_report(report, tmp_path)
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        merge(read_report(tmp_path), read_results(stored(tmp_path, filled(report, **changes))))
    assert message in str(caught.value) and len(str(caught.value)) < 500
    assert (tmp_path / "bench.json").read_bytes() == before


def test_not_a_number_and_not_json_are_refused(tmp_path):
    path = tmp_path / "results.json"
    for text, message in (("{", "not valid JSON"), ('{"schema": NaN}', "NaN is not a number")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_results(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path / "missing.json")


def test_a_configuration_has_what_a_measurement_elsewhere_needs(report, tmp_path):
    program = named("small", width=8)
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 3, 16, 16), np.float32), labels=np.zeros(20, np.int64))
    settings = Settings(precisions=("f32", "int8"))
    emit_config([program], "npu", settings, tmp_path / "npu", data=str(tmp_path / "data.npz"))
    config = json.loads((tmp_path / "npu/config.json").read_text())
    (model,) = config["models"]
    content = (tmp_path / "npu" / model["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == model["sha256"] == describe(program)["sha256"]
    assert model["sha256"] == report["models"][0]["sha256"]  # so that results are taken
    calibration, test = (np.load(tmp_path / "npu" / model[f"{k}_file"]) for k in ("calibration", "test"))
    assert set(test.files) == {"x", "labels"} and set(calibration.files) == {"x"}
    assert config["measure"]["latency"] == {
        "batch_samples": 1, "warm_up_runs": 10, "runs": 50, "statistic": "mean_s"
    }  # fmt: skip
    readme = (tmp_path / "npu/README.md").read_text()
    assert "results.template.json" in readme and all(name in readme for name in CONDITIONS)
    template = tmp_path / "npu/results.template.json"
    assert len(json.loads(template.read_text())["results"]) == 2
    with pytest.raises(UsageError, match="conditions 'device' is ''"):
        read_results(template)  # it is to be filled in first
    with pytest.raises(UsageError, match="no name for a target"):
        emit_config([program], "../up", settings, tmp_path)


# ---- files and command ---------------------------------------------------------------------------
def test_the_page_is_one_file_and_escapes_everything(report, tmp_path):
    evil = copy.deepcopy(report)
    evil["models"][0]["name"] = "<script>alert(1)</script>"
    for row in evil["rows"]:
        row["model"] = row["model"].replace("small", "<script>alert(1)</script>")
        row["reason"] = "<img src=x>"
    page = render(evil)
    assert "<script" not in page and "<img" not in page and "http" not in page.replace("http-equiv", "")
    assert "<svg" in page and "Content-Security-Policy" in page
    with pytest.raises(InternalError, match="cannot be written as JSON"):
        write_report(evil | {"number": float("nan")}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_have_their_units_in_their_names(report):
    units = (
        "_s", "_flop", "_flop_per_s", "_samples_per_s", "_w", "_bytes", "_samples", "_fraction", "_layers",
        "_channels", "_pixels", "macs", "parameters", "runs", "samples", "readings", "cores", "threads", "seed",
        "samples_per_s_per_w", "vertices", "cores_allowed",
    )  # fmt: skip

    def walk(value, key):
        if isinstance(value, dict):
            for name, item in value.items():
                walk(item, name)
        elif isinstance(value, list):
            for item in value:
                walk(item, key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            seen.append(key)

    seen: list[str] = []
    for section in ("rows", "models", "parameters", "rooflines"):
        walk(
            [{**m, "input_shapes": {}} for m in report[section]] if section == "models" else report[section],
            "",
        )
    assert seen and not [key for key in seen if not key.endswith(units)]


@pytest.fixture
def model(tmp_path):
    return str(named(width=8).save(tmp_path / "net.onnx"))


def test_the_command_writes_a_report_and_imports_into_it(vendor, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    out = tmp_path / "out"
    limits = ["--time-limit", "1", "--batch-limit", "1", "--roofline-limit", "0"]
    assert main(["bench", "--models", model, "--targets", "planted,picky", *limits, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "10 runs to warm up, then 50 runs" in text and "bench.html" in text
    assert sorted(p.name for p in out.iterdir()) == ["bench.html", "bench.json"]
    report = read_report(out)
    results = filled({"models": [report["models"][0] | {"name": "small"}]}, result={"model": "net.onnx"})
    path = stored(tmp_path, results)
    assert main(["bench", "--import", str(path), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sartor.bench-report/1" and document == read_report(out)
    assert rows_of(document, "npu")[0]["state"] == "imported"
    results["results"][0]["latency"]["mean_s"] = 0
    assert main(["bench", "--import", str(stored(tmp_path, results)), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and document == read_report(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--models", "m.onnx"], "needs --models and --targets"),
        (["--models", "m.onnx", "--targets", "nope"], "does not exist"),
        (["--emit-config", "npu", "--models", "m.onnx"], "needs --models and --out"),
        (["--emit-config", "npu", "--targets", "onnxruntime"], "leave --targets"),
        (["--models", "m.onnx", "--targets", "planted", "--precisions", "f33"], "Precisions are ['f33']"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_kill_leaves_nothing(vendor, model, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sartor", "bench", "--models", model, "--targets", "planted"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CI": "",
        "TMPDIR": str(tmp_path),
    }
    with subprocess.Popen(
        [*command, "--roofline-limit", "0", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        for line in process.stderr:
            if "latency, visit" in line:
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail("it ended before it measured")
    assert process.returncode == -signal.SIGKILL and not out.exists()


def test_options_travel_to_the_subprocess(vendor, tmp_path):
    from sartor.bench.device import Device

    artifact = backends.get("planted").lower(named(), tmp_path / "a", TargetOptions())
    with Device("planted", TargetOptions()) as device:
        assert device.load("k", artifact) == {"law": "planted"}
        done = device.runs("k", warm_up_runs=2, runs=5, limit_s=1.0)
        assert len(done.samples_s) == 5 and done.warm_up_runs == 2
        slow = device.runs("k", warm_up_runs=10**6, runs=10**6, limit_s=0.05)
        assert slow.warm_up_runs < 10**6 and 3 <= len(slow.samples_s) < 10**6
