"""Claims about latency, measured interleaved with the unchanged network at batch 1, on one thread.

Networks have random weights: what they compute does not matter, and how long it takes does not depend on it.
A latency is the median over rounds of its ratio to the original's, with a distribution-free 95 % interval. What a
verdict calls slower, or little, is so over the whole of that interval.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_record import PANEL, Claim, Panel, Row, Rows, figure, percent

CPUS = ("onnxruntime", "openvino")
SIZES = {"resnet18": 64, "resnet50": 128}
"""Networks of torchvision, and the images they take."""
LITTLE = 0.1
"""A cut gains little whose latency falls by less than this share of what its MACs fall by."""
_ROUNDS, _VISIT_S, _AT_ONCE = 9, 0.04, 12  # of nine rounds, the second and the eighth are a 95 % interval
_LIGHT = 0.5
SLOWER = 1.01
"""A ratio above which a network is slower: of many that take as long as the original, some seem to take more."""
_SLICES = np.linspace(0.0, 1.0, 11)


# ---- measuring -----------------------------------------------------------------------------------
@functools.cache
def network(name: str, size: int) -> Any:
    """A network of torchvision for images of this size, with random weights."""
    import torch
    import zoo_models

    from sartor.ir.capture import capture

    torch.manual_seed(0)
    module = zoo_models.import_torchvision().models.get_model(name, weights=None).eval()
    return capture(module, (torch.zeros(1, 3, size, size),), name=name)


def macs_of(program: Any) -> int:
    from sartor.cost_models.static import static_cost

    return int(static_cost(program).macs)


def measured(target: str, base: Any, programs: Sequence[Any], work: Path, seed: int) -> list[Row]:
    """What programs take over the base, measured in turn with it in one process; `baseline_s` is what that takes."""
    from sartor import backends
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions

    options, backend = TargetOptions(threads=1), backends.get(target)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        artifacts = [
            backend.lower(program, Path(folder) / str(number), options)
            for number, program in enumerate([base, *programs])
        ]
        found = measure(
            target,
            artifacts,
            options,
            min_rounds=_ROUNDS,
            max_rounds=_ROUNDS,
            time_limit_s=120.0,
            visit_s=_VISIT_S,
            seed=seed,
        )
    return [
        {"ratio": each.latency, "ci95": list(each.latency_ci95), "baseline_s": found.baseline.median}
        for each in found.ratios
    ]


def add_measured(
    rows: Rows, target: str, base: Any, keys: Sequence[Row], made: Callable[[Row], Any], work: Path
) -> None:
    """Measure the networks of the keys that are missing, some at a time, and add their rows.

    Args:
        rows: of the claim.
        target: that runs them.
        base: network that they compare with.
        keys: of the rows; `target` is added.
        made: the network of a key.
        work: scratch folder.
    """
    missing = rows.missing([{"target": target, **key} for key in keys])
    macs = macs_of(base)
    for start in range(0, len(missing), _AT_ONCE):
        some = missing[start : start + _AT_ONCE]
        programs = [made(key) for key in some]
        found = measured(target, base, programs, work, seed=start)
        counts = [{"macs": macs_of(program), "baseline_macs": macs} for program in programs]
        rows.add(*(key | count | each for key, count, each in zip(some, counts, found, strict=True)))


def targets_here(rows: Rows, names: Sequence[str]) -> Iterator[str]:
    """Targets that run on this machine; a note says of the others why not."""
    from sartor import backends
    from sartor.errors import SartorError

    for name in names:
        try:
            reason = backends.get(name).capabilities().not_run_here
        except SartorError as error:
            reason = str(error)
        if reason:
            rows.note(f"{name} is not measured: {reason}")
        else:
            yield name


def cells(rows: Sequence[Row], *fields: str) -> dict[str, list[Row]]:
    """Rows by what these fields say."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(" on ".join(str(row[field]) for field in fields), []).append(row)
    return found


def share_of_macs(row: Row) -> float:
    """MACs over those of the unchanged network."""
    return float(row["macs"] / row["baseline_macs"])


# ---- granularity ---------------------------------------------------------------------------------
KINDS = {"filters": "one", "few filters": "two", "blocks": "three"}
"""Of cuts, and how their series look."""


def signatures(
    kind: str, sizes: Mapping[str, int], blocks: Sequence[str], draws: int
) -> list[dict[str, Any]]:
    """What is cut at random: units that stay, by group that loses some, or blocks that go.

    More draws begin with those of fewer, and none is there twice.


    * `filters`: of every group a share from 0 to 0.9 goes (001, 4.1).
    * `few filters`: the largest share is itself drawn, up to 0.5: what published filter pruning removed (ours).
    * `blocks`: a number of blocks, from 1 to all that can go.

    Widths are integers and on no grid.
    """
    found: list[dict[str, Any]] = []
    for number in range(20 * draws):
        random = np.random.default_rng([list(KINDS).index(kind), number])
        if kind == "blocks":
            count = int(random.integers(1, len(blocks) + 1))
            chosen = {"blocks": sorted(random.choice(blocks, count, replace=False).tolist())}
        else:
            most = 0.9 if kind == "filters" else random.uniform(0.0, _LIGHT)
            gone = {
                name: int(random.integers(0, max(int(most * size), 1) + 1)) for name, size in sizes.items()
            }
            chosen = {"kept": {name: sizes[name] - count for name, count in gone.items() if count}}
        if chosen not in found and any(chosen.values()):
            found.append(chosen)
    return found[:draws]


def measure_granularity(rows: Rows, options: argparse.Namespace) -> None:
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.channels import channel_groups
    from sartor.ir.plan import GroupPlan, Plan
    from sartor.passes.prune import apply_plan

    for name, size in {"resnet18": 32}.items() if options.quick else SIZES.items():
        program = network(name, size)
        analysis = channel_groups(program)
        sizes = {group.name: group.size for group in analysis.groups}
        blocks = [block.name for block in residual_blocks(program) if block.removable]
        drawn = {kind: signatures(kind, sizes, blocks, options.draws) for kind in KINDS}

        def made(key: Row, program: Any = program, drawn: Any = drawn, sizes: Any = sizes) -> Any:
            chosen = drawn[key["kind"]][key["number"]]
            groups = {
                group: GroupPlan(sizes[group], tuple(range(count)))
                for group, count in chosen.get("kept", {}).items()
            }
            return apply_plan(program, Plan(program.source.sha256, groups, tuple(chosen.get("blocks", ()))))

        # Kinds alternate, so that a run that is ended has some of each.
        keys = [
            {"network": f"{name} {size} px", "kind": kind, "number": number}
            for number in range(options.draws)
            for kind in KINDS
            if number < len(drawn[kind])
        ]
        for target in targets_here(rows, CPUS):
            add_measured(rows, target, program, keys, made, options.work)


def summarize_granularity(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of cuts that are slower than the original or gain little, by kind, and reductions at equal MACs.

    The claim holds where some filter pruning is slower and no block pruning is slower or gains little.
    """
    found: dict[str, Any] = {"cells": {}}
    for name, own in cells(rows, "network", "target").items():
        found["cells"][name] = {kind: _reductions([r for r in own if r["kind"] == kind]) for kind in KINDS}
        found["cells"][name] |= _at_equal_macs(own)
    for kind in KINDS:
        found[kind] = _reductions([r for r in rows if r["kind"] == kind])
    filters = [r for r in rows if r["kind"] != "blocks"]
    blocks = [r for r in rows if r["kind"] == "blocks"]
    found["holds"] = bool(blocks) and any(_slower(r) for r in filters) and not any(map(_useless, blocks))
    return found


def _slower(row: Row) -> bool:
    return bool(row["ci95"][0] > SLOWER)


def _useless(row: Row) -> bool:
    """Slower, or faster by less than a tenth of what it saves in MACs, over the whole interval."""
    return _slower(row) or bool(1.0 - row["ci95"][0] < LITTLE * (1.0 - share_of_macs(row)))


def _reductions(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {"count": 0}
    ratios = [row["ratio"] for row in rows]
    return {
        "count": len(rows),
        "share_slower": sum(map(_slower, rows)) / len(rows),
        "share_slower_or_little": sum(map(_useless, rows)) / len(rows),
        "slowest_ratio": max(ratios),
        "median_latency_reduction": 1.0 - statistics.median(ratios),
        "most_latency_reduction": 1.0 - min(ratios),
        "median_macs_reduction": 1.0 - statistics.median(map(share_of_macs, rows)),
    }


def _at_equal_macs(rows: Sequence[Row]) -> dict[str, Any]:
    """Median reductions in slices of a tenth of the MACs that have filters and blocks."""
    slices, quotients = [], []
    for low, high in itertools.pairwise(_SLICES):
        inside = [r for r in rows if low < share_of_macs(r) <= high]
        parts = [
            [1.0 - r["ratio"] for r in inside if (r["kind"] == "blocks") is kind] for kind in (False, True)
        ]
        if all(parts):
            filters, blocks = map(statistics.median, parts)
            one = {
                "macs": [round(float(low), 1), round(float(high), 1)],
                "filters": filters,
                "blocks": blocks,
            }
            slices.append(one)
            if filters > 0:
                quotients.append(blocks / filters)
    return {
        "equal_macs": slices,
        "blocks_over_filters": statistics.median(quotients) if quotients else None,
    }


def draw_granularity(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    panels = []
    for name, own in cells(rows, "network", "target").items():
        points = [
            charts.Point(
                100 * (1 - share_of_macs(row)),
                100 * (1 - row["ratio"]),
                title=f"{row['kind']} {row['number']}: {row['ratio']:.3f}x",
                kind=KINDS[row["kind"]],
                y_interval=(100 * (1 - row["ci95"][1]), 100 * (1 - row["ci95"][0])),
            )
            for row in own
        ]
        chart = charts.scatter(
            points,
            x_title="MACs that are saved (%)",
            y_title="latency that is saved (%)",
            x_format=lambda v: f"{v:.0f}",
            y_format=lambda v: f"{v:.0f}",
            lines=[("even", [(0.0, 0.0), (100.0, 100.0)])],
            limits=[charts.Limit("y", 0.0, "")],
            include=((0.0, 100.0), (0.0,)),
            bounds=((0.0, 100.0), (-math.inf, 100.0)),
            size=PANEL,
        )
        cell = summary["cells"][name]
        notes = [
            f"{kind}: {percent(cell[kind]['share_slower'])} slower, "
            f"{percent(cell[kind]['share_slower_or_little'])} slower or gain little"
            for kind in KINDS
            if cell[kind]["count"]
        ]
        panels.append(Panel(name, chart, tuple(notes)))
    said = (
        "A dot is a random cut at batch 1, one thread; the bar is its 95 % interval. Slower, and gain little (less "
        "latency than a tenth of the MACs), is what is so over the whole interval. "
        f"{'Filters can be slower and blocks are not.' if summary['holds'] else 'The claim does not hold here.'}"
    )
    legend = [
        ("one", "filters: 0 to 90 % of each group go"),
        ("two", f"few filters: 0 to a drawn share of at most {percent(_LIGHT)}"),
        ("three", "blocks: random subsets go"),
        ("even", "as much latency as MACs"),
        ("limit", "as slow as the original"),
    ]
    return figure("What filters and blocks save in latency", said, panels, legend)


GRANULARITY = Claim(
    "granularity",
    "Filter pruning can raise latency at batch 1 while block pruning does not (001, 4.1 and chapter 5; METHODS.md, a "
    "training-free check of granularity).",
    ("network", "target", "kind", "number"),
    measure_granularity,
    summarize_granularity,
    draw_granularity,
    lambda options: {"quick": options.quick},
)
