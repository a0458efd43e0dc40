"""Time of the whole model: the interpreter tells no times of operators."""

from __future__ import annotations

import statistics
import time

from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.tflite_micro import run


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """One entry with the median over `runs` inferences, for all nodes.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    session = run.load(artifact, options)
    once = session.prepare(random_inputs(artifact.inputs, {**artifact.shapes, **options.shapes}, seed=0))
    once()
    samples = []
    for _ in range(runs):
        begin = time.perf_counter()
        once()
        samples.append(time.perf_counter() - begin)
    nodes = dict.fromkeys(node for operator in artifact.metadata["operators"] for node in operator["nodes"])
    return [
        KernelTime("model", "model", tuple(nodes), statistics.median(samples), runs, "portable reference")
    ]
