"""Claims about depth, width and resolution: what latency follows, and how much of a processor is used.

Measured as in `claims_granularity`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from claims_granularity import CPUS, add_measured, cells, macs_of, network, share_of_macs, targets_here
from claims_record import PANEL, Claim, Panel, Row, Rows, figure

STRAIGHT = 0.9
"""R^2 of a line that describes latency over MACs (5.4)."""
RAISED = 1.1
"""Achieved FLOPS over those of the base network that are more."""
SIZES = {"resnet18": 160, "resnet50": 160}
"""Networks of torchvision, and the images they take."""
KINDS = {"depth": "one", "width": "two", "resolution": "three"}


# ---- dimensions ----------------------------------------------------------------------------------
DIMENSIONS = tuple(KINDS)
_SHARES = {"width": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25), "resolution": (0.875, 0.75, 0.625, 0.5, 0.375)}


def spread(names: Sequence[str], count: int) -> list[str]:
    """So many of some names, evenly from the first to the last."""
    return [names[int((i + 0.5) * len(names) / count)] for i in range(count)]


def measure_dimensions(rows: Rows, options: argparse.Namespace) -> None:
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.plan import Plan
    from sartor.passes.prune import apply_plan
    from sartor.passes.rescale import Rescale

    for name, size in {"resnet18": 64}.items() if options.quick else SIZES.items():
        program = network(name, size)
        blocks = [block.name for block in residual_blocks(program) if block.removable]
        counts = sorted({round(len(blocks) * i / 6) for i in range(1, 7)})
        keys = [
            *({"dimension": "depth", "value": count} for count in counts if count),
            *({"dimension": d, "value": share} for d, shares in _SHARES.items() for share in shares),
        ]

        def made(key: Row, program: Any = program, blocks: Any = blocks) -> Any:
            dimension, value = key["dimension"], key["value"]
            if dimension == "depth":
                return apply_plan(program, Plan(program.source.sha256, blocks=tuple(spread(blocks, value))))
            return Rescale(**{dimension: value}, channel_grid=8).run(program).program

        for target in targets_here(rows, CPUS):
            add_measured(
                rows,
                target,
                program,
                [{"network": f"{name} {size} px", **key} for key in keys],
                made,
                options.work,
            )


def summarize_dimensions(rows: Sequence[Row]) -> dict[str, Any]:
    """A line of latency over MACs per dimension (5.4), both as shares of the original's, which is a point of each.

    Slopes differ where the 95 % intervals of two of them do not meet. The claim holds where all lines are straight and
    slopes differ, for every network and target.
    """
    found: dict[str, Any] = {"cells": {}}
    for name, own in cells(rows, "network", "target").items():
        lines = {d: line_of([r for r in own if r["dimension"] == d]) for d in DIMENSIONS}
        known = {d: line for d, line in lines.items() if line is not None}
        apart = [
            [one, other]
            for i, one in enumerate(known)
            for other in list(known)[i + 1 :]
            if known[one]["slope_ci95"][1] < known[other]["slope_ci95"][0]
            or known[other]["slope_ci95"][1] < known[one]["slope_ci95"][0]
        ]
        straight = len(known) == len(DIMENSIONS) and min(line["r2"] for line in known.values()) >= STRAIGHT
        slopes = [line["slope"] for line in known.values()]
        found["cells"][name] = {
            **known,
            "slopes_differ": apart,
            "steepest_over_flattest": max(slopes) / min(slopes) if slopes and min(slopes) > 0 else None,
            "holds": straight and bool(apart),
        }
    found["holds"] = bool(found["cells"]) and all(cell["holds"] for cell in found["cells"].values())
    return found


def line_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Least squares of latency over MACs; None of fewer than three networks."""
    from scipy import stats

    if len(rows) < 3:
        return None
    found = stats.linregress([1.0, *map(share_of_macs, rows)], [1.0, *(row["ratio"] for row in rows)])
    half = float(stats.t.ppf(0.975, len(rows) - 1)) * float(found.stderr)
    base = rows[0]
    return {
        "count": len(rows) + 1,
        "slope": float(found.slope),
        "slope_ci95": [float(found.slope) - half, float(found.slope) + half],
        "intercept": float(found.intercept),
        "r2": float(found.rvalue) ** 2,
        "seconds_per_gmac": float(found.slope) * base["baseline_s"] / base["baseline_macs"] * 1e9,
    }


def draw_dimensions(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    panels = []
    for name, own in cells(rows, "network", "target").items():
        points, lines, notes = [], [], []
        for dimension, kind in KINDS.items():
            points += [
                charts.Point(
                    100 * share_of_macs(row),
                    100 * row["ratio"],
                    title=f"{dimension} {row['value']}",
                    kind=kind,
                    y_interval=(100 * row["ci95"][0], 100 * row["ci95"][1]),
                )
                for row in own
                if row["dimension"] == dimension
            ]
            line = summary["cells"][name].get(dimension)
            if line is None:
                continue
            least = min(share_of_macs(row) for row in own if row["dimension"] == dimension)
            ends = [(100 * x, 100 * (line["intercept"] + line["slope"] * x)) for x in (least, 1.0)]
            lines.append((kind, ends))
            notes.append(f"{dimension} {line['slope']:.2f} (R² {line['r2']:.3f})")
        chart = charts.scatter(
            [*points, charts.Point(100.0, 100.0, title="the original")],
            x_title="MACs (% of the original)",
            y_title="latency (% of the original)",
            x_format=lambda v: f"{v:.0f}",
            y_format=lambda v: f"{v:.0f}",
            lines=[("even", [(0.0, 0.0), (100.0, 100.0)]), *lines],
            include=((0.0,), (0.0,)),
            bounds=((0.0, math.inf), (0.0, math.inf)),
            size=PANEL,
        )
        panels.append(Panel(name, chart, ("slopes: " + ", ".join(notes),)))
    verdict = (
        "They are straight and their slopes differ." if summary["holds"] else "Not all charts show the claim."
    )
    verdict = (
        "They are straight and their slopes differ." if summary["holds"] else "Not all charts show the claim."
    )
    said = (
        "One dimension at a time is cut; a dot is a network at batch 1, one thread, the bar its 95 % interval. Lines "
        f"are least squares. {verdict}"
    )
    legend = [*((kind, d) for d, kind in KINDS.items()), ("even", "as much latency as MACs")]
    return figure("Latency over MACs depends on the dimension", said, panels, legend)


# ---- utilisation ---------------------------------------------------------------------------------
FACTORS = (2, 4, 8)
BASES = {"resnet18": 1.0, "quarter resnet18": 0.25}
"""Width of the base networks over torchvision's."""


def grown(program: Any, dimension: str, factor: float) -> Any:
    """A network of about so many times the MACs, in one dimension."""
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.plan import Plan
    from sartor.passes.prune import apply_plan
    from sartor.passes.rescale import Rescale

    if dimension != "depth":
        return Rescale(**{dimension: math.sqrt(factor)}, channel_grid=8).run(program).program
    blocks = tuple(block.name for block in residual_blocks(program) if block.removable)
    macs, rest = macs_of(program), macs_of(apply_plan(program, Plan(program.source.sha256, blocks=blocks)))
    return Rescale(depth=(factor * macs - rest) / (macs - rest)).run(program).program


def measure_utilisation(rows: Rows, options: argparse.Namespace) -> None:
    from sartor.passes.rescale import Rescale

    for name, width in BASES.items():
        if options.quick and width == 1.0:
            continue
        size = 32 if options.quick else 64
        program = network("resnet18", size)
        base = program if width == 1.0 else Rescale(width=width).run(program).program
        keys = [
            {"network": f"{name} {size} px", "dimension": d, "factor": f} for d in DIMENSIONS for f in FACTORS
        ]

        def made(key: Row, base: Any = base) -> Any:
            return grown(base, key["dimension"], key["factor"])

        for target in targets_here(rows, (*CPUS, "tensorrt")):
            add_measured(rows, target, base, keys, made, options.work)


def summarize_utilisation(rows: Sequence[Row]) -> dict[str, Any]:
    """Achieved FLOPS, 2 MACs / latency, of the largest network of each dimension over those of the base.

    The claim holds for a network and target where width and resolution raise them and depth does not.
    """
    found: dict[str, Any] = {"cells": {}}
    for name, own in cells(rows, "network", "target").items():
        cell: dict[str, Any] = {
            "base_gflops": gflops(own[0] | {"macs": own[0]["baseline_macs"], "ratio": 1.0})
        }
        for dimension in DIMENSIONS:
            of_it = [row for row in own if row["dimension"] == dimension]
            if of_it:
                row = max(of_it, key=lambda r: r["factor"])
                gain, (low, high) = gain_of(row)
                cell[dimension] = {"factor": share_of_macs(row), "gain": gain, "gain_ci95": [low, high]}
                cell[dimension]["raises"] = gain >= RAISED and low > 1.0
        raised = {d: cell[d]["raises"] for d in DIMENSIONS if d in cell}
        cell["holds"] = raised == {"depth": False, "width": True, "resolution": True}
        found["cells"][name] = cell
    found["holds_in"] = [name for name, cell in found["cells"].items() if cell["holds"]]
    found["holds"] = bool(rows) and len(found["holds_in"]) == len(found["cells"])
    return found


def gain_of(row: Row) -> tuple[float, tuple[float, float]]:
    """Achieved FLOPS over the base's, and their 95 % interval."""
    return share_of_macs(row) / row["ratio"], (
        share_of_macs(row) / row["ci95"][1],
        share_of_macs(row) / row["ci95"][0],
    )


def gflops(row: Row) -> float:
    """Achieved by a network: 2 MACs / latency, 10⁹ a second."""
    return float(2e-9 * row["macs"] / (row["ratio"] * row["baseline_s"]))


def draw_utilisation(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    panels = []
    for name, own in cells(rows, "network", "target").items():
        points, lines = [charts.Point(0.0, 1.0, title="the base")], []
        for dimension, kind in KINDS.items():
            of_it = [row for row in own if row["dimension"] == dimension]
            of_it.sort(key=share_of_macs)
            places = [(math.log2(share_of_macs(row)), gain_of(row)) for row in of_it]
            lines.append((kind, [(0.0, 1.0), *((x, gain) for x, (gain, _) in places)]))
            points += [
                charts.Point(x, gain, title=f"{gflops(row):.1f} GFLOPS", kind=kind, y_interval=interval)
                for (x, (gain, interval)), row in zip(places, of_it, strict=True)
            ]
        chart = charts.scatter(
            points,
            x_title="MACs (times those of the base)",
            y_title="achieved FLOPS (times)",
            x_format=lambda v: f"{2**v:.0f}" if abs(v - round(v)) < 1e-9 else "",
            y_format=lambda v: f"{v:.1f}",
            lines=lines,
            limits=[charts.Limit("y", 1.0, "")],
            include=((0.0, 3.0), (0.0,)),
            bounds=((0.0, math.inf), (0.0, math.inf)),
            size=PANEL,
        )
        cell = summary["cells"][name]
        panels.append(Panel(name, chart, (f"the base achieves {cell['base_gflops']:.1f} GFLOPS",)))
    where = ", ".join(summary["holds_in"]) or "none"
    said = (
        "A network grows in one dimension; dots are at batch 1, one thread, bars 95 % intervals. Width and resolution "
        f"raise achieved FLOPS (2 MACs / latency) and depth does not in: {where}."
    )
    legend = [*((kind, d) for d, kind in KINDS.items()), ("limit", "as the base")]
    return figure("Achieved FLOPS of networks that grow", said, panels, legend)


DIMENSION = Claim(
    "dimensions",
    "Latency is a line over MACs, another one for depth, width and resolution (000, figure 5.3; METHODS.md, 5.4).",
    ("network", "target", "dimension", "value"),
    measure_dimensions,
    summarize_dimensions,
    draw_dimensions,
    lambda options: {"quick": options.quick},
)
UTILISATION = Claim(
    "utilisation",
    "Growth in width or resolution raises achieved FLOPS, in depth it does not (000, figure 4.2; METHODS.md, "
    "HACScale).",
    ("network", "target", "dimension", "factor"),
    measure_utilisation,
    summarize_utilisation,
    draw_utilisation,
    lambda options: {"quick": options.quick},
)
