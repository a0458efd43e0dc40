"""MASKED: the original with zeros where a plan cuts. It computes what the pruned program computes.

What a plan adds changes no function, so that MASKED is the same with it and without.

Nodes and names are those of the original; only initializers differ. A parameter that is zeroed for one
reader and needed whole by another is zeroed in a private copy.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sartor.errors import PlanError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.channels.masking import Zero, zeros
from sartor.ir.plan import REPLACEMENTS, Plan
from sartor.ir.program import Program
from sartor.passes.prune import check_source
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter
from sartor.passes.scaled_reads import ScaledRead, scale_reads


@dataclasses.dataclass(frozen=True)
class Zeroed:
    """Zeros along one axis of one initializer of MASKED."""

    initializer: str
    axis: int
    indices: tuple[int, ...]


def masked(
    program: Program, plan: Plan, analysis: ChannelAnalysis | None = None
) -> tuple[Program, tuple[Zeroed, ...]]:
    """The MASKED form of `plan` on `program`, and the list of what was zeroed.

    Raises:
        PlanError: the plan belongs to another model, or is not legal for it.
        PassError: the form cannot be built; names the node that stands in the way.
    """
    check_source(program, plan)
    if plan.approximate:
        raise PlanError(
            "The plan may narrow approximate groups, whose features a norm mixes without weights; they have no "
            "MASKED form. Make a plan of exact groups, or leave the masked model away."
        )
    if plan.replaces_layers:
        section = plan.replacements[0]
        raise PlanError(
            f"The plan {REPLACEMENTS[section]}; it has no MASKED form. Leave its section '{section}' away."
        )
    demands: list[Zero] = []
    if plan.groups:
        analysis = analysis or channel_groups(program)
        demands += zeros(analysis.propagation, ~analysis.alive_atoms(plan))
    clone = program.clone()
    rewriter = Rewriter(clone, "masked")
    if plan.blocks:
        demands += _block_demands(program, plan)
    zeroed = _write(clone, demands, rewriter)
    clone.invalidate()
    resize_inputs(clone, plan.sizes, rewriter)
    return clone, zeroed


def _block_demands(program: Program, plan: Plan) -> list[Zero]:
    """Every reader of a removed block's last affine parameters, inside the block, sees zeros."""
    blocks = {block.name: block for block in residual_blocks(program)}
    demands = []
    for name in plan.blocks:
        block = blocks.get(name)
        if block is None or not block.removable:
            raise PlanError(
                f"'{program.source.name}' has no removable block '{name}'. List blocks with `sartor inspect`."
            )
        inside = set(block.nodes)
        for parameter in block.last_affine:
            for user, index in program.initializers[parameter].uses():
                if user.name in inside:
                    size = max(1, *(program.initializer_shape(parameter) or (1,))[:1])
                    demands.append(Zero(parameter, 0, np.ones(size, dtype=bool), user.name or "", index))
    return demands


def _write(program: Program, demands: list[Zero], rewriter: Rewriter) -> tuple[Zeroed, ...]:
    reads = [
        ScaledRead(zero.initializer, zero.axis, np.where(zero.mask, 0.0, 1.0), zero.node, zero.input)
        for zero in demands
    ]
    written = scale_reads(program, reads, rewriter)
    return tuple(
        Zeroed(name, axis, tuple(int(i) for i in np.flatnonzero(factors == 0)))
        for (name, axis), factors in sorted(written.items(), key=lambda entry: entry[0])
    )
