"""Backends whose speed is planted: a launch floor and a rate, and memory that ends at a batch."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from null_backend import NullBackend

from sartor.backends.artifact import verify_files, write_artifact
from sartor.backends.protocol import Capabilities, Session

FLOOR_S, RATE_FLOP_PER_S = 5e-5, 1e11
MOST_SAMPLES = 2


class PlantedSession(Session):
    """Spins for what the planted law says."""

    def __init__(self, artifact, seconds):
        self.settings = {"law": "planted"}
        self.inputs, self._outputs, self._seconds = artifact.inputs, artifact.outputs, seconds

    def run(self, inputs):
        return {spec.name: np.zeros(1, np.float32) for spec in self._outputs}

    def prepare(self, inputs):
        seconds, clock = self._seconds, time.perf_counter

        def spin():
            end = clock() + seconds
            while clock() < end:
                pass

        return spin


class Planted(NullBackend):
    """`L = max(floor, W / rate)`; a batch beyond `MOST_SAMPLES` does not fit."""

    name = "planted"

    def capabilities(self):
        return Capabilities(self.name, "1.0", ("f32",), {}, control_flow=False, max_rank=4)

    def rules(self):
        from sartor.backends.legality import Rules

        return Rules()

    def lower(self, program, folder, options):
        from sartor.cost_models.static import static_cost

        def write(temporary: Path):
            batch = next(iter(program.input_shapes.values()))[0]
            flop = 2 * static_cost(program).macs / batch
            (temporary / "law.json").write_text(json.dumps({"flop": flop}))
            return ("law.json",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)

    def load(self, artifact, options):
        verify_files(artifact)
        batch = next(iter({**artifact.shapes, **options.shapes}.values()))[0]
        if batch > MOST_SAMPLES:
            raise MemoryError(f"cannot hold {batch} samples")
        flop = batch * json.loads(artifact.main_file.read_text())["flop"]
        return PlantedSession(artifact, max(FLOOR_S, flop / RATE_FLOP_PER_S))


class NotHere(Planted):
    """Lowers, and cannot run."""

    name = "not-here"

    def capabilities(self):
        return dataclasses.replace(super().capabilities(), not_run_here="planted: no such device")


class Picky(Planted):
    """Takes no convolution."""

    name = "picky"

    def legality(self, program, options):
        from sartor.backends.protocol import Finding, LegalityReport

        found = [
            Finding(node.name, "no-conv", "Conv", "Convolutions are not taken.", ok=False)
            for node in program.nodes()
            if node.op_type == "Conv"
        ]
        return LegalityReport(tuple(found))


class Cached(Planted):
    """Keeps its conversions, as a target whose compiler is slow."""

    name = "cached"

    def lower(self, program, folder, options):
        from sartor.backends.tflite.cache import kept

        converted = []

        def convert():
            converted.append(True)
            return b"", {}

        def write(temporary: Path):
            kept("0" * 64, convert)
            (temporary / "converted.json").write_text(json.dumps(bool(converted)))
            return ("converted.json",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)


ENTRIES = {c.name: f"bench_backends:{c.__name__}" for c in (Planted, NotHere, Picky, Cached)}
