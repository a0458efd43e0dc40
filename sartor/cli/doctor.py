"""Say what is installed, what is missing with the line that installs it, and what is broken with the traceback:
this machine, the packages Sartor stands on, every backend, every plugin. Exit code 0 when nothing is broken, 5
otherwise."""

from __future__ import annotations

import argparse
from typing import Any

from sartor.cli.output import Result, table
from sartor.cli.progress import Progress
from sartor.errors import EXIT_VERIFICATION_FAILED

EXAMPLE = "sartor doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""


def run(options: argparse.Namespace) -> Result:
    """Examine the environment and every plugin, each in a subprocess of its own."""
    from sartor.conformance import doctor

    with Progress.on_stderr() as progress:
        progress.stage("examining plugins", doctor.number_of_plugins())
        document = doctor.examine(on_plugin=progress.advance)
    return Result(document, _text(document), EXIT_VERIFICATION_FAILED if document["broken"] else 0)


def _text(document: dict[str, Any]) -> str:
    environment = document["environment"]
    instructions = ", ".join(environment["instructions"]) or "none that are known here"
    lines = [
        f"sartor {environment['sartor']}, Python {environment['python']}, {environment['platform']}",
        f"{environment['cpu']}: {environment['cores_allowed']} of {environment['cores']} cores, "
        f"{environment['memory_bytes'] / 2**30:.1f} GiB, instructions: {instructions}",
        "",
        table(
            [(p["name"], p.get("version", "-"), p["problem"]) for p in environment["packages"]],
            ("package", "version", "problem"),
        ),
    ]
    extras = [
        (e["name"], ", ".join(e["packages"]), e["install"] if e["missing"] else "installed")
        for e in environment["extras"]
    ]
    if extras:
        lines += ["", table(extras, ("extra", "packages", ""))]
    for group, entries in document["plugins"].items():
        if not entries:
            continue
        rows = [(e["name"], e["owner"], e["state"], _summary(e)) for e in entries]
        lines += ["", group, table(rows, ("name", "owner", "state", ""))]
    for entry in (e for entries in document["plugins"].values() for e in entries):
        if entry["state"] == "broken":
            lines += ["", f"'{entry['name']}' of {entry['owner']} is broken: {entry['problem']}"]
            lines += [f"  | {line}" for line in entry["traceback"].rstrip().splitlines()]
    for group, owners in document["unread_groups"].items():
        lines.append(f"Nothing reads the entry-point group '{group}' of {', '.join(owners)}; is it misspelt?")
    broken, missing = document["broken"], document["missing"]
    lines += [
        "",
        f"broken: {', '.join(broken) or 'nothing'}; not installed: {', '.join(missing) or 'nothing'}",
    ]
    return "\n".join(lines)


def _summary(entry: dict[str, Any]) -> str:
    if entry["state"] == "missing":
        return str(entry["install"])
    if entry["state"] == "broken":
        return "see below"
    if "precisions" in entry:
        flow = "control flow" if entry["control_flow"] else "no control flow"
        runs = "" if not entry["not_run_here"] else "; does not run here"
        able = ", ".join(entry["precisions"])
        return f"{entry['version']}; {able}; rank up to {entry['max_rank']}; {flow}{runs}"
    if "object" in entry:
        return str(entry["object"])
    names = ", ".join(entry["options"])
    return f"{entry['semantics']}{{{names}}}" if names else str(entry["semantics"])
