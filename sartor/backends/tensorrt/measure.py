"""Layer times from TensorRT's profiler, mapped back to the nodes of the program. Untested: there was no GPU."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.tensorrt import run
from sartor.backends.tensorrt.lower import LAYERS

_WARM_UP_RUNS = 3
_RANGE = re.compile(r"\{ForeignNode\[(?P<first>.*?)\.\.\.(?P<last>.*?)\]\}")


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per layer of the engine over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: there is no GPU for an engine, or it cannot be run.
    """
    session = run.load(artifact, options)
    once = session.prepare(random_inputs(artifact.inputs, artifact.shapes, seed=0))
    for _ in range(_WARM_UP_RUNS):
        once()
    durations: dict[str, list[float]] = {}
    session.context.profiler = _profiler(session, durations)
    for _ in range(runs):
        once()
    record = json.loads((artifact.folder / LAYERS).read_text(encoding="utf-8"))
    origin = Layers(record)
    return [
        KernelTime(
            name=name,
            op_type=origin.op_type(name),
            nodes=origin.nodes(name),
            median_s=statistics.median(samples),
            runs=len(samples),
        )
        for name, samples in durations.items()
    ]


class Layers:
    """Nodes behind the layers of an engine, from the names that fusion leaves.

    A fused layer is called `conv0 + relu0` after the layers that it is made of, or, where the compiler took a whole
    part of the network, `{ForeignNode[first...last]}`.
    """

    def __init__(self, record: dict[str, Any]):
        self._order = [entry["node"] for entry in record["nodes"]]
        self._types = {entry["node"]: entry["op_type"] for entry in record["nodes"]}
        self._of = {layer: entry["node"] for entry in record["nodes"] for layer in entry["layers"]}

    def nodes(self, name: str) -> tuple[str, ...]:
        """Nodes that a layer computes, in execution order; empty where its name says nothing."""
        found: set[int] = set()
        for match in _RANGE.finditer(name):
            ends = [self._position(match[end]) for end in ("first", "last")]
            if None not in ends:
                known = [end for end in ends if end is not None]
                found.update(range(min(known), max(known) + 1))
        for part in _RANGE.sub("", name).split(" + "):
            position = self._position(part.strip())
            if position is not None:
                found.add(position)
        return tuple(self._order[position] for position in sorted(found))

    def op_type(self, name: str) -> str:
        """Operators that a layer computes, joined."""
        return "+".join(dict.fromkeys(self._types[node] for node in self.nodes(name)))

    def _position(self, layer: str) -> int | None:
        node = self._of.get(layer, layer if layer in self._types else None)
        return self._order.index(node) if node is not None else None


def _profiler(session: run.TensorRTSession, durations: dict[str, list[float]]) -> Any:
    module = session.vendor.module

    class Profiler(module.IProfiler):  # type: ignore[name-defined,misc]  # the vendor is imported here only
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            durations.setdefault(layer, []).append(milliseconds * 1e-3)

    return Profiler()
