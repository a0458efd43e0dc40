"""`bench.html`: one file without scripts, fonts or requests. Every string of the report is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sartor.report import charts, markup
from sartor.report.bench_table import (
    COLUMNS,
    NONE,
    cells,
    has_numbers,
    label,
    rate,
    roofline_sentence,
    shown_columns,
)
from sartor.report.charts import Limit, Point
from sartor.report.markup import code, escape, section
from sartor.report.text import count, percent, seconds

Report = Mapping[str, Any]
_CHART = (640, 360)
_LABEL = 24
_LAW_POINTS = 60


def render(report: Report) -> str:
    """The page of a document of schema `sartor.bench-report/1`."""
    sections = [
        _results(report),
        *_rooflines(report),
        _throughputs(report),
        _refused(report),
        _imports(report),
        _protocol(report),
        _models(report),
        _conditions(report),
    ]
    names = [model["name"] for model in report["models"]]
    targets = sorted({row["target"] for row in report["rows"]})
    subtitle = f"{', '.join(names)} on {', '.join(targets)}; {report['conditions'].get('cpu', '')}"
    return markup.page("Sartor benchmark", ", ".join(names), subtitle, sections, _footer(report))


# ---- results -------------------------------------------------------------------------------------
def _results(report: Report) -> str:
    shown = shown_columns(report)
    rows = []
    for row in filter(has_numbers, report["rows"]):
        found = cells(row)
        first = f"{code(row['model'])}<small>{escape(label(row))}, {escape(row['precision'])}</small>"
        for departure in row.get("departures", ()):
            first += f"<small>departs from the protocol: {escape(departure)}</small>"
        values = [found.get(key, (NONE, row["absent"].get(key, ""))) for key, _ in shown]
        first = f'<div style="min-width: 130px">{first}</div>'
        rows.append((first, *(f"{escape(value)}<small>{escape(note)}</small>" for value, note in values)))
    if not rows:
        return section("Results", "No model gave a number on any target; the reasons are below.", "")
    titles = ("Model", *(title for _, title in shown))
    body = _wide(markup.marked_table(rows, titles, "<" * len(titles)), 860)
    note = (
        "Every number has its own protocol, which is below; times under different protocols cannot be compared. "
        "Models on one target are timed in turn."
    )
    return section("Results", note, body)


def _wide(body: str, pixels: int) -> str:
    """Markup that a small window scrolls sideways instead of squeezing it."""
    return f'<div class="scroll"><div style="min-width: {pixels}px">{body}</div></div>'


def _refused(report: Report) -> str:
    rows = [
        (
            code(row["model"]),
            escape(row["target"]),
            escape(row["precision"]),
            escape(row["state"]),
            _reason(row),
        )
        for row in report["rows"]
        if row.get("reason")
    ]
    if not rows:
        return ""
    table = markup.marked_table(rows, ("Model", "Target", "Precision", "State", "Reason"), "<<<<<", "stack")
    return section("What was not measured, and why", "", table)


def _reason(row: Mapping[str, Any]) -> str:
    return escape(row["reason"]) + (f"<small>{escape(row['log'])}</small>" if row.get("log") else "")


# ---- rooflines -----------------------------------------------------------------------------------
def _rooflines(report: Report) -> Iterator[str]:
    work = {model["name"]: model.get("operations_flop", 0) for model in report["models"]}
    for roofline in report["rooflines"]:
        measured = [p for p in roofline["points"] if "latency" in p]
        if not measured:
            continue
        here = (roofline["target"], roofline["precision"])
        rows = [
            row
            for row in report["rows"]
            if (row["target"], row["precision"]) == here and "roofline" in row and work[row["model"]]
        ]
        body = markup.facts(_facts(roofline, rows, measured), "wide")
        body += _legend(bool(rows), roofline.get("fit") is not None)
        body += f"<h3>Latency against work</h3>{_latency_chart(roofline, measured, rows, work)}"
        body += f"<h3>Rate against work</h3>{_rate_chart(roofline, measured, rows, work)}"
        yield section(
            f"Roofline of {roofline['target']}, {roofline['precision']}",
            "What the target gave generated convolutional networks at batch 1, and where the models are. "
            + roofline_sentence(roofline)
            + ".",
            body,
        )


def _facts(
    roofline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], measured: Sequence[Any]
) -> list[tuple[str, str, str]]:
    facts = []
    law = roofline.get("fit")
    if law is not None:
        facts = [
            ("Launch floor", seconds(law["floor_s"]), "of any network, however small"),
            ("Saturated from", f"{count(law['saturation_flop'])}FLOP", "more work takes more time"),
            ("Peak rate", f"{count(law['rate_flop_per_s'])}FLOPS", "of the fitted law"),
        ]
    facts.append(("Best measured", f"{count(roofline['best_flop_per_s'])}FLOPS", f"{len(measured)} networks"))
    for row in rows:
        share = row["roofline"]["share_fraction"]
        facts.append(
            (row["model"], f"{100 * share:.0f} %", "of what the target gave any generated model of its size")
        )
    return facts


def _latency_chart(
    roofline: Mapping[str, Any], measured: Sequence[Any], rows: Sequence[Any], work: Mapping[str, int]
) -> str:
    points = [_point(p["operations_flop"], p["latency"]["median_s"], p["name"]) for p in measured]
    for row in rows:
        latency = row["latency"]
        done = work[row["model"]] * latency["batch_samples"]
        points.append(_model(row, done, latency.get("median_s", latency["mean_s"]), seconds))
    lines = [("", [_log(v["operations_flop"], v["latency_s"]) for v in roofline["envelope"]])]
    limits = []
    law = roofline.get("fit")
    if law is not None:
        lines.insert(0, ("path", [_log(w, t) for w, t in _law(law, measured)]))
        limits = [
            Limit("y", math.log10(law["floor_s"]), "launch floor"),
            Limit("x", math.log10(law["saturation_flop"]), "saturated"),
        ]
    return _scatter(points, "median latency, batch 1", seconds, lines, limits)


def _rate_chart(
    roofline: Mapping[str, Any], measured: Sequence[Any], rows: Sequence[Any], work: Mapping[str, int]
) -> str:
    points = [_point(p["operations_flop"], p["achieved_flop_per_s"], p["name"], _rate) for p in measured]
    for row in rows:
        done = work[row["model"]] * row["latency"]["batch_samples"]
        points.append(_model(row, done, row["latency"]["achieved_flop_per_s"], _rate))
    vertices = [(v["operations_flop"], v["operations_flop"] / v["latency_s"]) for v in roofline["envelope"]]
    lines = [("", [_log(*vertex) for vertex in vertices])]
    limits = []
    law = roofline.get("fit")
    if law is not None:
        lines.insert(0, ("path", [_log(w, w / t) for w, t in _law(law, measured)]))
        limits = [Limit("y", math.log10(law["rate_flop_per_s"]), "peak of the law")]
    return _scatter(points, "FLOPS at batch 1", _round, lines, limits)


def _law(law: Mapping[str, Any], measured: Sequence[Any]) -> list[tuple[float, float]]:
    from sartor.bench.roofline import Fit

    fit = Fit(**{k: v for k, v in law.items() if k != "saturation_flop"})
    low, high = (math.log10(f(p["operations_flop"] for p in measured)) for f in (min, max))
    works = [10 ** (low + (high - low) * i / (_LAW_POINTS - 1)) for i in range(_LAW_POINTS)]
    return [(work, fit.latency_s(work)) for work in works]


def _scatter(
    points: list[Point],
    y_title: str,
    y_format: charts.Format,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    limits: Sequence[Limit],
) -> str:
    """On two logarithmic axes: the chart gets logarithms, and its ticks are turned back."""
    chart = charts.scatter(
        points,
        x_title="FLOP of one inference",
        y_title=y_title,
        x_format=lambda v: _round(10**v),
        y_format=lambda v: y_format(10**v),
        lines=lines,
        limits=limits,
        size=_CHART,
    )
    return _wide(chart, 520)


def _point(flop: float, value: float, name: str, text: charts.Format = seconds) -> Point:
    return Point(*_log(flop, value), title=f"{name}: {count(flop)}FLOP, {text(value)}")


def _model(row: Mapping[str, Any], flop: float, value: float, text: charts.Format) -> Point:
    name = _shortened(row["model"])
    share = f"{100 * row['roofline']['share_fraction']:.0f} % of the envelope"
    return Point(*_log(flop, value), name, f"{row['model']}: {text(value)}, {share}", "result")


def _log(x: float, y: float) -> tuple[float, float]:
    return math.log10(x), math.log10(y)


def _rate(value: float) -> str:
    return f"{_round(value)}FLOPS"


def _round(value: float) -> str:
    return count(float(f"{value:.3g}"))


def _legend(models: bool, law: bool) -> str:
    entries = ['<li><i class="step"></i>generated models; the line is their envelope</li>']
    if law:
        entries.append('<li><i class="before"></i>fitted law</li>')
    if models:
        entries.append('<li><i class="result"></i>models</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


# ---- throughput ----------------------------------------------------------------------------------
def _throughputs(report: Report) -> str:
    body = []
    for model in report["models"]:
        rows = [r for r in report["rows"] if r["model"] == model["name"] and "throughput" in r]
        if rows:
            body.append(f"<h3>{escape(model['name'])}</h3>{_bars(rows)}")
    if not body:
        return ""
    return section("Throughput", "Samples per second at the best batch.", "".join(body))


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Horizontal bars, one per target and precision."""
    width, row_height, bar, left, right = 640, 26, 14, 190, 170
    largest = max(row["throughput"]["samples_per_s"] for row in rows)
    parts = []
    for index, row in enumerate(rows):
        entry, y = row["throughput"], row_height * index + 5
        long = max(1.0, entry["samples_per_s"] / largest * (width - left - right))
        kind = "same" if row["state"] == "imported" else "after"
        name = escape(_shortened(f"{label(row)} {row['precision']}"))
        text = escape(f"{rate(entry['samples_per_s'])}/s at batch {entry['batch_samples']}")
        parts.append(
            f'<text class="name end" x="{left - 10}" y="{y + bar - 2}">{name}</text>'
            f'<rect class="bar {kind}" x="{left}" y="{y}" width="{long:.1f}" height="{bar}" rx="2"/>'
            f'<text class="tick" x="{left + long + 8:.1f}" y="{y + bar - 2}">{text}</text>'
        )
    height = row_height * len(rows) + 6
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Throughput per target">'
    return _wide(f"{svg}{''.join(parts)}</svg>", 520)


def _shortened(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


# ---- what the numbers stand on -------------------------------------------------------------------
def _imports(report: Report) -> str:
    body = "".join(
        f"<h3>{escape(entry['target'])}</h3>" + markup.pairs(list(entry["conditions"].items()))
        for entry in report["imports"]
    )
    note = (
        "Measured elsewhere, by others; the models are the same files, by SHA-256. Derived numbers are ours."
    )
    return section("Imported results", note, body) if body else ""


def _protocol(report: Report) -> str:
    titles = dict(COLUMNS)
    rows = [(titles.get(key, key), text) for key, text in report["protocol"].items()]
    return section("What each number is", "", markup.table(rows, ("Metric", "Protocol"), "<<"))


def _models(report: Report) -> str:
    rows = [
        (
            code(model["name"]),
            escape(", ".join(f"{n} {s}" for n, s in model["input_shapes"].items())),
            *(
                escape(count(model[key], unit)) if key in model else NONE
                for key, unit in (("macs", ""), ("parameters", ""), ("weight_bytes", "B"))
            ),
            code(model["sha256"][:16]),
        )
        for model in report["models"]
    ]
    titles = ("Model", "Inputs", "MACs", "Parameters", "Weights", "SHA-256, first 16")
    return section("Models", "Of one sample.", markup.marked_table(rows, titles, "<" * len(titles)))


def _conditions(report: Report) -> str:
    rows = []
    for group in ("conditions", "parameters"):
        for key, value in report[group].items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, (list, tuple)):
                value = ", ".join(map(str, value))
            rows.append((key.replace("_", " "), str(value)))
    return section("Conditions", "", markup.pairs(rows))


def _footer(report: Report) -> str:
    measured = [row for row in report["rows"] if has_numbers(row)]
    share = percent(len(measured) / len(report["rows"])) if report["rows"] else NONE
    return f"Sartor {report['sartor_version']}; {len(measured)} of {len(report['rows'])} rows have numbers ({share})."
