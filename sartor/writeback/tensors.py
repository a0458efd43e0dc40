"""Parameters and buffers of a module, cut by the indices that a plan keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from sartor.errors import InternalError, PlanError, UsageError
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.plan import Plan
from sartor.ir.program import Program

Kept = Mapping[str, Mapping[int, np.ndarray]]
"""Kept positions by tensor name and axis; axes that stay whole are absent."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One name under which a module holds a tensor."""

    owner: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """What lies there now."""
        found = getattr(self.owner, self.attribute)
        assert isinstance(found, torch.Tensor)
        return found


def places(module: nn.Module) -> dict[int, list[Place]]:
    """Every parameter and buffer by identity, with all names under which it is shared."""
    found: dict[int, list[Place]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for store in (owner._parameters, owner._buffers):
            for attribute, tensor in store.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append(Place(owner, attribute, prefix + attribute))
    return found


def by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names, non-persistent buffers included."""
    return {place.name: place.tensor for shared in places(module).values() for place in shared}


def require_same(module: nn.Module, program: Program) -> None:
    """Check that a program has the module's tensors by name and shape.

    Raises:
        UsageError: a shape differs, or no name is common.
    """
    own = by_name(module)
    common = [name for name in program.initializers if name in own]
    if not common and own:
        raise UsageError(f"The program '{program.source.name}' has no parameter of this module; capture it.")
    for name in common:
        expected, found = program.initializer_array(name).shape, tuple(own[name].shape)
        if expected != found:
            raise UsageError(
                f"Parameter '{name}' has shape {list(found)} in the module and {list(expected)} in the program; "
                "capture this module again."
            )


def kept_indices(program: Program, plan: Plan, analysis: ChannelAnalysis) -> dict[str, dict[int, np.ndarray]]:
    """Which positions of each parameter axis stay; only axes that lose something."""
    alive = analysis.alive_atoms(plan)
    kept: dict[str, dict[int, np.ndarray]] = {}
    for (name, axis), atoms in analysis.propagation.parameter_atoms.items():
        if not alive[atoms].all():
            kept.setdefault(name, {})[axis] = np.flatnonzero(alive[atoms])
    return kept


def narrow(module: nn.Module, kept: Kept, narrowed: Program) -> dict[str, tuple[int, ...]]:
    """Cut the tensors of `module` in place; shared tensors stay shared.

    Args:
        module: a private copy.
        kept: from `kept_indices`.
        narrowed: the narrowed program, which has the shapes to arrive at.

    Returns:
        Former shapes of the cut tensors, under all their names.

    Raises:
        PlanError: two names of one tensor are to be cut differently.
        InternalError: a cut tensor has another shape than in the narrowed program.
    """
    old: dict[str, tuple[int, ...]] = {}
    for shared in places(module).values():
        wanted = {place.name: kept[place.name] for place in shared if place.name in kept}
        if not wanted:
            continue
        first, axes = next(iter(wanted.items()))
        for name, other in wanted.items():
            if set(axes) != set(other) or any(not np.array_equal(axes[a], other[a]) for a in axes):
                raise PlanError(
                    f"'{first}' and '{name}' are one tensor of the module, and the plan keeps other indices "
                    "of each. Plan both alike, or give each a tensor of its own."
                )
        tensor = shared[0].tensor
        cut = _cut(tensor, axes)
        target = narrowed.initializers.get(first)
        if target is not None and tuple(narrowed.initializer_array(first).shape) != tuple(cut.shape):
            raise InternalError(
                f"Parameter '{first}' has shape {list(cut.shape)} after the cut, and "
                f"{list(narrowed.initializer_array(first).shape)} in the narrowed program; report this."
            )
        for place in shared:
            old[place.name] = tuple(tensor.shape)
            _put(place, cut)
    return old


def _cut(tensor: torch.Tensor, axes: Mapping[int, np.ndarray]) -> torch.Tensor:
    data = tensor.detach()
    for axis, indices in axes.items():
        data = data.index_select(axis, torch.from_numpy(indices).to(data.device))
    if data.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(tensor, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)  # marks that optimizers read, such as "no weight decay"
    return parameter


def _put(place: Place, tensor: torch.Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        place.owner._parameters[place.attribute] = tensor
    else:
        place.owner._buffers[place.attribute] = tensor
