"""Kernel times from ONNX Runtime's profiler, mapped back to the nodes of the artifact."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.backends.artifact import verify_files
from sartor.backends.inputs import random_inputs
from sartor.backends.onnxruntime import run
from sartor.backends.onnxruntime.executed import INSERTED, executed_nodes, unnamed
from sartor.backends.origin import Origin
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.visits import median_of_microseconds

_SUFFIX = "_kernel_time"
_WARM_UP_RUNS = 3
_COUNTED, _FEWEST_COUNTED = 3, 4  # of the inferences one in so many counts


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per kernel over the fastest of `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    import onnx

    verify_files(artifact)
    require_lowered_for(artifact, options)
    made, fixed, settings = run.session_options(artifact.inputs, options)
    with tempfile.TemporaryDirectory(prefix="sartor-profile-") as folder:
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(folder) / "profile")
        made.optimized_model_filepath = str(Path(folder) / "executed.onnx")
        session = run.create(str(artifact.main_file), made)
        wrapped = run.OnnxRuntimeSession(session, artifact.inputs, fixed, settings)
        once = wrapped.prepare(random_inputs(artifact.inputs, {**artifact.shapes, **options.shapes}, seed=0))
        for _ in range(_WARM_UP_RUNS + runs):
            once()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        original = onnx.load(str(artifact.main_file), load_external_data=False).graph
        graph = onnx.load(str(Path(folder) / "executed.onnx"), load_external_data=False).graph
    return _collect(events, Origin(original), executed_nodes(original, graph), runs)


def _collect(
    events: list[Mapping[str, Any]],
    origin: Origin,
    executed: Mapping[str, tuple[str, ...]],
    runs: int,
) -> list[KernelTime]:
    # Inserted nodes share a name (several `ReorderInput`), so kernels are told apart by their index.
    durations: dict[tuple[str, str], list[float]] = {}
    types: dict[tuple[str, str], str] = {}
    written: dict[tuple[str, str], tuple[int, ...]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        key = (event["name"].removesuffix(_SUFFIX), str(event["args"].get("node_index", "")))
        durations.setdefault(key, []).append(event["dur"] * 1e-6)
        types[key] = event["args"].get("op_name", "")
        written[key] = _shape(event["args"])
    found = _nodes(types, origin, executed)
    counted = {key: samples[-runs:] for key, samples in durations.items()}
    most = max(map(len, counted.values()), default=0)
    # What did not run in every inference, such as a branch, has fewer times, and no say.
    fastest = _fastest([times for times in counted.values() if len(times) == most])
    return [
        KernelTime(
            name=key[0],
            op_type=types[key],
            nodes=found[key],
            median_s=median_of_microseconds(
                [samples[i] for i in fastest] if len(samples) == most else samples
            ),
            runs=len(samples),
            implementation="nchwc" if key[0].endswith("_nchwc") else "",
            written=written[key],
        )
        for key, samples in counted.items()
    ]


def _shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the first output; the profiler says `[{"float": [1, 64, 28, 28]}, ...]`."""
    for value in arguments.get("output_type_shape", ())[:1]:
        for shape in value.values():
            return tuple(map(int, shape))
    return ()


def _fastest(kernels: list[list[float]]) -> list[int]:
    """Inferences that others disturbed least: chosen by their whole time, which no single kernel decides."""
    totals = [sum(times) for times in zip(*kernels, strict=True)]
    count = max(_FEWEST_COUNTED, len(totals) // _COUNTED)
    return sorted(range(len(totals)), key=totals.__getitem__)[:count]


def _nodes(
    types: Mapping[tuple[str, str], str], origin: Origin, executed: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Nodes per kernel. A node without a name is called `TYPE_INDEX` by the profiler."""
    found = {}
    counts: Counter[str] = Counter()
    for key in sorted(types, key=lambda key: int(key[1] or 0)):
        name, op_type = key[0], types[key]
        if name not in executed and name == f"{op_type}_{key[1]}":
            counts[op_type] += 1
            name = unnamed(op_type, counts[op_type])
        if name in executed:
            found[key] = executed[name]
        else:  # inside a body, where names are the original's
            found[key] = origin.nodes([INSERTED.sub("", name)], [op_type.removeprefix("Fused")])
    return found
