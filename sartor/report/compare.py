"""Reports of several fits side by side, and what of them must not be compared: `sartor.compare/1`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.errors import UsageError
from sartor.report import read_report
from sartor.report.text import COSTS, STATUS, count, percent, seconds, table, visible

SCHEMA = "sartor.compare/1"
UNKNOWN = "unknown"
NONE = "–"
_LIMITS = {
    "macs": ("MACs", ""),
    "weight_bytes": ("weights", "B"),
    "peak_activation_bytes": ("peak memory", "B"),
}
_NAMED = 2  # removed blocks named in a cell
Report = Mapping[str, Any]
Bundle = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Condition:
    """Something that has to be equal for numbers to be compared.

    Attributes:
        key: in the document.
        name: shown, in plural.
        forbids: what must not be compared where it differs: `latency`, `ratio`, `score`.
        read: its value in a report; None where the report does not tell.
    """

    key: str
    name: str
    forbids: tuple[str, ...]
    read: Callable[[Report], Any]


def _machine(key: str) -> Callable[[Report], Any]:
    return lambda report: report.get("conditions", {}).get(key)


def _target(key: str) -> Callable[[Report], Any]:
    return lambda report: report["target"].get(key)


_TIMED = ("latency", "ratio")
CONDITIONS = (
    Condition("model", "models", (*_TIMED, "score"), lambda report: report.get("source", {}).get("sha256")),
    Condition("target", "targets", _TIMED, _target("name")),
    Condition("target_version", "versions of the target", _TIMED, _target("version")),
    Condition("threads", "numbers of threads", _TIMED, _target("threads")),
    Condition("shapes", "input shapes", _TIMED, _target("shapes")),
    Condition("cpu", "processors", _TIMED, _machine("cpu")),
    Condition("cores_allowed", "numbers of processors", _TIMED, _machine("cores_allowed")),
    Condition("platform", "platforms", _TIMED, _machine("platform")),
    Condition("governor", "frequency governors", _TIMED, _machine("governor")),
    # A ratio is to the original in the precision of the target: of two precisions it has two denominators.
    Condition("precision", "precisions", ("ratio",), _target("precision")),
    Condition("data", "data", ("score",), lambda report: report.get("data", {}).get("fingerprint")),
    Condition("score_split", "splits that are scored", ("score",), lambda report: report.get("score_split")),
    Condition("versions", "versions of packages", (), lambda report: _others(report)),
)


def compare(folders: Sequence[str]) -> dict[str, Any]:
    """The bundles of `sartor fit` in `folders`, side by side.

    Keys of the document:

    - `bundles`, in the order given: `folder`, `model` `{name, sha256}`, `target`, `budget`, `max_drop`, `status`,
      `quality`, `latency_s` `{before, after}` (medians), `ratio` `{latency, latency_ci95}`, `predicted_ratio`, `macs`,
      `parameters`, `weight_bytes`, `peak_activation_bytes` (`{before, after}` each), `score` `{before, after, drop,
      samples, split}`, `widths`, `blocks_removed`, `strategy`, `seed`, `recovery`, `conditions`. What a report does not
      have is absent.
    - `differences` `[{condition, forbids, values}]`: conditions that are not the same everywhere, with a value per
      bundle (of a mapping what differs), and what must therefore not be compared: `latency`, `ratio`, `score`, or
      nothing.
    - `alike`: lists of positions in `bundles` whose latencies and scores can be compared with each other.

    Args:
        folders: two or more, each written by `sartor fit`.

    Raises:
        UsageError: fewer than two, one twice, or one without a usable report; names the folder.
    """
    if len(folders) < 2:
        raise UsageError(f"{len(folders)} folder is given; name two or more, each written by 'sartor fit'.")
    paths = [Path(folder).resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"The folder '{folder}' is given twice; name different ones.")
    reports = [read_report(folder) for folder in folders]
    bundles, values = [], []
    for folder, report in zip(folders, reports, strict=True):
        try:
            bundles.append(_bundle(folder, report))
            values.append([condition.read(report) for condition in CONDITIONS])
            row(bundles[-1])
            json.dumps([bundles[-1], values[-1]], allow_nan=False)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UsageError(
                f"The report in '{folder}' is damaged ({type(error).__name__}: {error}); fit again, or leave the "
                "folder away."
            ) from error
    differences = []
    for condition, found in zip(CONDITIONS, zip(*values, strict=True), strict=True):
        if len({_key(value) for value in found}) > 1:
            differences.append(
                {"condition": condition.key, "forbids": list(condition.forbids), "values": _differing(found)}
            )
    alike: dict[str, list[int]] = {}
    for position, read in enumerate(values):
        deciding = [v for c, v in zip(CONDITIONS, read, strict=True) if {"latency", "score"} & {*c.forbids}]
        alike.setdefault(_key(deciding), []).append(position)
    return {
        "schema": SCHEMA,
        "bundles": bundles,
        "differences": differences,
        "alike": list(alike.values()),
    }


def notes(document: Mapping[str, Any]) -> list[str]:
    """What must not be compared and why, then what else differs, one sentence each."""
    folders = [bundle["folder"] for bundle in document["bundles"]]
    names_of = {condition.key: condition.name for condition in CONDITIONS}
    lines = []
    for difference in sorted(document["differences"], key=lambda one: not one["forbids"]):
        by_value: dict[str, list[str]] = {}
        for folder, value in zip(folders, difference["values"], strict=True):
            by_value.setdefault(_short(value), []).append(visible(folder))
        told = "; ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())
        what = f"{names_of[difference['condition']]}: {told}."
        if difference["forbids"]:
            lines.append(f"Not comparable: {_joined(difference['forbids'])}, because of different {what}")
        else:
            lines.append(f"Different {what}")
    return lines


def row(bundle: Bundle) -> list[tuple[str, str]]:
    """`(quantity, text)` of one bundle; the same quantities in the same order for every bundle."""
    target, ratio = bundle["target"], bundle["ratio"]
    low, high = ratio["latency_ci95"]
    latency = bundle["latency_s"]
    found = [
        ("Model", bundle["model"].get("name", NONE)),
        ("Target", f"{target.get('name', '?')} {target.get('version', '')}".strip()),
        ("Threads, precision", f"{target.get('threads', '?')}, {target.get('precision', '?')}"),
        ("Processor", str(bundle["conditions"].get("cpu", NONE))),
        ("Budget", _budget(bundle.get("budget", {}))),
        ("Status", STATUS.get(bundle["status"], str(bundle["status"]))),
        ("Latency before", seconds(latency["before"])),
        ("Latency after", seconds(latency["after"])),
        ("Latency ratio", f"{ratio['latency']:.3f}×"),
        ("95 % interval", f"[{low:.3f}, {high:.3f}]"),
        ("Predicted ratio", _optional(bundle.get("predicted_ratio"), lambda v: f"{v:.3f}×")),
    ]
    found += [(label, _cost(bundle.get(key), unit)) for key, label, unit in COSTS]
    score = bundle.get("score")
    found += [
        ("Score before", _optional(score, lambda s: percent(s["before"]))),
        ("Score after", _optional(score, lambda s: percent(s["after"]))),
        (
            "Points lost",
            _optional(score, lambda s: f"{100 * s['drop']:.2f}, {_number(bundle.get('max_drop'))} allowed"),
        ),
        ("Samples", _optional(score, lambda s: f"{s.get('samples', '?')} of '{s.get('split', '?')}'")),
        ("Groups narrowed", _narrowed(bundle)),
        (
            "Blocks removed",
            _optional(bundle.get("blocks_removed"), _blocks),
        ),
        ("Strategy", str(bundle.get("strategy", NONE))),
        ("Seed", str(bundle.get("seed", NONE))),
        ("Recovery", _optional(bundle.get("recovery"), _recovery)),
    ]
    return [(label, visible(str(text))) for label, text in found]


def summary(document: Mapping[str, Any], width: int = 100) -> str:
    """The comparison as text, in as many tables as the width demands.

    Args:
        document: of `compare`.
        width: columns of a line.
    """
    bundles = document["bundles"]
    columns = [[visible(bundle["folder"]), *(text for _, text in row(bundle))] for bundle in bundles]
    labels = ["", *(label for label, _ in row(bundles[0]))]
    left = max(map(len, labels))
    parts: list[str] = []
    while columns:
        used, taken = left, 0
        for column in columns:
            used += 2 + max(map(len, column))
            if taken and used > width:
                break
            taken += 1
        shown, columns = [labels, *columns[:taken]], columns[taken:]
        lines = list(zip(*shown, strict=True))
        parts.append(table(lines[1:], lines[0], "<" + ">" * taken))
    return "\n\n".join(["\n".join(notes(document)), *parts] if document["differences"] else parts)


# ---- pieces --------------------------------------------------------------------------------------
def _bundle(folder: str, report: Report) -> dict[str, Any]:
    before, after = report["baseline"], report["result"]
    source = report.get("source", {})
    bundle: dict[str, Any] = {
        "folder": folder,
        "model": {key: source[key] for key in ("name", "sha256") if key in source},
        "target": dict(report["target"]),
        "status": report["status"],
        "quality": report["quality"],
        "latency_s": {
            "before": float(before["latency_s"]["median"]),
            "after": float(after["latency_s"]["median"]),
        },
        "ratio": dict(report["ratio"]),
        "conditions": {
            condition.key: value for condition in CONDITIONS if (value := condition.read(report)) is not None
        },
    }
    predicted = report["predicted"]
    if predicted.get("latency_s") is not None:
        original_s = predicted.get("baseline_s") or before["latency_s"]["median"]
        bundle["predicted_ratio"] = predicted["latency_s"] / original_s
    for key, _, _ in COSTS:
        if key in before and key in after:
            bundle[key] = {"before": before[key], "after": after[key]}
    if before.get("score") is not None and after.get("score") is not None:
        bundle["score"] = {
            "before": before["score"],
            "after": after["score"],
            "drop": before["score"] - after["score"],
        }
        if "score_n" in after:
            bundle["score"]["samples"] = after["score_n"]
        if "score_split" in report:
            bundle["score"]["split"] = report["score_split"]
    optional = ("budget", "max_drop", "widths", "blocks_removed", "strategy", "seed", "recovery")
    bundle |= {key: report[key] for key in optional if key in report}
    return bundle


def _others(report: Report) -> dict[str, str]:
    """Versions besides that of the target."""
    return {k: v for k, v in report["versions"].items() if k != report["target"].get("name")}


def _differing(values: Sequence[Any]) -> list[Any]:
    """Values as they are told: of mappings what differs, and a word for what a report does not tell."""
    if not all(isinstance(value, Mapping) for value in values):
        return [UNKNOWN if value is None else value for value in values]
    keys = sorted(set().union(*values))
    differ = [key for key in keys if len({_key(value.get(key)) for value in values}) > 1]
    return [{key: value.get(key, UNKNOWN) for key in differ} for value in values]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_short, value))}]"
    text = visible(str(value))
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text  # a SHA-256


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _budget(budget: Mapping[str, Any]) -> str:
    texts = []
    for key, limit in budget.items():
        label, unit = _LIMITS.get(key, (key, ""))
        if limit.get("relative") or "value" not in limit:
            texts.append(f"{label} {limit.get('value', limit.get('ratio'))}×")
        else:
            texts.append(
                f"{label} {seconds(limit['value']) if key == 'latency' else count(limit['value'], unit)}"
            )
    return ", ".join(texts) or NONE


def _cost(cost: Mapping[str, Any] | None, unit: str) -> str:
    if cost is None:
        return NONE
    ratio = f" ({cost['after'] / cost['before']:.3f}×)" if cost["before"] else ""
    return f"{count(cost['after'], unit)}{ratio}"


def _narrowed(bundle: Bundle) -> str:
    widths = bundle.get("widths")
    if widths is None:
        return NONE
    return f"{sum(w['after'] < w['before'] for w in widths)} of {len(widths)}"


def _blocks(names: Sequence[str]) -> str:
    if len(names) > _NAMED:
        return f"{len(names)} blocks"
    return ", ".join(names) or "none"


def _recovery(recovery: Mapping[str, Any]) -> str:
    return f"{recovery['seconds']:.0f} s, {recovery['steps']} steps" if recovery["steps"] else "none"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _optional(value: Any, form: Callable[[Any], str]) -> str:
    return NONE if value is None else form(value)
