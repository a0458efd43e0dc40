"""Kernel times from OpenVINO's performance counters, mapped back to the nodes of the program."""

from __future__ import annotations

import dataclasses

from sartor.backends.inputs import random_inputs
from sartor.backends.openvino import run
from sartor.backends.openvino.executed import Layer, executed_nodes
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.visits import median_of_microseconds

_WARM_UP_RUNS = 3


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per executed kernel over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    shapes = {**artifact.shapes, **options.shapes}
    options = dataclasses.replace(options, shapes=shapes)
    session = run.load(artifact, options, PERF_COUNT=True)
    inputs = random_inputs(artifact.inputs, shapes, seed=0)
    request = session.compiled.create_infer_request()
    durations: dict[str, list[float]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for index in range(_WARM_UP_RUNS + runs):
        request.infer(inputs)
        if index < _WARM_UP_RUNS:
            continue
        for entry in request.profiling_info:
            if "NOT_RUN" in str(entry.status) or "OPTIMIZED_OUT" in str(entry.status):
                continue
            durations.setdefault(entry.node_name, []).append(entry.real_time.total_seconds())
            kinds[entry.node_name] = (entry.node_type, entry.exec_type)
    origin = Origin.from_dict(artifact.metadata["origin"])
    executed = executed_nodes(origin, _layers(session))
    return [
        KernelTime(
            name=name,
            op_type=kinds[name][0],
            nodes=executed.get(name, ()),
            median_s=median_of_microseconds(samples),
            runs=len(samples),
            implementation=kinds[name][1],
        )
        for name, samples in durations.items()
    ]


def _layers(session: run.OpenVinoSession) -> list[Layer]:
    """The execution graph, sources first, without constants."""
    found = []
    for layer in session.compiled.get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        kind = str(info["layerType"].value) if "layerType" in info else ""
        if kind == "Const":
            continue
        names = str(info["originalLayersNames"].value) if "originalLayersNames" in info else ""
        sources = [value.get_source_output().get_node().get_friendly_name() for value in layer.inputs()]
        original = tuple(name for name in names.split(",") if name)
        found.append(Layer(layer.get_friendly_name(), kind, original, tuple(sources)))
    return found
