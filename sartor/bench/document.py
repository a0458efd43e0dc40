"""The report of a benchmark: schema `sartor.bench-report/1`.

    models      what was measured: name, SHA-256, shapes, costs of one sample where they can be counted
    rows        one per model, target and precision; `state` is `measured`, `imported`, `not-taken` (legality, or a
                model whose costs cannot be counted), `not-run-here`, `not-available`, `failed`, or `unfinished`
                where the benchmark ended before, each with a `reason`; a metric that is missing from a row is in
                its `absent`, with the reason
    rooflines   one per target and precision: points of the parameterized models, envelope, fit
    protocol    what each metric means; parameters, conditions
    imports     results from elsewhere, with their conditions

Every quantity has its unit in its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.bench.fields import METRICS, require_entry, require_metrics, shown
from sartor.bench.roofline import Roofline, envelope, fit
from sartor.errors import InternalError, UsageError

SCHEMA = "sartor.bench-report/1"
REPORT, PAGE = "bench.json", "bench.html"
_HINT = "delete it, and write it again with 'sartor bench'"
_DOCUMENT = {
    "schema": "text",
    "sartor_version": "text",
    "models": "list",
    "rows": "list",
    "rooflines": "list",
    "imports": "list",
    "protocol": "texts",
    "conditions": "object",
    "parameters": "object",
}
_ENTRIES = {
    "models": {
        "name": "text",
        "sha256": "text",
        "input_shapes": "object",
        "operations_flop": "count0?",
        "macs": "count0?",
        "parameters": "count0?",
        "weight_bytes": "count0?",
    },
    "rows": {
        "model": "text",
        "target": "text",
        "precision": "precision",
        "state": "text",
        "absent": "texts",
        "reason": "string?",
        "log": "string?",
        "departures": "sentences?",
        "conversion_s": "positive?",
        "artifact_bytes": "count0?",
        "preparation_s": "number?",
        "calibration": "string?",
        **dict.fromkeys(METRICS, "object?"),
    },
    "rooflines": {"target": "text", "precision": "precision", "points": "list"},
    "imports": {"target": "text", "conditions": "texts"},
}
"""What every entry of a section has; it may have more."""
_MORE_OF_METRICS = {
    "throughput": {"reason": "string?"},
    "accuracy": {"split": "string?", "compared_with": "string?"},
}
_POINT = {"name": "text", "operations_flop": "count", "latency": "object?"}
_DERIVED = ("achieved_flop_per_s", "efficiency_samples_per_s_per_w", "roofline")
_DERIVED_OF_ROOFLINE = ("envelope", "best_flop_per_s", "fit", "fit_reason")


def finish(document: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from the measurements: F, E, rooflines, and the place of each row on them. Idempotent."""
    models = {model["name"]: model for model in document["models"]}
    lines: dict[tuple[str, str], Roofline] = {}
    for roofline in document["rooflines"]:
        for key in _DERIVED_OF_ROOFLINE:
            roofline.pop(key, None)
        points = [p for p in roofline["points"] if "latency" in p]
        for point in points:
            point["achieved_flop_per_s"] = point["operations_flop"] / point["latency"]["median_s"]
        if points:
            pairs = [(p["operations_flop"], p["latency"]["median_s"]) for p in points]
            line = envelope(pairs)
            lines[roofline["target"], roofline["precision"]] = line
            roofline["envelope"] = [{"operations_flop": f, "latency_s": s} for f, s in line.vertices]
            roofline["best_flop_per_s"] = line.best_flop_per_s
            law, reason = fit(pairs)
            roofline["fit"] = law.to_dict() if law is not None else None
            roofline["fit_reason"] = reason
    for row in document["rows"]:
        _derive(row, models[row["model"]], lines.get((row["target"], row["precision"])))
    return document


def _derive(row: dict[str, Any], model: Mapping[str, Any], line: Roofline | None) -> None:
    for key in _DERIVED:
        row.pop(key, None)
    flop = model.get("operations_flop", 0)
    if "throughput" in row:
        rate = row["throughput"]["samples_per_s"]
        if flop:
            row["achieved_flop_per_s"] = rate * flop
        if "power" in row and row["power"]["highest_w"] > 0:
            row["efficiency_samples_per_s_per_w"] = rate / row["power"]["highest_w"]
    row.get("latency", {}).pop("achieved_flop_per_s", None)
    if "latency" in row and flop:
        latency = row["latency"].get("median_s", row["latency"]["mean_s"])
        work = flop * row["latency"]["batch_samples"]
        row["latency"]["achieved_flop_per_s"] = work / latency
        if line is not None:
            largest = line.vertices[-1][0]
            if work > largest:
                row["absent"]["roofline"] = (
                    f"the largest generated model that was measured in its time has {largest:.3g} FLOP, and "
                    f"'{row['model']}' has {work:.3g}"
                )
                return
            reference = line.latency_s(work)
            row["roofline"] = {"share_fraction": reference / latency, "envelope_latency_s": reference}


def write_report(document: Mapping[str, Any], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `bench.json` and `bench.html` to `folder`: both, each whole, or none.

    Raises:
        InternalError: a number is not finite.
        UsageError: the file system refuses.
    """
    from sartor.ir.files import write_all
    from sartor.report.bench_page import render

    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InternalError(f"The report cannot be written as JSON: {error}.") from error
    page = render(document)
    written = write_all({Path(folder) / PAGE: page.encode(), Path(folder) / REPORT: text.encode()})
    return written[1], written[0]


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The report in `folder`.

    Raises:
        UsageError: there is none, it is not of this schema, or it is damaged; names the place.
    """
    path = Path(folder) / REPORT
    document = read_json(path)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(
            f"'{path}' is not a report of schema '{SCHEMA}'; name a folder with one that 'sartor bench' wrote."
        )
    _require_sound(f"'{path}' is damaged", document)
    return finish(document)


def _require_sound(damaged: str, document: dict[str, Any]) -> None:
    require_entry(damaged, document, _DOCUMENT, _HINT, more=True)
    for section, kinds in _ENTRIES.items():
        for index, entry in enumerate(document[section]):
            require_entry(f"{damaged}: {section}[{index}]", entry, kinds, _HINT, more=True)
    models = {model["name"] for model in document["models"]}
    for index, row in enumerate(document["rows"]):
        place = f"{damaged}: rows[{index}]"
        if row["model"] not in models:
            raise UsageError(f"{place} is of model {shown(row['model'])}, which is not in 'models'; {_HINT}.")
        require_metrics(place, row, _HINT, more=True)
        for metric, kinds in _MORE_OF_METRICS.items():
            require_entry(f"{place}: '{metric}'", row.get(metric, {}), kinds, _HINT, more=True)
    for index, roofline in enumerate(document["rooflines"]):
        for number, point in enumerate(roofline["points"]):
            place = f"{damaged}: rooflines[{index}]: points[{number}]"
            require_entry(place, point, _POINT, _HINT, more=True)
            if "latency" in point:
                require_entry(
                    f"{place}: 'latency'", point["latency"], {"median_s": "positive"}, _HINT, more=True
                )


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UsageError: it cannot be read, or is not JSON; NaN and infinity are not.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is not valid JSON: {error}.") from error
