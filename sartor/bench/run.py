"""The benchmark: every model on every target in every precision, under the same deployment parameters."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor import __version__, backends
from sartor.backends import host
from sartor.bench.document import SCHEMA, finish
from sartor.bench.family import ladder
from sartor.bench.power import find_sensor
from sartor.bench.preparation import describe, distinct, identify
from sartor.bench.protocol import PROTOCOL, Settings
from sartor.bench.store import UNFINISHED
from sartor.bench.target import Row, Subject, Target
from sartor.errors import InternalError, SartorError, UsageError

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program

_STOPPED = "the benchmark ended before this was done"


def run_bench(
    programs: Sequence[Program],
    targets: Sequence[str],
    settings: Settings | None = None,
    *,
    data: str | None = None,
    sysfs: Path = Path("/sys"),
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        programs: canonical, with names of their own.
        targets: backends. One that is not installed, or does not take a model, gives rows with the reason.
        settings: deployment parameters and limits.
        data: data source for calibration and accuracy; see `sartor.data`.
        sysfs: where power sensors are looked for.
        say: called with what is being done.
        keep: called with the whole document, before anything is measured and after each step; in it, rows that are
            not done have the state `unfinished`.

    Returns:
        A document of schema `sartor.bench-report/1`; see `sartor.bench.document`.

    Raises:
        UsageError: no model or target, an unknown or repeated one, data that fit no model.
    """
    settings = settings or Settings()
    distinct(programs)
    _require_targets(targets)
    described = [_described(program) for program in programs]
    given = [_data(data, program, settings.seed) for program in programs]
    if data is not None and not any(source for source, _ in given):
        raise UsageError(given[0][1])
    sensor, sensor_reason = find_sensor(sysfs)
    members = ladder(max(model.get("operations_flop", 0) for model, _ in described), settings.seed)
    report = _Report([model for model, _ in described], targets, settings, keep)
    report.keep()
    with tempfile.TemporaryDirectory(prefix="sartor-bench-") as folder:
        for name, precision in itertools.product(targets, settings.precisions):
            try:
                target = Target(
                    name, precision, settings, Path(folder), sensor=sensor, sensor_reason=sensor_reason
                )
            except InternalError:
                raise
            except SartorError as error:  # the vendor's package is missing or broken
                for model, _ in described:
                    report.refuse(model["name"], name, precision, "not-available", str(error))
                continue
            report.runtimes[name] = target.capabilities.version
            subjects = []
            for program, (source, no_data), (model, reason) in zip(programs, given, described, strict=True):
                if reason:
                    report.refuse(model["name"], name, precision, "not-taken", reason)
                    continue
                subject = target.subject(program, source)
                if no_data:
                    subject.row["absent"]["accuracy"] = no_data
                report.rows[_key(subject.row)] = subject.row
                subjects.append(subject)
            _measure(target, subjects, members, report, say)
    return report.document()


class _Report:
    """What is known so far.

    Attributes:
        rows: by model, target and precision, every one of them from the beginning.
        rooflines: of the report.
        runtimes: version by target.
    """

    def __init__(
        self,
        models: list[Row],
        targets: Sequence[str],
        settings: Settings,
        keep: Callable[[dict[str, Any]], object],
    ):
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.rooflines: list[Row] = []
        self.runtimes: dict[str, str] = {}
        self._models, self._settings, self._keep = models, settings, keep
        self._done: set[tuple[str, str, str]] = set()
        self._load_before = list(host.load_average())
        for name, precision, model in itertools.product(targets, settings.precisions, models):
            row = {"model": model["name"], "target": name, "precision": precision}
            self.rows[_key(row)] = row | {"state": UNFINISHED, "absent": {}}

    def refuse(self, model: str, target: str, precision: str, state: str, reason: str) -> None:
        """A row without numbers."""
        row = {"model": model, "target": target, "precision": precision, "state": state, "reason": reason}
        self.rows[_key(row)] = row | {"absent": {}}
        self.done(row)

    def done(self, row: Row) -> None:
        """Nothing more is measured of this row."""
        self._done.add(_key(row))
        self.keep()

    def keep(self) -> None:
        """Hand out what there is."""
        self._keep(self.document())

    def document(self) -> dict[str, Any]:
        """The report as it is."""
        rows = [
            row if key in self._done else row | {"state": UNFINISHED, "reason": _STOPPED}
            for key, row in self.rows.items()
        ]
        return finish(
            copy.deepcopy(
                {
                    "schema": SCHEMA,
                    "sartor_version": __version__,
                    "protocol": dict(PROTOCOL),
                    "parameters": self._settings.to_dict(),
                    "conditions": {
                        **host.conditions(),
                        "load_average": {"before": self._load_before, "after": list(host.load_average())},
                        "runtimes": self.runtimes,
                    },
                    "models": self._models,
                    "rows": rows,
                    "rooflines": self.rooflines,
                    "imports": [],
                }
            )
        )


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["target"], row["precision"]


def _measure(
    target: Target,
    subjects: Sequence[Subject],
    members: Sequence[Any],
    report: _Report,
    say: Callable[[str], None],
) -> None:
    """All metrics of one target and precision."""
    label = f"{target.name} {target.precision}"
    for number, subject in enumerate(subjects):
        say(f"{label}: converting {subject.row['model']}")
        target.convert(subject, number)
        if subject.artifact is None:
            report.done(subject.row)
        else:
            report.keep()
    runnable = [subject for subject in subjects if subject.artifact is not None]
    if not runnable:
        return
    points = target.latencies(runnable, members, say)
    if points:
        report.rooflines.append({"target": target.name, "precision": target.precision, "points": points})
    report.keep()
    for subject in runnable:
        if subject.row["state"] == "measured":
            say(f"{label}: throughput of {subject.row['model']}")
            target.throughput(subject)
            if subject.data is not None:
                say(f"{label}: accuracy of {subject.row['model']}")
            target.accuracy(subject)
        report.done(subject.row)


def _described(program: Program) -> tuple[Row, str]:
    """The model's entry in the report, and why it cannot be measured, where its costs cannot be counted."""
    try:
        return describe(program), ""
    except InternalError:
        raise
    except SartorError as error:
        return identify(program), f"its costs cannot be counted: {error}"


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
