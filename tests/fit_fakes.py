"""Fits in which nothing is timed: latency follows from file sizes, and is predicted from MACs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from sartor.backends import isolation, worker
from sartor.backends.measure import LatencyStats, Measurement, Ratio
from sartor.cost_models.protocol import CostEstimate
from sartor.selection import Selection
from sartor.workbench import Workbench


class Table:
    """A cost model that knows MACs only; the original's latency gives them their scale."""

    method = "MACs"

    def __init__(self, selection):
        macs = np.ravel(selection.workload.evaluate().macs)[0]
        self.seconds_per_mac = selection.baseline["latency"] / float(macs)

    def estimate_batch(self, workload, fractions, removed):
        return workload.evaluate(fractions, removed).macs * self.seconds_per_mac

    def estimate(self, workload, fractions, removed):
        seconds = float(self.estimate_batch(workload, fractions, removed))
        return CostEstimate("MACs", {"latency_s": seconds})

    scales: ClassVar = {"conv": 1.0}

    def calibrate(self, *arguments):
        pass


def without_timing(monkeypatch):
    """Replaces measuring and the cost model; the list that comes back gets the artifacts of each measurement.

    Networks are lowered in this process: starting another for each of them is most of what such a fit takes.
    """
    measured = []

    def call(request, **_):
        worker.COMMANDS[request["command"]](request, lambda _: None)

    others = {name: getattr(isolation.process, name) for name in ("Worker",)}
    monkeypatch.setattr(isolation, "process", SimpleNamespace(call=call, **others))

    def measure(self, artifacts, seconds, seed=None):
        measured.append(len(artifacts))
        macs = [len(artifact.main_file.read_bytes()) for artifact in artifacts]
        ratios = [m / macs[0] for m in macs[1:]]
        return Measurement(
            {"name": "onnxruntime", "threads": 1, "precision": "f32"},
            {},
            tuple(LatencyStats(m * 1e-7, m * 1e-7, m * 1e-7) for m in macs),
            tuple(Ratio(r, (0.995 * r, 1.005 * r)) for r in ratios),
            (),
            "interval",
        )

    monkeypatch.setattr(Workbench, "measure", measure)
    monkeypatch.setattr(Selection, "_cost_model", lambda selection: Table(selection))
    return measured
