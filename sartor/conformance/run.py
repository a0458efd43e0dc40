"""Running the suite on a registered backend, in a subprocess that may crash."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sartor
from sartor import backends
from sartor.backends.process import Worker
from sartor.conformance.check import Check, Outcome
from sartor.conformance.suite import VERSION, select
from sartor.errors import SartorError, UsageError

TIME_LIMIT_S = 600.0
"""Of one check. The slowest converters need a minute for a model; what needs longer hangs."""

PROCESS = "sartor.conformance.process"
"""Module of the subprocess that checks run in."""
_DIAGNOSIS_LIMIT_S = 120.0
_START_S = 30.0  # more for the first check of a process, which imports everything


class Runner:
    """Performs checks one by one; a context manager that owns the subprocess and the scratch folder.

    Args:
        backend: registered name.
        time_limit_s: of one check.
    """

    def __init__(self, backend: str, *, time_limit_s: float = TIME_LIMIT_S):
        self._backend, self._time_limit_s = backend, time_limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="sartor-conformance-")
        self._worker: Worker | None = None
        self._processes = 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subprocess and remove what was lowered."""
        self._end()
        self._folder.cleanup()

    def require_installed(self) -> None:
        """Refuse a backend that is not there; one that is broken is put through the suite, and fails.

        Raises:
            UsageError: it is not registered, or what it needs is not installed.
        """
        known = backends.available()
        if self._backend not in known:
            backends.get(self._backend)  # says so, with the names that there are
        found = diagnose_apart(backends.REGISTRY.group, self._backend)
        if found["state"] == "missing":
            raise UsageError(found["problem"])

    def perform(self, check: Check) -> Outcome:
        """The outcome of one check; a crash or a hang is a failed check."""
        limit = self._time_limit_s
        if self._worker is None:
            self._worker = Worker(threads=1, module=PROCESS)
            self._processes += 1
            limit += _START_S
        scratch = Path(self._folder.name) / str(self._processes)  # a dead process leaves half of its own
        scratch.mkdir(exist_ok=True)
        request = {"command": "check", "id": check.id, "backend": self._backend, "scratch": str(scratch)}
        started = time.monotonic()
        try:
            return Outcome(**self._worker.ask(request, time_limit_s=limit))
        except SartorError as error:
            self._end()
            return Outcome(
                check.id,
                check.sentence,
                "failed",
                str(error),
                round(time.monotonic() - started, 3),
                "\n".join(getattr(error, "__notes__", ())),
            )

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Outcomes of the suite, or of a part of it, on one backend.

    Attributes:
        backend: registered name.
        outcomes: in the order of the suite.
        selected: patterns that chose the checks; empty when it was the whole suite.
        seconds: wall time.
    """

    backend: str
    outcomes: tuple[Outcome, ...]
    selected: tuple[str, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Checks that do not hold."""
        return tuple(o for o in self.outcomes if o.result == "failed")

    @property
    def conforms(self) -> bool:
        """Nothing failed."""
        return not self.failed

    @property
    def compared(self) -> int:
        """Models whose outputs were compared with the reference, and agree."""
        return sum(o.id.startswith("numerics.") and o.result == "passed" for o in self.outcomes)

    def counts(self) -> dict[str, int]:
        """Number of checks per result."""
        found = Counter(outcome.result for outcome in self.outcomes)
        return {"passed": found["passed"], "failed": found["failed"], "skipped": found["skipped"]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, schema `sartor.conformance/1`."""
        return {
            "schema": "sartor.conformance/1",
            "suite": VERSION,
            "sartor": sartor.__version__,
            "python": platform.python_version(),
            "backend": self.backend,
            "selected": list(self.selected),
            "conforms": self.conforms,
            "counts": self.counts(),
            "models_compared": self.compared,
            "seconds": round(self.seconds, 1),
            "checks": [outcome.to_dict() for outcome in self.outcomes],
        }


def run_suite(
    backend: str,
    patterns: Sequence[str] = (),
    *,
    time_limit_s: float = TIME_LIMIT_S,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> Report:
    """Put one backend through the suite.

    Args:
        backend: registered name.
        patterns: ids or beginnings of ids of the checks to run; all by default.
        time_limit_s: of one check.
        on_outcome: called after every check, for progress.

    Raises:
        UsageError: no such backend, or a pattern that fits no check.
    """
    checks = select(patterns)
    started = time.monotonic()
    outcomes = []
    with Runner(backend, time_limit_s=time_limit_s) as runner:
        runner.require_installed()
        for check in checks:
            outcomes.append(runner.perform(check))
            on_outcome(outcomes[-1])
    return Report(backend, tuple(outcomes), tuple(patterns), time.monotonic() - started)


def diagnose_apart(group: str, name: str, *, time_limit_s: float = _DIAGNOSIS_LIMIT_S) -> dict[str, Any]:
    """`diagnosis.diagnose` in a subprocess; a crash or a hang is a broken plugin."""
    request = {"command": "diagnosis", "group": group, "name": name, "backend": name}
    try:
        with Worker(threads=1, module=PROCESS) as worker:
            return worker.ask(request, time_limit_s=time_limit_s)
    except SartorError as error:
        log = "\n".join(getattr(error, "__notes__", ()))
        return {"name": name, "state": "broken", "problem": str(error), "traceback": log}
