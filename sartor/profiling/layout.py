"""What it costs to call the runtime and to enter and leave its layout, which is no kernel's own time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sartor.cost_models.boundary import Boundary, Map, boundary_from, probe_models
from sartor.ir.fusion_rules import FusionRules
from sartor.profiling.design import Point
from sartor.profiling.shapes import INPUT_SIDES, SIDES
from sartor.profiling.timing import BATCH, Effort, Job, Timer

_CHANNELS = (16, 128, 1024)
_MOST_ELEMENTS = 1_600_000
_EFFORT = Effort(half_width=0.03, most=6)


def probes_of(edges: Iterable[int] = (*SIDES, *INPUT_SIDES)) -> list[tuple[Map, int]]:
    """(feature map, channels) to probe: up to three widths for every square map."""
    found: list[tuple[Map, int]] = []
    for edge in sorted(set(edges)):
        widest = max(16, _MOST_ELEMENTS // (edge * edge) // 16 * 16)  # other widths are not converted at all
        found += [((1, edge, edge), c) for c in sorted({min(c, widest) for c in _CHANNELS})]
    return found


def edges_of(points: Iterable[Point]) -> set[int]:
    """Edges of the maps that these kernels read and write, of those that `probes_of` knows by itself."""
    maps = [p.spec[side] for p in points if p.spec["op"] == "Conv" for side in ("spatial", "out")]
    return {edge for edge, *rest in maps if rest == [edge]} & {*SIDES, *INPUT_SIDES}


def boundary_of(chosen: Sequence[tuple[Map, int]], ratios: Sequence[float], rules: FusionRules) -> Boundary:
    """The boundary of a target; only what has a blocked layout for some widths fuses by it."""
    aligned = any(rules.takes(op_type, "BlockedAdd") for op_type in rules.fuses)
    return boundary_from(chosen, ratios, aligned_only=aligned)


def time_probes(chosen: Sequence[tuple[Map, int]], timer: Timer) -> tuple[list[float], list[float]]:
    """Times for `boundary_from`, in units of the reference, NaN where one failed; and the reference's seconds."""
    models = probe_models(chosen)
    ratios: list[float] = []
    reference: list[float] = []
    for start in range(0, len(models), BATCH):
        batch = timer([Job(model) for model in models[start : start + BATCH]], _EFFORT)
        ratios += [timed.warm.ratio if timed.warm is not None else math.nan for timed in batch.times]
        reference.append(batch.reference_s)
    return ratios, reference
