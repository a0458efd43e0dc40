"""Claims about searches and training, on the digits of `examples/digits`: what they cost, and what score is left.

Scores are accuracies on the test split of 447 images, of which one standard error is 0.8 points at 97 %: two that are
no more than `POINTS` apart count as equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims_digits import Digits
from claims_record import PANEL, Claim, Panel, Row, Rows, figure

POINTS = 1.0
"""Scores that are so near, in points, are equal."""
CHEAPER, SAVED = 0.25, 0.30
"""Most of the cost of ITES alone that INES and ITES take, and least share of training FLOPs that RAT saves."""
_PASSES = 3  # forward, gradient of the inputs, gradient of the weights: METHODS.md, RAT


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- INES and ITES -------------------------------------------------------------------------------
BUDGETS = (0.5, 0.35)
SEARCHES = {"INES+ITES": True, "ITES only": False}


def measure_ines(rows: Rows, options: argparse.Namespace) -> None:
    """A search per row, which judges each network on the same samples, and short recoveries of what it finds.

    Latency, half of what is saved (5.6), is that of a roofline of the source's CPU, so that both searches see the
    same and repeat.
    """
    digits = Digits(few=options.quick)
    program = digits.trained_one()
    for budget in (0.9,) if options.quick else BUDGETS:
        for name, ines in SEARCHES.items():
            key = {"search": name, "budget": budget}
            if key in rows:
                continue
            found, pruned = searched(digits, program, budget, ines, options.work)
            scores = []
            for seed in range(1 if options.quick else options.seeds):
                recovered = digits.train(pruned, program, 2 if options.quick else 36, seed=seed).program
                scores.append(digits.score(recovered, program))
            rows.add(key | found | {"scores": scores})


def searched(digits: Digits, program: Any, budget: float, ines: bool, work: Path) -> tuple[Row, Any]:
    """What a search by `teco` cost and found, and the network."""
    from sartor.cost_models.roofline import Roofline
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.channels import channel_groups
    from sartor.ir.plan import Plan
    from sartor.journal import Journal
    from sartor.judge import Judge
    from sartor.passes.prune import apply_plan
    from sartor.plan_prices import PlanPrices, channel_step, sized_programs
    from sartor.profiling.build import fusion_rules
    from sartor.selection import describe
    from sartor.strategies.protocol import strategy
    from sartor.strategies.space import Space
    from sartor.unit_scores import unit_scores
    from sartor.workbench import FitOptions, Workbench, static_costs

    work.mkdir(parents=True, exist_ok=True)
    data, macs = digits.data(program), static_costs(program)["macs"]
    analysis, blocks = channel_groups(program), residual_blocks(program)
    with (
        tempfile.TemporaryDirectory(dir=work) as folder,
        Journal(Path(folder) / "journal.jsonl", {}) as journal,
        Journal(Path(folder) / "unused.jsonl", {}) as unused,
    ):
        bench = Workbench(program, FitOptions("onnxruntime", {}), data, Path(folder))
        try:
            rules = fusion_rules(bench.backend)
            sizes, _ = sized_programs(
                program, analysis, [b for b in blocks if b.removable], rules, resizes=True
            )
            judge = Judge(bench, analysis, blocks, journal, lambda _: None)
            space = Space(
                analysis,
                blocks,
                lambda: unit_scores(bench, analysis, blocks)[0],
                PlanPrices(sizes, ["macs"], Roofline("i7-9750h", "f32")).input_sizes(),
                lambda group: channel_step(bench.backend, program, "f32", group),
                judge,
            )
            # What is imported, and compiled, the first time is no search's.
            Judge(bench, analysis, blocks, unused, lambda _: None).loss(Plan(program.source.sha256))
            unit_scores(bench, analysis, blocks)
            start = time.perf_counter()
            decision = strategy(f"teco{{ines={str(ines).lower()}}}").prepare(space)({"macs": budget * macs})
            seconds = time.perf_counter() - start
            judged = sum(record["kind"] == "judged-plan" for record in journal.records)
            found = {"seconds": seconds, "judged": judged, "steps": len(decision.steps)}
            found |= {"loss": judge.loss(decision.plan), "plan": describe(decision), "met": decision.feasible}
        finally:
            bench.close()
    pruned = apply_plan(program, decision.plan, analysis)
    return found | {"macs_share": static_costs(pruned)["macs"] / macs}, pruned


def summarize_ines(rows: Sequence[Row]) -> dict[str, Any]:
    """Cost and score of both searches together over those of ITES alone, by budget.

    The claim holds where the search judges and takes at most a quarter, and the score is equal or better, at every
    budget.
    """
    found: dict[str, Any] = {"budgets": {}}
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        both, alone = (
            [r for r in rows if r["budget"] == budget and r["search"] == name] for name in SEARCHES
        )
        if not both or not alone:
            continue
        (ours,), (theirs,) = both, alone
        gap = 100 * (statistics.fmean(ours["scores"]) - statistics.fmean(theirs["scores"]))
        judged, seconds = (ours[key] / theirs[key] for key in ("judged", "seconds"))
        found["budgets"][f"{budget}x"] = {
            "judged_ratio": judged,
            "seconds_ratio": seconds,
            "loss_difference": ours["loss"] - theirs["loss"],
            "score_difference_points": gap,
            "holds": judged <= CHEAPER and seconds <= CHEAPER and gap >= -POINTS,
        }
    found["holds"] = bool(found["budgets"]) and all(one["holds"] for one in found["budgets"].values())
    return found


def draw_ines(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    kinds, panels = dict(zip(SEARCHES, ("one", "two"), strict=True)), []
    for title, key in (("networks that are judged", "judged"), ("seconds of the search", "seconds")):
        points = []
        for row in rows:
            mean, sd = mean_sd([100 * s for s in row["scores"]])
            points.append(
                charts.Point(
                    row[key],
                    mean,
                    f"{row['budget']}x",
                    f"{row['search']}: {row['plan']}",
                    kinds[row["search"]],
                    y_interval=(mean - sd, mean + sd),
                )
            )
        chart = charts.scatter(
            points,
            x_title=title,
            y_title="test score after recovery (%)",
            x_format=lambda v: f"{v:.0f}",
            y_format=lambda v: f"{v:.1f}",
            include=((0.0,), ()),
            bounds=((0.0, float("inf")), (0.0, 100.0)),
            size=PANEL,
        )
        panels.append(Panel(f"Score over {title}", chart))
    parts = [
        f"At {budget} of the MACs INES+ITES judges {one['judged_ratio']:.2f} times as many networks in "
        f"{one['seconds_ratio']:.2f} times the seconds, {one['score_difference_points']:+.1f} points."
        for budget, one in summary["budgets"].items()
    ]
    said = " ".join([*parts, "Dots: mean over seeds of the recovery, bars one standard deviation."])
    return figure(
        "What TECO's local importance saves", said, panels, [(k, name) for name, k in kinds.items()]
    )


# ---- resolution-adaptive training ----------------------------------------------------------------
WAYS = ("full size", "RAT")


def measure_rat(rows: Rows, options: argparse.Namespace) -> None:
    """Fresh weights, equal numbers of steps, with and without; FLOPs are 2 MACs, of forward and backward passes."""
    from sartor.cost_models.static import static_cost

    digits = Digits(few=options.quick)
    for seed in range(1 if options.quick else options.seeds):
        for way in WAYS:
            key = {"way": way, "seed": seed}
            if key in rows:
                continue
            program = digits.fresh(2, seed)
            more = {"rat": 0.5} if way == "RAT" else {}
            result = digits.train(
                program, program, 6 if options.quick else 180, seed=seed, scratch=True, **more
            )
            macs = _PASSES * static_cost(program).macs if way != "RAT" else result.training_macs
            if macs is None:
                raise SystemExit(f"Resolution-adaptive training did not apply: {'; '.join(result.notes)}")
            rows.add(
                key
                | {
                    "score": digits.score(result.program, program),
                    "steps": result.steps,
                    "seconds": result.seconds,
                }
                | {"training_flops": 2 * int(macs)}  # of a sample in a step, the mean over steps
                | {"sizes": {str(size): count for size, count in result.sizes.items()}}
            )


def summarize_rat(rows: Sequence[Row]) -> dict[str, Any]:
    """FLOPs, seconds and score with resolution-adaptive training and without.

    The claim holds where at least 30 % of the FLOPs are saved in equally many steps, and the score is equal or better.
    """
    found: dict[str, Any] = {"holds": False}
    ways = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    for way, own in ways.items():
        if own:
            mean, sd = mean_sd([100 * row["score"] for row in own])
            found[way] = {"count": len(own), "score_mean": mean, "score_sd": sd}
            found[way] |= {k: statistics.fmean(r[k] for r in own) for k in ("training_flops", "seconds")}
    if all(ways.values()):
        full, rat = (found[way] for way in WAYS)
        found["flops_saved"] = 1.0 - rat["training_flops"] / full["training_flops"]
        found["seconds_saved"] = 1.0 - rat["seconds"] / full["seconds"]
        found["score_difference_points"] = rat["score_mean"] - full["score_mean"]
        equal = len({row["steps"] for row in rows}) == 1
        found["holds"] = (
            equal and found["flops_saved"] >= SAVED and found["score_difference_points"] >= -POINTS
        )
    return found


def draw_rat(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    kinds = dict(zip(WAYS, ("two", "one"), strict=True))
    points = [
        charts.Point(
            row["training_flops"] / 1e6,
            100 * row["score"],
            "",
            f"{row['way']}, seed {row['seed']}",
            kinds[row["way"]],
        )
        for row in rows
    ]
    for way, kind in kinds.items():
        if way in summary:
            one = summary[way]
            mean, sd = one["score_mean"], one["score_sd"]
            points.append(
                charts.Point(
                    one["training_flops"] / 1e6,
                    mean,
                    f"{mean:.1f} %",
                    "mean",
                    kind,
                    y_interval=(mean - sd, mean + sd),
                )
            )
    chart = charts.scatter(
        points,
        x_title="training FLOPs of a sample in a step (10⁶)",
        y_title="test score (%)",
        x_format=lambda v: f"{v:.0f}",
        y_format=lambda v: f"{v:.1f}",
        include=((0.0,), ()),
        bounds=((0.0, float("inf")), (0.0, 100.0)),
        size=PANEL,
    )
    said = "A dot is a seed; with its mean, a bar is one standard deviation."
    if "flops_saved" in summary:
        said = (
            f"Images that grow from half their size save {100 * summary['flops_saved']:.0f} % of the FLOPs at "
            f"{summary['score_difference_points']:+.1f} points. " + said
        )
    panel = Panel("Trained from fresh weights, equally many steps", chart)
    return figure("Resolution-adaptive training", said, [panel], [(kind, way) for way, kind in kinds.items()])


INES = Claim(
    "ines",
    "INES and ITES reach what ITES alone reaches at a quarter of its cost or less (000, table 5.3: a sixth; "
    "METHODS.md, TECO).",
    ("search", "budget"),
    measure_ines,
    summarize_ines,
    draw_ines,
    lambda options: {"quick": options.quick, "seeds": options.seeds},
)
RAT = Claim(
    "rat",
    "Resolution-adaptive training saves at least 30 % of the training FLOPs at an equal score (000, table 5.11; "
    "METHODS.md, 5.15 and 5.16).",
    ("way", "seed"),
    measure_rat,
    summarize_rat,
    draw_rat,
    lambda options: {"quick": options.quick},
)
