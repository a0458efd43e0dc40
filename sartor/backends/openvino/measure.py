"""Kernel times from OpenVINO's performance counters, mapped back to the nodes of the program."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from sartor.backends.inputs import random_inputs
from sartor.backends.openvino import run
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions

_WARM_UP_RUNS = 3
_ONNX_TYPES: Mapping[str, tuple[str, ...]] = {
    "Convolution": ("Conv",),
    "GroupConvolution": ("Conv",),
    "Deconvolution": ("ConvTranspose",),
    "FullyConnected": ("Gemm", "MatMul"),
    "MatMul": ("Gemm", "MatMul"),
}


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
    layers = _layer_names(session)
    return [
        KernelTime(
            name=name,
            op_type=kinds[name][0],
            nodes=origin.nodes(layers.get(name, (name,)), _ONNX_TYPES.get(kinds[name][0], ())),
            median_s=statistics.median(samples),
            runs=len(samples),
            implementation=kinds[name][1],
        )
        for name, samples in durations.items()
    ]


def _layer_names(session: run.OpenVinoSession) -> dict[str, tuple[str, ...]]:
    """Original layer names per executed kernel, from the runtime model."""
    found = {}
    for layer in session.compiled.get_runtime_model().get_ops():
        info = layer.get_rt_info()
        if "originalLayersNames" in info:
            names = str(info["originalLayersNames"].value).split(",")
            found[layer.get_friendly_name()] = tuple(name for name in names if name)
    return found
