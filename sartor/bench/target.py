"""One target in one precision: conversions, latencies in turn, throughput with power, accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor import backends
from sartor.backends import isolation
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.bench.device import Device
from sartor.bench.family import Member
from sartor.bench.power import Sensor
from sartor.bench.preparation import Prepared, prepare, samples_per_run
from sartor.bench.protocol import RUNS, VISITS, WARM_UP_RUNS, Settings
from sartor.bench.throughput import throughput
from sartor.errors import InternalError, SartorError

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program

Row = dict[str, Any]
Say = Callable[[str], None]
_MEMBER_S = 4.0  # of the runs of one parameterized model; the largest then have fewer than the protocol's
_CONVERSION_SHARE = 0.5  # of the family's time; the rest is for its runs


@dataclasses.dataclass
class Subject:
    """A model on the target.

    Attributes:
        program: as it was given.
        data: its data, or why there are none that fit.
        row: its row of the report, filled step by step.
        written: in the precision of the row; None where that failed.
        artifact: None where there is none to run.
        samples_s: timed runs at one sample.
        warm_up_runs: before them.
    """

    program: Program
    data: Data | None
    row: Row
    written: Prepared | None = None
    artifact: Artifact | None = None
    samples_s: list[float] = dataclasses.field(default_factory=list)
    warm_up_runs: int = 0


class Target:
    """See the module docstring.

    Args:
        name: backend.
        precision: of every model.
        settings: of the benchmark.
        folder: for artifacts.
        sensor: power sensor, or None.
        sensor_reason: why there is none.
    """

    def __init__(
        self,
        name: str,
        precision: str,
        settings: Settings,
        folder: Path,
        *,
        sensor: Sensor | None = None,
        sensor_reason: str = "",
    ):
        self.name, self.precision, self.settings, self.folder = name, precision, settings, folder
        self.sensor, self.sensor_reason = sensor, sensor_reason
        self.options = TargetOptions(threads=settings.threads, precision=precision)
        self.backend = backends.get(name)
        self.capabilities = self.backend.capabilities()

    def subject(self, program: Program, data: Data | None) -> Subject:
        """A model with an empty row."""
        row: Row = {
            "model": program.source.name,
            "target": self.name,
            "precision": self.precision,
            "state": "measured",
            "absent": {},
        }
        return Subject(program, data, row)

    # ---- conversion ------------------------------------------------------------------------------
    def convert(self, subject: Subject, number: int) -> None:
        """Legality first, then the target's compiler."""
        row = subject.row
        if self.precision not in self.capabilities.precisions:
            have = ", ".join(self.capabilities.precisions)
            row |= {"state": "not-taken", "reason": f"the target has no {self.precision}; it has {have}"}
            return
        with _blame(row):
            subject.written = prepare(subject.program, self.precision, subject.data, self.settings.seed)
            row["preparation_s"] = subject.written.seconds
            if subject.written.calibration:
                row["calibration"] = subject.written.calibration
            report = self.backend.legality(subject.written.program, self.options)
            if not report.ok:
                broken = report.violations
                more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
                row |= {"state": "not-taken", "reason": f"{broken[0]}{more}"}
        if row["state"] != "measured" or subject.written is None:
            return
        with _blame(row):
            begun = time.perf_counter()
            artifact = isolation.lower(
                self.name,
                subject.written.program,
                self.folder / f"{self.name}-{self.precision}-{number}",
                self.options,
                time_limit_s=self.settings.conversion_limit_s,
                memory_limit_bytes=self.settings.memory_limit_bytes,
                fresh=True,
            )
            row["conversion_s"] = time.perf_counter() - begun
            row["artifact_bytes"] = artifact.size_bytes
            subject.artifact = artifact
        if self.capabilities.not_run_here and subject.artifact is not None:
            row |= {"state": "not-run-here", "reason": self.capabilities.not_run_here}
            subject.artifact = None

    # ---- latency ---------------------------------------------------------------------------------
    def latencies(self, subjects: Sequence[Subject], members: Sequence[Member], say: Say) -> list[Row]:
        """Times all models in turn, with the family in between; returns the family's points."""
        generator = random.Random(self.settings.seed)
        with contextlib.ExitStack() as stack:
            family = _Family(self, members, stack, say)
            loaded = []
            for subject in subjects:
                device = stack.enter_context(self._device())
                with _blame(subject.row):
                    assert subject.artifact is not None
                    subject.row["settings"] = device.load("model", subject.artifact)
                    loaded.append((subject, device))
            for visit in range(VISITS):
                say(f"{self.name} {self.precision}: latency, visit {visit + 1} of {VISITS}")
                for subject, device in generator.sample(loaded, len(loaded)):
                    if subject.row["state"] == "measured":
                        self._visit(subject, device, first=visit == 0)
                family.measure((visit + 1) / VISITS)
        for subject in subjects:
            if subject.row["state"] == "measured":
                samples = samples_per_run(subject.program)
                subject.row["latency"] = {
                    **_quantiles(subject.samples_s),
                    "warm_up_runs": subject.warm_up_runs,
                    "batch_samples": samples,
                }
        return family.points

    def _visit(self, subject: Subject, device: Device, *, first: bool) -> None:
        with _blame(subject.row):
            done = device.runs(
                "model",
                warm_up_runs=WARM_UP_RUNS if first else 1,
                runs=RUNS // VISITS,
                limit_s=self.settings.time_limit_s / VISITS,
            )
            subject.samples_s += done.samples_s
            if first:
                subject.warm_up_runs = done.warm_up_runs

    # ---- throughput, accuracy --------------------------------------------------------------------
    def throughput(self, subject: Subject) -> None:
        """Throughput, and power in its configuration."""
        assert subject.artifact is not None and subject.written is not None
        row = subject.row
        with self._device() as device:
            found, power, reason = throughput(
                device,
                subject.artifact,
                subject.written.program,
                self.settings,
                self.folder / "batches",
                self.sensor,
            )
        if found is None:
            row["absent"]["throughput"] = reason
        else:
            row["throughput"] = found
        if power is not None:
            row["power"] = power
        else:
            row["absent"]["power"] = self.sensor_reason or "the sensor gave no reading"

    def accuracy(self, subject: Subject) -> None:
        """The score of the artifact on the whole test split, one sample at a time."""
        assert subject.artifact is not None
        if subject.data is None:
            subject.row["absent"].setdefault("accuracy", "no data are given")
            return
        from sartor.data import score
        from sartor.ir.fx import run_twin

        data, program = subject.data, subject.program
        carriers = program.batch.inputs if program.batch.symbolic else ()
        try:
            with isolation.Session(
                subject.artifact, self.options, memory_limit_bytes=self.settings.memory_limit_bytes
            ) as session:

                def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                    if not carriers:
                        return session.run(inputs)
                    parts = [
                        session.run({k: v[i : i + 1] if k in carriers else v for k, v in inputs.items()})
                        for i in range(len(inputs[carriers[0]]))
                    ]
                    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

                value, count = score(predict, data.test, data.metric, lambda given: run_twin(program, given))
        except InternalError:
            raise
        except SartorError as error:
            subject.row["absent"]["accuracy"] = str(error)
            return
        labelled = data.metric is not None or data.test.has_labels
        subject.row["accuracy"] = {
            "score_fraction": value,
            "samples": count,
            "split": "evaluate" if data.test_is_evaluate else "test",
            "compared_with": "labels" if labelled else "the model as it was given, in float64",
        }

    def _device(self) -> Device:
        return Device(
            self.name,
            self.options,
            memory_limit_bytes=self.settings.memory_limit_bytes,
            seed=self.settings.seed,
        )


class _Family:
    """Parameterized models of one target: converted until half of their time is over, timed in what is left."""

    def __init__(self, target: Target, members: Sequence[Member], stack: contextlib.ExitStack, say: Say):
        self.points: list[Row] = []
        self._target, self._say = target, say
        self._limit_s = target.settings.family_limit_s
        self._spent_s, self._next = 0.0, 0
        self._ready: list[tuple[Member, Artifact]] = []
        if members and self._limit_s > 0:
            self._device = stack.enter_context(target._device())
            self._convert(members)

    def _convert(self, members: Sequence[Member]) -> None:
        target, begun = self._target, time.perf_counter()
        self._say(f"{target.name} {target.precision}: converting parameterized models")
        for member in members:
            if time.perf_counter() - begun >= _CONVERSION_SHARE * self._limit_s:
                break
            folder = target.folder / f"{target.name}-{target.precision}-{member.name}"
            try:
                program = prepare(member.build(), target.precision, None, target.settings.seed).program
                limit = max(self._limit_s, 1.0)
                self._ready.append((member, self._device.lower(program, folder, time_limit_s=limit)))
            except InternalError:
                raise
            except SartorError as error:
                self._fail(member, error)
        # Compilers leave memory and threads behind; the runs get a process of their own.
        self._device.restart()

    def measure(self, share: float) -> None:
        """Time members until this share of the time that is left after conversion is spent."""
        until = self._limit_s * _CONVERSION_SHARE * share
        begun = time.perf_counter()
        while self._next < len(self._ready) and self._spent_s + time.perf_counter() - begun < until:
            member, artifact = self._ready[self._next]
            self._next += 1
            try:
                self._device.load(member.name, artifact)
                limit = min(_MEMBER_S, self._target.settings.time_limit_s)
                done = self._device.runs(member.name, warm_up_runs=WARM_UP_RUNS, runs=RUNS, limit_s=limit)
                self._device.unload(member.name)
            except InternalError:
                raise
            except SartorError as error:
                self._fail(member, error)
                continue
            self.points.append(
                self._entry(member)
                | {"latency": {**_quantiles(done.samples_s), "warm_up_runs": done.warm_up_runs}}
            )
        self._spent_s += time.perf_counter() - begun

    def _entry(self, member: Member) -> Row:
        return {
            "name": member.name,
            "depth_layers": member.depth,
            "width_channels": member.width,
            "resolution_pixels": member.resolution,
            "kernel_pixels": member.kernel,
            "operations_flop": member.flop,
        }

    def _fail(self, member: Member, error: SartorError) -> None:
        self.points.append(self._entry(member) | {"failed": str(error)})
        self._device.restart()


@contextlib.contextmanager
def _blame(row: Row) -> Iterator[None]:
    """A failure is the row's, with the vendor's last words, and not the end of the benchmark."""
    try:
        yield
    except InternalError:
        raise
    except SartorError as error:
        row |= {"state": "failed", "reason": str(error)}
        notes = list(getattr(error, "__notes__", ()))
        if notes:
            row["log"] = notes[-1][-2000:]


def _quantiles(samples_s: Sequence[float]) -> Row:
    p10, median, p90 = np.quantile(samples_s, [0.1, 0.5, 0.9]).tolist()
    return {
        "mean_s": statistics.fmean(samples_s),
        "median_s": median,
        "p10_s": p10,
        "p90_s": p90,
        "runs": len(samples_s),
    }
