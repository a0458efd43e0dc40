"""The roofline as a cost model of whole networks and of single kernels; its law is in `roofline_law`.

Constants come from a description file (`RooflineConstants.of`) or from timed kernels (`Roofline.fitted`).
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.descriptions import TargetDescription, describe_target
from sartor.cost_models.energy import EnergyModel
from sartor.cost_models.populations import by_size
from sartor.cost_models.profile import ALONE, Company, Sample
from sartor.cost_models.protocol import CostEstimate, KernelCost
from sartor.cost_models.roofline_law import (
    PRECISION_BYTES,
    Level,
    RooflineConstants,
    Terms,
    narrowing,
    terms,
)
from sartor.cost_models.signatures import Signature, signature_of
from sartor.cost_models.work import Work, work
from sartor.errors import UsageError
from sartor.ir.kernels import Kernel
from sartor.ir.population import Fractions, Population, Presence, Removed
from sartor.ir.workload import Workload, presence

KIND = "roofline/1"


@dataclasses.dataclass(frozen=True)
class _Item:
    """Kernels of a workload that cost the same under every plan, except for when they exist."""

    kernel: Kernel
    signature: Signature | None
    when: tuple[Presence, ...]


class Roofline:
    """See the module docstring. Satisfies `CostModel` and, for single kernels, `KernelModel`."""

    tier = "roofline"

    def __init__(
        self,
        constants: RooflineConstants | TargetDescription | str,
        precision: str | None = None,
        *,
        name: str = "",
    ):
        """A roofline of these constants.

        Args:
            constants: numbers, a description, or the name of a published device.
            precision: that kernels run in; float tensors are priced at its width. None: as the program has them
                (only with numbers; a description needs one).
            name: of the device, for people.

        Raises:
            UsageError: unknown device or precision, or a description without constants.
        """
        if isinstance(constants, str):
            constants = describe_target(constants)
        if precision is not None and precision not in PRECISION_BYTES:
            raise UsageError(f"Precision '{precision}' is not one of {sorted(PRECISION_BYTES)}.")
        self._energy: EnergyModel | None = None
        self._leaves_out: tuple[str, ...] = ()
        self._limits: dict[str, float] = {}
        if isinstance(constants, TargetDescription):
            if precision is None:
                raise UsageError(
                    f"A roofline of '{constants.name}' needs a precision: one of {list(constants.precisions)}."
                )
            self._energy = EnergyModel.of(constants, precision)
            self._leaves_out, name = constants.unmodelled, name or constants.name
            if constants.constants is not None:
                self._limits = {key: number.value for key, number in constants.constants.limits.items()}
            constants = RooflineConstants.of(constants, precision)
        self.constants = constants
        self.precision = precision
        self.name = name
        self._bound: weakref.WeakKeyDictionary[Workload, list[_Item]] = weakref.WeakKeyDictionary()

    @property
    def method(self) -> str:
        """One line for people: what the numbers are based on."""
        basis = (
            f"fitted to {self.constants.samples} kernels" if self.constants.samples else "published constants"
        )
        return " ".join(part for part in ("roofline", self.name, self.precision or "", f"({basis})") if part)

    # ---- single kernels ------------------------------------------------------------------------
    def knows(self, signature: Signature) -> bool:
        """Always: work follows from the signature."""
        return True

    def predict(
        self, signature: Signature, sizes: Sequence[Any], period_s: Any = 0.0, company: Company = ALONE
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel.predict`: the kernel alone, its weights in the caches that hold them."""
        seconds = self.terms(signature.spec, work(signature, sizes)).seconds
        return seconds, np.full(seconds.shape, self.constants.log_sd)

    def terms(self, spec: Mapping[str, Any], found: Work, network_weight_bytes: Any = None) -> Terms:
        """Where the time of a kernel goes; arguments as of `sartor.cost_models.roofline_law.terms`."""
        return terms(self.constants, spec, found, self.precision, network_weight_bytes)

    # ---- whole networks ------------------------------------------------------------------------
    def estimate_batch(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: Any = None,
        batch: Any = None,
        batches: float = 1.0,
    ) -> np.ndarray:
        """Latency in seconds of a population of plans, an array `[plans]` (0-d for a single plan).

        Args:
            workload: what the plans belong to.
            fractions: kept fraction per group.
            removed: removed blocks.
            size: which of the workload's declared input sizes, an index or an array `[plans]`.
            batch: samples, a number or an array `[plans]`; for workloads with declared sizes.
            batches: how many times that batch goes through at once.

        Raises:
            PlanError: a removed block is not in the workload.
        """
        found = self.evaluate(workload, fractions, removed, size=size, batch=batch, batches=batches)
        return found["latency_s"]

    def evaluate(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: Any = None,
        batch: Any = None,
        batches: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Every metric of a population of plans, as `estimate` names them, each an array `[plans]`.

        Arguments as of `estimate_batch`.

        Raises:
            PlanError: a removed block, a size or a batch is not in the workload.
        """
        names: list[str] = []

        def price(here: Workload, plans: Population) -> list[Any]:
            metrics = self._evaluate(here, plans, batches)
            names[:] = metrics
            return list(metrics.values())

        found = by_size(workload, fractions or {}, removed or {}, size, batch, price)
        return dict(zip(names, found, strict=True))

    def _evaluate(self, workload: Workload, plans: Population, batches: float) -> dict[str, np.ndarray]:
        macs: Any = np.zeros(plans.shape)
        traffic: Any = np.zeros(plans.shape)
        latency: Any = np.full(plans.shape, self.constants.call_s)
        for item, found, network in self._priced(workload, plans, batches):
            count = _count(item, plans)
            latency = latency + count * self._terms_of(item, found, network).seconds
            macs = macs + count * found.macs
            traffic = traffic + count * found.moved * self._narrowing(item)
        return self._metrics(np.asarray(latency), np.asarray(macs), np.asarray(traffic))

    def _metrics(self, latency: Any, macs: Any, traffic: Any) -> dict[str, Any]:
        metrics = {"latency_s": latency, "macs": macs, "traffic_bytes": traffic}
        if self._energy is not None:
            metrics["energy_j"] = self._energy.energy_j(macs, traffic, latency)
        return metrics

    def _narrowing(self, item: _Item) -> float:
        return narrowing(item.signature.spec, self.precision) if item.signature else 1.0

    def estimate(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: int | None = None,
        batch: int | None = None,
        batches: float = 1.0,
    ) -> CostEstimate:
        """Price one plan (scalars), with a breakdown per kernel; arguments as of `estimate_batch`.

        The error of published constants is not known, so that there is no interval. `energy_j` is there for
        devices whose description has energy constants.

        Raises:
            PlanError: a removed block is not in the workload.
        """
        workload = workload.at(size, batch)
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        costs: list[KernelCost] = []
        unmodelled: list[str] = []
        macs: float = 0.0
        traffic: float = 0.0
        weights: float = 0.0
        largest: float = 0.0
        priced = {}
        for item, found, network in self._priced(workload, plans, batches):
            priced[_key(item.kernel, item.signature)] = item, found, network
        for kernel in workload.kernels:
            if not float(plans.present(presence(kernel))):
                continue
            item, found, network = priced[_key(kernel, signature_of(kernel))]
            shares = self._terms_of(item, found, network)
            costs.append(
                KernelCost(
                    kernel.name, kernel.op_type, float(shares.seconds), self.tier, bound=shares.bound()
                )
            )
            macs += float(found.macs)
            traffic += float(found.moved) * self._narrowing(item)
            weights = float(network)
            largest = max(largest, float(found.read + found.written) * self._narrowing(item))
            if (
                item.signature is None and kernel.nodes
            ):  # without nodes: a change of layout, which only copies
                unmodelled.append(
                    f"{kernel.name} ({kernel.op_type}): what runs inside it, priced as one kernel"
                )
        latency = sum(c.latency_s for c in costs) + self.constants.call_s
        metrics = self._metrics(latency, macs, traffic)
        unmodelled += self._too_large(flash_bytes=weights, sram_bytes=largest)
        return CostEstimate(self.method, metrics, {}, tuple(costs), (*unmodelled, *self._leaves_out))

    def _too_large(self, **needs: float) -> list[str]:
        """What does not fit the device, so that it cannot run there as it was priced."""
        words = {"flash_bytes": ("weights", "flash"), "sram_bytes": ("activations of one kernel", "SRAM")}
        return [
            f"it does not fit: {count:,.0f} bytes of {words[key][0]}, {self._limits[key]:,.0f} bytes of {words[key][1]}"
            for key, count in needs.items()
            if count > self._limits.get(key, math.inf)
        ]

    def _terms_of(self, item: _Item, found: Work, network: Any) -> Terms:
        spec = item.signature.spec if item.signature else {"op": item.kernel.op_type, "inputs": []}
        return self.terms(spec, found, network)

    def _priced(self, workload: Workload, plans: Population, batches: float) -> list[tuple[_Item, Work, Any]]:
        """Items, their work under every plan, and the weight bytes of the whole network."""
        found = []
        network: Any = 0.0
        for item in self._items(workload):
            if item.signature is None:
                mine = _opaque(item.kernel, plans)
            else:
                mine = work(item.signature, [plans.quantity(v) for v in item.signature.variables])
            network = network + _count(item, plans) * mine.weight_bytes * self._narrowing(item)
            found.append((item, mine if batches == 1.0 else mine.times(batches)))
        return [(item, mine, network) for item, mine in found]

    def _items(self, workload: Workload) -> list[_Item]:
        if workload not in self._bound:
            merged: dict[Any, _Item] = {}
            for kernel in workload.kernels:
                signature = signature_of(kernel)
                key = _key(kernel, signature)
                known = merged.get(key)
                when = (*(known.when if known else ()), presence(kernel))
                merged[key] = _Item(kernel, signature, when)
            self._bound[workload] = list(merged.values())
        return self._bound[workload]

    # ---- fitting and files ---------------------------------------------------------------------
    @staticmethod
    def fitted(samples: Sequence[Sample], **options: Any) -> Roofline:
        """Constants from timed kernels; options and rule in `sartor.cost_models.roofline_fit.fit`.

        Raises:
            UsageError: no sample.
        """
        from sartor.cost_models.roofline_fit import fit

        return Roofline(fit(samples, **options), options.get("precision"))

    def update(self, samples: Sequence[Sample]) -> Roofline:
        """Constants moved towards these samples; what they were counts as much as the samples they rest on."""
        from sartor.cost_models.roofline_fit import fit

        if not samples:
            return self
        return Roofline(
            fit(samples, prior=self.constants, precision=self.precision), self.precision, name=self.name
        )

    def save(self) -> dict[str, Any]:
        """JSON-ready form; `load` is its inverse. An infinite capacity is null."""
        constants = dataclasses.asdict(self.constants)
        constants["levels"] = [
            {**level, "bytes": None if math.isinf(level["bytes"]) else level["bytes"]}
            for level in constants["levels"]
        ]
        return {"kind": KIND, "name": self.name, "precision": self.precision, "constants": constants}

    @staticmethod
    def load(document: Mapping[str, Any]) -> Roofline:
        """Inverse of `save`.

        Raises:
            UsageError: not a saved roofline.
        """
        if document.get("kind") != KIND:
            raise UsageError(f"Expected a roofline of kind '{KIND}', found {document.get('kind')!r}.")
        try:
            constants = dict(document["constants"])
            levels = [
                Level(**{**level, "bytes": math.inf if level["bytes"] is None else level["bytes"]})
                for level in constants.pop("levels")
            ]
            return Roofline(
                RooflineConstants(**constants, levels=tuple(levels)),
                document["precision"],
                name=document["name"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"A saved roofline is malformed ({error}); fit it again.") from error


def _key(kernel: Kernel, signature: Signature | None) -> Any:
    return (signature.key, signature.variables) if signature else kernel.name


def _count(item: _Item, plans: Population) -> Any:
    return sum(plans.present(when) for when in item.when)


def _opaque(kernel: Kernel, plans: Population) -> Work:
    """Control flow: its MACs as one product, its bytes as activations."""
    macs = np.asarray(plans.quantity(kernel.macs), float)
    one = np.ones(macs.shape)
    read, written = (np.asarray(plans.quantity(q), float) for q in (kernel.bytes_read, kernel.bytes_written))
    return Work(macs, 0.0 * one, read * one, written * one, one, macs, one, one, one)
