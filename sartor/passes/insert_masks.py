"""`insert-masks` and `harden-masks`: which filters stay is learned with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sartor.errors import PlanError
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.dialect import DIALECT_VERSION, filter_mask, is_filter_mask
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import DIALECT_DOMAIN, Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.prune import rewrite
from sartor.passes.rewriter import Rewriter

SUFFIX = ".mask"
"""Of the names of masks: the rest is the group's."""


@dataclasses.dataclass(frozen=True)
class InsertMasks(Pass):
    """Give every channel group a trainable mask, one number per unit, that decides whether the unit stays.

    Becomes: y = Conv(x, W)   →   y = Conv(x, W · FilterMask(mask, index))     in every layer that reads the group

    `FilterMask` is 1 where the sigmoid of the mask is one half or more, and 0 elsewhere; it lets the gradient of the
    sigmoid through. Recovery trains masks with the weights, against the share of units that they keep, and
    `harden-masks` cuts what they switched off.

    Ensures: the same function, because all masks are open.

    Refuses when: zeros cannot make the units of a group contribute nothing (see `sartor inspect`).
    """

    name: ClassVar[str] = "insert-masks"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    start: float = option(0.1, help="of every mask; a unit goes when training brings it below 0", above=0.0)

    def plan(self, program: Program, context: Context) -> Any:
        """Where each mask multiplies. See `Pass.plan`."""
        analysis = channel_groups(program, context.keep)
        masks: dict[str, Any] = {}
        refusals = [Refusal(b.value, f"{b.reason} {b.source}".strip()) for b in analysis.blocked]
        for group in analysis.groups:
            if group.mixed:
                refusals.append(Refusal(group.name, f"its features are mixed without weights: {group.mixed}"))
                continue
            masks[group.name] = {"size": group.size, "places": _places(analysis, group)}
        return Planned({"start": self.start, "masks": masks} if masks else None, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Insert them. See `Pass.apply`."""
        function = filter_mask()
        program.model.functions.setdefault(function.identifier(), function)
        program.model.opset_imports[DIALECT_DOMAIN] = DIALECT_VERSION
        for name, entry in plan["masks"].items():
            dtype = program.initializers[entry["places"][0]["initializer"]].dtype
            values = np.full(entry["size"], plan["start"], dtype.numpy())  # type: ignore[union-attr]
            mask = rewriter.add_initializer(name + SUFFIX, values)
            for place in entry["places"]:
                node = rewriter.node(place["node"])
                weight = node.inputs[place["input"]]
                assert weight is not None
                rank = len(program.initializer_shape(place["initializer"]) or ())
                shape = [-1 if axis == place["axis"] else 1 for axis in range(rank)]
                index = np.asarray(place["index"], np.int64).reshape(shape)
                table = rewriter.add_initializer(f"{name}{SUFFIX}_index", index)
                call = rewriter.insert_before(
                    node, function.name, [mask, table], name=f"{name}{SUFFIX}", domain=DIALECT_DOMAIN
                )
                product = rewriter.insert_before(
                    node, "Mul", [weight, call.outputs[0]], name=f"{name}{SUFFIX}ed"
                )
                rewriter.set_input(node, place["input"], product.outputs[0])
            rewriter.count("masks_inserted")


@dataclasses.dataclass(frozen=True)
class HardenMasks(Pass):
    """Cut the units that masks switched off, and take the masks away.

    Becomes: y = Conv(x, W · FilterMask(mask, index))   →   y = Conv(x, W′)     without the units

    Ensures: equal to the program with masks.

    Refuses when: all units of a group are switched off: the one whose mask is largest stays.
    """

    name: ClassVar[str] = "harden-masks"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def plan(self, program: Program, context: Context) -> Any:
        """What the masks keep, as a plan for the program without them. See `Pass.plan`."""
        masks = masks_of(program)
        if not masks:
            return None
        bare = program.clone()
        take_away(bare, Rewriter(bare, self.name))
        bare.invalidate()
        analysis = channel_groups(bare)
        groups, refusals = {}, []
        for name, values in masks.items():
            group = analysis.sized(name, len(values))
            wanted = int((values >= 0).sum())
            keep = group.keep_best(values, wanted)
            if len(keep) > wanted:
                refusals.append(Refusal(name, f"{len(keep) - wanted} of the units that are off have to stay"))
            if len(keep) < group.size:
                groups[name] = GroupPlan(group.size, keep)
        plan = Plan(program.source.sha256, groups, notes={"pass": str(self)})
        return Planned(plan, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Cut. See `Pass.apply`."""
        take_away(program, rewriter)
        program.invalidate()
        rewrite(program, plan, rewriter)


def masks_of(program: Program) -> Mapping[str, np.ndarray]:
    """Values of the masks by group; empty where there are none."""
    found = {}
    for node in program.nodes():
        if is_filter_mask(node) and node.inputs[0] is not None:
            name = node.inputs[0].name or ""
            found[name.removesuffix(SUFFIX)] = program.initializer_array(name)
    return found


def take_away(program: Program, rewriter: Rewriter) -> None:
    """Remove masks of `program` in place, whatever they say."""
    for call in [node for node in program.nodes() if is_filter_mask(node)]:
        (product,) = {user for user, _ in call.outputs[0].uses()}
        weight = next(value for value in product.inputs if value is not call.outputs[0])
        if product.op_type != "Mul" or weight is None:
            raise PlanError(
                f"The mask '{call.name}' does not multiply a weight; it was not made by 'insert-masks'."
            )
        read = [value for value in call.inputs if value is not None]
        for user, index in list(product.outputs[0].uses()):
            rewriter.set_input(user, index, weight)
        rewriter.remove_nodes([product, call])
        for value in read:
            if not value.uses():
                rewriter.remove_initializer(value)
    for key in [key for key in program.model.functions if key[1] == filter_mask().name]:
        rewriter.remove_function(key)


def _places(analysis: ChannelAnalysis, group: Any) -> list[dict[str, Any]]:
    """Where zeros make units contribute nothing, with the unit of every index there, −1 for none."""
    units = analysis.units_of_atoms(group)
    atoms = analysis.propagation.parameter_atoms
    return [
        {
            "initializer": zero.initializer,
            "axis": zero.axis,
            "node": zero.node,
            "input": zero.input,
            "index": np.where(zero.mask, units[atoms[zero.initializer, zero.axis]], -1).tolist(),
        }
        for zero in analysis.zeros_of(group)
    ]
