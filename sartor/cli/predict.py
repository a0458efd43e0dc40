"""Predict the latency of MODEL from a device profile, or from the published description of a device.

With --profile, the answer has a 90 % interval and says of every kernel how it was priced: between samples of the
very kernel (interpolated), beyond them (extrapolated), by a learned model of its family, or by the roofline. With
--target, a device is priced by its published constants alone: good for ranking, not for a budget. Nothing is run.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments, pricing
from sartor.cli.output import Result, count, seconds, table
from sartor.errors import PlanError

if TYPE_CHECKING:
    from sartor.cost_models.protocol import CostEstimate, CostModel, KernelCost
    from sartor.cost_models.widths import Step
    from sartor.ir.channels import ChannelAnalysis
    from sartor.ir.plan import Plan
    from sartor.ir.program import Program
    from sartor.ir.workload import Workload

EXAMPLE = "sartor predict model.onnx --profile device.json --plan plan.json"
SCHEMA = "sartor.predict/1"
_SHOWN_STEPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    pricing.add_pricing(parser)
    parser.add_argument("--plan", metavar="PLAN.json", help="predict what this plan makes of MODEL, too")
    parser.add_argument(
        "--kernels", type=arguments.positive, default=20, metavar="N", help="longest kernels to show (20)"
    )


def run(options: argparse.Namespace) -> Result:
    """Price the model, and the plan.

    Raises:
        UsageError: neither or both of `--profile` and `--target`; `--precision` with a profile.
        PlanError: the plan is of another model.
    """
    from sartor.ir.plan import Plan
    from sartor.passes.prune import apply_plan

    plan = _plan(options.plan)
    pricer = pricing.pricer_of(options)
    model = pricer.model
    program = arguments.open_program(options)
    analysis, workload = pricer.workload(program, plan)
    before = model.estimate(workload)
    if plan is not None and not plan.only_removes:  # no variables of a workload: priced as it becomes
        program = apply_plan(program, plan)
        plan = Plan(program.source.sha256)
        analysis, workload = pricer.workload(program, plan)
    fractions, removed = _changes(program, plan, analysis, workload)
    found = model.estimate(workload, fractions, removed) if plan is not None else before
    sizes = {group.name: group.size for group in analysis.groups}
    steps = _steps(model, workload, sizes, fractions, removed, whole=plan is None)
    document = {
        "schema": SCHEMA,
        "model": arguments.source_document(program),
        **pricer.facts,
        "notes": pricer.notes,
        **_priced(found),
        "baseline": _priced(before, kernels=False) if plan is not None else None,
        "static": _static(workload, fractions, removed),
        "bound": _bounds(found),
        "groups": [vars(step) | {"is_free": step.is_free} for step in steps],
    }
    return Result(document, _text(document, found, steps, options.kernels))


# ---- what to price -------------------------------------------------------------------------------
def _plan(path: str | None) -> Plan | None:
    from sartor.ir.plan import Plan

    return None if path is None else Plan.load(path)


def _changes(
    program: Program, plan: Plan | None, analysis: ChannelAnalysis, workload: Workload
) -> tuple[dict[str, float], dict[str, bool]]:
    """Kept fractions and removed blocks of a plan that belongs to the program."""
    if plan is None:
        return {}, {}
    from sartor.passes.prune import check_source

    check_source(program, plan)
    sizes = {group.name: group.size for group in analysis.groups}
    for name, group in plan.groups.items():
        if sizes.get(name) != group.size:
            raise PlanError(
                f"The plan gives group '{name}' {group.size} units; in '{program.source.name}' it has "
                f"{sizes.get(name, 'no such group')}. Make the plan with this version of Sartor."
            )
    removed = {name: True for name in plan.blocks}
    workload.check_removed(removed)
    return analysis.fractions(plan), removed


def _steps(
    model: CostModel,
    workload: Workload,
    sizes: Mapping[str, int],
    fractions: Mapping[str, float],
    removed: Mapping[str, bool],
    *,
    whole: bool,
) -> tuple[Step, ...]:
    from sartor.cost_models.ladder import Ladder
    from sartor.cost_models.pricer import Pricer
    from sartor.cost_models.widths import rounded_up, steps

    if isinstance(model, Ladder):
        pricer = Pricer(model, workload, sizes)
        found = steps(
            workload, lambda f, r: pricer.estimate_batch(pricer.fractions(f, r)), sizes, fractions, removed
        )
        if not whole:
            return found
        return tuple(
            dataclasses.replace(s, rounded=rounded_up(model, workload, s.group, s.size)) for s in found
        )
    return steps(workload, lambda f, r: model.estimate_batch(workload, f, r), sizes, fractions, removed)


# ---- the answer ----------------------------------------------------------------------------------
def _priced(found: CostEstimate, *, kernels: bool = True) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "method": found.method,
        "metrics": {name: float(value) for name, value in found.metrics.items()},
        "intervals": {name: list(map(float, span)) for name, span in found.intervals.items()},
    }
    if kernels:
        parts["unmodelled"] = list(found.unmodelled)
        parts["kernels"] = [_kernel(kernel) for kernel in found.kernels]
    return parts


def _kernel(cost: KernelCost) -> dict[str, Any]:
    return {**vars(cost), "interval": None if cost.interval is None else list(cost.interval)}


def _static(
    workload: Workload, fractions: Mapping[str, float], removed: Mapping[str, bool]
) -> dict[str, int]:
    """What the graph alone says."""
    cost = workload.evaluate(fractions, removed)
    return {
        "macs": round(float(cost.macs)),
        "weight_bytes": round(float(cost.weight_bytes)),
        "peak_activation_bytes": round(float(workload.peak_activation_bytes(fractions, removed))),
    }


def _bounds(found: CostEstimate) -> dict[str, dict[str, Any]]:
    """Seconds and kernels by what bounds them, most first."""
    total: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    for kernel in found.kernels:
        if kernel.bound:
            total[kernel.bound] += kernel.latency_s  # type: ignore[assignment]
            kernels[kernel.bound] += 1
    return {
        name: {"latency_s": float(value), "kernels": kernels[name]} for name, value in total.most_common()
    }


def _text(document: Mapping[str, Any], found: CostEstimate, steps: Sequence[Step], shown: int) -> str:
    target = document["target"]
    place = f"on {target['name']}"
    if "device" in document:
        place += f" {target.get('version', '')}, {target.get('threads', '?')} thread(s), {target.get('precision', '')}"
        place += f", {document['device'].get('cpu', 'a machine that the profile does not name')}"
    else:
        place += f", {target['precision']}"
    lines = [f"{document['model']['name']} {place}", _latency(found)]
    if document["baseline"] is not None:
        before = document["baseline"]["metrics"]["latency_s"]
        lines.append(
            f"without the plan: {seconds(before)}; the plan takes {found.latency_s / before:.3f} of it"
        )
    lines.append(f"by {found.method}")
    static = document["static"]
    lines.append(
        f"{count(static['macs'], 'MACs')}, weights {count(static['weight_bytes'], 'B')}, activations "
        f"{count(static['peak_activation_bytes'], 'B')} at most"
        + (f", {found.metrics['energy_j'] * 1e3:.3g} mJ" if "energy_j" in found.metrics else "")
    )
    networks = document.get("errors", {}).get("networks", {})
    if networks.get("n"):
        lines.append(
            f"on {networks['n']} networks that were held out: mean error {100 * networks['mape']:.1f} %, "
            f"{100 * networks['within_10']:.0f} % within 10 %, intervals right "
            f"{100 * networks['coverage_90']:.0f} % of the time"
        )
    lines += [f"note: {note}" for note in document["notes"]]
    lines += ["", *_dominant(document, found), "", _table(found, shown)]
    if found.unmodelled:
        lines += ["", "priced by the roofline, or not at all:"]
        lines += [f"  {entry}" for entry in found.unmodelled[:10]]
        if len(found.unmodelled) > 10:
            lines.append(f"  and {len(found.unmodelled) - 10} more (--json)")
    lines += ["", *_widths(steps, found.latency_s)]
    return "\n".join(lines)


def _latency(found: CostEstimate) -> str:
    if "latency_s" not in found.intervals:
        return f"latency {seconds(found.latency_s)}; its error is not known"
    low, high = found.interval
    return f"latency {seconds(found.latency_s)}, 90 % interval [{seconds(low)}, {seconds(high)}]"


def _dominant(document: Mapping[str, Any], found: CostEstimate) -> list[str]:
    lines = []
    for name, part in document["bound"].items():
        share = 100 * part["latency_s"] / found.latency_s
        what = {"launch": "starting kernels", "layout": "converting layouts"}.get(name, name)
        lines.append(f"{share:.0f} % of the time is bound by {what} ({part['kernels']} kernels)")
    return lines


def _table(found: CostEstimate, shown: int) -> str:
    longest = sorted(found.kernels, key=lambda k: -k.latency_s)[:shown]
    rows = [
        (
            kernel.name,
            kernel.op_type,
            seconds(kernel.latency_s),
            "-"
            if kernel.interval is None
            else f"{seconds(kernel.interval[0])} - {seconds(kernel.interval[1])}",
            f"{100 * kernel.latency_s / found.latency_s:.1f} %",
            kernel.bound or "-",
            kernel.method,
        )
        for kernel in longest
    ]
    header = ("kernel", "operator", "time", "90 %", "share", "bound by", "priced")
    rest = len(found.kernels) - len(longest)
    return table(rows, header) + (f"\nand {rest} shorter kernels (--kernels, --json)" if rest > 0 else "")


def _widths(steps: Sequence[Step], latency_s: float) -> list[str]:
    """What a designer can do with it: widths that cost nothing, and the next ones that save something."""
    lines = []
    for step in (s for s in steps if s.is_free):
        lines.append(f"{step.group}: {step.kept} -> {step.widest} units costs nothing")
    for step in (s for s in steps if s.rounded is not None):
        lines.append(f"{step.group}: {step.size} -> {step.rounded} channels costs nothing")
    for step in [s for s in steps if s.narrower is not None][:_SHOWN_STEPS]:
        line = (
            f"{step.group}: the next narrower width that is faster is {step.narrower} of {step.kept} units, "
            f"-{seconds(step.saved_s)} ({100 * step.saved_s / latency_s:.1f} %)"
        )
        if step.dearer is not None and step.narrower is not None and step.dearer > step.narrower:
            line += f"; {step.dearer} would be slower"
        lines.append(line)
    return lines
