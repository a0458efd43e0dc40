"""One-shot rankings of blocks against those of iterative removal, on the trained digits and a deeper variant.

Reference: METHODS.md, imprinting (4.1 to 4.3) and layer scores (5.1 to 5.3), and 001, table 5.4. The deeper variant has
four blocks per stage, and is trained briefly into the scratch folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims_digits import Digits
from claims_record import PANEL, Claim, Panel, Row, Rows, figure

CRITERIA = {"imprint": "one", "l2": "two", "taylor-weight": "three", "bn-gamma": "four"}
"""What ranks blocks, and how its series looks."""
NETWORKS = ("digits", "deep digits")
TABLE = 4
"""Blocks that go in table 5.4."""
ALIKE = 0.9
"""Least correlation of rankings that agree."""
_DEPTH = 4


def network(name: str, digits: Digits, work: Path, quick: bool) -> Any:
    """A trained network; the deeper one is trained the first time."""
    import sartor

    if name == "digits":
        return digits.trained_one()
    path = work / f"deep_digits{'_quick' if quick else ''}.onnx"
    if not path.exists():
        fresh = digits.fresh(_DEPTH)
        work.mkdir(parents=True, exist_ok=True)
        digits.train(fresh, fresh, 2 if quick else 108, seed=0, scratch=True).program.save(path)
    return sartor.load(path)


def scores_of(program: Any, criterion: str, digits: Digits) -> dict[str, float]:
    """Importance of the blocks of a network that can go, on the calibration split."""
    from sartor.ir.blocks import residual_blocks
    from sartor.strategies.layer_scores import layer_scores

    return layer_scores(criterion, program, residual_blocks(program), data=digits.data(program).calibration)


def without(program: Any, blocks: Sequence[str]) -> Any:
    from sartor.ir.plan import Plan
    from sartor.passes.prune import apply_plan

    return apply_plan(program, Plan(program.source.sha256, blocks=tuple(blocks)))


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Least important first; of equal ones the first by name."""
    return sorted(scores, key=lambda name: (scores[name], name))


def correlation(one_shot: Mapping[str, float], other: Mapping[str, float]) -> float | None:
    """Spearman's, over the blocks that both have; None where there are fewer than three."""
    from thesis_ranking import spearman

    names = [name for name in one_shot if name in other]
    return spearman([one_shot[n] for n in names], [other[n] for n in names])


def measure_imprint(rows: Rows, options: argparse.Namespace) -> None:
    """A ranking per row: blocks go one by one, the rest is recovered shortly and scored again, until one is left.

    Networks that lost the same blocks in the same order are recovered once.
    """
    digits = Digits(few=options.quick)
    effort = (1, None) if options.quick else (8, 384)  # steps, on so many samples
    for name in NETWORKS:
        keys = rows.missing({"network": name, "criterion": criterion} for criterion in CRITERIA)
        if not keys:
            continue
        original = network(name, digits, options.work, options.quick)
        known: dict[tuple[str, ...], Any] = {(): original}

        def after(order: tuple[str, ...], known: Any = known, original: Any = original) -> Any:
            if order not in known:
                cut = without(after(order[:-1]), order[-1:])
                found = digits.train(cut, original, *effort, seed=len(order), judge=False)
                known[order] = found.program
            return known[order]

        for key in keys:
            rows.add(key | compared(original, key["criterion"], digits, after, 1 if options.quick else None))


def compared(original: Any, criterion: str, digits: Digits, after: Any, most: int | None) -> Row:
    """Iterative removal beside the ranking in one shot.

    Args:
        original: the network.
        criterion: that ranks.
        digits: the data.
        after: the network that is left of blocks that went in an order.
        most: blocks that go; None for all but one.
    """
    first = scores_of(original, criterion, digits)
    order: tuple[str, ...] = ()
    again, accuracies, scores = [], [], first
    while len(scores) > 1 and len(order) < (most or len(first)):
        order = (*order, ranked(scores)[0])
        program = after(order)
        scores = scores_of(program, criterion, digits)
        again.append(correlation(first, scores))
        accuracies.append(digits.score(program, original))
    order = (*order, *ranked(scores))
    return {
        "one_shot": ranked(first),
        "iterative": list(order),
        "spearman": correlation(first, {name: float(place) for place, name in enumerate(order)}),
        "spearman_scored_again": again,
        "scores": accuracies,
    }


def summarize_imprint(rows: Sequence[Row]) -> dict[str, Any]:
    """Correlation of the ranking in one shot with the order of removal, and after each of the first removals.

    The claim holds where that of imprinting is at least 0.9 in every network.
    """
    found: dict[str, Any] = {"networks": {}}
    for row in rows:
        own = found["networks"].setdefault(row["network"], {"blocks": len(row["one_shot"])})
        same = [a == b for a, b in zip(row["one_shot"], row["iterative"], strict=True)]
        own[row["criterion"]] = {
            "spearman": row["spearman"],
            "spearman_scored_again": row["spearman_scored_again"][:TABLE],
            "first_removed_is_the_same": same[0],
        }
    ours = [own["imprint"]["spearman"] for own in found["networks"].values() if "imprint" in own]
    found["holds"] = len(ours) == len(NETWORKS) and all(one is not None and one >= ALIKE for one in ours)
    return found


def draw_imprint(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    from sartor.report import charts

    panels = []
    for name, own in summary["networks"].items():
        points = []
        for row in (row for row in rows if row["network"] == name):
            aside = 0.12 * (list(CRITERIA).index(row["criterion"]) - (len(CRITERIA) - 1) / 2)
            for place, block in enumerate(row["one_shot"], 1):
                went = row["iterative"].index(block) + 1
                kind = CRITERIA[row["criterion"]]
                points.append(charts.Point(place + aside, went, "", f"{row['criterion']}: {block}", kind))
        count = own["blocks"]
        chart = charts.scatter(
            points,
            x_title="rank in one shot (1 is the least important)",
            y_title="place in iterative removal",
            x_format=lambda v: f"{v:.0f}" if abs(v - round(v)) < 1e-9 else "",
            y_format=lambda v: f"{v:.0f}" if abs(v - round(v)) < 1e-9 else "",
            lines=[("even", [(1.0, 1.0), (count, count)])],
            include=((0.5, count + 0.5), (0.5, count + 0.5)),
            size=PANEL,
        )
        said = ", ".join(
            f"{criterion} {'none' if own[criterion]['spearman'] is None else format(own[criterion]['spearman'], '.2f')}"
            for criterion in CRITERIA
            if criterion in own
        )
        panels.append(Panel(f"{name}, {count} blocks", chart, (f"Spearman: {said}",)))
    said = (
        "A dot is a residual block; dots of one rank lie side by side. Between removals the network is recovered "
        "shortly and scored again. On the dotted line one shot and iterating agree."
    )
    legend = [*((kind, criterion) for criterion, kind in CRITERIA.items()), ("even", "the same")]
    return figure("One-shot rankings of blocks against iterative ones", said, panels, legend)


IMPRINT = Claim(
    "imprint",
    "Ranking blocks by imprinting in one shot agrees with ranking them again after each removal (001, table 5.4: "
    "Spearman 0.91 and more; METHODS.md, one shot is enough for layers).",
    ("network", "criterion"),
    measure_imprint,
    summarize_imprint,
    draw_imprint,
    lambda options: {"quick": options.quick},
)
