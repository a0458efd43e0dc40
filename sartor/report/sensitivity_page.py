"""`sensitivity.html`: one file without scripts, fonts or requests. Every string of the study is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sartor.report import charts, markup
from sartor.report.charts import Point
from sartor.report.markup import code, escape, pairs, section
from sartor.report.sensitivity_table import (
    Document,
    Row,
    by_loss,
    cheapest,
    headings,
    how,
    judged_on,
    loss,
    middle_ratio,
    place,
    points,
    price,
    rows,
    saved,
    unscored,
)
from sartor.report.text import count, percent

_LABELLED = 3  # markers of the chart with a name beside them, of the cheapest and of the most sensitive
_APART = (
    0.22,
    0.12,
)  # of the width and height of the chart: names closer to each other than this would overlap
_STRONGEST = 75.0  # percent of the colour in the cell of the largest loss: the number must stay readable
_OPEN = 48  # curves that are shown when the page opens
_LEAST_SCALE = 0.01  # score; smaller losses than a point are not drawn as if they were large


def render(document: Document) -> str:
    """The page of a document of schema `sartor.sensitivity/1`."""
    found = rows(document)
    sections = [
        _facts(document, found),
        _unscored(document),
        _chart(document, found),
        _heat(document, [row for row in found if not row.block]),
        _blocks([row for row in found if row.block]),
        _curves(document, [row for row in found if not row.block]),
        _conditions(document),
    ]
    name = document["source"]["name"]
    subtitle = f"{name} · {judged_on(document)}"
    footer = (
        f"Written by Sartor {document['versions'].get('sartor', '')}. The same content for machines is in "
        "sensitivity.json."
    )
    return markup.page("What each cut costs", name, subtitle, sections, footer)


# ---- sections ------------------------------------------------------------------------------------
def _facts(document: Document, found: Sequence[Row]) -> str:
    baseline, ranked, cheap = document["baseline"], by_loss(found), cheapest(found)
    scored = sum(len(row.points) for row in found)
    entries = [("Original's score", percent(baseline["score"]), f"on {judged_on(document)}")]
    if "reestimated_score" in baseline:
        entries.append(
            ("With new statistics", percent(baseline["reestimated_score"]), "the original, nothing cut")
        )
    entries.append(("Cuts scored", f"{scored} of {scored + len(document['missing'])}", "each alone"))
    if ranked:
        worst = ranked[0]
        entries.append(("Most sensitive", worst.name, f"{points(worst.drop)} points{_at(worst)}"))
    if cheap:
        note = (
            f"{price(cheap[0])} points per 1 % of MACs; saves {percent(cheap[0].macs_share)}{_at(cheap[0])}"
        )
        entries.append(("Cheapest by MACs saved", cheap[0].name, note))
    return (
        f'<section>{markup.facts(entries, "wide")}<p class="note ops">{escape(how(document))}</p></section>'
    )


def _unscored(document: Document) -> str:
    lines = unscored(document)
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    missing = "".join(f"<li>{escape(place(cut))}</li>" for cut in document["missing"])
    if missing:
        items += f"<li><details><summary>all that is missing</summary><ul>{missing}</ul></details></li>"
    return section("What has no score", "", f"<ul>{items}</ul>") if items else ""


def _chart(document: Document, found: Sequence[Row]) -> str:
    ranked = by_loss(found)
    if not ranked:
        return ""
    labelled = {id(row) for row in _labelled(ranked)}
    markers, lines = [], []
    for row in ranked:
        curve = [
            (100.0 * point["macs_share"], 100.0 * point["drop"])
            for _, point in sorted(row.points.items(), key=lambda item: item[0] or 0.0)
            if "drop" in point
        ]
        if not row.block:
            lines.append(("path", [(0.0, 0.0), *curve]))
        markers.append(
            Point(
                100.0 * row.macs_share,
                100.0 * (row.drop or 0.0),
                label=row.name if id(row) in labelled else "",
                title=f"{row.name}{_at(row)}: {points(row.drop)} points for {percent(row.macs_share)} of the MACs",
                kind="measured" if row.block else "step",
            )
        )
    chart = charts.scatter(
        markers,
        x_title="MACs saved, % of the whole network",
        y_title="points lost",
        x_format=lambda v: f"{v:g} %",
        y_format=lambda v: f"{v:g}",
        lines=lines,
        include=((0.0,), (0.0,)),
        bounds=((0.0, math.inf), (-math.inf, math.inf)),
    )
    legend = f'<li><i class="step"></i>group at {100 * middle_ratio(document):g} % of its units</li>'
    if lines:
        legend += '<li><i class="path"></i>the same group at all ratios</li>'
    if any(row.block for row in ranked):
        legend += '<li><i class="measured"></i>block, removed as a whole</li>'
    note = "Down and to the right is where cutting is cheap. Losses of several cuts do not add up."
    return section("Score lost against MACs saved", note, f'{chart}<ul class="legend">{legend}</ul>')


def _heat(document: Document, groups: Sequence[Row]) -> str:
    if not groups:
        return ""
    columns = headings(document, groups)
    scale = max([_LEAST_SCALE, *_drops(groups)])
    lines = []
    for row in groups:
        cells = [f"<td>{code(row.name)}</td>", f'<td class="number">{escape(row.units)}</td>']
        for _, ratio in columns:
            drop = row.points.get(ratio, {}).get("drop", 0.0)
            strength = _STRONGEST * min(max(drop / scale, 0.0), 1.0)
            style = f' style="--heat: {strength:.0f}%"' if strength >= 0.5 else ""
            cells.append(f'<td class="number"{style}>{escape(loss(row, ratio))}</td>')
        cells.append(f'<td class="number">{escape(saved(row))}</td>')
        cells.append(f'<td class="number">{escape(price(row))}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = ["Units", *(title for title, _ in columns), "MACs saved", "Points per 1 %"]
    head = "<th>Group</th>" + "".join(f'<th class="number">{escape(title)}</th>' for title in titles)
    body = (
        f'<div class="scroll"><table class="heat"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    at = f"{100 * middle_ratio(document):g} %"
    note = f"By share of units removed, in the order of the network. The last two columns are those at {at}."
    return section("Points lost per group", note, body)


def _blocks(blocks: Sequence[Row]) -> str:
    if not blocks:
        return ""
    lines = [
        (
            code(row.name) + (f"<small>{escape(row.weights)}</small>" if row.weights else ""),
            escape(loss(row, None)),
            escape(saved(row)),
            escape(price(row)),
        )
        for row in blocks
    ]
    titles = ("Block", "Points lost", "MACs saved", "Points per 1 %")
    note = "Each block replaced by its shortcut, in the order of the network."
    return section("Points lost per block", note, markup.marked_table(lines, titles, "<>>>"))


def _curves(document: Document, groups: Sequence[Row]) -> str:
    baseline = document["baseline"]["score"]
    scored = [row for row in groups if _drops([row])]
    if not scored:
        return ""
    scores = [baseline, *(baseline - drop for drop in _drops(scored))]
    figures = [_figure(document, row, _axis(min(scores), max(scores))) for row in scored]
    body = f'<div class="curves">{"".join(figures[:_OPEN])}</div>'
    if figures[_OPEN:]:
        more = f'<div class="curves">{"".join(figures[_OPEN:])}</div>'
        body += f"<details><summary>{len(figures) - _OPEN} more</summary>{more}</details>"
    note = "Score against the share of units removed; all charts have the same axes. The dashed line is the original."
    return section("Curves", note, body)


def _figure(document: Document, row: Row, y_range: tuple[float, float]) -> str:
    markers = [
        Point(ratio, point["score"], title=f"{100 * ratio:g} %: {percent(point['score'])}")
        for ratio, point in row.points.items()
        if ratio is not None and "score" in point
    ]
    chart = charts.curve(
        markers,
        y_range=y_range,
        reference=document["baseline"]["score"],
        title=f"Score of {row.name} against the share of units removed",
        x_format=lambda v: f"{100 * v:g} %",
        y_format=lambda v: f"{100 * v:g} %",
    )
    what = f"{row.units} units, saves {saved(row)} of the MACs{_at(row)}"
    return f"<figure><figcaption>{code(row.name)}<small>{escape(what)}</small></figcaption>{chart}</figure>"


def _conditions(document: Document) -> str:
    baseline, data = document["baseline"], document["data"]
    entries = [
        ("criterion", document["criterion"]),
        ("ratios", ", ".join(f"{ratio:g}" for ratio in document["ratios"])),
        ("data", f"{data['source']}, split {data['split']}, {baseline['samples']} samples"),
        ("statistics of BatchNormalization", "taken anew" if document["reestimate"] else "as they are"),
        ("MACs", count(baseline["macs"])),
        ("parameters", count(baseline["parameters"])),
        ("weights", count(baseline["weight_bytes"], "B")),
        ("seed", str(document["seed"])),
        ("kept", ", ".join(document["keep"]) or "nothing"),
        ("seconds", f"{document['seconds']:.1f}"),
        ("SHA-256 of the model", document["source"]["sha256"]),
        *((f"version of {name}", text) for name, text in document["versions"].items()),
    ]
    return section("Conditions", "", pairs(entries))


# ---- pieces --------------------------------------------------------------------------------------
def _labelled(ranked: Sequence[Row]) -> list[Row]:
    """The cheapest and the most sensitive rows, as far as their names do not overlap in the chart."""
    widest = max(row.macs_share for row in ranked) or 1.0
    span = max(_LEAST_SCALE, max(_drops(ranked)) - min(0.0, *_drops(ranked)))
    chosen: list[Row] = []
    for row in (*cheapest(ranked)[:_LABELLED], *ranked[:_LABELLED]):
        x, y = row.macs_share / widest, (row.drop or 0.0) / span
        near = (
            abs(x - other.macs_share / widest) < _APART[0] and abs(y - (other.drop or 0.0) / span) < _APART[1]
            for other in chosen
        )
        if not any(near):
            chosen.append(row)
    return chosen


def _axis(low: float, high: float) -> tuple[float, float]:
    """Round numbers around scores, within 0 and 1."""
    step = 10.0 ** math.floor(math.log10(max(high - low, _LEAST_SCALE)))
    ends = (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)
    return max(round(ends[0], 6), 0.0), min(round(ends[1], 6), 1.0)


def _drops(found: Sequence[Row]) -> list[float]:
    return [point["drop"] for row in found for point in row.points.values() if "drop" in point]


def _at(row: Row) -> str:
    return "" if row.main is None else f" at {100 * row.main:g} %"
