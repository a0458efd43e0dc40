"""A workload bound to the tiers of a profile: kernels that cost the same are one item, with its surface."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sartor.cost_models.law import Caches, cold_share
from sartor.cost_models.signatures import Signature, signature_of
from sartor.cost_models.surface import Surface
from sartor.cost_models.tiers import Tiers, waiting_s
from sartor.cost_models.work import work_of_spec
from sartor.ir.kernels import Kernel
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.layout import Layout
from sartor.ir.population import Population, Presence
from sartor.ir.workload import Workload, presence


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """Kernels that cost the same under every plan, except for when they exist.

    Attributes:
        kernels: in execution order.
        signature: None where no sample can stand for it.
        surface: its times; None without a signature.
        cold: as `Cold.coefficients`.
    """

    kernels: tuple[Kernel, ...]
    signature: Signature | None
    surface: Surface | None
    cold: tuple[float, float, float]

    @property
    def kernel(self) -> Kernel:
        """Any of them."""
        return self.kernels[0]

    @property
    def when(self) -> tuple[Presence, ...]:
        """When each of them exists."""
        return tuple(presence(kernel) for kernel in self.kernels)

    def seconds(self, plans: Population, tiers: Tiers) -> tuple[Any, Any]:
        """Warm seconds of one of them and their standard deviation in seconds, scalars or `[plans]`."""
        if self.surface is None or self.signature is None:
            moved = plans.quantity(self.kernel.bytes_read) + plans.quantity(self.kernel.bytes_written)
            seconds, sd = tiers.rates.seconds(self.kernel.family, plans.quantity(self.kernel.macs), moved)
            return seconds, seconds * sd
        return self.surface.interpolate([plans.quantity(v) for v in self.signature.variables])

    def weight_bytes(self, plans: Population) -> Any:
        """Stored bytes that one of them reads."""
        if self.signature is None:
            return 0.0
        sizes = [np.asarray(plans.quantity(v), float) for v in self.signature.variables]
        return work_of_spec(self.signature.spec, sizes).weight_bytes

    def waiting_s(self, weight_bytes: Any) -> tuple[Any, Any]:
        """Seconds that one of them waits for these weights; see `tiers.waiting_s`."""
        return waiting_s(self.cold, weight_bytes)


def bind(workload: Workload, tiers: Tiers) -> tuple[Item, ...]:
    """The items of a workload. Asks the models; a plan asks the surfaces only."""
    merged: dict[Any, Item] = {}
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        key: Any = (signature.key, signature.variables, kernel.family) if signature else kernel.name
        known = merged.get(key)
        if known is not None:
            merged[key] = dataclasses.replace(known, kernels=(*known.kernels, kernel))
            continue
        surface = None
        if signature is not None:
            surface = tiers.surface(signature, [bool(v.groups) for v in signature.variables])
        cold = tiers.cold.coefficients(kernel.family) if signature is not None else (0.0, 0.0, 0.0)
        merged[key] = Item((kernel,), signature, surface, cold)
    return tuple(merged.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """Seconds of a population before the law, each a scalar or `[plans]`.

    Attributes:
        seconds: by term of the law.
        variances: of the sum of the kernels of a family, seconds squared, errors of single kernels only.
    """

    seconds: dict[str, Any]
    variances: dict[str, Any]


def copies_s(layout: Layout, plans: Population, tiers: Tiers) -> tuple[Any, Any]:
    """Seconds of all copies between layouts and their variance; nothing where copies were not timed."""
    seconds: Any = 0.0
    variance: Any = 0.0
    for copy in layout.copies(plans) if tiers.prices_layout else ():
        one, sd = tiers.rates.seconds(LAYOUT, 0.0, copy.moved, copy.op_type)
        seconds = seconds + copy.count * one
        variance = variance + copy.count * np.square(one * sd)
    return seconds, variance


def terms(
    items: tuple[Item, ...], layout: Layout, plans: Population, tiers: Tiers, call_s: float, caches: Caches
) -> Terms:
    """Add up a population."""
    seconds: dict[str, Any] = {"call": call_s, "cold": 0.0}
    variances: dict[str, Any] = {}
    seconds[LAYOUT], variances[LAYOUT] = copies_s(layout, plans, tiers)
    weights: Any = 0.0
    extra: Any = 0.0
    far: Any = 0.0
    may_be_cold = full_weights(items) > caches.near > 0
    for item in items:
        count: Any = sum(plans.present(when) for when in item.when)
        warm, sd = item.seconds(plans, tiers)
        family = item.kernel.family
        seconds[family] = seconds.get(family, 0.0) + count * warm
        variances[family] = variances.get(family, 0.0) + np.square(count * sd)
        if may_be_cold and item.signature is not None:
            stored = item.weight_bytes(plans)
            weights = weights + count * stored
            near_s, far_s = item.waiting_s(stored)
            extra, far = extra + count * near_s, far + count * far_s
    if may_be_cold:
        seconds["cold"] = cold_share(weights, caches.near) * extra + cold_share(weights, caches.last) * far
    return Terms(seconds, variances)


def full_weights(items: tuple[Item, ...]) -> float:
    """Stored bytes that all kernels read before pruning."""
    plans = Population({}, {})
    return sum(
        float(item.weight_bytes(plans)) * sum(float(plans.present(when)) for when in item.when)
        for item in items
    )


def cold_weights(items: tuple[Item, ...], plans: Population, caches: Caches) -> tuple[float, float]:
    """Shares of the weights of one plan that the nearest cache, and that no cache keeps."""
    if not full_weights(items) > caches.near > 0:
        return 0.0, 0.0
    stored = sum(
        float(item.weight_bytes(plans)) * sum(float(plans.present(when)) for when in item.when)
        for item in items
    )
    return float(cold_share(stored, caches.near)), float(cold_share(stored, caches.last))
