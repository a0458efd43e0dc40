"""Numbers with units, and the summary of a report as plain text. Shared by the page and the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STATUS = {
    "met": "Budget met",
    "budget-missed": "Budget missed",
    "quality-missed": "Quality missed",
}
"""Headline per status of a report."""

COSTS: tuple[tuple[str, str, str], ...] = (
    ("macs", "MACs", ""),
    ("parameters", "Parameters", ""),
    ("weight_bytes", "Weights", "B"),
    ("peak_activation_bytes", "Peak activations", "B"),
)
"""Key, label and unit of the static costs of a model."""


def seconds(value: float) -> str:
    """A duration with three significant digits, e.g. `1.81 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{_significant(value / factor)} {unit}"
    return f"{_significant(value * 1e9)} ns"


def count(value: float, unit: str = "") -> str:
    """A count with a decimal prefix, e.g. `4.09 G` or `12.3 MB`."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_significant(value / factor)} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def percent(value: float) -> str:
    """A share as `98.4 %`."""
    return f"{100 * value:.1f} %"


def _significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0.0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def visible(text: str) -> str:
    """`text` on one line without anything that steers a terminal or reorders what is beside it.

    Names in a model file are whatever its author chose: line breaks, escape sequences, marks that turn the
    direction of writing. Each such character becomes its Python escape; letters of any script stay.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def columns(text: str) -> int:
    """How many columns of a terminal `text` takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def table(rows: Iterable[Sequence[str]], header: Sequence[str], align: str = "") -> str:
    """Columns padded to equal width; `align` has one of `<` and `>` per column, default left."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    align = align or "<" * len(header)
    text = []
    for number, line in enumerate(lines):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("  ".join("-" * width for width in widths))
    return "\n".join(text)


def cost_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, before, after, change) of everything that both models have."""
    before, after = report["baseline"], report["result"]
    rows = []
    if "latency_s" in before and "latency_s" in after:
        low, high = report["ratio"]["latency_ci95"]
        rows.append(
            (
                "Latency, median",
                seconds(before["latency_s"]["median"]),
                seconds(after["latency_s"]["median"]),
                f"{report['ratio']['latency']:.3f}× [{low:.3f}, {high:.3f}]",
            )
        )
    for key, label, unit in COSTS:
        if key in before and key in after:
            ratio = f"{after[key] / before[key]:.3f}×" if before[key] else "–"
            rows.append((label, count(before[key], unit), count(after[key], unit), ratio))
    if before.get("score") is not None and after.get("score") is not None:
        points = 100 * (after["score"] - before["score"])
        rows.append(
            (score_label(report), percent(before["score"]), percent(after["score"]), f"{points:+.2f} points")
        )
    return rows


def score_label(report: Mapping[str, Any]) -> str:
    """What the score was taken on, and whether selection saw it, too."""
    n = report["result"].get("score_n")
    label = f"Score, {n} samples" if n else "Score"
    return f"{label} that selection saw" if report.get("score_split") == "evaluate" else label


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence that says what was reached."""
    ratio = report["ratio"]
    low, high = ratio["latency_ci95"]
    text = (
        f"{STATUS.get(report['status'], report['status'])}: {ratio['latency']:.3f} of the original latency, "
        f"95 % interval [{low:.3f}, {high:.3f}]"
    )
    before, after = report["baseline"].get("score"), report["result"].get("score")
    if before is not None and after is not None:
        text += f"; score {percent(before)} became {percent(after)}"
    else:
        text += f"; quality {report['quality']}"
    return text


def oracle_sentence(oracle: Mapping[str, Any]) -> str:
    """The oracle's verdict with its numbers, as far as they exist."""
    text = f"oracle {oracle['verdict']}"
    if oracle.get("max_rel_error") is not None:
        text += f": relative error {oracle['max_rel_error']:.2g}, tolerance {oracle['tolerance']:.0e}"
    return text


def summary(report: Mapping[str, Any]) -> str:
    """The report as a short table for the terminal."""
    target = report["target"]
    return "\n".join(
        [
            table(cost_rows(report), ("", "before", "after", "change"), "<>>>"),
            "",
            verdict(report),
            f"{oracle_sentence(report['oracle'])}; target {target.get('name', '?')}, "
            f"{target.get('threads', '?')} thread(s), {target.get('precision', '?')}",
        ]
    )
