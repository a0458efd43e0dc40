"""One question, answered by the cheapest model that is sure enough: `estimate(workload, target)`.

Kernels escalate inside a profile: measured, learned, roofline (`ladder`). As a whole, a described device has its
roofline only; a profile has an interval; and what is still too wide is measured, if the target can be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from sartor.cost_models.ladder import Ladder
from sartor.cost_models.protocol import CostEstimate
from sartor.cost_models.roofline import Roofline
from sartor.errors import UsageError
from sartor.ir.population import Fractions, Removed
from sartor.ir.workload import Workload

Measure = Callable[[Workload, Fractions, Removed], tuple[float, tuple[float, float]]]
"""Measures a plan as a whole: median seconds, and their 95 % interval."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What is known about a target, cheapest first.

    Attributes:
        name: for messages.
        roofline: of its published constants.
        ladder: of its device profile.
        measure: runs a plan on it; see `sartor.profiling.whole.measuring`.
    """

    name: str
    roofline: Roofline | None = None
    ladder: Ladder | None = None
    measure: Measure | None = None


def estimate(
    workload: Workload,
    target: Target,
    fractions: Fractions | None = None,
    removed: Removed | None = None,
    *,
    half_width: float = math.inf,
) -> CostEstimate:
    """Price one plan.

    Args:
        workload: of the program.
        target: what can answer.
        fractions: kept fraction per group, scalars.
        removed: removed blocks, scalars.
        half_width: of the interval, as a share of the latency, that is narrow enough. What is wider, or has no
            interval, is measured where that is possible; a measurement also calibrates the ladder.

    Raises:
        UsageError: nothing is known about the target.
        PlanError: a removed block is not in the workload.
    """
    model = target.ladder or target.roofline
    if model is None and target.measure is None:
        raise UsageError(
            f"Nothing is known about target '{target.name}': it has no device profile, no description and cannot be "
            "measured; build a profile with 'sartor profile'."
        )
    found = None if model is None else model.estimate(workload, fractions, removed)
    if target.measure is None or (found is not None and _is_sure(found, half_width)):
        assert found is not None
        return found
    seconds, interval = target.measure(workload, fractions or {}, removed or {})
    if target.ladder is not None:
        target.ladder.calibrate(workload, seconds, fractions, removed)
    kernels = () if found is None else found.kernels
    unmodelled = ("the kernels' shares are predicted, the latency is measured",) if kernels else ()
    intervals = {"latency_s": interval}
    return CostEstimate("measured as a whole", {"latency_s": seconds}, intervals, kernels, unmodelled)


def _is_sure(found: CostEstimate, half_width: float) -> bool:
    if math.isinf(half_width):
        return True
    if "latency_s" not in found.intervals:
        return False
    low, high = found.interval
    return (high - low) / 2 <= half_width * found.latency_s
