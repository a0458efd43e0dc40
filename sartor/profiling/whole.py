"""The last step of the escalation: a plan is applied, lowered and measured as a whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from sartor.backends.protocol import TargetOptions
from sartor.cost_models.escalation import Measure
from sartor.errors import UsageError
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.population import Fractions, Removed
from sartor.ir.program import Program
from sartor.ir.workload import Workload


def measuring(
    program: Program,
    analysis: ChannelAnalysis,
    target: str,
    options: TargetOptions | None = None,
    *,
    seconds: float = 15.0,
) -> Measure:
    """What measures plans of `program` on a target that this machine runs; for `escalation.Target.measure`.

    Of a group the first units stay: which ones they are changes no time.

    Args:
        program: canonical program.
        analysis: its channel groups.
        target: registered backend.
        options: threads and precision.
        seconds: time limit of a measurement.

    Returns:
        A function that gives the median seconds of a plan and their 95 % interval. It raises UsageError for a fraction
        that is not in (0, 1] or a group that the program does not have, PlanError for a plan that is not legal, and
        BackendError where the target fails.
    """

    def measure(
        workload: Workload, fractions: Fractions, removed: Removed
    ) -> tuple[float, tuple[float, float]]:
        from sartor.backends import isolation
        from sartor.backends.measure import measure as measure_artifacts
        from sartor.backends.rounds import median_interval
        from sartor.passes.prune import apply_plan

        pruned = apply_plan(program, _plan(program, analysis, fractions, removed), analysis)
        with tempfile.TemporaryDirectory(prefix="sartor-whole-") as folder:
            artifact = isolation.lower(target, pruned, Path(folder) / "artifact", options or TargetOptions())
            found = measure_artifacts(
                target, [artifact], options, time_limit_s=seconds, target_half_width=0.005
            )
        return found.baseline.median, median_interval([r.seconds(0) for r in found.rounds])

    return measure


def _plan(program: Program, analysis: ChannelAnalysis, fractions: Fractions, removed: Removed) -> Plan:
    shares = {name: float(np.asarray(share)) for name, share in fractions.items()}
    known = {group.name for group in analysis.groups}
    for name, share in shares.items():
        if name not in known or not 0 < share <= 1:
            raise UsageError(
                f"Group '{name}' cannot keep {share:g} of its units; name a group of the program and a share in (0, 1]."
            )
    groups: dict[str, GroupPlan] = {}
    for group in analysis.groups:
        count = round(shares.get(group.name, 1.0) * group.size)
        keep = group.keep_best(np.zeros(group.size), count)
        if len(keep) < group.size:
            groups[group.name] = GroupPlan(group.size, keep)
    blocks = tuple(name for name, gone in removed.items() if bool(np.all(gone)))
    return Plan(program.source.sha256, groups, blocks)
