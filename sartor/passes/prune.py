"""`apply_plan`: replays a plan, byte-identical on every run."""

from __future__ import annotations

from sartor.errors import PlanError
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.narrow import narrow
from sartor.passes.remove_blocks import remove_blocks
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter


def apply_plan(program: Program, plan: Plan, analysis: ChannelAnalysis | None = None) -> Program:
    """A new program with the plan's channels and blocks removed and its inputs resized; `program` is not changed.

    Args:
        program: the canonical program the plan was made for.
        plan: what is to be done.
        analysis: channel groups of `program`, if they are at hand.

    Raises:
        PlanError: the plan belongs to another model, or is not legal for this one.
    """
    check_source(program, plan)
    clone = program.clone()
    rewriter = Rewriter(clone, "apply-plan")
    rewrite(clone, plan, rewriter, analysis)
    clone.invalidate()
    clone.applied = (*program.applied, "apply-plan")
    return clone


def rewrite(
    program: Program, plan: Plan, rewriter: Rewriter, analysis: ChannelAnalysis | None = None
) -> None:
    """Narrow groups, remove blocks and resize inputs of `program` in place; groups refer to the program before all."""
    if plan.groups:
        analysis = analysis or channel_groups(program, approximate=plan.approximate)
        narrow(program, analysis, analysis.alive_atoms(plan), rewriter)
        program.invalidate()
    if plan.blocks:
        remove_blocks(program, plan.blocks, rewriter)
    resize_inputs(program, plan.sizes, rewriter)


def check_source(program: Program, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanError: the hashes differ.
    """
    if plan.source_sha256 != program.source.sha256:
        raise PlanError(
            f"The plan was made for a model with SHA-256 {plan.source_sha256[:16]}…, but '{program.source.name}' "
            f"has {program.source.sha256[:16]}…. Make a new plan for this model."
        )
