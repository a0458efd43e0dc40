"""Layer times from TensorRT's profiler, mapped back to the nodes of the program. Untested: there was no GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.tensorrt import run
from sartor.backends.tensorrt.lower import LAYERS

_WARM_UP_RUNS = 3


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
    """Nodes behind the layers of an engine.

    A fused layer is called `conv0 + relu0` after the layers that it is made of, or, where the compiler took a whole
    part of the network, `{ForeignNode[first...last]}`, of which the builder's log has told the nodes.
    """

    def __init__(self, record: Mapping[str, Any]):
        self._order = {entry["node"]: index for index, entry in enumerate(record["nodes"])}
        self._types = {entry["node"]: entry["op_type"] for entry in record["nodes"]}
        self._of = {layer: entry["node"] for entry in record["nodes"] for layer in entry["layers"]}
        self._fused = record["fused"]

    def nodes(self, name: str) -> tuple[str, ...]:
        """Nodes that a layer computes, in execution order; empty where its name says nothing."""
        found: set[str] = set()
        for part in name.split(" + "):
            found.update(self._fused.get(part, (self._of.get(part, part),)))
        return tuple(sorted(found & set(self._order), key=self._order.__getitem__))

    def op_type(self, name: str) -> str:
        """Operators that a layer computes, joined."""
        return "+".join(dict.fromkeys(self._types[node] for node in self.nodes(name)))


def _profiler(session: run.TensorRTSession, durations: dict[str, list[float]]) -> Any:
    module = session.vendor.module

    class Profiler(module.IProfiler):  # type: ignore[name-defined,misc]  # the vendor is imported here only
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            durations.setdefault(layer, []).append(milliseconds * 1e-3)

    return Profiler()
