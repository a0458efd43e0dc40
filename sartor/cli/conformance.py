"""Put BACKEND through the conformance kit: numerics, contract, errors, isolation, determinism, measurement.

Exit code 0 when no check failed, 5 otherwise. `pytest --sartor-backend=BACKEND` runs the same checks as tests.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from sartor.cli import arguments
from sartor.cli.output import Result, table
from sartor.cli.progress import Progress
from sartor.errors import EXIT_VERIFICATION_FAILED, UsageError

if TYPE_CHECKING:
    from sartor.conformance.check import Outcome
    from sartor.conformance.run import Report

EXAMPLE = "sartor conformance onnxruntime --only numerics"
_DETAIL_LINES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("backend", nargs="?", metavar="BACKEND", help="a name from 'sartor targets'")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ID",
        help="run the checks with this id, area or glob; repeatable",
    )
    parser.add_argument("--list", action="store_true", help="list the checks instead of running them")
    parser.add_argument(
        "--all", action="store_true", help="show the checks that passed and were skipped, too"
    )
    parser.add_argument(
        "--time-limit",
        type=arguments.positive_number,
        default=600.0,
        metavar="S",
        help="of one check, after which it has failed (600)",
    )


def run(options: argparse.Namespace) -> Result:
    """Run or list the checks."""
    from sartor.conformance.run import run_suite
    from sartor.conformance.suite import VERSION, select

    if options.list:
        checks = select(options.only)
        listed = [{"id": check.id, "sentence": check.sentence} for check in checks]
        rows = [(check.id, check.sentence) for check in checks]
        return Result(
            {"schema": "sartor.conformance-list/1", "suite": VERSION, "checks": listed},
            table(rows, ("check", "what holds")),
        )
    if options.backend is None:
        raise UsageError("No backend is named; give one of 'sartor targets', or list the checks with --list.")
    with Progress.on_stderr() as progress:
        progress.stage(f"checking '{options.backend}'", len(select(options.only)))
        report = run_suite(
            options.backend,
            options.only,
            time_limit_s=options.time_limit,
            on_outcome=lambda _: progress.advance(),
        )
    code = 0 if report.conforms else EXIT_VERIFICATION_FAILED
    return Result(report.to_dict(), _text(report, everything=options.all), code)


def _text(report: Report, everything: bool) -> str:
    areas: dict[str, Counter[str]] = {}
    for outcome in report.outcomes:
        areas.setdefault(outcome.id.partition(".")[0], Counter())[outcome.result] += 1
    rows = [(area, str(c["passed"]), str(c["failed"]), str(c["skipped"])) for area, c in areas.items()]
    lines = [table(rows, ("area", "passed", "failed", "skipped")), ""]
    for outcome in report.outcomes:
        if everything or outcome.result == "failed":
            lines += _entry(outcome)
    # Reasons up to their colon: which rule refuses which model is what --all is for.
    skipped = Counter(o.observed.partition(":")[0] for o in report.outcomes if o.result == "skipped")
    if skipped and not everything:
        lines.append("skipped, with the reason:")
        lines += [f"  {number} x {reason}" for reason, number in skipped.most_common()]
    counts = ", ".join(f"{number} {result}" for result, number in report.counts().items())
    verdict = "conforms" if report.conforms else "does not conform"
    part = " to the selected checks" if report.selected else ""
    lines.append(f"'{report.backend}' {verdict}{part}: {counts}, {report.seconds:.0f} s")
    if any(o.id.startswith("numerics.") for o in report.outcomes) and not report.compared:
        lines.append("No output was compared with the reference: see what was skipped.")
    return "\n".join(lines)


def _entry(outcome: Outcome) -> list[str]:
    lines = [f"{outcome.result} {outcome.id}: {outcome.sentence}", f"  observed: {outcome.observed}"]
    if outcome.result == "failed" and outcome.details:
        lines += [f"  | {line}" for line in outcome.details.rstrip().splitlines()[-_DETAIL_LINES:]]
    return lines
