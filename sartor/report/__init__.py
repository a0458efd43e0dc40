"""Reports of a fit (`report.json` for machines, a self-contained `report.html` for people, one bundle), and the
page of an inspection."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.errors import InternalError, UsageError
from sartor.report.text import summary

__all__ = ["SCHEMA", "read_report", "summary", "write_html", "write_inspection", "write_report"]

SCHEMA = "sartor.report/1"
_REQUIRED = (
    "schema", "status", "quality", "target", "baseline", "result", "ratio", "predicted", "oracle", "history",
    "versions",
)  # fmt: skip


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` to `folder`, each atomically.

    Beside the sections of schema `sartor.report/1` the page shows, when present, `budget`, `max_drop`,
    `widths` (`[{name, before, after}]`), `blocks_removed`, `decisions` (strings or objects), `conditions`
    and `score_split` (`test`, or `evaluate` where the data have no split that selection did not see). `strategy`,
    `seed`, `recovery` (`{limit_s, seconds, steps}`) and `data` (`{source, fingerprint}`) are for comparing fits.

    Returns:
        The paths of both files.

    Raises:
        InternalError: a required section is missing, or a number is not finite.
    """
    from sartor.ir.files import write_atomic

    missing = [name for name in _REQUIRED if name not in report]
    if missing or report["schema"] != SCHEMA:
        raise InternalError(f"The report lacks {missing} or is not of schema '{SCHEMA}'.")
    try:
        text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InternalError(f"The report cannot be written as JSON: {error}.") from error
    path = write_atomic(Path(folder) / "report.json", text.encode())
    return path, write_html(report, folder)


def write_html(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Render `report.html` from a report document."""
    from sartor.ir.files import write_atomic
    from sartor.report.page import render

    return write_atomic(Path(folder) / "report.html", render(report).encode())


def write_inspection(document: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page of an inspection, atomically.

    Args:
        document: of `sartor.inspection.inspect_program`.
        path: file to write.

    Raises:
        UsageError: the file system refuses.
    """
    from sartor.ir.files import write_atomic
    from sartor.report.prunability import render

    return write_atomic(path, render(document).encode())


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The report document in `folder`.

    Raises:
        UsageError: there is none, or it is not of this schema.
    """
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The report '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"The report '{path}' is not valid JSON: {error}.") from error
    missing = [name for name in _REQUIRED if not isinstance(report, dict) or name not in report]
    if missing or report["schema"] != SCHEMA:
        raise UsageError(f"'{path}' is not a report of schema '{SCHEMA}' with all of its sections.")
    return report
