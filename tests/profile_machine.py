"""A synthetic machine whose law is known, as a timer for the builder: staircase, caches, noise, outliers, crashes."""

from __future__ import annotations

import math
import random

import onnx

from sartor.backends.visits import Summary
from sartor.profiling.timing import NETWORKS, Batch, Timed

REFERENCE_S = 3e-4
STEP = 8
CALL = 0.01  # in units of the reference
MACS, BYTES, COLD_BYTES = 18e6, 6e6, 2.5e6  # per unit of the reference
OFF_GRID = 1.25
LAYOUT_BYTES = 20e6


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def law(op: str, macs: float, moved: float, off_grid: bool) -> float:
    """Units of the reference that one kernel takes."""
    return (OFF_GRID if off_grid else 1.0) * max(macs / MACS, moved / BYTES) + 0.002


class Machine:
    """Reads the graph of each model, whatever it is; slow operators of `broken` fail."""

    def __init__(self, clock=None, noise=0.0, seed=0, broken=(), scale=1.0, interrupt_after=None, speed=None):
        self.clock, self.noise, self.broken, self.scale = clock or Clock(), noise, set(broken), scale
        self.random, self.batches = random.Random(seed), 0
        self.interrupt_after, self.speed = interrupt_after, dict(speed or {})

    def __call__(self, jobs, effort):
        if self.interrupt_after is not None and self.batches >= self.interrupt_after:
            raise KeyboardInterrupt
        self.batches += 1
        times = tuple(self._timed(job) for job in jobs)
        self.clock.now += 3.0 if effort is NETWORKS else 0.6
        call = Timed(Summary(CALL, 0.01, 3, 3), Summary(4 * CALL, 0.1, 6, 6))
        return Batch(times, call, REFERENCE_S * self.scale, {"pinned": [1]})

    def _timed(self, job) -> Timed:
        model = onnx.load_from_string(job.model)
        if {node.op_type for node in model.graph.node} & self.broken:
            return Timed(None, None, "planted failure")
        seconds, weights = self.network(model)
        warm = Summary(seconds * self._noise(), 0.01, 4, 4)
        cold = seconds + 3 * CALL + weights / COLD_BYTES
        return Timed(warm, Summary(cold * self._noise(), 0.05, 6, 6) if job.cold else None)

    def _noise(self) -> float:
        return 1 + self.noise * self.random.gauss(0, 1)

    def network(self, model) -> tuple[float, float]:
        """Units that a whole model takes, and the bytes of its weights."""
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        shape = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*graph.input, *graph.value_info, *graph.output)
        }
        weights = {w.name: list(w.dims) for w in graph.initializer}
        shape.update(weights)
        total = CALL
        for node in graph.node:
            total += self._node(node, shape) * self.speed.get(node.op_type, 1.0)
        if any(node.op_type == "Conv" and self._blocked(node, shape) for node in graph.node):
            ends = [v.name for v in (*graph.input, *graph.output)]
            sizes = [shape[name] for name in ends if len(shape[name]) == 4]
            plain = shape[graph.node[0].input[0]] if graph.node[0].op_type == "Conv" else [0, 16]
            total += sum(4 * math.prod(dims) for dims in sizes) / LAYOUT_BYTES
            total -= (
                4 * math.prod(plain) / LAYOUT_BYTES if plain[1] < 16 and not self._depthwise(graph) else 0.0
            )
        return total, sum(4.0 * math.prod(dims) for dims in weights.values())

    @staticmethod
    def _depthwise(graph) -> bool:
        return any(a.name == "group" and a.i > 1 for node in graph.node for a in node.attribute)

    @staticmethod
    def _blocked(node, shape) -> bool:
        """Which convolutions have the layout, in words of the machine: channels of one group on both sides."""
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        read, made = shape[node.input[0]][1] // group, shape[node.output[0]][1] // group
        if group > 1 and read == made == 1:
            return group % 4 == 0
        if group > 1:
            return read % 16 == 0 == made % 16
        return read < 16 or read % 4 == 0

    def _node(self, node, shape) -> float:
        out, x = shape[node.output[0]], shape[node.input[0]]
        moved = 4.0 * (math.prod(out) + math.prod(x))
        if node.op_type == "Conv":
            w = shape[node.input[1]]
            channels = math.ceil(w[0] / STEP) * STEP
            return law("Conv", math.prod(out) / w[0] * channels * math.prod(w[1:]), moved, w[0] % 4 != 0)
        if node.op_type in ("Gemm", "MatMul"):
            return law(node.op_type, math.prod(out) * x[-1], moved, False)
        return law(node.op_type, 0.0, moved, False) if node.op_type not in ("Reshape", "Flatten") else 0.0
