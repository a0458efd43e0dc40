"""List the targets that can be lowered to and measured on, or published devices; or describe one of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sartor.cli.output import Result, table

EXAMPLE = "sartor targets"
_LIMIT_S = 60.0  # of one backend; importing the slowest vendor takes a few seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("target", nargs="?", help="describe only this one, in full")
    parser.add_argument(
        "--devices",
        action="store_true",
        help="published devices instead: latency can be predicted for them from data sheets, not measured",
    )


def run(options: argparse.Namespace) -> Result:
    """Ask every backend, each in a subprocess: one that is not installed, broken, crashes or hangs says so."""
    from sartor import backends

    if options.devices:
        return _devices(options.target)
    if options.target is not None:
        return _described(options.target)
    entries = _asked(backends.available())
    rows = [
        (e["name"], "yes", e["version"], ", ".join(e["precisions"]))
        if e["available"]
        else (e["name"], "no", "-", "-")
        for e in entries
    ]
    lines = [table(rows, ("target", "installed", "version", "precisions"))]
    for entry in entries:
        if not entry["available"]:
            lines.append(f"{entry['name']}: {entry['reason']}")
            lines += [f"  | {line}" for line in entry.get("traceback", "").rstrip().splitlines()]
    unable = [e for e in entries if e["available"] and e["not_run_here"]]
    lines += [f"{e['name']} lowers here and does not run here: {e['not_run_here']}" for e in unable]
    return Result({"schema": "sartor.targets/1", "targets": entries}, "\n".join(lines))


def _devices(name: str | None) -> Result:
    """Published devices with their rates, or one of them with every constant and where it is from.

    Raises:
        UsageError: there is no device of this name.
    """
    from sartor.cost_models.descriptions import describe_target, described_devices
    from sartor.errors import UsageError

    names = described_devices()
    if name is not None and name not in names:
        raise UsageError(f"No published device '{name}'; there are {list(names)}.")
    described = [describe_target(each) for each in (names if name is None else (name,))]
    document: dict[str, Any] = {
        "schema": "sartor.devices/1",
        "devices": [each.to_dict() for each in described],
    }
    if name is None:
        rows = []
        for entry in document["devices"]:
            rates = {p: entry["constants"][f"macs_per_s.{p}"]["value"] for p in entry["precisions"]}
            peak = ", ".join(f"{p} {rate / 1e9:,.6g}" for p, rate in rates.items())
            memory = entry["constants"]["bandwidth_bytes_per_s"]["value"]
            rows.append((entry["name"], peak, f"{memory / 1e9:,.6g}", entry["title"]))
        return Result(document, table(rows, ("device", "peak GMAC/s", "memory GB/s", "")))
    (entry,) = document["devices"]
    lines = [f"{key}: {_show(value)}" for key, value in entry.items() if key != "constants"]
    numbers = entry["constants"].items()
    rows = [(key, f"{n['value']:.4g}", n["certainty"], f"{n['source']} ({n['date']})") for key, n in numbers]
    return Result(document, "\n".join([*lines, table(rows, ("constant", "value", "certainty", "source"))]))


def _described(name: str) -> Result:
    """One backend in full.

    Raises:
        UsageError: there is none of this name, or its package is not installed.
        BackendError: it is broken; the traceback is a note.
    """
    from sartor import backends
    from sartor.errors import BackendError, UsageError

    if name not in backends.available():
        backends.get(name)  # says so, with the names that there are
    (entry,) = _asked((name,))
    if not entry["available"]:
        error = (BackendError if "traceback" in entry else UsageError)(entry["reason"])
        if "traceback" in entry:
            error.add_note(entry["traceback"])
        raise error
    lines = [f"{key}: {_show(value)}" for key, value in entry.items()]
    return Result({"schema": "sartor.targets/1", "targets": [entry]}, "\n".join(lines))


def _asked(names: Sequence[str]) -> list[dict[str, Any]]:
    """What each says of itself, or why it does not. As many are asked at once as there are cores."""
    from sartor import backends
    from sartor.conformance.run import diagnose_apart

    def ask(name: str) -> dict[str, Any]:
        found = diagnose_apart(backends.REGISTRY.group, name, time_limit_s=_LIMIT_S)
        state = found.pop("state")
        if state == "ok":
            return {"available": True, **found}
        reason = " ".join(found["problem"].split())
        broken = {"traceback": found["traceback"]} if state == "broken" else {}
        return {"name": name, "available": False, "reason": reason, **broken}

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(ask, names))


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) or "-"
