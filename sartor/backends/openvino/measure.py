"""Kernel times from OpenVINO's performance counters, mapped back to the nodes of the program."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from sartor.backends.inputs import random_inputs
from sartor.backends.openvino import run
from sartor.backends.openvino.executed import Layer, executed_nodes
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions

_WARM_UP_RUNS = 3
_NOT_EXECUTED = ("NOT_RUN", "OPTIMIZED_OUT")
"""The first is also said of a kernel that took less than a microsecond on average: one that ever ran is one."""
_CUT_OFF = 0.5  # of an average, on average
_SPREAD = 0.41  # standard deviation of the difference of two averages that were cut off
_ERROR_US, _ERROR = 0.8, 0.03  # of the mean of a stretch: no less than one of them


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Typical time per executed kernel over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    shapes = {**artifact.shapes, **options.shapes}
    options = dataclasses.replace(options, shapes=shapes)
    session = run.load(artifact, options, PERF_COUNT=True)
    inputs = random_inputs(artifact.inputs, shapes, seed=0)
    request = session.compiled.create_infer_request()
    averages: dict[str, list[int]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for _ in range(_WARM_UP_RUNS + runs):
        request.infer(inputs)
        for entry in request.profiling_info:
            if not any(status in str(entry.status) for status in _NOT_EXECUTED):
                kinds[entry.node_name] = (entry.node_type, entry.exec_type)
            average = round(entry.real_time.total_seconds() * 1e6)
            averages.setdefault(entry.node_name, []).append(average)
    origin = Origin.from_dict(artifact.metadata["origin"])
    executed = executed_nodes(origin, _layers(session))
    return [
        KernelTime(
            name=name,
            op_type=op_type,
            nodes=executed.get(name, ()),
            median_s=typical_of_averages(averages[name], _WARM_UP_RUNS),
            runs=runs,
            implementation=implementation,
        )
        for name, (op_type, implementation) in ((n, kinds[n]) for n in averages if n in kinds)
    ]


def typical_of_averages(averages_us: Sequence[int], warm_up: int) -> float:
    """Seconds of one run that no interruption counts in.

    A counter gives the average of all runs of the session so far, in whole microseconds: what `k` runs took together
    is known to half of `k`. The mean of any stretch of runs follows, the better the longer it is for its place; an
    interruption, hundreds of times as long as a kernel, is in one stretch alone. The lower median of them counts.

    Args:
        averages_us: after each run, from the first one on; more than `warm_up`.
        warm_up: runs that do not count.
    """
    totals = [0.0, *(number * (average + _CUT_OFF) for number, average in enumerate(averages_us, 1))]
    first = max(warm_up, 1)
    rough = _typical(totals, first, _ERROR_US)
    return max(_typical(totals, first, max(_ERROR_US, _ERROR * rough)), 0.0) * 1e-6


def _typical(totals: Sequence[float], first: int, error: float) -> float:
    """Lower median of stretches that are as short as the error of their means allows; at least three of them."""
    last = len(totals) - 1
    if last <= first:
        return totals[last] / last
    growth = min(error / (error - _SPREAD), (last / first) ** (1 / 3))
    found, start = [], first
    while start < last:
        end = min(max(start + 1, math.floor(start * growth)), last)
        found.append((totals[end] - totals[start]) / (end - start))
        start = end
    return statistics.median_low(found)


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
