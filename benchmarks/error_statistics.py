"""Statistics of predictions against measurements, where plans of one network are not independent of each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

_BOOTSTRAPS = 2000


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Reference: E. B. Wilson, JASA 22 (1927)."""
    share, square = hits / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def by_network(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["network"], []).append(row)
    return found


def clustered(rows: Sequence[dict[str, Any]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the coverage when networks, not plans, are what was drawn: a bootstrap over networks."""
    rng = np.random.default_rng(seed)
    groups = [[_covered(r) for r in group] for group in by_network(rows).values()]
    hits = np.array([sum(g) for g in groups])
    counts = np.array([len(g) for g in groups])
    drawn = rng.integers(0, len(groups), (_BOOTSTRAPS, len(groups)))
    shares = hits[drawn].sum(1) / counts[drawn].sum(1)
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def _covered(row: dict[str, Any]) -> bool:
    low, high = row["interval"]
    return bool(low <= row["measured_s"] <= high)


def errors_of(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """`mape`, `within_10`, `spearman` over all, and `spearman_within`: the median over networks."""
    from sartor.cost_models.scores import spearman, summary

    found = summary([r[key] for r in rows], [r["measured_s"] for r in rows])
    inside = [
        spearman([r[key] for r in group], [r["measured_s"] for r in group])
        for group in by_network(rows).values()
    ]
    known = [value for value in inside if value is not None]
    return {
        **{name: found.get(name) for name in ("n", "mape", "within_10", "bias", "spearman")},
        "spearman_within": statistics.median(known) if known else None,
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the benchmark says of one target."""
    widths = [(r["ci95"][1] - r["ci95"][0]) / 2 / r["measured_s"] for r in rows]
    found = {
        **errors_of(rows, "predicted_s"),
        "networks": len(by_network(rows)),
        "truth_half_width_median": statistics.median(widths),
        "truth_half_width_worst": max(widths),
        "flops": errors_of(rows, "flops_s"),
        "roofline": errors_of(rows, "roofline_s"),
    }
    known = [r for r in rows if r["interval"] is not None]
    if known:
        hits = sum(map(_covered, known))
        found["coverage_90"] = hits / len(known)
        found["coverage_90_wilson"] = list(wilson(hits, len(known)))
        found["coverage_90_by_network"] = list(clustered(known))
    return found


def table(summary: dict[str, Any]) -> str:
    """The three predictors side by side."""
    keys = ("mape", "within_10", "bias", "spearman", "spearman_within")
    lines = [f"{'':12}" + "".join(f"{key:>17}" for key in keys)]
    for name, errors in (
        ("profile", summary),
        ("roofline", summary["roofline"]),
        ("flops", summary["flops"]),
    ):
        cells = [f"{errors[key]:.3f}" if errors[key] is not None else "-" for key in keys]
        lines.append(f"{name:12}" + "".join(f"{cell:>17}" for cell in cells))
    if "coverage_90" in summary:
        low, high = summary["coverage_90_wilson"]
        by_low, by_high = summary["coverage_90_by_network"]
        lines.append(
            f"coverage of the 90 % interval {summary['coverage_90']:.3f}, Wilson [{low:.3f}, {high:.3f}], "
            f"by network [{by_low:.3f}, {by_high:.3f}]"
        )
    lines.append(
        f"truth: 95 % half width {summary['truth_half_width_median']:.3%} (median), "
        f"{summary['truth_half_width_worst']:.3%} (worst), {summary['n']} plans of {summary['networks']} networks"
    )
    return "\n".join(lines)
