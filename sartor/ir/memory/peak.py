"""Peak memory of a given schedule, exact: for one graph, or for a population of plans at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.ir.liveness import Peak
from sartor.ir.memory.buffers import BufferGraph, Moment, moments, saved


def peak(graph: BufferGraph) -> Peak:
    """Highest bytes over the steps in their order, and where; the first place of several."""
    best = Peak(-1, "", ())
    for moment in moments(graph):
        total = sum(graph.sizes[b] for b in moment.live) - saved(moment.in_place, graph.sizes)[0]
        if total > best.bytes:
            name = graph.steps[moment.step].name if moment.step >= 0 else ""
            best = Peak(total, name, moment.live)
    return best


def peaks(rows: Sequence[Moment], sizes: Mapping[str, Any]) -> Any:
    """Peak bytes of a population whose buffers have `sizes` (scalars or arrays `[plans]`), in one schedule.

    Args:
        rows: of `moments`; they depend on the schedule alone, not on sizes.
        sizes: bytes by buffer.
    """
    highest: Any = 0.0
    for row in rows:
        total: Any = 0.0
        for buffer in row.live:
            total = total + sizes[buffer]
        gain: Any = 0.0
        for permit in row.in_place:
            extra = sizes[permit.extra] if permit.extra else 0.0
            gain = np.maximum(gain, np.minimum(sizes[permit.read], sizes[permit.write]) - extra)
        highest = np.maximum(highest, total - gain)
    return highest
