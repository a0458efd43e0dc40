"""`rescale`: another width, depth and input size."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import ChannelGroup, channel_groups, coarsest
from sartor.ir.plan import Plan, Widening
from sartor.ir.program import Program
from sartor.passes import deepen, widen
from sartor.passes.base import CRITERIA, Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.candidates import kept_by
from sartor.passes.prune import rewrite
from sartor.passes.prune_channels import PruneChannels
from sartor.passes.remove_blocks import RemoveBlocks
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter

_GRIDS, _OFF = (32, 16, 8, 4, 2), 0.05


@dataclasses.dataclass(frozen=True)
class Rescale(Pass):
    """Multiply the width, the depth and the input size of a network, in both directions.

    Becomes: with `width`, channel groups of as many times their units; with `depth`, as many times the residual blocks
    that could be removed; with `resolution`, the same layers on smaller or larger maps. Shapes, crops, sizes of Resize
    and pools over the whole map follow; tables of positions (position embeddings) are interpolated, class tokens stay.
    Of features that are heads times features per head, the heads are multiplied.

    What goes is the least important by `criterion`. Added units are copies, and what reads them is divided among them;
    added blocks have the weights of the block before them and add zero.

    Ensures: growing width and depth changes no result. Another input size gives the program that capturing the model at
    that size gives, where the model has no tables of positions.

    Refuses when: weights fix the input size (a Linear behind a flattened map), positions are picked by number, windows
    do not fit the new map, or an operator has no rule for it; a group is blocked (see `sartor inspect`) or mixed
    without weights; a block cannot be removed.
    """

    name: ClassVar[str] = "rescale"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING
    resizes_inputs: ClassVar[bool] = True

    width: float = option(1.0, help="new over old units of every group", minimum=0.01, maximum=16.0)
    depth: float = option(1.0, help="new over old number of residual blocks", minimum=0.0, maximum=16.0)
    resolution: float = option(
        1.0, help="new over old height and width of images; see `grid`", minimum=0.01, maximum=16.0
    )
    grid: int = option(
        0,
        help="round heights and widths to multiples of this; 0: the largest of 32 to 1 that is 5 % off at most",
        minimum=0,
    )
    channel_grid: int = option(1, help="round widths up to multiples of this many channels", minimum=1)
    criterion: str = option("l2", help=f"what ranks what goes: {CRITERIA}")
    seed: int = option(0, help="of criterion random, and of which units are copied", minimum=0)

    def plan(self, program: Program, context: Context) -> Any:
        """All three dimensions; the input size tried out. See `Pass.plan`."""
        parts = [self._width(program, context), self._depth(program, context), self.resolution_plan(program)]
        refusals = tuple(refusal for part in parts for refusal in part.refusals)
        width, depth, resolution = (part.data or Plan(program.source.sha256) for part in parts)
        plan = Plan(
            program.source.sha256,
            groups=width.groups,
            blocks=depth.blocks,
            notes={"pass": str(self)},
            sizes=resolution.sizes,
            widened=width.widened,
            deepened=depth.deepened,
        )
        return Planned(plan if any(part.data is not None for part in parts) else None, refusals)

    def _width(self, program: Program, context: Context) -> Planned:
        if self.width == 1.0:
            return Planned(None)
        analysis = channel_groups(program, context.keep)
        chosen = {group.name for group in coarsest(analysis.groups)}
        if self.width < 1.0:
            ratio = 1.0 - self.width
            step = PruneChannels(
                ratio=ratio, criterion=self.criterion, seed=self.seed, grid=self.channel_grid
            )
            found = step.plan(program, context)
            groups = {name: entry for name, entry in found.data.groups.items() if name in chosen}
            return Planned(Plan(program.source.sha256, groups) if groups else None, found.refusals)
        refusals = [Refusal(b.value, f"{b.reason} {b.source}".strip()) for b in analysis.blocked]
        widened = {}
        for group in analysis.groups:
            if group.name not in chosen:
                continue
            if reason := widen.obstacle(analysis, group):
                refusals.append(Refusal(group.name, reason))
            elif copies := self._copies(group):
                widened[group.name] = Widening(group.size, copies)
        return Planned(Plan(program.source.sha256, widened=widened) if widened else None, tuple(refusals))

    def _copies(self, group: ChannelGroup) -> tuple[int, ...]:
        """Every unit equally often, and by chance those that are left."""
        step = self.channel_grid // math.gcd(self.channel_grid, group.granularity)
        wanted = math.ceil(round(group.size * self.width) / step) * step
        whole, rest = divmod(wanted - group.size, group.size)
        generator = np.random.default_rng([self.seed, zlib.crc32(group.name.encode())])
        chosen = generator.permutation(group.size)[:rest]
        return tuple(sorted([*np.tile(np.arange(group.size), whole).tolist(), *chosen.tolist()]))

    def _depth(self, program: Program, context: Context) -> Planned:
        if self.depth == 1.0:
            return Planned(None)
        blocks = residual_blocks(program)
        free = [b for b in blocks if b.removable and kept_by(program, b, context) is None]
        change = round(len(free) * abs(self.depth - 1.0))
        if not free:
            return Planned(None, (Refusal("*", "no residual block can be removed or repeated"),))
        if not change:
            return Planned(None)
        if self.depth < 1.0:
            step = RemoveBlocks(count=change, criterion=self.criterion, seed=self.seed)
            found: Planned = step.plan(program, context)
            return found
        refused = {block.name: reason for block in free if (reason := deepen.obstacle(program, block))}
        free = [block for block in free if block.name not in refused]
        repeats = {
            block.name: times
            for i, block in enumerate(free)
            if (times := change * (i + 1) // len(free) - change * i // len(free))
        }
        refusals = tuple(Refusal(name, reason) for name, reason in refused.items())
        return Planned(Plan(program.source.sha256, deepened=repeats) if repeats else None, refusals)

    def resolution_plan(self, program: Program) -> Planned:
        """The plan of the input size alone, tried out."""
        sizes = {
            value.name or "": shape
            for value in program.graph.inputs
            if (shape := self._size(program, value)) != program.input_shapes[value.name or ""]
        }
        if not sizes:
            return Planned(None)
        clone = program.clone()
        try:
            resize_inputs(clone, sizes, Rewriter(clone, self.name))
        except PlanError as error:
            return Planned(None, (Refusal(next(iter(sizes)), str(error)),))
        return Planned(Plan(program.source.sha256, sizes=sizes))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Rescale mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)

    def _size(self, program: Program, value: ir.Value) -> tuple[int, ...]:
        shape = list(program.input_shapes[value.name or ""])
        for axis in spatial_axes(program, value):
            shape[axis] = self._rounded(shape[axis])
        return tuple(shape)

    def _rounded(self, length: int) -> int:
        wanted = length * self.resolution
        grids = (self.grid,) if self.grid else tuple(g for g in _GRIDS if length % g == 0)
        for grid in grids:
            found = max(round(wanted / grid), 1) * grid
            if self.grid or abs(found / wanted - 1) <= _OFF:
                return found
        return max(round(wanted), 1)


def spatial_axes(program: Program, value: ir.Value) -> Sequence[int]:
    """Height and width (and depth) of an image input: behind batch and channels, or between them.

    Between them where its first readers move the last axis to the front, as files of TensorFlow do.
    """
    shape = program.input_shapes[value.name or ""]
    if len(shape) < 4:
        return ()
    last = (0, len(shape) - 1, *range(1, len(shape) - 1))
    readers = [node for node, _ in value.uses()]
    if readers and all(
        node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == last for node in readers
    ):
        return range(1, len(shape) - 1)
    return range(2, len(shape))
