"""The measured kernel table: the cost model that steers `sartor fit`.

Latency of a plan = Σ over its fused kernels of a time interpolated between samples of that kernel at
other channel counts, times a calibration from whole-network measurements (`calibration`). Samples are
one-kernel models timed on the target (`sampling`). Kernels without a sample are priced by a roofline
whose two rates come from the samples, and are named in `unmodelled`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.cost_models.calibration import Law, Observation, fit_law, relative_half_width
from sartor.cost_models.grid import Grid
from sartor.cost_models.protocol import CostEstimate, KernelCost
from sartor.cost_models.signatures import Signature, signature_of
from sartor.errors import MetricUnavailableError, UsageError
from sartor.ir.files import write_atomic
from sartor.ir.kernels import Kernel
from sartor.ir.workload import Fractions, Population, Presence, Removed, Workload, presence

SCHEMA = "sartor.kernel_table/1"
_CALL = "call"  # family of the one call per inference


@dataclasses.dataclass(frozen=True)
class Rates:
    """Two roofline rates for kernels without samples, from the kernels that have them."""

    macs_per_s: float
    bytes_per_s: float

    def seconds(self, macs: Any, moved: Any) -> Any:
        """The slower of computing and moving."""
        return np.maximum(macs / self.macs_per_s, moved / self.bytes_per_s)


@dataclasses.dataclass(frozen=True)
class _Item:
    """Kernels of a workload that cost the same under every plan, except for when they exist."""

    kernel: Kernel
    signature: Signature | None
    grid: Grid | None
    when: tuple[Presence, ...]


class MeasuredTable:
    """Interpolates sampled kernel times; see the module docstring. Satisfies `CostModel`.

    Calibration is the only state that changes: `calibrate` adds an observation.
    """

    def __init__(
        self,
        grids: Mapping[str, Grid],
        rates: Rates,
        *,
        target: Mapping[str, Any],
        call_s: float = 0.0,
        failures: Mapping[str, str] | None = None,
        observations: tuple[Observation, ...] = (),
    ):
        """Use `build_table` or `load` instead.

        Args:
            grids: by signature key.
            rates: for signatures without a grid.
            target: backend, options and versions that the samples were taken with.
            call_s: an empty call of the runtime, paid once per inference.
            failures: reason by signature key that could not be sampled.
            observations: whole-network measurements so far.
        """
        self.grids = dict(grids)
        self.rates = rates
        self.target = dict(target)
        self.call_s = call_s
        self.failures = dict(failures or {})
        self._observations = observations
        self._law = fit_law(observations)
        self._bound: weakref.WeakKeyDictionary[Workload, list[_Item]] = weakref.WeakKeyDictionary()

    @property
    def method(self) -> str:
        """One line for people: what the numbers are based on."""
        samples = sum(g.seconds.size for g in self.grids.values())
        return (
            f"measured kernel table: {samples} samples of {len(self.grids)} kernels, "
            f"{len(self._observations)} whole-network measurements"
        )

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Whole-network measurements that the calibration rests on."""
        return self._observations

    # ---- pricing ---------------------------------------------------------------------------
    def estimate_batch(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> np.ndarray:
        """Latency in seconds of a population of plans, an array `[plans]` (0-d for a single plan).

        Raises:
            PlanError: a removed block is not in the workload.
        """
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        return np.zeros(plans.shape) + self._law.predict(self._families(workload, plans))

    def estimate(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> CostEstimate:
        """Price one plan (scalars), with a breakdown per kernel.

        Raises:
            PlanError: a removed block is not in the workload.
        """
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        costs: list[KernelCost] = []
        unmodelled: list[str] = []
        for kernel in workload.kernels:
            if not float(plans.present(presence(kernel))):
                continue
            signature = signature_of(kernel)
            grid = self.grids.get(signature.key) if signature else None
            item = _Item(kernel, signature, grid, (presence(kernel),))
            seconds = float(self._seconds(item, plans)) * self._law.scale_of(kernel.family)
            if grid is None or signature is None:
                how = "roofline"
                unmodelled.append(f"{kernel.name} ({kernel.op_type}): {self._why(signature)}")
            else:
                at = [float(plans.quantity(v)) for v in signature.variables]
                how = "interpolated" if grid.contains(at) else "extrapolated"
            costs.append(KernelCost(kernel.name, kernel.op_type, seconds, how))
        latency = sum(c.latency_s for c in costs) + self.constant_s
        intervals = {}
        half = relative_half_width(self._observations)
        if half is not None:
            intervals["latency_s"] = (max(0.0, latency * (1 - half)), latency * (1 + half))
        return CostEstimate(self.method, {"latency_s": latency}, intervals, tuple(costs), tuple(unmodelled))

    @property
    def constant_s(self) -> float:
        """Part of every estimate that belongs to no kernel: the call, and the calibration's offset."""
        return self.call_s * self._law.scale_of(_CALL) + self._law.offset_s

    def _why(self, signature: Signature | None) -> str:
        if signature is None:
            return "no sample model exists for it"
        return self.failures.get(signature.key, "not sampled")

    def _families(self, workload: Workload, plans: Population) -> dict[str, Any]:
        totals: dict[str, Any] = {_CALL: self.call_s}
        for item in self._items(workload):
            count: Any = sum(plans.present(when) for when in item.when)
            family = item.kernel.family
            totals[family] = totals.get(family, 0.0) + count * self._seconds(item, plans)
        return totals

    def _seconds(self, item: _Item, plans: Population) -> Any:
        if item.grid is None or item.signature is None:
            kernel = item.kernel
            moved = plans.quantity(kernel.bytes_read) + plans.quantity(kernel.bytes_written)
            return self.rates.seconds(plans.quantity(kernel.macs), moved)
        return item.grid.interpolate([plans.quantity(v) for v in item.signature.variables])

    def _items(self, workload: Workload) -> list[_Item]:
        if workload not in self._bound:
            merged: dict[Any, _Item] = {}
            for kernel in workload.kernels:
                signature = signature_of(kernel)
                grid = self.grids.get(signature.key) if signature else None
                key: Any = (signature.key, signature.variables) if signature and grid else kernel.name
                known = merged.get(key)
                when = (*(known.when if known else ()), presence(kernel))
                merged[key] = _Item(kernel, signature, grid, when)
            self._bound[workload] = list(merged.values())
        return self._bound[workload]

    # ---- calibration -----------------------------------------------------------------------
    def calibrate(
        self,
        workload: Workload,
        latency_s: float,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
    ) -> None:
        """Add a whole-network measurement: the baseline first, then measured candidates.

        Args:
            workload: what the plan belongs to.
            latency_s: measured, on the target and with the options of this table.
            fractions: kept fraction per group of the measured plan; nothing for the baseline.
            removed: blocks that the measured plan removes.

        Raises:
            UsageError: the latency is not a positive number.
            PlanError: a removed block is not in the workload.
        """
        if not (math.isfinite(latency_s) and latency_s > 0):
            raise UsageError(f"A latency of {latency_s} s cannot calibrate; pass positive seconds.")
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        seconds = {f: float(v) for f, v in self._families(workload, plans).items()}
        self._observations = (*self._observations, Observation(seconds, latency_s))
        self._law = fit_law(self._observations)

    @property
    def law(self) -> Law:
        """The current calibration."""
        return self._law

    # ---- files -----------------------------------------------------------------------------
    def to_json(self) -> str:
        """Deterministic JSON text, schema `sartor.kernel_table/1`."""
        document = {
            "schema": SCHEMA,
            "target": self.target,
            "call_s": self.call_s,
            "rates": dataclasses.asdict(self.rates),
            "kernels": [
                {"signature": json.loads(key), **grid.to_dict()} for key, grid in sorted(self.grids.items())
            ],
            "failures": [
                {"signature": json.loads(k), "reason": reason} for k, reason in sorted(self.failures.items())
            ],
            "observations": [dataclasses.asdict(o) for o in self._observations],
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` atomically."""
        return write_atomic(path, self.to_json().encode())

    @staticmethod
    def from_json(text: str) -> MeasuredTable:
        """Inverse of `to_json`.

        Raises:
            UsageError: not a kernel table of this schema.
        """
        try:
            document = json.loads(text)
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            if found != SCHEMA:
                raise UsageError(f"Expected a kernel table of schema '{SCHEMA}', found '{found}'.")
            return MeasuredTable(
                {_key(entry): Grid.from_dict(entry) for entry in document["kernels"]},
                Rates(**document["rates"]),
                target=document["target"],
                call_s=float(document["call_s"]),
                failures={_key(entry): str(entry["reason"]) for entry in document["failures"]},
                observations=tuple(Observation(**entry) for entry in document["observations"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"The kernel table is malformed ({type(error).__name__}: {error}); measure it again."
            ) from error

    @staticmethod
    def load(path: str | Path) -> MeasuredTable:
        """Read a file written by `save`.

        Raises:
            UsageError: the file does not exist or is no kernel table.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The kernel table '{path}' cannot be read: {error}.") from error
        return MeasuredTable.from_json(text)


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry["signature"], sort_keys=True, separators=(",", ":"))


def rates_from(workload: Workload, grids: Mapping[str, Grid]) -> Rates:
    """Median rates of the kernels that have samples, at their full size.

    Raises:
        MetricUnavailableError: no kernel has a sample, or none of those that compute.
    """
    macs_rates, byte_rates = [], []
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        grid = grids.get(signature.key) if signature else None
        if grid is None or signature is None:
            continue
        seconds = max(float(grid.interpolate([v.full for v in signature.variables])), 1e-9)
        if kernel.macs.full > 0:
            macs_rates.append(kernel.macs.full / seconds)
        byte_rates.append((kernel.bytes_read.full + kernel.bytes_written.full) / seconds)
    computes = any(k.macs.full > 0 for k in workload.kernels)
    if not byte_rates or (computes and not macs_rates):
        raise MetricUnavailableError(
            f"None of the {len(workload.kernels)} kernels that carry this network's work could be timed on "
            "the target, so its latency is unknown; look at the reasons that the timer gives."
        )
    return Rates(
        macs_per_s=statistics.median(macs_rates) if macs_rates else math.inf,
        bytes_per_s=statistics.median(byte_rates),
    )
