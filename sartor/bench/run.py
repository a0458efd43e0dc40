"""The benchmark: every model on every target in every precision, under the same deployment parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor import __version__, backends
from sartor.backends import host
from sartor.bench.document import SCHEMA, finish
from sartor.bench.family import ladder
from sartor.bench.power import find_sensor
from sartor.bench.preparation import describe, distinct
from sartor.bench.protocol import PROTOCOL, Settings
from sartor.bench.target import Subject, Target
from sartor.errors import InternalError, SartorError, UsageError

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program


def run_bench(
    programs: Sequence[Program],
    targets: Sequence[str],
    settings: Settings | None = None,
    *,
    data: str | None = None,
    sysfs: Path = Path("/sys"),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        programs: canonical, with names of their own.
        targets: backends. One that is not installed, or does not take a model, gives rows with the reason.
        settings: deployment parameters and limits.
        data: data source for calibration and accuracy; see `sartor.data`.
        sysfs: where power sensors are looked for.
        say: called with what is being done.

    Returns:
        A document of schema `sartor.bench-report/1`; see `sartor.bench.document`.

    Raises:
        UsageError: no model or target, an unknown or repeated one, data that fit no model.
    """
    settings = settings or Settings()
    distinct(programs)
    _require_targets(targets)
    models = [describe(program) for program in programs]
    given = [_data(data, program, settings.seed) for program in programs]
    if data is not None and not any(source for source, _ in given):
        raise UsageError(given[0][1])
    sensor, sensor_reason = find_sensor(sysfs)
    members = ladder(max(model["operations_flop"] for model in models), settings.seed)
    load_before = host.load_average()
    rows: list[dict[str, Any]] = []
    rooflines: list[dict[str, Any]] = []
    runtimes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="sartor-bench-") as folder:
        for name in targets:
            for precision in settings.precisions:
                try:
                    target = Target(
                        name, precision, settings, Path(folder), sensor=sensor, sensor_reason=sensor_reason
                    )
                except InternalError:
                    raise
                except SartorError as error:  # the vendor's package is missing or broken
                    rows += [_unusable(m["name"], name, precision, error) for m in models]
                    continue
                runtimes[name] = target.capabilities.version
                subjects = []
                for program, (source, reason) in zip(programs, given, strict=True):
                    subject = target.subject(program, source)
                    if reason:
                        subject.row["absent"]["accuracy"] = reason
                    subjects.append(subject)
                points = _measure(target, subjects, members, say)
                rows += [subject.row for subject in subjects]
                if points:
                    rooflines.append({"target": name, "precision": precision, "points": points})
    return finish(
        {
            "schema": SCHEMA,
            "sartor_version": __version__,
            "protocol": dict(PROTOCOL),
            "parameters": settings.to_dict(),
            "conditions": {
                **host.conditions(),
                "load_average": {"before": load_before, "after": host.load_average()},
                "runtimes": runtimes,
                "power_sensor": sensor.name if sensor is not None else f"none: {sensor_reason}",
            },
            "models": models,
            "rows": rows,
            "rooflines": rooflines,
            "imports": [],
        }
    )


def _measure(
    target: Target, subjects: list[Subject], members: Sequence[Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All metrics of one target and precision."""
    label = f"{target.name} {target.precision}"
    for number, subject in enumerate(subjects):
        say(f"{label}: converting {subject.row['model']}")
        target.convert(subject, number)
    runnable = [subject for subject in subjects if subject.artifact is not None]
    if not runnable:
        return []
    points = target.latencies(runnable, members, say)
    for subject in runnable:
        if subject.row["state"] == "measured":
            say(f"{label}: throughput of {subject.row['model']}")
            target.throughput(subject)
            if subject.data is not None:
                say(f"{label}: accuracy of {subject.row['model']}")
            target.accuracy(subject)
    return points


def _require_targets(targets: Sequence[str]) -> None:
    known = backends.available()
    unknown = [name for name in targets if name not in known]
    if not targets or unknown or len(set(targets)) != len(targets):
        observed = ", ".join(f"'{name}'" for name in targets) or "none"
        raise UsageError(
            f"The targets are {observed}; expected one or more of {', '.join(known)}, each once."
        )


def _data(spec: str | None, program: Program, seed: int) -> tuple[Data | None, str]:
    """The data as this model takes them, or why it does not."""
    from sartor.data import load_data

    if spec is None:
        return None, ""
    try:
        return load_data(spec, list(program.input_shapes), seed, program=program), ""
    except UsageError as error:
        return None, str(error)


def _unusable(model: str, target: str, precision: str, error: SartorError) -> dict[str, Any]:
    return {
        "model": model,
        "target": target,
        "precision": precision,
        "state": "not-available",
        "reason": str(error),
        "absent": {},
    }
