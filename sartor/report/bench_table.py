"""The report of a benchmark on a terminal, and the texts of its cells, which the page shows, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sartor.report.text import count, percent, seconds, table, visible

NONE = "–"
COLUMNS = (
    ("latency", "Latency"),
    ("throughput", "Throughput"),
    ("accuracy", "Accuracy"),
    ("flops", "FLOPS"),
    ("power", "Power"),
    ("efficiency", "Efficiency"),
    ("conversion", "Conversion"),
    ("roofline", "Of roofline"),
)
"""Key in the protocol, and heading."""
_ALWAYS = ("latency", "throughput", "flops", "conversion")


def cells(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Per metric, its value, and how it came about; missing metrics are missing."""
    found: dict[str, tuple[str, str]] = {}
    if "latency" in row:
        latency = row["latency"]
        note = f"batch {latency['batch_samples']}, mean of {latency['runs']} after {latency['warm_up_runs']}"
        if "median_s" in latency:
            note += f"; median {seconds(latency['median_s'])}"
        if "p10_s" in latency and "p90_s" in latency:
            note += f", p10 {seconds(latency['p10_s'])}, p90 {seconds(latency['p90_s'])}"
        found["latency"] = (seconds(latency["mean_s"]), note)
    if "throughput" in row:
        entry = row["throughput"]
        note = f"batch {entry['batch_samples']}, mean of {entry['runs']} after {entry['warm_up_runs']}"
        if entry.get("reason"):
            note += f"; ended because {entry['reason']}"
        found["throughput"] = (f"{rate(entry['samples_per_s'])}/s", note)
    if "accuracy" in row:
        entry = row["accuracy"]
        note = f"{entry['samples']} samples"
        if "split" in entry and "compared_with" in entry:
            note += f" of '{entry['split']}', against {entry['compared_with']}"
        found["accuracy"] = (percent(entry["score_fraction"]), note)
    if "achieved_flop_per_s" in row:
        found["flops"] = (f"{count(row['achieved_flop_per_s'])}FLOPS", "throughput x 2 x MACs")
    if "power" in row:
        found["power"] = (f"{row['power']['highest_w']:.3g} W", f"highest of {row['power']['sensor']}")
    if "efficiency_samples_per_s_per_w" in row:
        found["efficiency"] = (f"{rate(row['efficiency_samples_per_s_per_w'])}/s/W", "throughput / power")
    if "conversion_s" in row:
        note = f"{count(row['artifact_bytes'], 'B')}" if "artifact_bytes" in row else ""
        if row.get("calibration"):
            note += f"; calibrated with {row['calibration']}"
            note += f" in {seconds(row['preparation_s'])}" if "preparation_s" in row else ""
        found["conversion"] = (seconds(row["conversion_s"]), note.removeprefix("; "))
    if "roofline" in row:
        entry = row["roofline"]
        note = f"the envelope takes {seconds(entry['envelope_latency_s'])} for as much work"
        found["roofline"] = (f"{100 * entry['share_fraction']:.0f} %", note)
    return found


def rate(value: float) -> str:
    """A number of samples, with three digits."""
    return count(value) if value >= 1000 else f"{value:.3g}"


def shown_columns(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The columns that some row fills, and those that every benchmark has."""
    filled = {key for row in document["rows"] for key in cells(row)}
    return [(key, title) for key, title in COLUMNS if key in filled or key in _ALWAYS]


def label(row: Mapping[str, Any]) -> str:
    """The target of a row, marked if its numbers come from elsewhere or are not all there."""
    marked = row["state"] in ("imported", "unfinished")
    return f"{row['target']} ({row['state']})" if marked else str(row["target"])


def has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether the row belongs into the table of results."""
    return bool(cells(row))


def roofline_sentence(roofline: Mapping[str, Any]) -> str:
    """Floor, saturation and peak of one target."""
    measured = [p for p in roofline["points"] if "latency" in p]
    text = f"{roofline['target']} {roofline['precision']}: {len(measured)} generated models"
    if not measured:
        return text + ", none of which ran"
    law = roofline.get("fit")
    if law is None:
        return text + f", best {count(roofline['best_flop_per_s'])}FLOPS; no law: {roofline['fit_reason']}"
    return (
        f"{text}, floor {seconds(law['floor_s'])}, saturated from {count(law['saturation_flop'])}FLOP, peak "
        f"{count(law['rate_flop_per_s'])}FLOPS by the law '{law['law']}' (residuals: rms "
        f"{percent(law['rms_residual_fraction'])}, worst {percent(law['worst_residual_fraction'])}); best measured "
        f"{count(roofline['best_flop_per_s'])}FLOPS"
    )


def summary(document: Mapping[str, Any]) -> str:
    """The whole report as text."""
    shown = shown_columns(document)
    rows = [
        (
            visible(row["model"]),
            visible(label(row)),
            visible(row["precision"]),
            *(cells(row).get(key, (NONE, ""))[0] for key, _ in shown),
        )
        for row in document["rows"]
        if has_numbers(row)
    ]
    parts = []
    if rows:
        titles = ("Model", "Target", "Precision", *(title for _, title in shown))
        parts = [table(rows, titles, "<<<" + ">" * len(shown)), ""]
    said = [f"{state}: {who}: {reason}" for (state, reason), who in _refused(document).items()]
    said += [f"roofline of {roofline_sentence(roofline)}" for roofline in document["rooflines"]]
    absent = {(metric, reason): None for row in document["rows"] for metric, reason in row["absent"].items()}
    said += [f"no {metric}: {reason}" for metric, reason in absent]
    protocol = document["protocol"]
    said += [f"{title.lower()}: {protocol[key]}" for key, title in shown if key in protocol]
    return "\n".join([*parts, *map(visible, said)])


def _refused(document: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Rows with a reason: who they are, by state and reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in document["rows"]:
        if row.get("reason"):
            who = f"{row['model']} on {row['target']} {row['precision']}"
            grouped.setdefault((row["state"], row["reason"]), []).append(who)
    return {key: ", ".join(who) for key, who in grouped.items()}
