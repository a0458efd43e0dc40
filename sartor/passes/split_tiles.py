"""`split-tiles`: a part of the network tile by tile, so that less of it is in memory at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.errors import PlanError, UsageError
from sartor.ir.memory import DEFAULT, MICROCONTROLLER, PLAIN
from sartor.ir.program import Program
from sartor.ir.tiles.region import Region, Stop, grid, map_axes, regions, tile_of
from sartor.ir.tiles.spans import Untileable
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import Rewriter
from sartor.passes.tile_search import best_split, layers, narrowest
from sartor.passes.tiled import split

_RULES = {"default": DEFAULT, "microcontroller": MICROCONTROLLER, "plain": PLAIN}


@dataclasses.dataclass(frozen=True)
class SplitTiles(Pass):
    """Compute what lies between two values tile by tile, so that large maps never exist as a whole.

    Becomes: y = f(x)   →   y = Concat(f₁(Slice(x, tile 1)), f₂(Slice(x, tile 2)), …)

    A tile reads as much more of `x` as the windows of its layers reach beyond it, and is padded at the true borders
    only. It is computed to the end of the region before the next one begins, and weights are shared. Of what is
    `auto`, the memory model decides: the split that needs the least, of those that repeat little.

    Ensures: the same function, also bit by bit of quantized networks: tiles have the scales of the whole.

    Refuses when: the region has a node that looks at the whole map, or puts positions elsewhere; no split within
    `overhead` needs less memory.

    Reference: Lin et al., "MCUNetV2: memory-efficient patch-based inference for tiny deep learning", NeurIPS 2021.
    """

    name: ClassVar[str] = "split-tiles"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    rows: int | None = option(None, help="tiles from top to bottom", minimum=1, absent="auto")
    cols: int | None = option(None, help="tiles from left to right", minimum=1, absent="auto")
    depth: int | None = option(
        None, help="convolutions, matrix products and pools in the region", minimum=1, absent="auto"
    )
    entry: str = option("", help="value that tiles are cut out of; without, the first input with a map")
    overhead: float = option(0.1, help="MACs that may be added, over those of the network", minimum=0.0)
    memory: str = option(
        "microcontroller", help="rules of the runtime whose memory counts", choices=sorted(_RULES)
    )

    def plan(self, program: Program, context: Context) -> Any:
        """Where the region begins and ends, and how many tiles. See `Pass.plan`."""
        entry = _entry(program, self.entry)
        try:
            found, stop = regions(program, entry, map_axes(program.shapes()[entry.name or ""]))
        except Untileable as error:
            return Planned(None, (Refusal(entry.name or "", f"the value {error}"),))
        chosen = self._of_depth(program, found, stop)
        if isinstance(chosen, Refusal):
            return Planned(None, (chosen,))
        axes = len(chosen[-1].axes[chosen[-1].exit])
        fixed = (self.rows, self.cols)[-axes:]
        if self.depth is not None and all(count is not None for count in fixed):
            return self._given(program, chosen[-1], [count or 1 for count in fixed])
        best = best_split(program, chosen, fixed, self.overhead, _RULES[self.memory])
        if best is None:
            reason = f"no split that adds at most {self.overhead:.0%} of the MACs needs less memory"
            return Planned(None, (Refusal(entry.name or "", reason),))
        return _document(best.region, best.counts)

    def _of_depth(self, program: Program, found: Sequence[Region], stop: Stop) -> list[Region] | Refusal:
        """Regions to choose from: of the depth that is given the last, else those with little to put together."""
        if self.depth is None:
            usable = narrowest(program, found)
            return usable or Refusal(stop.node, stop.reason)
        exact = [region for region in found if layers(program, region) == self.depth]
        if exact:
            return exact[-1:]
        deepest = layers(program, found[-1]) if found else 0
        if deepest < self.depth:
            return Refusal(stop.node, f"{stop.reason}, and only {deepest} layers are before it")
        return Refusal(
            "", f"behind {self.depth} layers there is no single value; choose where branches are together"
        )

    def _given(self, program: Program, region: Region, counts: Sequence[int]) -> Any:
        lengths = [program.shapes()[region.exit][axis] for axis in region.axes[region.exit]]
        for count, length in zip(counts, lengths, strict=True):
            if count > length:
                reason = f"the map has {length} positions there, too few for {count} tiles"
                return Planned(None, (Refusal(region.exit, reason),))
        if math.prod(counts) == 1:
            return None
        try:
            for wanted in grid(program.shapes()[region.exit], region.axes[region.exit], counts):
                tile_of(program, region, wanted)
        except Untileable as error:
            return Planned(None, (Refusal(region.exit, str(error)),))
        return _document(region, counts)

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Split. See `Pass.apply`."""
        entry = _entry(program, plan["entry"])
        found, _ = regions(program, entry, map_axes(program.shapes()[plan["entry"]]))
        region = next((one for one in found if one.exit == plan["exit"]), None)
        if region is None:
            raise PlanError(
                f"The plan splits what is between '{plan['entry']}' and '{plan['exit']}', which is no region of this "
                "program. Make the plan from the program it is applied to."
            )
        split(program, region, plan["counts"], rewriter)


def _document(region: Region, counts: Sequence[int]) -> Mapping[str, Any]:
    return {"entry": region.entry, "exit": region.exit, "counts": list(counts)}


def _entry(program: Program, name: str) -> ir.Value:
    """The value that tiles are cut out of: what has this name, else an input, behind its quantization."""
    shapes = program.shapes()
    values = [*program.graph.inputs, *(value for node in program.nodes() for value in node.outputs)]
    if name:
        named = next((value for value in values if value.name == name), None)
        if named is None:
            raise UsageError(f"There is no value '{name}' to cut tiles out of; see 'sartor inspect'.")
        return named
    maps = [value for value in program.graph.inputs if len(shapes[value.name or ""]) > 2]
    found = maps[0] if maps else program.graph.inputs[0]
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        users = {user for user, _ in found.uses()}
        user = next(iter(users), None)
        if len(users) != 1 or user is None or user.op_type != op_type:
            return maps[0] if maps else found
        found = user.outputs[0]
    return found
