"""MASKED: the original with zeros where a plan cuts. It computes what the pruned program computes.

Nodes and names are those of the original; only initializers differ. A parameter that is zeroed for one
reader and needed whole by another is zeroed in a private copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from sartor.errors import PlanError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.channels.masking import Zero, zeros
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.prune import check_source
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter


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
    if plan.factors:
        raise PlanError(
            "The plan factorizes layers, whose weights are others then; it has no MASKED form. Leave its section "
            "'factors' away."
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
    by_name: dict[str, dict[tuple[str, int], dict[int, np.ndarray]]] = {}
    for demand in demands:
        axes = by_name.setdefault(demand.initializer, {}).setdefault((demand.node, demand.input), {})
        axes[demand.axis] = axes.get(demand.axis, np.zeros_like(demand.mask)) | demand.mask
    result: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, wanted in by_name.items():
        uses = {(node.name or "", index) for node, index in program.initializers[name].uses()}
        first = next(iter(wanted.values()))
        alike = all(_equal(axes, first) for axes in wanted.values()) and uses == set(wanted)
        for (node, index), axes in [(next(iter(wanted)), first)] if alike else wanted.items():
            value = (
                program.initializers[name]
                if alike
                else rewriter.private_initializer(rewriter.node(node), index)
            )
            for axis, mask in axes.items():
                result[value.name or "", axis] = tuple(int(i) for i in np.flatnonzero(mask))
            rewriter.derive_initializer(value, functools.partial(_with_zeros, axes))
    return tuple(Zeroed(name, axis, indices) for (name, axis), indices in sorted(result.items()))


def _with_zeros(axes: Mapping[int, np.ndarray], array: np.ndarray) -> np.ndarray:
    array = np.array(array)
    for axis, mask in axes.items():
        if array.ndim:
            array[(slice(None),) * axis + (mask,)] = 0
        else:
            array[...] = 0
    return array


def _equal(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[a] == other[a]).all() for a in one)
