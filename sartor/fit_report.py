"""What a fit reports: before and after, and whether budget and quality hold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sartor.ir.plan import Plan
from sartor.versions import versions

if TYPE_CHECKING:
    from sartor.backends.measure import Measurement
    from sartor.backends.protocol import Artifact
    from sartor.fit import _Fit
    from sartor.lowered import Lowered


def fit_report(
    run: _Fit,
    plan: Plan,
    predicted_s: float,
    verdict: Any,
    artifact: Artifact,
    costs: dict[str, int],
    final: Measurement,
    agreement: Lowered,
) -> dict[str, Any]:
    """The document of `report.json`, schema `sartor.report/1`; the scores are taken here.

    Args:
        run: the fit, with its baseline, history and decisions.
        plan: that was chosen.
        predicted_s: its predicted latency, seconds.
        verdict: of the oracle; None where nothing was removed.
        artifact: that is delivered.
        costs: what the graph says of it.
        final: the baseline and the artifact, measured interleaved.
        agreement: of the artifact with its program.
    """
    baseline: dict[str, Any] = {"latency_s": dataclasses.asdict(final.latencies[0]), **run.before}
    after: dict[str, Any] = {"latency_s": dataclasses.asdict(final.latencies[1]), **costs}
    quality, score_split = "unmeasured", dict[str, Any]()
    if run.data is not None:
        score_split = {
            "score_split": "evaluate" if run.data.test_is_evaluate else "test",
            "data": {"source": run.data.source, "fingerprint": run.data.fingerprint()},
        }
        baseline["score"], baseline["score_n"] = run.bench.score(run.bench.exact, "test")
        after["score"], after["score_n"] = run.bench.score(artifact, "test")
        lost = baseline["score"] - after["score"]
        quality = "kept" if lost <= run.options.max_drop / 100.0 + 1e-12 else "missed"
    low, high = final.ratio.latency_ci95
    met = True
    # The original against itself is a draw around 1: of a program that is within its limits as it is, the
    # fresh measurement shows the noise and decides nothing.
    for key, limit in run.options.budget.items() if not run.untouched else ():
        if key == "latency":
            wanted = limit.value if limit.relative else limit.value / final.latencies[0].median
            met &= high <= wanted
        else:
            met &= after[key] <= limit.absolute(run.before[key])
    status = "budget-missed" if not met else "quality-missed" if quality == "missed" else "met"
    passed = {"max_rel_error": 0.0, "tolerance": 1e-9, "verdict": "passed", "note": "nothing was removed"}
    sizes = {g.name: g.size for g in run.analysis.groups}
    return {
        "schema": "sartor.report/1",
        "status": status,
        "quality": quality,
        "source": dataclasses.asdict(run.program.source),
        "target": dict(final.target),
        "budget": {
            key: {"value": limit.value, "relative": limit.relative}
            | ({"ratio": limit.absolute(run.baseline_s) / run.baseline_s} if key == "latency" else {})
            for key, limit in run.options.budget.items()
        },
        "max_drop": run.options.max_drop,
        "strategy": run.options.strategy,
        "seed": run.options.seed,
        "recovery": dict(run.recovery),
        **score_split,
        "baseline": baseline,
        "result": after,
        "ratio": {"latency": final.ratio.latency, "latency_ci95": [low, high]},
        "predicted": {"latency_s": predicted_s, "baseline_s": run.baseline_s},
        "oracle": verdict.to_dict() if verdict is not None else passed,
        "lowered": agreement.to_dict(),
        "history": run.history,
        "widths": [
            {
                "name": name,
                "before": size,
                "after": _width(plan, name, size),
            }
            for name, size in sizes.items()
        ],
        "blocks_removed": list(plan.blocks),
        "inputs": {name: list(shape) for name, shape in plan.sizes.items()},
        "seconds": {stage: round(seconds, 3) for stage, seconds in run.seconds.items()},
        "decisions": run.decisions,
        "conditions": final.to_dict()["conditions"]
        | {"ended_by": final.ended_by, "rounds": len(final.rounds)},
        "versions": versions(run.options.target),
    }


def _width(plan: Plan, name: str, size: int) -> int:
    if name in plan.widened:
        return size + len(plan.widened[name].copies)
    return len(plan.groups[name].keep) if name in plan.groups else size
