"""Kernel times from ONNX Runtime's profiler, mapped back to the nodes of the artifact."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.artifact import verify_files
from sartor.backends.inputs import random_inputs
from sartor.backends.onnxruntime import run
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions

if TYPE_CHECKING:
    import onnx

_SUFFIX = "_kernel_time"
_WARM_UP_RUNS = 3


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per kernel over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    import onnx

    verify_files(artifact)
    made, fixed, settings = run.session_options(artifact.inputs, options)
    with tempfile.TemporaryDirectory(prefix="sartor-profile-") as folder:
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(folder) / "profile")
        session = run.create(str(artifact.main_file), made)
        wrapped = run.OnnxRuntimeSession(session, artifact.inputs, fixed, settings)
        once = wrapped.prepare(random_inputs(artifact.inputs, {**artifact.shapes, **options.shapes}, seed=0))
        for _ in range(_WARM_UP_RUNS + runs):
            once()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    origin = _Origin(onnx.load(str(artifact.main_file), load_external_data=False).graph)
    return _collect(events, origin, runs)


def _collect(events: list[Mapping[str, Any]], origin: _Origin, runs: int) -> list[KernelTime]:
    # Inserted nodes share a name (several `ReorderInput`), so kernels are told apart by their index.
    durations: dict[tuple[str, str], list[float]] = {}
    types: dict[tuple[str, str], str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        key = (event["name"].removesuffix(_SUFFIX), str(event["args"].get("node_index", "")))
        durations.setdefault(key, []).append(event["dur"] * 1e-6)
        types[key] = event["args"].get("op_name", "")
    return [
        KernelTime(
            name=key[0],
            op_type=types[key],
            nodes=origin.nodes(key[0], types[key]),
            median_s=statistics.median(samples[-runs:]),
            runs=min(runs, len(samples)),
            implementation="nchwc" if key[0].endswith("_nchwc") else "",
        )
        for key, samples in durations.items()
    ]


class _Origin:
    """Nodes of the file behind a kernel name.

    A kernel keeps its node's name, except in the blocked layout, where it is named after the value it
    writes plus `_nchwc`. Activations fused behind it are then the nodes between its own operator and
    that value.
    """

    def __init__(self, graph: onnx.GraphProto):
        self._by_name = {node.name: node for node in graph.node}
        self._producer = {output: node for node in graph.node for output in node.output if output}

    def nodes(self, kernel: str, op_type: str) -> tuple[str, ...]:
        name = kernel.removesuffix("_nchwc")
        node = self._by_name.get(name) or self._producer.get(name)
        chain: list[str] = []
        while node is not None and len(chain) < 8:
            chain.append(node.name)
            if node.op_type == op_type or op_type.endswith(node.op_type):
                return tuple(reversed(chain))
            node = self._producer.get(node.input[0]) if node.input else None
        return tuple(chain[:1])
