"""Kernel times from OpenVINO's performance counters, mapped back to the nodes of the program."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from sartor.backends.inputs import random_inputs
from sartor.backends.openvino import run
from sartor.backends.openvino.executed import Layer, executed_nodes
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions

_FEWEST_WARM_UP, _WARM_UP = 3, 0.25  # runs, and of those that count
_READINGS, _FEWEST_STRETCHES = 10, 5
"""Stretches of runs between readings of the counters, which themselves take time and caches; that are told apart."""
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
    averages: dict[str, dict[int, int]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    read = readings(runs)
    for number in range(1, read[-1] + 1):
        request.infer(inputs)
        for entry in request.profiling_info if number == 1 or number in read else ():
            if not any(status in str(entry.status) for status in _NOT_EXECUTED):
                kinds[entry.node_name] = (entry.node_type, entry.exec_type)
            average = round(entry.real_time.total_seconds() * 1e6)
            averages.setdefault(entry.node_name, {})[number] = average
    for taken in averages.values():
        taken.pop(1)  # a short kernel is said to have run after the first run only
    origin = Origin.from_dict(artifact.metadata["origin"])
    layers = _layers(session)
    executed, written = executed_nodes(origin, layers), {layer.name: layer.written for layer in layers}
    return [
        KernelTime(
            name=name,
            op_type=op_type,
            nodes=executed.get(name, ()),
            median_s=typical_of_averages(averages[name]),
            runs=runs,
            implementation=implementation,
            written=written.get(name, ()),
        )
        for name, (op_type, implementation) in ((n, kinds[n]) for n in averages if n in kinds)
    ]


def readings(runs: int) -> list[int]:
    """After which runs of a session the counters are read, so that `runs` count: the first time when it is warm.

    Stretches grow with the number of runs before them, as the error of the averages does.
    """
    first = max(_FEWEST_WARM_UP, round(_WARM_UP * runs))
    last = first + runs
    return sorted({round(first * (last / first) ** (i / _READINGS)) for i in range(_READINGS + 1)})


def typical_of_averages(averages_us: Mapping[int, int]) -> float:
    """Seconds of one run that no interruption counts in.

    A counter gives the average of all runs of the session so far, in whole microseconds: what `k` runs took together
    is known to half of `k`. The mean of any stretch of runs follows, the better the longer it is for its place; an
    interruption, hundreds of times as long as a kernel, is in one stretch alone. The lower median of them counts.

    Args:
        averages_us: by how many runs there were so far, ascending; the runs before the first do not count, unless
            there is no other.
    """
    totals = [(number, number * (average + _CUT_OFF)) for number, average in averages_us.items()]
    if len(totals) == 1:
        totals.insert(0, (0, 0.0))
    rough = _typical(totals, _ERROR_US)
    return max(_typical(totals, max(_ERROR_US, _ERROR * rough)), 0.0) * 1e-6


def _typical(totals: Sequence[tuple[int, float]], error: float) -> float:
    """Lower median of stretches that are as short as the error of their means allows; a few at least."""
    steps = max(1, (len(totals) - 1) // _FEWEST_STRETCHES)
    found = []
    start = 0
    while start < len(totals) - 1:
        first, before = totals[start]
        ends = range(start + 1, min(start + steps, len(totals) - 1) + 1)
        end = next((i for i in ends if _SPREAD * totals[i][0] <= error * (totals[i][0] - first)), ends[-1])
        found.append((totals[end][1] - before) / (totals[end][0] - first))
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
        shape = layer.output(0).get_partial_shape() if layer.get_output_size() else None
        written = tuple(shape.to_shape()) if shape is not None and shape.is_static else ()
        found.append(Layer(layer.get_friendly_name(), kind, original, tuple(sources), written))
    return found
