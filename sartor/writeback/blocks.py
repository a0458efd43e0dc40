"""Residual blocks that a plan removes, taken out of a module.

A module that disappears whole (`y = x + f(x)` is its entire forward) becomes a `Shortcut`. Otherwise the
Add stays in the author's code, and the modules of the branch make way: the last of them becomes
`Nothing`, which returns zeros, those before it a `Shortcut`. Whether that is the removed block is decided
by running it (`sartor.writeback.proof`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sartor.errors import PlanError
from sartor.ir.blocks import Block, residual_blocks
from sartor.ir.plan import Plan
from sartor.ir.program import Program


class Shortcut(nn.Module):
    """In place of a removed block or layer: returns its first argument."""

    def forward(self, input: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        """`input`, whatever else is given."""
        return input


class Nothing(nn.Module):
    """In place of the last layer of a removed branch: zeros like its first argument.

    Args:
        pair: return `(zeros, None)`, as attention modules do.
    """

    def __init__(self, pair: bool = False):
        super().__init__()
        self.pair = pair

    def forward(self, input: torch.Tensor, *others: Any, **options: Any) -> Any:
        """Zeros of the shape of `input`."""
        zeros = torch.zeros_like(input)
        return (zeros, None) if self.pair else zeros

    def extra_repr(self) -> str:
        """Whether it returns a pair."""
        return "pair=True" if self.pair else ""


@dataclasses.dataclass(frozen=True)
class Removed:
    """What was put in place of modules.

    Attributes:
        paths: replaced module paths.
        blocks: names of the removed blocks.
    """

    paths: tuple[str, ...]
    blocks: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Whether a tensor was in a replaced module."""
        return any(under(name, path) for path in self.paths)


def under(path: str, ancestor: str) -> bool:
    """Whether a dotted path is `ancestor` or lies inside it."""
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def replace(module: nn.Module, program: Program, narrowed: Program, plan: Plan) -> Removed:
    """Put a `Shortcut` or `Nothing` in place of every module that a removed block made superfluous.

    Args:
        module: a private copy.
        program: the program before.
        narrowed: the program without the blocks.
        plan: names the blocks.

    Raises:
        PlanError: a block's branch has no module of its own.
    """
    if not plan.blocks:
        return Removed((), ())
    left = {node.name for node in narrowed.nodes()}
    paths = {
        n.name or "": program.provenance[n.name or ""].module
        for n in program.nodes()
        if n.name in program.provenance
    }
    alive = {path for name, path in paths.items() if name in left}
    found = {block.name: block for block in residual_blocks(program)}
    replaced: list[str] = []
    for name in plan.blocks:
        block = found[name]
        inside = [paths.get(node, "") for node in block.nodes]
        home = paths.get(block.add, "")
        if home and not any(under(path, home) for path in alive):
            _put(module, home, Shortcut())
            replaced.append(home)
            continue
        gone = _outermost((p for p in inside if p != home), home, alive)
        if not gone:
            where = program.where(next(n for n in program.nodes() if n.name == block.add))
            raise PlanError(
                f"Block '{name}' is no module of its own, its nodes are written out in the forward method of "
                f"'{home or type(module).__name__}' (Add {where}). Leave it out of the plan, or use "
                "sartor.to_fx(sartor.apply_plan(program, plan)) in place of the module."
            )
        for path in gone[:-1]:
            _put(module, path, Shortcut())
        _put(
            module, gone[-1], Nothing(pair=isinstance(module.get_submodule(gone[-1]), nn.MultiheadAttention))
        )
        replaced += gone
    return Removed(tuple(replaced), plan.blocks)


def _outermost(paths: Iterable[str], home: str, alive: set[str]) -> list[str]:
    """The largest modules around `paths`, in order of first use, that do not hold `home` or a living node."""
    found: dict[str, None] = {}
    for path in paths:
        largest = ""
        while path and not under(home, path) and not any(under(other, path) for other in alive):
            largest, path = path, path.rpartition(".")[0]
        if largest:
            found[largest] = None
    return list(found)


def _put(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    new.training = module.get_submodule(path).training
    setattr(owner, name, new)


__all__ = ["Block", "Nothing", "Removed", "Shortcut", "replace", "under"]
