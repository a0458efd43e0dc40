"""Kernel times from OpenVINO's performance counters, mapped back to the nodes of the program."""

from __future__ import annotations

import dataclasses

from sartor.backends.inputs import random_inputs
from sartor.backends.openvino import run
from sartor.backends.openvino.executed import Layer, executed_nodes
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions

_WARM_UP_RUNS = 3
_NOT_EXECUTED = ("NOT_RUN", "OPTIMIZED_OUT")
"""The first is also said of a kernel that took less than a microsecond on average: one that ever ran is one."""


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Mean time per executed kernel over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    shapes = {**artifact.shapes, **options.shapes}
    options = dataclasses.replace(options, shapes=shapes)
    session = run.load(artifact, options, PERF_COUNT=True)
    inputs = random_inputs(artifact.inputs, shapes, seed=0)
    request = session.compiled.create_infer_request()
    averages: list[dict[str, int]] = []  # before the runs that count, and behind them
    kinds: dict[str, tuple[str, str]] = {}
    for index in range(_WARM_UP_RUNS + runs):
        request.infer(inputs)
        entries = request.profiling_info
        for entry in entries:
            if not any(status in str(entry.status) for status in _NOT_EXECUTED):
                kinds[entry.node_name] = (entry.node_type, entry.exec_type)
        if index in (_WARM_UP_RUNS - 1, _WARM_UP_RUNS + runs - 1):
            averages.append({e.node_name: round(e.real_time.total_seconds() * 1e6) for e in entries})
    origin = Origin.from_dict(artifact.metadata["origin"])
    executed = executed_nodes(origin, _layers(session))
    return [
        KernelTime(
            name=name,
            op_type=op_type,
            nodes=executed.get(name, ()),
            median_s=mean_of_averages(
                averages[0].get(name, 0), averages[1].get(name, 0), _WARM_UP_RUNS, runs
            ),
            runs=runs,
            implementation=implementation,
        )
        for name, (op_type, implementation) in ((n, kinds[n]) for n in averages[1] if n in kinds)
    ]


def mean_of_averages(before_us: int, after_us: int, warm_up: int, runs: int) -> float:
    """Seconds of one run: a counter gives the average of all runs of the session so far, in whole microseconds.

    Args:
        before_us: after `warm_up` runs.
        after_us: after `runs` more.
        warm_up: runs whose time is taken out.
        runs: that count.
    """
    half = 0.5  # what is cut off, on average
    total_us = (after_us + half) * (warm_up + runs) - (before_us + half) * warm_up
    return max(total_us / runs, 0.0) * 1e-6


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
