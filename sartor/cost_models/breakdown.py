"""The table of single kernels of one plan: what each takes, which tier says so, and what bounds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.features import is_movement
from sartor.cost_models.interval import Interval
from sartor.cost_models.items import Item, bind_late, crowds, places_of
from sartor.cost_models.law import Law
from sartor.cost_models.protocol import KernelCost
from sartor.cost_models.signatures import Signature
from sartor.cost_models.tiers import Tiers
from sartor.cost_models.work import work
from sartor.ir.kernels import Kernel
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.population import Population
from sartor.ir.workload import Workload


@dataclasses.dataclass(frozen=True, eq=False)
class Breakdown:
    """One plan, taken apart.

    Attributes:
        tiers: times of single kernels.
        law: scales of their families.
        interval: their errors.
        failures: why kernels could not be timed, by key of the signature.
        plans: the plan.
        shares: of the states of the caches that it runs in, `[states]`.
    """

    tiers: Tiers
    law: Law
    interval: Interval
    failures: Mapping[str, str]
    plans: Population
    shares: np.ndarray

    def table(
        self, workload: Workload, items: Sequence[Item]
    ) -> tuple[tuple[KernelCost, ...], tuple[str, ...]]:
        """Every kernel that exists under the plan; and which of them no tier but the roofline knows, with why."""
        places = places_of(items)
        crowd_of = crowds(items, self.plans)
        costs: list[KernelCost] = []
        unmodelled: list[str] = []
        for kernel in workload.existing(self.plans):
            if kernel.family == LAYOUT and not self.tiers.prices_layout:
                continue
            place = places.get(kernel.name)
            item = bind_late(workload.layout, kernel, self.tiers) if place is None else items[place]
            costs.append(self._cost(kernel, item, 0.0 if place is None else crowd_of[place]))
            if costs[-1].method == "roofline":
                unmodelled.append(f"{kernel.name} ({kernel.op_type}): {self._why(item.signature)}")
        return tuple(costs), tuple(unmodelled)

    def _cost(self, kernel: Kernel, item: Item, crowd: Any) -> KernelCost:
        signature = item.signature
        own, sd = (float(self.shares @ v) for v in item.seconds(self.plans, self.tiers, crowd))
        seconds = own * self.law.scale_of(kernel.family)
        tier = "roofline" if signature is None else self.tiers.model_for(signature).tier
        how = tier
        if tier == "measured" and signature is not None:
            at = [float(self.plans.quantity(v)) for v in signature.variables]
            inside = self.tiers.table.corrections[signature.key].contains(at)
            how = "interpolated" if inside else "extrapolated"
        interval = None
        if self.interval.kernels:
            interval = self.interval.of_kernel(tier, seconds, sd / max(own, 1e-12))
        return KernelCost(kernel.name, kernel.op_type, seconds, how, interval, self._bound(item, kernel))

    def _bound(self, item: Item, kernel: Kernel) -> str:
        period = float(np.exp(self.shares @ np.log(np.maximum(self.tiers.periods, 1e-12))))
        macs, moved = float(self.plans.quantity(kernel.macs)), 0.0
        for part in (kernel.bytes_read, kernel.bytes_written):
            moved += float(self.plans.quantity(part))
        weights = 0.0
        if item.signature is not None:
            sizes = [float(self.plans.quantity(v)) for v in item.signature.variables]
            weights = float(work(item.signature, sizes).weight_bytes)
        rates = self.tiers.rates
        return rates.bound(kernel.family, kernel.op_type, macs, moved, weights, period, item.company.alike)

    def _why(self, signature: Signature | None) -> str:
        if signature is None:
            return "no sample model exists for it"
        if signature.key in self.failures:
            return self.failures[signature.key]
        what = "it was not sampled"
        if self.tiers.learned is None:
            return f"{what}, and the profile has no learned model"
        kind = "movement" if is_movement(signature.spec) else "contraction"
        return f"{what}, and no model was learned of {kind} '{signature.spec['op']}' in family '{signature.family}'"
