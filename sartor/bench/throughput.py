"""Throughput: the batch doubled until nothing is gained by it, or something stands in the way."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor import backends
from sartor.backends import isolation
from sartor.bench.power import Sampler, Sensor
from sartor.bench.preparation import at_batch, samples_per_run
from sartor.bench.protocol import GROWTH, MEMORY_SHARE, RUNS, WARM_UP_RUNS, Settings
from sartor.errors import InternalError, SartorError

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact
    from sartor.bench.device import Device
    from sartor.ir.program import Program

_BATCH_SHARE = 0.25  # of the time limit, for the runs of one batch
_MEMINFO = Path("/proc/meminfo")
_MEMORY_SIGNS = (
    "bad_alloc",
    "memoryerror",
    "sigkill",
    "out of memory",
    "failed to allocate",
    "cannot allocate",
)


def throughput(
    device: Device,
    artifact: Artifact,
    program: Program,
    settings: Settings,
    folder: Path,
    sensor: Sensor | None = None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """Best throughput of `program` on a target, and the power drawn there.

    Args:
        device: a subprocess of that target, with nothing loaded.
        artifact: lowered from `program`; lowered anew for other batches if it takes only one.
        program: at one sample, or at its fixed batch.
        settings: limits.
        folder: for artifacts of other batches.
        sensor: read during the runs.

    Returns:
        The metric and the power, None where there is none, and the reason where there is no throughput.
    """
    begun = time.perf_counter()
    sizes = _Sizes(program, settings)
    batches: list[dict[str, Any]] = []
    draws: list[dict[str, Any] | None] = []
    ended_by, reason = "", ""
    stale = 0
    while not ended_by:
        batch = sizes.current
        try:
            refusal = _load(device, artifact, program, batch, settings, folder)
            if refusal:
                ended_by, reason = "not_taken", f"batch {batch}: {refusal}"
                break
            with contextlib.ExitStack() as stack:
                sampler = stack.enter_context(Sampler(sensor)) if sensor is not None else None
                limit = _BATCH_SHARE * settings.time_limit_s
                done = device.runs("model", warm_up_runs=WARM_UP_RUNS, runs=RUNS, limit_s=limit)
        except InternalError:
            raise
        except SartorError as error:
            ended_by, reason = _failure(error, batch)
            break
        mean = statistics.fmean(done.samples_s)
        entry = {
            "batch_samples": batch,
            "samples_per_s": batch / mean,
            "mean_s": mean,
            "runs": len(done.samples_s),
            "warm_up_runs": done.warm_up_runs,
        }
        best = max((b["samples_per_s"] for b in batches), default=0.0)
        stale = stale + 1 if entry["samples_per_s"] < GROWTH * best else 0
        batches.append(entry)
        draws.append(_draw(sampler, sensor))
        ended_by, reason = sizes.grow(time.perf_counter() - begun, stale)
    if not batches:
        return None, None, reason
    at = max(range(len(batches)), key=lambda i: batches[i]["samples_per_s"])
    found = {
        **{k: batches[at][k] for k in ("samples_per_s", "batch_samples", "runs", "warm_up_runs")},
        "ended_by": ended_by,
        "reason": reason,
        "batches": batches,
    }
    return found, draws[at], ""


class _Sizes:
    """The next batch, and what ends their growth."""

    def __init__(self, program: Program, settings: Settings):
        from sartor.cost_models.static import static_cost

        self.current = samples_per_run(program)
        self._program, self._settings = program, settings
        self._bytes_per_sample = static_cost(program).peak_activation_bytes / self.current

    def grow(self, seconds: float, stale: int) -> tuple[str, str]:
        """Double; returns why not, as a key and a sentence."""
        if not self._program.batch.symbolic:
            return "batch_fixed", f"the batch is fixed because {self._program.batch.reason}"
        if stale >= 2:
            return "no_growth", "two doublings in a row gained nothing"
        if 2 * self.current > self._settings.batch_limit:
            return "batch_limit", f"the limit of the batch is {self._settings.batch_limit}"
        if seconds >= self._settings.time_limit_s:
            return "time_limit", f"the time limit is {self._settings.time_limit_s:g} s"
        need, free = 2 * self.current * self._bytes_per_sample, _available_bytes()
        if free is not None and need > MEMORY_SHARE * free:
            return "memory", (
                f"batch {2 * self.current} needs at least {need / 2**20:.0f} MiB of activations, and "
                f"{free / 2**20:.0f} MiB of memory are free"
            )
        self.current *= 2
        return "", ""


def _load(
    device: Device, artifact: Artifact, program: Program, batch: int, settings: Settings, folder: Path
) -> str:
    """Load the artifact for a batch, or one of its own if it was lowered for another only; says why it cannot be."""
    if batch == samples_per_run(program):
        device.load("model", artifact)
        return ""
    shapes = {name: (batch, *program.input_shapes[name][1:]) for name in program.batch.inputs}
    free = {spec.name for spec in artifact.inputs if spec.shape and isinstance(spec.shape[0], str)}
    if set(shapes) <= free:
        device.load("model", artifact, shapes)
        return ""
    batched = at_batch(program, batch)
    report = backends.get(artifact.target).legality(batched, device.options)
    if not report.ok:
        return str(report.violations[0])
    own = isolation.lower(
        artifact.target,
        batched,
        folder,
        device.options,
        time_limit_s=settings.conversion_limit_s,
        memory_limit_bytes=settings.memory_limit_bytes,
    )
    device.load("model", own)
    return ""


def _failure(error: SartorError, batch: int) -> tuple[str, str]:
    said = " ".join([str(error), *getattr(error, "__notes__", ())]).lower()
    kind = "memory" if any(sign in said for sign in _MEMORY_SIGNS) else "failed"
    return kind, f"batch {batch}: {error}"


def _draw(sampler: Sampler | None, sensor: Sensor | None) -> dict[str, Any] | None:
    if sampler is None or sensor is None or not sampler.highest_w:  # 0 W: a sensor that measures nothing
        return None
    return {"highest_w": sampler.highest_w, "sensor": sensor.name, "readings": len(sampler.watts)}


def _available_bytes() -> int | None:
    """Free memory as Linux tells it; None elsewhere."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
