"""Protocols of `sartor bench`: latency in turn, growing batches, rows with reasons, power, accuracy."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time

import numpy as np
import pytest
from bench_fixtures import (  # noqa: F401
    QUICK,
    batches,
    fake_fixture,
    named,
    report_fixture,
    rows_of,
    throughput_of,
    vendor_fixture,
)

from sartor.bench import power, run_bench, target
from sartor.bench.document import finish
from sartor.bench.power import Rapl, Sampler, find_sensor
from sartor.bench.protocol import RUNS, VISITS, WARM_UP_RUNS, Settings
from sartor.cost_models.static import static_cost
from sartor.data import load_data
from sartor.errors import UsageError
from sartor.ir.batch import as_fixed
from sartor.report.bench_table import summary


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


def test_a_timed_conversion_finds_no_earlier_one(vendor, tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    here = target.Target("cached", "f32", QUICK, tmp_path)
    for number in range(2):
        here.convert(subject := here.subject(named(), None), number)
        assert json.loads(subject.artifact.main_file.read_text()) is True
    assert os.environ["SARTOR_CACHE"] == str(tmp_path / "cache") and not (tmp_path / "cache").exists()
    made = [here.backend.lower(named(), tmp_path / f"{i}", here.options) for i in range(2)]
    found = [json.loads(artifact.main_file.read_text()) for artifact in made]
    assert found == [True, False]  # the backend does keep them


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


def rapl(root, energy="1000000", number=0):
    """A package of the processor, and a part of it; the counter wraps after 1000 J."""
    zone = root / f"class/powercap/intel-rapl:{number}"
    (zone / f"intel-rapl:{number}:0").mkdir(parents=True)
    name, most = f"package-{number}", "1000000000"
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
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
    assert isinstance(sensor, Rapl)
    sensor.start()
    (zone / "energy_uj").write_text("4000000")
    assert sensor.read() == pytest.approx(1.5)
    (zone / "energy_uj").write_text("1000000")  # 1000 J at most: 997 J more, modulo that
    assert sensor.read() == pytest.approx(997.0)


def test_what_was_drawn_between_two_blocks_is_in_neither(tmp_path, monkeypatch):
    zones = [rapl(tmp_path), rapl(tmp_path, number=1)]
    sensor, _ = find_sensor(tmp_path)

    def draw(joule):
        for zone in zones:
            energy = int((zone / "energy_uj").read_text()) + int(joule * 1e6)
            (zone / "energy_uj").write_text(str(energy % 1_000_000_000))

    for _ in range(2):
        with Sampler(sensor, interval_s=0.03) as sampler:
            time.sleep(0.15)
        assert sampler.watts and sampler.highest_w == 0.0
        draw(500.0)  # compiling and loading
    with Sampler(sensor, interval_s=60.0) as sampler:  # shorter than the interval: one reading, at the end
        begun = time.monotonic()
        draw(2.0)
        time.sleep(0.1)
        spent_s = time.monotonic() - begun
    assert len(sampler.watts) == 1 and 0.5 * 4.0 / spent_s < sampler.highest_w <= 4.0 / spent_s
    monkeypatch.setattr(power, "_SHORTEST_S", 10.0)
    with Sampler(sensor, interval_s=60.0) as sampler:
        draw(2.0)
    assert sampler.highest_w is None  # a counter's step over a few microseconds is no power


def test_several_packages_add_up_and_wrap_each_by_itself(tmp_path, monkeypatch):
    zones = [rapl(tmp_path, energy="4000000"), rapl(tmp_path, energy="1000000", number=1)]
    sensor, _ = find_sensor(tmp_path)
    now = iter([0.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    sensor.start()
    (zones[0] / "energy_uj").write_text("500000")  # of 1000 J: wrapped after 996 J, then half a joule
    (zones[1] / "energy_uj").write_text("3000000")
    assert sensor.read() == pytest.approx((996.5 + 2.0) / 2.0)


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
        values = iter([3.0, 9.0, 5.0])

        def start(self):
            pass

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
