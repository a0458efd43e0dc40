"""The page of `sartor compare --html`: one file without scripts, fonts or requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sartor.report import charts, markup
from sartor.report.charts import Point
from sartor.report.compare import NONE, notes, row
from sartor.report.markup import code, escape, section
from sartor.report.text import percent, seconds

Document = Mapping[str, Any]
_BELOW = 0.12  # of the range of scores: room for the name below the lowest marker


def render(document: Document) -> str:
    """The page of a document of schema `sartor.compare/1`."""
    from sartor import __version__

    sections = [
        _notes(document),
        _table(document),
        *(_chart(document, positions) for positions in document["alike"]),
        _widths(document),
    ]
    names = ", ".join(bundle["folder"] for bundle in document["bundles"])
    footer = f"Written by Sartor {__version__}. The same content for machines: sartor compare --json."
    return markup.page("Fits side by side", names, names, sections, footer)


def _notes(document: Document) -> str:
    lines = notes(document)
    if not lines:
        return ""
    forbidding = any(difference["forbids"] for difference in document["differences"])
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    if not forbidding:
        return section("What differs", "", f"<ul>{items}</ul>")
    return f'<section class="verdict"><h2>Not everything is comparable</h2><ul>{items}</ul></section>'


def _table(document: Document) -> str:
    columns = [row(bundle) for bundle in document["bundles"]]
    lines = [
        (escape(label), *(escape(column[position][1]) for column in columns))
        for position, (label, _) in enumerate(columns[0])
    ]
    titles = ("", *(bundle["folder"] for bundle in document["bundles"]))
    note = (
        "A ratio is measured with the original in turn; medians of two runs differ by what the machine did between "
        "them. Factors in brackets are shares of the original."
    )
    return section("Side by side", note, markup.marked_table(lines, titles, "<" + ">" * len(columns)))


def _chart(document: Document, positions: Sequence[int]) -> str:
    bundles = [document["bundles"][position] for position in positions]
    scored = [bundle for bundle in bundles if "score" in bundle]
    if not scored:
        return ""
    markers = []
    for number, bundle in enumerate(scored):
        before_s, after_s = bundle["latency_s"]["before"], bundle["latency_s"]["after"]
        score = bundle["score"]
        low, high = bundle["ratio"]["latency_ci95"]
        markers.append(
            Point(
                1e3 * before_s,
                score["before"],
                "" if number else "original",
                f"original, as measured with {bundle['folder']}: {seconds(before_s)}, {percent(score['before'])}",
                "baseline",
            )
        )
        markers.append(
            Point(
                1e3 * after_s,
                score["after"],
                bundle["folder"],
                f"{bundle['folder']}: {seconds(after_s)}, {percent(score['after'])}",
                "result",
                x_interval=(1e3 * low * before_s, 1e3 * high * before_s),
            )
        )
    scores = [bundle["score"][key] for bundle in scored for key in ("before", "after")]
    lowest, highest = min(scores), max(scores)
    chart = charts.scatter(
        markers,
        x_title="median latency, ms",
        y_title="score",
        x_format=lambda v: f"{v:g}",
        y_format=lambda v: f"{100 * v:g} %",
        include=((0.0,), (max(lowest - _BELOW * (highest - lowest), 0.0),)),
        bounds=((0.0, float("inf")), (0.0, 1.0)),
    )
    legend = (
        '<ul class="legend"><li><i class="baseline"></i>the original in each run</li>'
        '<li><i class="result"></i>result, with the 95 % interval of its ratio times the original</li></ul>'
    )
    title = "Score against latency"
    if len(document["alike"]) > 1:
        title += f": {', '.join(bundle['folder'] for bundle in bundles)}"
    note = "Up and to the left is better. Only runs under the same conditions share a chart."
    return section(title, note, chart + legend)


def _widths(document: Document) -> str:
    """Units per group, and which blocks stay, of fits of one model."""
    bundles = document["bundles"]
    if len({bundle["model"].get("sha256") for bundle in bundles}) > 1:
        return ""
    known = [{w["name"]: w for w in bundle.get("widths", ())} for bundle in bundles]
    names = list(dict.fromkeys(name for widths in known for name in widths))
    lines = []
    for name in names:
        before = next(str(widths[name]["before"]) for widths in known if name in widths)
        after = (escape(str(widths[name]["after"])) if name in widths else NONE for widths in known)
        lines.append((code(name), escape(before), *after))
    removed = [set(map(str, bundle.get("blocks_removed", ()))) for bundle in bundles]
    for name in sorted(set().union(*removed)):
        lines.append((code(name), "block", *("removed" if name in gone else "stays" for gone in removed)))
    if not lines:
        return ""
    titles = ("Group or block", "Original", *(bundle["folder"] for bundle in bundles))
    body = markup.marked_table(lines, titles, "<" + ">" * (1 + len(bundles)))
    return section("Widths", "Units per channel group, and blocks that some fit removed.", body)
