"""A sensitivity study as text, and what its table and its page say in the same words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.report.text import percent, table, visible

Document = Mapping[str, Any]
Point = Mapping[str, Any]

NONE = "–"
_SHOWN = 10  # rows of each end of a long table
_NAMED = 6  # cuts named of a list
_CHEAPEST, _WORTHWHILE = 3, 0.001
"""How many cheap cuts are named, and the least share of MACs that such a cut saves."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One group or block.

    Attributes:
        name: as plans call it.
        block: whether it is a block, which goes as a whole.
        units: removable units, `6×64` where one unit is several channels; empty for a block.
        points: of the document, by ratio; of a block by None.
        weights: of a block that is named after a node: its first and last weight; otherwise empty.
        main: the ratio by which rows are compared: the middle one, or what is nearest of those with a score.
    """

    name: str
    block: bool
    units: str
    weights: str
    points: Mapping[float | None, Point]
    main: float | None

    @property
    def point(self) -> Point | None:
        """The point at `main`; None where nothing has a score."""
        found = self.points.get(self.main)
        return found if found is not None and "drop" in found else None

    @property
    def drop(self) -> float | None:
        """Score lost at `main`."""
        return None if self.point is None else float(self.point["drop"])

    @property
    def macs_share(self) -> float:
        """Share of all MACs saved at `main`; 0 where nothing has a score."""
        return 0.0 if self.point is None else float(self.point["macs_share"])

    @property
    def price(self) -> float | None:
        """Points lost per percent of all MACs saved; None where no MACs are."""
        if self.drop is None or not self.macs_share > 0.0:
            return None
        return self.drop / self.macs_share  # 100 points per 100 percent


def rows(document: Document) -> list[Row]:
    """Groups, then blocks, each in execution order."""
    found = []
    middle = middle_ratio(document)
    for group in document["groups"]:
        points = {point["ratio"]: point for point in group["points"]}
        scored = [ratio for ratio, point in points.items() if "drop" in point]
        main = min(scored, key=lambda ratio: abs(ratio - middle), default=None)
        size, each = group["size"], group["granularity"]
        units = str(size) if each == 1 else f"{size}×{each}"
        found.append(Row(group["name"], False, units, "", points, main))
    for block in document["blocks"]:
        names = [name.removesuffix(".weight") for name in block["weights"]]
        path = "." in block["name"]  # of modules, which says what it is; else the name of an Add
        ends = "" if path else " … ".join(dict.fromkeys([*names[:1], *names[-1:]]))
        found.append(Row(block["name"], True, "", ends, {None: block}, None))
    return found


def middle_ratio(document: Document) -> float:
    """The ratio that all groups were scored at first."""
    ratios = document["ratios"]
    return float(ratios[len(ratios) // 2])


def by_loss(found: Sequence[Row]) -> list[Row]:
    """Those with a score, the most sensitive first; of equal ones what saves least."""
    scored = [row for row in found if row.drop is not None]
    return sorted(scored, key=lambda row: (-(row.drop or 0.0), row.macs_share))


def cheapest(found: Sequence[Row]) -> list[Row]:
    """The few rows that lose least per MAC saved, of those that save some."""
    priced = [row for row in found if row.price is not None and row.macs_share >= _WORTHWHILE]
    return sorted(priced, key=lambda row: (row.price or 0.0, -row.macs_share))[:_CHEAPEST]


def points(drop: float | None) -> str:
    """A loss of score in points, 1 point = 0.01."""
    if drop is None:
        return NONE
    text = f"{100.0 * drop:.2f}"
    return "0.00" if text == "-0.00" else text


def saved(row: Row) -> str:
    """Share of all MACs saved at the ratio by which rows are compared."""
    return NONE if row.point is None else percent(row.macs_share)


def price(row: Row) -> str:
    """Points lost per percent of MACs saved."""
    if row.price is None:
        return NONE
    digits = 2 if abs(row.price) < 100 else 0
    text = f"{row.price:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text


def place(cut: Mapping[str, Any]) -> str:
    """`'layer1.conv1' at 75 %`, or the name of a block."""
    at = f" at {100 * cut['ratio']:g} %" if cut.get("ratio") is not None else ""
    return f"'{visible(cut['name'])}'{at}"


def judged_on(document: Document) -> str:
    """What the scores were taken on, and whether it is less than was asked for."""
    baseline, data = document["baseline"], document["data"]
    text = f"{baseline['samples']} samples of '{data['split']}'"
    if data["short_of"]:
        text += f", more did not fit the {'time limit' if data['short_of'] == 'time' else 'memory'}"
    return text


def how(document: Document) -> str:
    """How the cuts were made, in sentences."""
    text = f"Each cut is made alone, the least important units by '{document['criterion']}' first"
    if document["reestimate"]:
        return f"{text}, with statistics of BatchNormalization taken anew and nothing recovered."
    text += ", and nothing is recovered."
    if document["batch_normalizations"]:
        text += (
            " BatchNormalization keeps the statistics of the whole network, which is part of what is lost; "
            "--reestimate takes them anew, as recovery does."
        )
    return text


def unscored(document: Document) -> list[str]:
    """What has no score and why, one sentence each."""
    lines = []
    missing = document["missing"]
    if missing:
        scored = sum(len(group["points"]) for group in document["groups"]) + len(document["blocks"])
        lines.append(
            f"{len(missing)} of {scored + len(missing)} cuts were not scored within {document['time_limit_s']:g} s: "
            f"{_named([place(cut) for cut in missing])}. Give more time with --seconds."
        )
    for row in rows(document):
        for point in row.points.values():
            if "reason" in point:
                lines.append(f"No score: {place({'name': row.name, **point})}: {visible(point['reason'])}")
    uncut = document["uncut"]
    if uncut:
        lines.append(f"Too small to cut: {_named([place(one) for one in uncut])}.")
    return lines


def summary(document: Document, everything: bool = False) -> str:
    """The study as text: the most and the least sensitive groups and blocks, and what each of them saves.

    Args:
        document: schema `sartor.sensitivity/1`.
        everything: nothing is left out of a long table.
    """
    baseline, found = document["baseline"], rows(document)
    text = (
        f"{visible(document['source']['name'])}: score {percent(baseline['score'])} on {judged_on(document)}"
    )
    if "reestimated_score" in baseline:
        text += f"; {percent(baseline['reestimated_score'])} with statistics taken anew and nothing cut"
    lines = [
        f"{text}.",
        how(document),
        "Points of score lost by share of units removed; the most sensitive first.",
        "",
        _table(document, found, everything),
    ]
    cheap = cheapest(found)
    if cheap:
        named = ", ".join(
            f"'{visible(row.name)}' ({price(row)} points per 1 %, saves {percent(row.macs_share)})"
            for row in cheap
        )
        lines += ["", f"Cheapest by MACs saved: {named}."]
    return "\n".join([*lines, *unscored(document)])


def headings(document: Document, found: Sequence[Row]) -> list[tuple[str, float | None]]:
    """Columns of losses: title and ratio, that of whole blocks last."""
    columns: list[tuple[str, float | None]] = [(f"{100 * r:g} %", r) for r in document["ratios"]]
    return columns + ([("whole", None)] if any(row.block for row in found) else [])


def _table(document: Document, found: Sequence[Row], everything: bool) -> str:
    columns = headings(document, found)
    ranked = by_loss(found)
    left_out = 0 if everything else max(0, len(ranked) - 2 * _SHOWN)
    shown = ranked if not left_out else ranked[:_SHOWN] + ranked[-_SHOWN:]
    cells = [
        (
            *(loss(row, ratio) for _, ratio in columns),
            saved(row),
            price(row),
            row.units or "block",
            visible(f"{row.name}: {row.weights}" if row.weights else row.name),
        )
        for row in shown
    ]
    titles = (*(title for title, _ in columns), "MACs saved", "per 1 %", "units", "group or block")
    lines = table(cells, titles, ">" * (len(titles) - 1) + "<").split("\n")
    if left_out:
        lines.insert(2 + _SHOWN, f"… {left_out} in between (--all shows them)")
    return "\n".join(lines)


def loss(row: Row, ratio: float | None) -> str:
    """Points lost at a ratio, or of a whole block; empty where such a cut does not exist, `none` without a score."""
    if row.block != (ratio is None):
        return ""
    point = row.points.get(ratio)
    if point is None:
        return NONE
    return points(point["drop"]) if "drop" in point else "none"


def _named(texts: Sequence[str]) -> str:
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
