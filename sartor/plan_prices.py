"""What plans cost, for searches: at every input size that the network can have, by the cost model and by the graph."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.errors import UsageError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.fusion import CONTRACTIONS, json_attributes
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.plan import Plan
from sartor.ir.population import Population
from sartor.ir.program import Program
from sartor.ir.workload import Workload, build_workload
from sartor.strategies.space import EXCESS, InputSize

_SMALLER, _LARGER = (0.875, 0.75, 0.625, 0.5, 0.375), (1.25, 1.5)
_PEAK = "peak_activation_bytes"


@dataclasses.dataclass(frozen=True)
class Sized:
    """A program at one input size.

    Attributes:
        shapes: of the inputs that are of another size than the original's.
        share: elements of all inputs over those of the original.
        workload: what plans are priced with.
    """

    shapes: Mapping[str, tuple[int, ...]]
    share: float
    workload: Workload


def sized_programs(
    program: Program,
    analysis: ChannelAnalysis,
    blocks: Sequence[Any],
    rules: FusionRules,
    *,
    resizes: bool,
    grows: bool = False,
    keep: Sequence[str] = (),
) -> tuple[list[Sized], str]:
    """The original, and where that is asked for what it becomes at smaller sizes, largest first.

    Args:
        program: the original.
        analysis: its channel groups.
        blocks: its blocks that may go.
        rules: what the target executes as one kernel.
        resizes: whether there are to be smaller sizes.
        grows: whether there are to be larger ones, too; these come last.
        keep: globs of parameters that stay, as `analysis` was made with.

    Returns:
        Sizes, and why there are no others where there should be.
    """
    from sartor.passes.prune import apply_plan
    from sartor.passes.rescale import Rescale

    found = [Sized({}, 1.0, build_workload(program, analysis.extents, blocks, rules))]
    names, reason = {block.name for block in blocks}, ""
    for resolution in (*_SMALLER, *(_LARGER if grows else ())) if resizes else ():
        planned = Rescale(resolution=resolution).resolution_plan(program)
        reason = next((refusal.reason for refusal in planned.refusals), reason)
        if planned.data is None or any(planned.data.sizes == one.shapes for one in found):
            continue
        shapes = planned.data.sizes
        resized = apply_plan(program, Plan(program.source.sha256, sizes=shapes))
        smaller = [block for block in residual_blocks(resized) if block.name in names]
        workload = build_workload(resized, channel_groups(resized, keep).extents, smaller, rules)
        found.append(Sized(shapes, _elements(resized) / _elements(program), workload))
    return found, reason if len(found) == 1 else ""


def _elements(program: Program) -> int:
    return sum(math.prod(shape) for shape in program.input_shapes.values())


class PlanPrices:
    """Predicts the quantities of budgets.

    Args:
        sizes: of the network.
        keys: quantities that budgets name.
        model: predicts latency, as `Ladder` does; None: only what the graph alone says is predicted.
    """

    def __init__(self, sizes: Sequence[Sized], keys: Iterable[str], model: Any = None):
        self.sizes, self.keys, self.model = sizes, tuple(keys), model

    def input_sizes(self) -> list[InputSize]:
        """For a search space."""
        return [
            InputSize(
                one.shapes,
                one.share,
                functools.partial(self.price, one.workload),
                functools.partial(_static, one.workload),
            )
            for one in self.sizes
        ]

    def workload(self, plan: Plan) -> Workload:
        """Of the input size that a plan has."""
        return next(one.workload for one in self.sizes if one.shapes == plan.sizes)

    def price(
        self,
        workload: Workload,
        fractions: Mapping[str, np.ndarray],
        removed: Mapping[str, np.ndarray],
        limits: Mapping[str, float],
    ) -> dict[str, np.ndarray]:
        """See `sartor.strategies.space.Price`. Latency always, where it is predicted: no step may be slower."""
        priced: dict[str, np.ndarray] = {}
        if self.model is not None:
            priced["latency"] = np.atleast_1d(self.model.estimate_batch(workload, fractions, removed))
        wanted = set(self.keys)
        if wanted & {"macs", "weight_bytes"}:
            cost = workload.evaluate(fractions, removed)
            priced |= {k: np.atleast_1d(getattr(cost, k)) for k in ("macs", "weight_bytes") if k in wanted}
        if _PEAK in wanted:
            priced[_PEAK] = np.atleast_1d(workload.peak_activation_bytes(fractions, removed))
            if _PEAK in limits:
                above = workload.peak_activation_bytes(fractions, removed, above=limits[_PEAK])
                priced[f"{_PEAK} {EXCESS}"] = np.atleast_1d(above)
        return priced

    def largest_term(
        self, key: str, size: int, fractions: Mapping[str, float], removed: Mapping[str, bool]
    ) -> str:
        """What most of a plan's cost is, in words."""
        workload = self.sizes[size].workload
        if key == "latency":
            found = self.model.estimate(workload, fractions, removed)
            parts = {f"kernel '{kernel.name}'": float(kernel.latency_s) for kernel in found.kernels}
            whole = float(found.read("latency_s"))
            parts["calling the network and what belongs to no kernel"] = whole - sum(parts.values())
        elif key == "weight_bytes":
            parts = {
                f"weight '{one.operand.name}'": float(one.operand.bytes.evaluate(fractions))
                for one in workload.stored
                if not one.readers or any(not any(removed.get(b) for b in blocks) for blocks in one.readers)
            }
            whole = sum(parts.values())
        elif key == "macs":
            plans = Population(workload.lengths(fractions), removed)
            parts = {
                f"kernel '{k.name}'": float(k.macs.evaluate(fractions)) for k in workload.existing(plans)
            }
            whole = sum(parts.values())
        else:
            return "the activations that are live together where the peak is"
        name, most = max(parts.items(), key=lambda part: part[1])
        return f"{name}, {most / whole:.0%} of it" if whole > 0 else "nothing"


def _static(
    workload: Workload, fractions: Mapping[str, np.ndarray], removed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    cost = workload.evaluate(fractions, removed)
    return {key: np.atleast_1d(getattr(cost, key)) for key in ("macs", "parameters", "bytes_written")}


def channel_step(backend: Any, program: Program, precision: str, group: Any) -> int:
    """The channel step that suits every operator which makes or reads the group's channels.

    Args:
        backend: of the target.
        program: the original.
        precision: of the target.
        group: of its channels.
    """
    readers = {
        node
        for member in group.members
        for node, _ in program.initializers[member.initializer].uses()
        if node.op_type in CONTRACTIONS
    }
    return math.lcm(*(backend.channel_grid(n.op_type, precision, json_attributes(n)) for n in readers))


def unreachable(key: str, limit: float, least: float, full: float, term: str) -> UsageError:
    """The error of a limit below the floor.

    Args:
        key: of the budget.
        limit: that was asked for.
        least: that the strategy's smallest network is predicted at.
        full: of the original.
        term: what sets the floor, see `PlanPrices.largest_term`.
    """
    return UsageError(
        f"The budget {key}={limit:.6g} is below the feasible floor: the smallest plan is predicted at "
        f"{least:.6g} ({least / full:.3f}x of {full:.6g}), most of it {term}. Raise the limit, protect less, or "
        "use a strategy that removes more."
    )
