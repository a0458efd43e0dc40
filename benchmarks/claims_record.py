"""Rows of a claim, which a run that was ended goes on with, and its figure, one SVG file without anything beside it."""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of a source, and what says whether it holds here.

    Attributes:
        name: of the subcommand.
        sentence: what the source says.
        key: fields that name a row.
        measure: adds the rows that are missing.
        summarize: the verdict, of rows alone.
        draw: the figure, of rows and verdict.
        settings: options that rows depend on, and that their names do not say.
    """

    name: str
    sentence: str
    key: tuple[str, ...]
    measure: Callable[[Rows, argparse.Namespace], None]
    summarize: Callable[[Sequence[Row]], dict[str, Any]]
    draw: Callable[[Sequence[Row], Mapping[str, Any]], str]
    settings: Callable[[argparse.Namespace], dict[str, Any]]


class Rows:
    """Rows of a claim in `FOLDER/claim-NAME.json`, written with the verdict whenever some are added.

    Args:
        claim: what is measured.
        folder: of the results.
        settings: that the rows depend on.
        again: forget rows that are there.

    Attributes:
        notes: what was not measured, and why.

    Raises:
        SystemExit: the rows that are there were measured with other settings.
    """

    def __init__(self, claim: Claim, folder: Path, settings: Mapping[str, Any], again: bool = False):
        self.claim, self.path = claim, folder / f"claim-{claim.name}.json"
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[Row] = []
        self.notes: list[str] = []
        if again or not self.path.exists():
            return
        known = json.loads(self.path.read_text())
        if (others := known["conditions"].get("settings")) != self.settings:
            raise SystemExit(
                f"The rows of '{self.path}' were measured with {json.dumps(others)}, not {json.dumps(self.settings)}: "
                "give the same options, --again to forget them, or another --out."
            )
        self.rows = known["rows"]

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return any(all(row[k] == key[k] for k in self.claim.key) for row in self.rows)

    def missing(self, keys: Iterable[Row]) -> list[Row]:
        """Those of some keys that there is no row of."""
        return [key for key in keys if key not in self]

    def add(self, *rows: Row) -> None:
        """Keep rows, on disk."""
        for row in rows:
            self.rows.append(row | {"commit": record.commit()})
            print(f"{self.claim.name}: {json.dumps(row)}", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Say what is not measured."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"{self.claim.name}: {text}", flush=True)

    def write(self) -> dict[str, Any]:
        """The document, with the verdict on the rows that there are."""
        summary = {"claim": self.claim.sentence, **self.claim.summarize(self.rows)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        more = {"settings": self.settings, "notes": self.notes}
        return record.write(str(self.path), f"claim-{self.claim.name}", self.rows, summary, **more)

    def draw(self) -> Path | None:
        """Write the figure beside the rows; None where there are no rows."""
        from sartor.ir.files import write_atomic

        if not self.rows:
            return None
        content = self.claim.draw(self.rows, self.claim.summarize(self.rows))
        return write_atomic(self.path.with_suffix(".svg"), content.encode())


# ---- figures -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart of a figure.

    Attributes:
        title: above it.
        chart: `sartor.report.charts.scatter` of size `PANEL`; the kind of a series is one of `SERIES`.
        notes: lines under the title.
    """

    title: str
    chart: str
    notes: tuple[str, ...] = ()


PANEL = (520, 300)
SERIES = ("one", "two", "three", "four")
_MARGIN, _LINE, _CHARACTER = 24, 18, 6.6
_STYLE = """
svg { --ground: #ffffff; --ink: #1d2125; --muted: #5b636c; --rule: #e2e0d9; --limit: #8a4b00;
  --one: #0b5fa5; --two: #c8500a; --three: #00805c; --four: #8a3c94; color-scheme: light dark;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ground: #181b1f; --ink: #e8e6e1; --muted: #a2abb4; --rule: #343a40; --limit: #e0b36a;
    --one: #62b0f2; --two: #f2955a; --three: #3fcf9f; --four: #d59ae0; } }
text { fill: var(--ink); font-size: 12px; } .ground { fill: var(--ground); }
.title { font-size: 16px; font-weight: 600; } .head { font-size: 13px; font-weight: 600; }
.said { font-size: 13px; } .tick, .axis, .note { fill: var(--muted); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.point { font-weight: 600; paint-order: stroke; stroke: var(--ground); stroke-width: 4px; }
.grid { stroke: var(--rule); } .limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 4; }
.line { fill: none; stroke: var(--muted); stroke-width: 2; } .line.even { stroke-dasharray: 2 4; }
.line.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 4; }
.dot { r: 4px; stroke: var(--ground); stroke-width: 1; fill: var(--muted); } .interval { stroke-width: 1.5; }
.one { --own: var(--one); } .two { --own: var(--two); } .three { --own: var(--three); } .four { --own: var(--four); }
.dot.one, .dot.two, .dot.three, .dot.four { fill: var(--own); fill-opacity: .85; }
.line.one, .line.two, .line.three, .line.four, .interval { stroke: var(--own); }
.line.two { stroke-dasharray: 9 4; } .line.three { stroke-dasharray: 3 3; } .line.four { stroke-dasharray: 10 3 2 3; }
"""


def figure(
    title: str, said: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str]], columns: int = 2
) -> str:
    """An SVG document of charts, readable on light and dark grounds.

    Args:
        title: of all of it.
        said: what was found.
        panels: charts, row by row.
        legend: kind and name of every series and line.
        columns: charts beside each other.
    """
    columns = min(columns, len(panels))
    width = columns * PANEL[0] + 2 * _MARGIN
    room = int((width - 2 * _MARGIN) / _CHARACTER)
    parts, y = [], _MARGIN + 8.0
    parts.append(_text(_MARGIN, y, title, "title"))
    for line in textwrap.wrap(said, room):
        y += _LINE
        parts.append(_text(_MARGIN, y, line, "said"))
    y += _LINE + 6
    x = float(_MARGIN)
    for kind, name in legend:
        step = 26 + _CHARACTER * len(name) + 20
        if x > _MARGIN and x + step > width - _MARGIN:
            x, y = float(_MARGIN), y + _LINE
        parts.append(
            f'<line class="line {kind}" x1="{x:.0f}" y1="{y - 4:.0f}" x2="{x + 20:.0f}" y2="{y - 4:.0f}"/>'
        )
        if kind in SERIES:
            parts.append(f'<circle class="dot {kind}" cx="{x + 10:.0f}" cy="{y - 4:.0f}" r="4"/>')
        parts.append(_text(x + 26, y, name, "note"))
        x += step
    y += 10
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        lines = max(len(panel.notes) for panel in row)
        for column, panel in enumerate(row):
            x = _MARGIN + column * PANEL[0]
            parts.append(_text(x + 6, y + 20, panel.title, "head"))
            for number, note in enumerate(panel.notes):
                parts.append(_text(x + 6, y + 20 + _LINE * (number + 1), note, "note"))
            place = f'<svg x="{x}" y="{y + 22 + _LINE * lines:.0f}" width="{PANEL[0]}" height="{PANEL[1]}" '
            parts.append(re.sub("^<svg ", place, panel.chart))
        y += 22 + _LINE * lines + PANEL[1] + 10
    height = round(y + _MARGIN / 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{html.escape(title, quote=True)}"><style>{_STYLE}</style>'
        f'<rect class="ground" width="{width}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
