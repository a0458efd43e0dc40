"""List the targets that can be lowered to and measured on, or describe one of them."""

from __future__ import annotations

import argparse
from typing import Any

from sartor.cli.output import Result, table

EXAMPLE = "sartor targets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("target", nargs="?", help="describe only this one, in full")


def run(options: argparse.Namespace) -> Result:
    """Ask every backend; one that is not installed or broken says so instead of ending the list."""
    from sartor import backends

    if options.target is not None:
        entry = {"available": True, **backends.get(options.target).capabilities().to_dict()}
        lines = [f"{key}: {_show(value)}" for key, value in entry.items()]
        return Result({"schema": "sartor.targets/1", "targets": [entry]}, "\n".join(lines))
    entries: list[dict[str, Any]] = []
    for name in backends.available():
        try:
            entries.append({"available": True, **backends.get(name).capabilities().to_dict()})
        except Exception as error:  # of any plugin, which must not hide the others
            reason = " ".join(str(error).split()) or type(error).__name__
            entries.append({"name": name, "available": False, "reason": reason})
    rows = [
        (e["name"], "yes", e["version"], ", ".join(e["precisions"]))
        if e["available"]
        else (e["name"], "no", "-", "-")
        for e in entries
    ]
    lines = [table(rows, ("target", "installed", "version", "precisions"))]
    lines += [f"{e['name']}: {e['reason']}" for e in entries if not e["available"]]
    unable = [e for e in entries if e["available"] and e["not_run_here"]]
    lines += [f"{e['name']} lowers here and does not run here: {e['not_run_here']}" for e in unable]
    return Result({"schema": "sartor.targets/1", "targets": entries}, "\n".join(lines))


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) or "-"
