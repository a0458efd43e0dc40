"""A small profile of one network: which of its kernels to time, in which order, within a time limit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sartor.cost_models.boundary import (
    LAYOUT_FAMILIES,
    Boundary,
    boundary_from,
    ends_of,
    probe_models,
    probes,
)
from sartor.cost_models.profile import DeviceProfile, Sample
from sartor.cost_models.samples import nearest_sizes, sample_model
from sartor.cost_models.signatures import Signature, signature_of
from sartor.errors import MetricUnavailableError
from sartor.ir.kernels import Kernel
from sartor.ir.workload import Workload

Timer = Callable[[list[bytes]], Sequence[float]]
"""Seconds of one inference per serialized ONNX model; NaN, or raising `MetricUnavailableError` when the
element is read, where a model could not be timed."""

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
_MOVEMENT_FRACTIONS = (0.125, 0.5, 1.0)
_CALL_BYTES = 192 << 20  # serialized models handed to one call of the timer
_ASSUMED_MACS_PER_S, _ASSUMED_BYTES_PER_S = 30e9, 8e9  # only to decide what is sampled first

Point = tuple[float, ...]


@dataclasses.dataclass
class _Case:
    """One signature to sample."""

    signature: Signature
    kernels: list[Kernel]
    coarse: list[Point]
    fine: list[Point]
    weight: float
    found: dict[Point, float] = dataclasses.field(default_factory=dict)
    failed: str = ""


def sample_kernels(
    workload: Workload,
    timer: Timer,
    *,
    target: Mapping[str, Any],
    device: Mapping[str, Any],
    channel_grid: Callable[[str], int],
    seconds: float = 25.0,
    fractions: Sequence[float] = FRACTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> DeviceProfile:
    """A small profile of one network's own kernels: samples only, nothing learned.

    Kernels that differ only in channels share samples. First every signature gets the corners of its
    range, the dearest first; then the ranges are filled in, the dearest first, until the time is over.

    Args:
        workload: built with the extents of the channel analysis; without, only full sizes are sampled.
        timer: times serialized one-kernel models on the target, with the options named in `target`.
        target: as in `DeviceProfile`; the channel grid is added.
        device: as in `DeviceProfile`.
        channel_grid: operator type → channel step of the target; samples lie on it.
        seconds: time limit for sampling. The call of the timer that is running when it ends finishes.
        fractions: of each full channel count, where samples lie.
        clock: monotonic seconds.

    Raises:
        MetricUnavailableError: not a single kernel could be timed, or none of those that compute.
    """
    begun = clock()
    cases, boundary, timed = _timed(workload, timer, channel_grid, seconds, fractions, clock)
    samples = tuple(
        Sample(dict(case.signature.spec), tuple(map(float, at)), case.signature.family, max(found, 1e-9))
        for case in cases
        for at, found in sorted(case.found.items())
    )
    kinds = {case.signature.kind for case in cases}
    if not samples or (
        "contraction" in kinds and all(c.signature.kind != "contraction" for c in cases if c.found)
    ):
        reasons = sorted({case.failed for case in cases if case.failed}) or ["the time limit was reached"]
        raise MetricUnavailableError(
            f"None of the {len(cases)} kernels that carry this network's work could be timed on the target, so its "
            f"latency is unknown: {reasons[0]}."
        )
    operators = sorted({case.signature.spec["op"] for case in cases if case.signature.kind == "contraction"})
    return DeviceProfile(
        target={**target, "channel_grid": {op: channel_grid(op) for op in operators}},
        device=device,
        protocol={"models": timed, "seconds": round(clock() - begun, 3)},
        call_s=boundary.call_s,
        samples=samples,
        failures=tuple(
            {"spec": dict(case.signature.spec), "reason": case.failed or "the time limit was reached"}
            for case in cases
            if not case.found
        ),
    )


def _timed(
    workload: Workload,
    timer: Timer,
    channel_grid: Callable[[str], int],
    seconds: float,
    fractions: Sequence[float],
    clock: Callable[[], float],
) -> tuple[list[_Case], Boundary, int]:
    """Cases with what was found of them in the time, the boundary, and how many models were timed."""
    begun = clock()
    end = begun + seconds
    cases = _cases(workload, channel_grid, fractions)
    boundary, probed = _measure_boundary(cases, timer)
    start, timed = clock(), 0
    pace = max((start - begun) / probed, 1e-6)  # seconds per model
    for level in ("coarse", "fine"):
        waiting = [(case, list(getattr(case, level))) for case in cases]
        while waiting:
            left = end - clock()
            if left <= 0 and timed:
                break
            budget = max(1, int(left / pace / (2 if level == "coarse" and not timed else 1.2)))
            batch: list[tuple[_Case, list[Point]]] = []
            size = 0
            while waiting and (not batch or size + len(waiting[0][1]) <= budget):
                batch.append(waiting.pop(0))
                size += len(batch[-1][1])
            timed += _sample(batch, timer, boundary)
            if timed:
                pace = max((clock() - start) / timed, 1e-6)
    return cases, boundary, timed


# ---- what to sample ------------------------------------------------------------------------------
def _cases(workload: Workload, channel_grid: Callable[[str], int], fractions: Sequence[float]) -> list[_Case]:
    members: dict[str, list[tuple[Signature, Kernel]]] = {}
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        if signature is not None:
            members.setdefault(signature.key, []).append((signature, kernel))
    cases = []
    for found in members.values():
        signature, kernels = found[0][0], [k for _, k in found]
        step = channel_grid(signature.spec["op"]) if signature.kind == "contraction" else 1
        if signature.kind == "contraction":
            axes = [
                _axis([s.variables[i] for s, _ in found], step, fractions, len(signature.variables))
                for i in range(len(signature.variables))
            ]
            fine = [tuple(map(float, p)) for p in itertools.product(*axes)]
            coarse = [tuple(map(float, p)) for p in itertools.product(*({a[0], a[-1]} for a in axes))]
        else:
            kernels.sort(key=lambda k: -(k.bytes_read.full + k.bytes_written.full))
            varies = any(e.groups for o in kernels[0].inputs if o is not None for e in o.dims)
            levels = _MOVEMENT_FRACTIONS if signature.scalable and varies else (1.0,)
            coarse = [(f,) for f in levels]
            fine = coarse
        weight = sum(
            k.macs.full / _ASSUMED_MACS_PER_S
            + (k.bytes_read.full + k.bytes_written.full) / _ASSUMED_BYTES_PER_S
            for k in kernels
        )
        coarse = sorted(set(coarse), key=lambda p: tuple(-c for c in p))
        fine = sorted(set(fine) - set(coarse))
        cases.append(_Case(signature, kernels, coarse, fine, weight))
    # The key breaks ties, so that the order of nodes in the file does not matter.
    return sorted(cases, key=lambda c: (-c.weight, c.signature.key))


def _axis(variables: Sequence[Any], step: int, fractions: Sequence[float], dimensions: int) -> list[int]:
    """Ascending channel counts for one variable: what any kernel of the signature can have."""
    wanted: set[int] = set()
    for quantity in variables:
        full = round(quantity.full)
        wanted.add(full)
        if any(factors for _, factors in quantity.terms):
            wanted.update(_snap(full * f, step, full) for f in fractions)
    ordered = sorted(wanted)
    most = {1: 8, 2: len(fractions)}.get(dimensions, 3)
    if len(ordered) <= most:
        return ordered
    # Keep both ends and spread the rest evenly in the logarithm: kernels differ in size by octaves.
    low, high = math.log(ordered[0]), math.log(ordered[-1])
    targets = [low + (high - low) * i / (most - 1) for i in range(most)]
    picked = {min(ordered, key=lambda c: abs(math.log(c) - t)) for t in targets}
    return sorted(picked | {ordered[0], ordered[-1]})


def _snap(channels: float, step: int, full: int) -> int:
    if full < step:
        return max(1, round(channels))
    return min(full, max(step, round(channels / step) * step))


# ---- sampling ------------------------------------------------------------------------------------
def _measure_boundary(cases: Sequence[_Case], timer: Timer) -> tuple[Boundary, int]:
    wanted = [
        end
        for case in cases
        if case.signature.family in LAYOUT_FAMILIES
        for point in (*case.coarse, *case.fine)
        for end in ends_of(case.signature, [int(c) for c in point])
    ]
    chosen = probes(wanted)
    models = probe_models(chosen)
    return boundary_from(chosen, _read(timer(models), len(models))), len(models)


def _sample(batch: Sequence[tuple[_Case, list[Point]]], timer: Timer, boundary: Boundary) -> int:
    """Time all points of `batch`, in as many calls as memory asks for; returns how many models."""
    jobs: list[tuple[_Case, Point]] = []
    models: list[bytes] = []
    done = 0

    def flush() -> None:
        nonlocal done
        taken = _read(timer(models), len(models)) if models else []
        for (case, at), seconds in zip(jobs, taken, strict=True):
            if math.isfinite(seconds):
                case.found[at] = boundary.own_s(case.signature, [int(c) for c in at], seconds)
            else:
                case.failed = "the target could not run or reach its sample model"
        done += len(models)
        jobs.clear()
        models.clear()

    for case, points in batch:
        for point in points:
            try:
                model, at = _model(case, point)
            except Exception as error:  # a node that no sample model can imitate is priced by the roofline
                case.failed = f"no sample model: {type(error).__name__}: {str(error)[:200]}"
                break
            jobs.append((case, at))
            models.append(model)
            if sum(map(len, models)) > _CALL_BYTES:
                flush()
    flush()
    return done


def _model(case: _Case, point: Point) -> tuple[bytes, Point]:
    """A sample model and its coordinates in the grid."""
    spec = case.signature.spec
    if case.signature.kind == "movement":  # the point is a share of the largest kernel's bytes
        largest = case.kernels[0].bytes_read.full + case.kernels[0].bytes_written.full
        at = nearest_sizes(spec, [point[0] * largest])
        return sample_model(spec, at), at
    return sample_model(spec, point), point


def _read(taken: Sequence[float], count: int) -> list[float]:
    seconds = []
    for index in range(count):
        try:
            seconds.append(float(taken[index]))
        except MetricUnavailableError:
            seconds.append(math.nan)
    return seconds
