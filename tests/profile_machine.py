"""A synthetic machine whose law is known, as an `Insider`: staircase, caches, a profiler that slows down, crashes."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import tempfile
from pathlib import Path

from sartor import backends
from sartor.backends.protocol import KernelTime
from sartor.backends.visits import Summary
from sartor.ir.fusion import partition
from sartor.ir.kernels import FREE
from sartor.ir.load import load
from sartor.profiling.build import fusion_rules
from sartor.profiling.inside import Inside

REFERENCE_S = 3e-4
STEP = 8
CALL = 0.01  # in units of the reference
PROFILER = 0.007  # what the profiler adds to every kernel
LAUNCH = 0.002
MACS, BYTES = 18e6, 6e6  # per unit of the reference
OFF_GRID = 1.25
SLOWED = 1.2  # by another tenant
FAR_BYTES = 4e6  # of displaced weights per unit of the reference
PERIODS = (0.5, 50.0)
"""Units of the reference between two runs of a kernel: up to one its weights stay, after the other they are gone."""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def law(macs: float, moved: float, off_grid: bool = False) -> float:
    """Units of the reference that one kernel takes right after a run of it."""
    return (OFF_GRID if off_grid else 1.0) * max(macs / MACS, moved / BYTES) + LAUNCH


def waiting_units(weights: float, period: float) -> float:
    """Units that a kernel waits for its weights, in bytes, after a period."""
    low, high = PERIODS
    share = math.log(max(period, low) / low) / math.log(high / low)
    return min(share, 1.0) * weights / FAR_BYTES


class Machine:
    """Runs what ONNX Runtime's rules make one kernel as one kernel; models with an operator of `broken` fail.

    HardSwish by itself runs in two parts, of which the second has no name; a Reshape takes no time but the profiler's.
    """

    def __init__(
        self,
        clock=None,
        noise=0.0,
        seed=0,
        broken=(),
        scale=1.0,
        interrupt_after=None,
        speed=None,
        busy=(0.0, 0.0),
    ):
        self.clock, self.noise, self.broken, self.scale = clock or Clock(), noise, set(broken), scale
        self.random, self.batches, self.models, self.unprofiled = random.Random(seed), 0, 0, 0
        self.conditions = {"pinned": [1]}
        self.interrupt_after, self.speed = interrupt_after, dict(speed or {})
        self.busy = busy  # from when to when another tenant slows everything but the reference

    def __call__(self, models, effort):
        if self.interrupt_after is not None and self.batches >= self.interrupt_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.models += len(models)
        self.unprofiled += not effort.profile_s
        found = []
        for model in models:
            self.clock.now += (0.3 if len(models) > 1 else 0.6) * (1.0 if effort.profile_s else 0.5)
            found.append(self._slowed(self._inside(model)))
        return found if effort.profile_s else [dataclasses.replace(one, kernels=()) for one in found]

    def _slowed(self, inside) -> Inside:
        if inside.latency is None or not self.busy[0] <= self.clock.now < self.busy[1]:
            return inside
        latency = dataclasses.replace(inside.latency, ratio=SLOWED * inside.latency.ratio)
        kernels = tuple(dataclasses.replace(k, median_s=SLOWED * k.median_s) for k in inside.kernels)
        return dataclasses.replace(inside, latency=latency, kernels=kernels)

    def _inside(self, model) -> Inside:
        nodes, kernels = _read(model)
        if nodes & self.broken:
            return Inside(None, reason="planted failure", reference_s=0.0)
        executed, latency = [], CALL
        period = self._period(kernels)
        for lead, names, warm, own_weights, written in kernels:
            units = warm * self.speed.get(lead, 1.0) + waiting_units(own_weights, period)
            latency += units
            parts = [(lead, names)]
            if lead == "HardSwish":
                parts = [("HardSigmoid", names), ("Mul", ())]
                latency += LAUNCH
            for op_type, of in parts:
                own = (units if len(parts) == 1 else (units + LAUNCH) / 2) * self._noise() + PROFILER
                if lead == "Reshape":
                    own = 3 * PROFILER  # nothing but the profiler, which takes longer for it
                executed.append(KernelTime(op_type, op_type, of, own, 8, written=written))
        summary = Summary(latency * self._noise(), 0.01, 4, 4)
        return Inside(summary, tuple(executed), REFERENCE_S * self.scale)

    def _period(self, kernels) -> float:
        """What one inference takes, if it takes that long since the last one."""
        period = 0.0
        for _ in range(50):
            period = CALL + sum(
                warm * self.speed.get(lead, 1.0)
                + waiting_units(own_weights, period)
                + (LAUNCH if lead == "HardSwish" else 0.0)
                for lead, _, warm, own_weights, _ in kernels
            )
        return period

    def _noise(self) -> float:
        return 1 + self.noise * self.random.gauss(0, 1)


@functools.cache
def _rules():
    return fusion_rules(backends.get("onnxruntime"))


@functools.lru_cache(maxsize=256)
def _read(model: bytes):
    """Types of all nodes; per kernel type, nodes, units, weights and the shape that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        program = load(path)
    shapes = program.shapes()
    kernels = []
    for group in partition(program, rules=_rules()):
        node = group.lead
        names = tuple(n.name for n in group.nodes)
        if node.op_type in FREE:
            kernels.append(("Reshape", names, 0.0, 0.0, ()))
            continue
        warm, own_weights, written = _work(node, shapes)
        kernels.append((node.op_type, names, warm, own_weights, written))
        if node.op_type == "GlobalAveragePool":  # its map leaves the layout first
            kernels.append(("ReorderOutput", (), law(0.0, 8.0 * math.prod(written)), 0.0, written))
    return {node.op_type for node in program.nodes()}, tuple(kernels)


def _work(node, shapes) -> tuple[float, float, tuple[int, ...]]:
    """Units, bytes of weights, and the shape that is written; biases are nothing to this machine."""
    out, x = shapes[node.outputs[0].name], shapes[node.inputs[0].name]
    moved = 4.0 * (math.prod(out) + math.prod(x))
    stored = [v for v in node.inputs[1:] if v is not None and v.is_initializer()]
    own_weights = 4.0 * sum(math.prod(shapes[v.name]) for v in stored)
    macs, off_grid = 0.0, False
    if node.op_type == "Conv":
        w = shapes[node.inputs[1].name]
        channels = math.ceil(w[0] / STEP) * STEP
        macs, off_grid = math.prod(out) / w[0] * channels * math.prod(w[1:]), w[0] % 4 != 0
    elif node.op_type in ("Gemm", "MatMul"):
        macs = math.prod(out) * x[-1]
    else:
        own_weights = 0.0
    return law(macs, moved, off_grid), own_weights, tuple(out)
