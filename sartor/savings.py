"""What a program saves when half of a channel group goes, from the graph alone: no weight is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.ir.extents import Extent
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.workload import build_workload

if TYPE_CHECKING:
    from sartor.ir.channels import ChannelAnalysis, ChannelGroup
    from sartor.ir.workload import Priced, Workload


@dataclasses.dataclass
class Saving:
    """What the whole program loses when half of one group's units are removed and nothing else.

    The figures are those of `sartor apply`. Where units hold different numbers of parameter indices, the half
    with the smallest units goes; otherwise it makes no difference which.

    Attributes:
        units: units removed: half of them, rounded down, fewer where a floor keeps more.
        even: every unit holds as many indices of each member as any other.
        macs: multiply-accumulates saved.
        parameters: parameters saved, counted as `sartor.cost_models.static` counts them.
        weight_bytes: bytes of initializers saved; what rewriting adds, a few bytes of sizes for a Split that
            had none, is not counted.
    """

    units: int
    even: bool
    macs: float = 0.0
    parameters: float = 0.0
    weight_bytes: float = 0.0

    def to_dict(self, macs: float, parameters: float) -> dict[str, Any]:
        """JSON form, with the shares of a program of `macs` and `parameters`."""
        return {
            "units": self.units,
            "macs": round(self.macs),
            "macs_share": round(self.macs / (macs or 1.0), 6),
            "parameters": round(self.parameters),
            "parameters_share": round(self.parameters / (parameters or 1.0), 6),
            "weight_bytes": round(self.weight_bytes),
            "even": self.even,
        }


def half(group: ChannelGroup) -> tuple[int, ...]:
    """The units that stay when half of them go, as many as in `prune-channels{ratio=0.5}`: the largest."""
    sizes = np.zeros(group.size)
    for member in group.members:
        sizes += np.bincount(member.index_map[member.index_map >= 0], minlength=group.size)
    return group.keep_best(sizes, group.size - group.size // 2)


def savings(
    analysis: ChannelAnalysis, workload: Workload, groups: Sequence[ChannelGroup]
) -> dict[str, Saving]:
    """The saving of each group alone, in time proportional to the program.

    Args:
        analysis: that found `groups`.
        workload: of its program and its extents.
        groups: channel groups.
    """
    kept = {group.name: half(group) for group in groups}
    result = {g.name: Saving(g.size - len(kept[g.name]), _even(g)) for g in groups}
    even = {g.name: len(kept[g.name]) / g.size for g in groups if result[g.name].even}
    _add_savings(workload, even, result)
    uneven = {g.name: _dead(analysis, {g.name: kept[g.name]}) for g in groups if g.name not in even}
    if uneven:  # a fraction of the units is not that fraction of an axis: count what goes
        counted = build_workload(analysis.program, _counted_extents(analysis, uneven))
        _add_savings(counted, dict.fromkeys(uneven, 0.0), result)
    return result


def halved(analysis: ChannelAnalysis) -> Priced:
    """Costs of the program when half of every group goes at once."""
    dead = _dead(analysis, {group.name: half(group) for group in analysis.groups})
    extents = _counted_extents(analysis, {"half": dead})
    return build_workload(analysis.program, extents).evaluate({"half": 0.0})


def _add_savings(workload: Workload, fractions: Mapping[str, float], result: Mapping[str, Saving]) -> None:
    """Add what each of `fractions` saves alone."""
    for kernel in workload.kernels:
        for name in kernel.macs.groups & fractions.keys():
            left = float(kernel.macs.evaluate({name: fractions[name]}))
            result[name].macs += kernel.macs.full - left
    for stored in workload.stored:
        size = stored.operand.bytes
        for name in size.groups & fractions.keys():
            saved = size.full - float(size.evaluate({name: fractions[name]}))
            result[name].weight_bytes += saved
            if stored.parameter:
                result[name].parameters += saved / stored.operand.item_bytes


def _even(group: ChannelGroup) -> bool:
    for member in group.members:
        inside = member.index_map[member.index_map >= 0]
        if np.unique(np.bincount(inside, minlength=group.size)).size > 1:
            return False
    return True


def _dead(analysis: ChannelAnalysis, kept: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Boolean per class: removed when these units of these groups stay."""
    groups = {name: GroupPlan(analysis.group(name).size, units) for name, units in kept.items()}
    return analysis.dead(Plan(analysis.program.source.sha256, groups))


def _counted_extents(
    analysis: ChannelAnalysis, dead: Mapping[str, np.ndarray]
) -> dict[str, tuple[Extent, ...]]:
    """Lengths of all axes in which a kept fraction of 0 for one of `dead` removes exactly what it removes.

    Args:
        analysis: channel groups of a program.
        dead: boolean per class, by any name.
    """
    names = list(dead)
    flags = np.stack([dead[name] for name in names], axis=1)
    cache: dict[tuple[int, int], Extent] = {}
    propagation, of_atom = analysis.propagation, analysis.classes.of_atom

    def extent(atoms: np.ndarray, position: int) -> Extent:
        key = (id(atoms), position)
        if key not in cache:
            slices = np.moveaxis(of_atom[atoms], position, 0).reshape(atoms.shape[position], -1)
            gone, counts = np.unique(flags[slices].all(axis=1), axis=0, return_counts=True)
            cache[key] = Extent(
                tuple(
                    (float(count), tuple(name for name, flag in zip(names, row, strict=True) if flag))
                    for row, count in zip(gone, counts, strict=True)
                )
            )
        return cache[key]

    axes = {name: [Extent.constant(d) for d in shape] for name, shape in propagation.shapes.items()}
    for name, labels in propagation.value_labels.items():
        for factor in labels:
            for position, axis in enumerate(factor.axes):
                axes[name][axis] = extent(factor.atoms, position)
    for (name, axis), atoms in propagation.parameter_atoms.items():
        axes[name][axis] = extent(atoms, 0)
    return {name: tuple(extents) for name, extents in axes.items()}
