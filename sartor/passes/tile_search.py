"""Where to split and how finely: the least peak memory of those regions and grids that repeat little work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from sartor.ir.fusion import CONTRACTIONS
from sartor.ir.memory import Rules, peak, program_buffers
from sartor.ir.program import Program
from sartor.ir.tiles.region import Region, grid, tile_of
from sartor.ir.tiles.spans import Untileable
from sartor.ir.workload import Workload, build_workload
from sartor.passes.rewriter import Rewriter
from sartor.passes.tiled import split

LAYERS = frozenset({*CONTRACTIONS, "AveragePool", "LpPool", "MaxPool"})
MOST = 8
"""Tiles along an axis; runtimes limit what they concatenate."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A region, and how it is split.

    Attributes:
        region: what is computed tile by tile.
        counts: tiles along each axis of the map.
        overhead: MACs that are added, over those of the whole network.
        peak_bytes: of activations, afterwards.
    """

    region: Region
    counts: tuple[int, ...]
    overhead: float
    peak_bytes: int


def layers(program: Program, region: Region) -> int:
    """Convolutions, matrix products and pools in a region."""
    kinds = {node.name: node.op_type for node in program.nodes()}
    return sum(kinds[name] in LAYERS for name in region.nodes)


def narrowest(program: Program, found: Sequence[Region]) -> list[Region]:
    """Regions whose exit is not larger than those around: there is least to put together.

    Between two layers, as of a norm and an activation behind one, it is the last.
    """
    shapes = program.shapes()
    last = {layers(program, region): region for region in found}
    regions = list(last.values())
    sizes = [math.inf, *(math.prod(shapes[region.exit]) for region in regions), math.inf]
    return [
        region
        for i, region in enumerate(regions)
        if sizes[i + 1] <= sizes[i] and sizes[i + 1] <= sizes[i + 2]
    ]


def grids(axes: int, fixed: Sequence[int | None]) -> Iterator[tuple[int, ...]]:
    """Counts of tiles to try: as many along every axis, or along one alone.

    Args:
        axes: of the map.
        fixed: counts that are given, by axis.
    """
    seen = set()
    for count in range(2, MOST + 1):
        for free in ((count,) * axes, *((count, *[1] * (axes - 1)),)):
            found = tuple(own if own is not None else other for own, other in zip(fixed, free, strict=True))
            if found not in seen and max(found) > 1:
                seen.add(found)
                yield found


def overhead(program: Program, workload: Workload, region: Region, counts: Sequence[int]) -> float:
    """MACs that a split adds, over those of the whole network.

    Raises:
        Untileable: a tile has nothing to read.
    """
    shapes = program.shapes()
    axes = region.axes[region.exit]
    tiles = [tile_of(program, region, wanted) for wanted in grid(shapes[region.exit], axes, counts)]
    added = 0.0
    for node in program.nodes():
        if node.name not in region.locals or node.op_type not in CONTRACTIONS:
            continue
        name = node.outputs[0].name or ""
        whole = math.prod(shapes[name][axis] for axis in region.axes[name])
        parts = sum(
            math.prod(span.length for span in tile.spans[name]) for tile in tiles if name in tile.spans
        )
        added += workload.macs_of_nodes([node.name or ""]) * (parts / whole - 1.0)
    total = workload.macs_of_nodes([node.name or "" for node in program.nodes()])
    return added / total if total else 0.0


def best_split(
    program: Program, found: Sequence[Region], fixed: Sequence[int | None], most: float, rules: Rules
) -> Split | None:
    """The split of least peak memory; None where none needs less than the network as it is.

    Args:
        program: canonical.
        found: regions to choose from.
        fixed: counts of tiles that are given, for the last axes of a map.
        most: MACs that may be added, over those of the whole network.
        rules: of the runtime whose memory counts.
    """
    workload = build_workload(program)
    best: Split | None = None
    least = peak(program_buffers(program, rules).graph()).bytes
    for region in found:
        axes = len(region.axes[region.exit])
        for counts in grids(axes, fixed[-axes:]):
            lengths = [program.shapes()[region.exit][axis] for axis in region.axes[region.exit]]
            if any(count > length for count, length in zip(counts, lengths, strict=True)):
                continue
            try:
                added = overhead(program, workload, region, counts)
                if added > most:
                    continue
                needed = _peak(program, region, counts, rules)
            except Untileable:
                continue
            if needed < least or (best is not None and needed == least and added < best.overhead):
                least, best = needed, Split(region, counts, added, needed)
    return best


def _peak(program: Program, region: Region, counts: Sequence[int], rules: Rules) -> int:
    clone = program.clone()
    split(clone, region, counts, Rewriter(clone, "split-tiles"))
    clone.invalidate()
    return peak(program_buffers(clone, rules).graph()).bytes
