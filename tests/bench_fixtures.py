"""Programs, planted backends and one report, for the tests of `sartor bench`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import bench_backends
import null_backend
import pytest
from backend_programs import small_cnn

from sartor import backends
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.bench import run_bench
from sartor.bench.device import Runs
from sartor.bench.protocol import Settings
from sartor.bench.throughput import throughput
from sartor.bench.vendor import CONDITIONS
from sartor.errors import BackendError

QUICK = Settings(batch_limit=16, time_limit_s=2.0, family_limit_s=0.0)


def named(name="net", **changes):
    program = small_cnn(**changes)
    program.source = dataclasses.replace(program.source, name=name)
    return program


@pytest.fixture(scope="module", name="vendor")
def vendor_fixture(tmp_path_factory):
    """The planted backends, registered here and in subprocesses."""
    site = tmp_path_factory.mktemp("site")
    crash = {"crash": null_backend.ENTRIES["crash"]}
    null_backend.install(site, {**bench_backends.ENTRIES, **crash}, "plantedvendor")
    sys.path.insert(0, str(site))
    backends.REGISTRY.refresh()
    yield site
    sys.path.remove(str(site))
    backends.REGISTRY.refresh()


@pytest.fixture(scope="module", name="report")
def report_fixture(vendor):
    """A benchmark of one model on four planted backends."""
    return run_bench([named("small", width=8)], ["planted", "picky", "not-here", "crash"], QUICK)


def rows_of(report, name):
    return [row for row in report["rows"] if row["target"] == name]


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


@pytest.fixture(name="fake")
def fake_fixture(monkeypatch):
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
