"""Show what MODEL consists of: operators, cost, channel groups, blocked axes and residual blocks."""

from __future__ import annotations

import argparse
from typing import Any

from sartor.cli import arguments
from sartor.cli.output import Result, count, table

EXAMPLE = "sartor inspect model.onnx --shape input=1,3,224,224"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    arguments.add_keep(parser)


def run(options: argparse.Namespace) -> Result:
    """Analyse and describe."""
    from sartor.inspection import inspect_program

    program = arguments.open_program(options)
    document = inspect_program(program, keep=tuple(options.keep))
    return Result(document, describe(document))


def describe(document: dict[str, Any]) -> str:
    """The document as text for people."""
    parts = [
        f"{count(document['macs'])} MACs, {count(document['parameters'])} parameters, "
        f"{count(document['weight_bytes'], 'B')} of weights, "
        f"{count(document['peak_activation_bytes'], 'B')} peak activations",
        "operators: " + ", ".join(f"{n} {op}" for op, n in document["ops"].items()),
    ]
    groups = [
        (g["name"], str(g["size"]), str(g["granularity"]), f"{g['macs_share']:.1%}", _parameters(g))
        for g in document["groups"]
    ]
    if groups:
        parts.append(table(groups, ("channel group", "size", "step", "MACs", "parameters"), "<>>><"))
    else:
        parts.append("no channel group can be pruned")
    blocked = [
        (b["value"], str(b["axis"]), b["reason"] + (f" ({b['source']})" if b.get("source") else ""))
        for b in document["blocked"]
    ]
    if blocked:
        parts.append(table(blocked, ("blocked value", "axis", "reason"), "<><"))
    approximate = [
        (g["name"], str(g["size"]), str(g["granularity"]), g["reason"]) for g in document["approximate"]
    ]
    if approximate:
        headings = ("approximate group (off by default)", "size", "step", "why it is not exact")
        parts.append(table(approximate, headings, "<>><"))
    blocks = [
        (
            b["name"],
            str(len(b["nodes"])),
            f"{b['macs_share']:.1%}",
            "yes" if b["removable"] else f"no: {b['reason']}",
        )
        for b in document["blocks"]
    ]
    if blocks:
        parts.append(table(blocks, ("residual block", "nodes", "MACs", "removable"), "<>><"))
    return "\n\n".join(parts)


def _parameters(group: dict[str, Any], width: int = 60) -> str:
    text = ", ".join(dict.fromkeys(m["initializer"] for m in group["members"] if "initializer" in m))
    return text if len(text) <= width else text[: width - 3] + "..."
