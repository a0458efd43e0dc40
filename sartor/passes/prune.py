"""`apply_plan`: replays a plan, byte-identical on every run."""

from __future__ import annotations

import dataclasses

from sartor.errors import PlanError
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.deepen import repeat_blocks
from sartor.passes.factored import factorize
from sartor.passes.fused import fuse
from sartor.passes.grouped import group
from sartor.passes.narrow import narrow
from sartor.passes.remove_blocks import remove_blocks
from sartor.passes.remove_layers import remove_layers
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter
from sartor.passes.widen import share_out
from sartor.passes.widths import Widths


def apply_plan(program: Program, plan: Plan, analysis: ChannelAnalysis | None = None) -> Program:
    """A new program with everything that the plan says done to it; `program` is not changed.

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


def at_plan_size(program: Program, plan: Plan) -> tuple[Program, Plan]:
    """The program with the plan's input sizes, and the rest of the plan, whose names are the same at every size.

    Raises:
        PlanError: as `apply_plan`.
    """
    if not plan.sizes:
        return program, plan
    resized = apply_plan(program, Plan(plan.source_sha256, sizes=plan.sizes))
    return resized, dataclasses.replace(plan, sizes={})


def rewrite(
    program: Program, plan: Plan, rewriter: Rewriter, analysis: ChannelAnalysis | None = None
) -> None:
    """Widths of groups, blocks, layers and input sizes, as the plan says and in this order, in place.

    Groups and blocks are those of the program before all of it, and the weights of layers those that are left.
    """
    if plan.groups or plan.widened:
        analysis = analysis or channel_groups(program, approximate=plan.approximate)
        widths = Widths(analysis, plan)
        narrow(program, analysis, widths, rewriter)
        share_out(program, analysis, widths, rewriter)
        program.invalidate()
    if plan.blocks:
        remove_blocks(program, plan.blocks, rewriter)
    repeat_blocks(program, plan.deepened, rewriter)
    remove_layers(program, plan.layers, rewriter)
    fuse(program, plan.fused, rewriter)
    group(program, plan.grouped, rewriter)
    factorize(program, plan.factors, rewriter)
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
