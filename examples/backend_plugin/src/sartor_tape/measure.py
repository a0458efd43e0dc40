"""Time per instruction. Latency itself is measured by Sartor: it loads two artifacts and runs them in turn."""

from __future__ import annotations

import statistics
import time

from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor_tape import run
from sartor_tape.kernels import execute


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time of each instruction over `runs` inferences, in execution order."""
    session = run.load(artifact, options)
    inputs = random_inputs(session.inputs, {**artifact.shapes, **options.shapes}, seed=0)
    instructions = session._tape["instructions"]
    samples: list[list[float]] = [[] for _ in instructions]
    for _ in range(runs):
        registers = {**session._weights, **inputs}
        for instruction, times in zip(instructions, samples, strict=True):
            begin = time.perf_counter()
            execute(instruction, registers)
            times.append(time.perf_counter() - begin)
    return [
        KernelTime(
            name=instruction["writes"],
            op_type=instruction["kernel"],
            nodes=(instruction["node"],),  # names of the program's nodes: what the tape kept them for
            median_s=statistics.median(times),
            runs=runs,
        )
        for instruction, times in zip(instructions, samples, strict=True)
    ]
