"""`report.html`: one file without scripts, fonts or requests. Every string of the report is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sartor.report import charts, markup
from sartor.report.charts import Limit, Point
from sartor.report.markup import escape, pairs, section
from sartor.report.text import (
    STATUS,
    cost_rows,
    count,
    oracle_sentence,
    percent,
    score_label,
    seconds,
)

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The page of a report document of schema `sartor.report/1`."""
    sections = [
        _verdict(report),
        _costs(report),
        _trade_off(report),
        _predicted(report),
        _widths(report),
        _oracle(report),
        _decisions(report),
        _conditions(report),
    ]
    name = _model_name(report)
    return markup.page("Sartor report", name, _subtitle(report, name), sections, _footer(report))


# ---- sections ------------------------------------------------------------------------------------
def _verdict(report: Report) -> str:
    status = report["status"]
    low, high = report["ratio"]["latency_ci95"]
    before, after = report["baseline"], report["result"]
    facts = [
        ("Latency ratio", f"{report['ratio']['latency']:.3f}×", f"95 % interval {low:.3f} to {high:.3f}"),
        (
            "Latency, median",
            seconds(after["latency_s"]["median"]),
            f"was {seconds(before['latency_s']['median'])}",
        ),
    ]
    if after.get("score") is not None and before.get("score") is not None:
        points = 100 * (after["score"] - before["score"])
        facts.append(
            (
                score_label(report),
                percent(after["score"]),
                f"was {percent(before['score'])}, {points:+.2f} points",
            )
        )
    else:
        facts.append(("Score", report["quality"], "no data was given"))
    if "macs" in before and "macs" in after and before["macs"]:
        facts.append(("MACs", count(after["macs"]), f"was {count(before['macs'])}"))
    limit = _latency_limit(report)
    if limit is not None:
        facts.insert(1, ("Budget", f"{limit:.3f}×", "for the interval's upper bound"))
    kind = "met" if status == "met" else "missed"
    headline = escape(STATUS.get(status) or str(status))
    return f'<section class="verdict {kind}"><h2>{headline}</h2>{markup.facts(facts)}</section>'


def _costs(report: Report) -> str:
    table = markup.table(cost_rows(report), ("", "Original", "Result", "Change"), "<>>>")
    return section(
        "Before and after",
        "The latency ratio is the median over interleaved rounds of a run that selected nothing; it is not "
        "the quotient of the two medians.",
        table,
    )


def _trade_off(report: Report) -> str:
    before, after = report["baseline"], report["result"]
    if before.get("score") is None or after.get("score") is None:
        return ""
    ratio = report["ratio"]
    points = [
        Point(
            entry["measured_ratio"],
            entry["score"],
            title=f"step {entry['step']}: {entry['change']}",
        )
        for entry in report["history"]
        if entry.get("measured_ratio") is not None and entry.get("score") is not None
    ]
    path = [(1.0, before["score"]), *((p.x, p.y) for p in points), (ratio["latency"], after["score"])]
    points.append(Point(1.0, before["score"], "original", "original", "baseline"))
    points.append(
        Point(
            ratio["latency"],
            after["score"],
            "result",
            f"result, on the {report.get('score_split', 'test')} split",
            "result",
            x_interval=tuple(ratio["latency_ci95"]),
        )
    )
    limits = []
    budget = _latency_limit(report)
    if budget is not None:
        limits.append(Limit("x", budget, "budget"))
    if report.get("max_drop") is not None:
        limits.append(Limit("y", before["score"] - report["max_drop"] / 100.0, "largest drop"))
    chart = charts.scatter(
        points,
        x_title="measured latency / original",
        y_title="score",
        x_format=lambda v: f"{v:.2f}×",
        y_format=lambda v: f"{100 * v:g} %",
        lines=[("path", path)],
        limits=limits,
        include=((0.0,), ()),
        bounds=((0.0, float("inf")), (0.0, 1.0)),
    )
    legend = [
        ("baseline", "original"),
        ("step", "measured on the way, before recovery (evaluate split)"),
        ("result", "result"),
    ]
    return section(
        "Latency against score",
        "Up and to the left is better. The bar through the result is its 95 % interval.",
        chart + _legend(legend),
    )


def _predicted(report: Report) -> str:
    # What the search predicted is on the scale of the baseline that it measured, not of that of the final run.
    baseline = report["predicted"].get("baseline_s") or report["baseline"]["latency_s"]["median"]
    history = [entry for entry in report["history"] if entry.get("predicted_latency_s") is not None]
    if not history or not baseline:
        return ""
    predicted = [(0.0, 1.0)]
    predicted += [(float(entry["step"]), entry["predicted_latency_s"] / baseline) for entry in history]
    markers = [
        Point(
            float(entry["step"]),
            entry["measured_ratio"],
            title=f"step {entry['step']}: measured {entry['measured_ratio']:.3f}",
            kind="measured",
            y_interval=tuple(entry["measured_ci95"]) if entry.get("measured_ci95") else None,
        )
        for entry in history
        if entry.get("measured_ratio") is not None
    ]
    last = predicted[-1][0]
    markers.append(
        Point(
            last,
            report["ratio"]["latency"],
            "final run",
            "final run, never used for selection",
            "result",
            y_interval=tuple(report["ratio"]["latency_ci95"]),
        )
    )
    budget = _latency_limit(report)
    chart = charts.scatter(
        markers,
        x_title="step",
        y_title="latency / original",
        x_format=lambda v: f"{v:g}",
        y_format=lambda v: f"{v:.2f}×",
        lines=[("predicted", predicted)],
        limits=[Limit("y", budget, "budget")] if budget is not None else [],
        include=((0.0, max(last, 4.0)), (0.0, 1.0)),
        bounds=((0.0, float("inf")), (0.0, float("inf"))),
    )
    final = report["predicted"].get("latency_s")
    note = "The line is the cost model's prediction per step, the marks are interleaved measurements."
    if final is not None:
        measured = report["ratio"]["latency"]
        note += (
            f" At the end the model predicted {final / baseline:.3f} of the original latency, "
            f"and {measured:.3f} was measured ({100 * (final / baseline / measured - 1):+.1f} %)."
        )
    legend = [("step", "predicted"), ("measured", "measured, with 95 % interval")]
    return section("Predicted against measured latency", note, chart + _legend(legend))


def _widths(report: Report) -> str:
    rows = [(str(w["name"]), int(w["before"]), int(w["after"])) for w in report.get("widths", ())]
    removed = [str(name) for name in report.get("blocks_removed", ())]
    if not rows and not removed:
        return ""
    body = (
        charts.bars(rows) + _legend([("before", "before"), ("after", "after"), ("same", "unchanged")])
        if rows
        else ""
    )
    if removed:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in removed)
        body += f"<p>Removed blocks: {names}.</p>"
    return section("Widths per layer", "Units of each channel group before and after.", body)


def _oracle(report: Report) -> str:
    oracle = report["oracle"]
    rows = [(key.replace("_", " "), _value(value)) for key, value in oracle.items()]
    return section(
        "Is it the same function?",
        "Before recovery the cut model must compute what the original computes with zeros in the places "
        f"that were cut: {oracle_sentence(oracle)}. It counts only if a perturbed kept channel is seen.",
        pairs(rows),
    )


def _decisions(report: Report) -> str:
    decisions = list(report.get("decisions", ()))
    parts = []
    if decisions:
        items = "".join(f"<li>{_decision(entry)}</li>" for entry in decisions)
        parts.append(f'<ol class="decisions">{items}</ol>')
    if report["history"]:
        rows = [
            (
                str(entry["step"]),
                str(entry["change"]),
                _optional(entry.get("predicted_latency_s"), seconds),
                _optional(entry.get("measured_ratio"), "{:.3f}×".format),
                _optional(entry.get("score"), percent),
            )
            for entry in report["history"]
        ]
        steps = markup.table(rows, ("Step", "Change", "Predicted", "Measured", "Score"), "<<>>>")
        number = len(report["history"])
        opened = " open" if number <= 12 else ""
        label = "1 step" if number == 1 else f"all {number} steps"
        parts.append(f"<details{opened}><summary>{label}</summary>{steps}</details>")
    return section("Decisions", "", "".join(parts)) if parts else ""


def _conditions(report: Report) -> str:
    rows = [*_flat("target", report["target"])]
    if "score_split" in report:
        rows.append(("score taken on split", str(report["score_split"])))
    rows += _flat("", report.get("conditions", {}))
    rows += _flat("version of", report["versions"])
    return section("Conditions of the measurement", "", pairs(rows))


# ---- pieces --------------------------------------------------------------------------------------
def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in entries)
    return f'<ul class="legend">{items}</ul>'


def _decision(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return escape(str(entry))
    title = entry.get("decision") or entry.get("what") or entry.get("kind") or ""
    rest = {key: value for key, value in entry.items() if value != title}
    detail = ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in rest.items())
    return escape(": ".join(part for part in (str(title), detail) if part))


def _optional(value: Any, form: Callable[[Any], str]) -> str:
    return "–" if value is None else form(value)


def _flat(prefix: str, document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in document.items():
        name = f"{prefix} {str(key).replace('_', ' ')}".strip()
        if isinstance(value, Mapping):
            rows.extend(_flat(name, value))
        else:
            rows.append((name, _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value) or "–"
    return "–" if value is None else str(value)


def _latency_limit(report: Report) -> float | None:
    """The latency budget as a ratio to the baseline: `budget.latency.ratio`, absent in other budgets."""
    latency = report.get("budget", {}).get("latency")
    return float(latency["ratio"]) if isinstance(latency, Mapping) and "ratio" in latency else None


def _model_name(report: Report) -> str:
    source = report.get("source", {})
    return str(source.get("name", "model")) if isinstance(source, Mapping) else "model"


def _subtitle(report: Report, name: str) -> str:
    target = report["target"]
    parts = [name, f"on {target.get('name', '?')} {target.get('version', '')}".strip()]
    parts.append(f"{target.get('threads', '?')} thread(s), {target.get('precision', '?')}")
    return " · ".join(parts)


def _footer(report: Report) -> str:
    version = report["versions"].get("sartor", "")
    return f"Written by Sartor {version}. The same content for machines is in report.json.".replace("  ", " ")
