"""The cost model of a device profile: every kernel by the best tier that knows it, corrected while a run measures.

Latency of a plan = the law of the profile (`law`) over its kernels, each from the tiers (`tiers`): measured,
learned, roofline; with the caches in the state that the network itself leaves them in. Every whole network that a run
measures sharpens the law's scales; the profile stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.cost_models.breakdown import Breakdown
from sartor.cost_models.fitting import fit_profile
from sartor.cost_models.interval import NORMAL, Interval
from sartor.cost_models.items import Item, Terms, bind, settled_shares, shares_at, terms
from sartor.cost_models.law import FAMILIES, Law, Observation
from sartor.cost_models.populations import by_size
from sartor.cost_models.profile import DeviceProfile
from sartor.cost_models.protocol import CostEstimate
from sartor.cost_models.signatures import key_of
from sartor.cost_models.tiers import Tiers
from sartor.errors import MetricUnavailableError, UsageError
from sartor.ir.files import write_atomic
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.workload import Workload

__all__ = ["SCHEMA", "Ladder", "fit_profile"]

SCHEMA = "sartor.ladder/1"
MEASUREMENT_SD = 0.015
"""Of one measured network of a run, and of how its plans differ beyond what scales can say."""
_SPEED_SD = 1.0  # of the machine's speed between two measurements, before the first network is measured
_T90 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)  # Student, by degrees of freedom


class Ladder:
    """See the module docstring. Satisfies `CostModel`.

    Measured networks are the only state that changes: `calibrate` adds one.
    """

    def __init__(self, profile: DeviceProfile, observations: tuple[Observation, ...] = ()):
        """From a profile, fitted or with samples only.

        Args:
            profile: of the target and the machine at hand.
            observations: networks that a run has measured.

        Raises:
            UsageError: the models of the profile are malformed.
            MetricUnavailableError: it has no samples.
        """
        self.profile = profile
        self.tiers = Tiers.of(profile)
        try:
            self._known = Law.from_dict(profile.law) if profile.law else None
            self._interval = Interval.from_dict(profile.interval) if profile.interval else Interval()
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"Law or interval of the device profile is malformed ({type(error).__name__}: {error}); build it "
                "again with 'sartor profile'."
            ) from error
        self._failed = {key_of(f["spec"]): str(f["reason"]) for f in profile.failures}
        self._items: weakref.WeakKeyDictionary[Workload, tuple[Item, ...]] = weakref.WeakKeyDictionary()
        self._observe(observations)

    # ---- what it rests on ------------------------------------------------------------------
    @property
    def target(self) -> Mapping[str, Any]:
        """Backend, options and versions that the profile was taken with."""
        return self.profile.target

    @property
    def failures(self) -> Mapping[str, str]:
        """Why kernels could not be timed, by key of the signature."""
        return self._failed

    @property
    def method(self) -> str:
        """One line for people: what the numbers are based on."""
        fitted = [n for n in self.profile.networks if n.role == "fit"]
        return (
            f"device profile: {len(self.profile.samples)} samples of "
            f"{len({key_of(s.spec) for s in self.profile.samples})} kernels, {len(fitted)} networks, "
            f"{len(self._observations)} whole-network measurements"
        )

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Whole-network measurements of this run."""
        return self._observations

    @property
    def law(self) -> Law:
        """The current law."""
        return self._law

    @property
    def scales(self) -> dict[str, float]:
        """The current scale per kernel family, of those that a measurement or the profile says something about."""
        families = {f for o in self._observations for f in o.seconds} & set(FAMILIES)
        return {f: self._law.scale_of(f) for f in FAMILIES if f in families or self._known is not None}

    @property
    def constant_s(self) -> float:
        """Part of every estimate that belongs to no kernel: the call, and the law's offset."""
        return self.profile.call_s * self._law.scale_of("call") + self._law.offset_s

    # ---- pricing ---------------------------------------------------------------------------
    def items(self, workload: Workload) -> tuple[Item, ...]:
        """Kernels of a workload with their surfaces; made once per workload."""
        if workload not in self._items:
            self._items[workload] = bind(workload, self.tiers)
        return self._items[workload]

    def terms(self, workload: Workload, plans: Population, latency_s: float | None = None) -> Terms:
        """Seconds of a population by term of the law, before the law.

        Args:
            workload: what the plans belong to.
            plans: the population.
            latency_s: what they take, where it was measured.
        """
        found = terms(self.items(workload), workload.layout, plans, self.tiers, self.profile.call_s)
        if latency_s is not None:
            return found.settled(shares_at(latency_s, self.tiers.periods))
        return found.settled(settled_shares(self._law.predict(found.seconds), self.tiers.periods))

    def estimate_batch(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: Any = None,
        batch: Any = None,
    ) -> np.ndarray:
        """Latency in seconds of a population of plans, an array `[plans]` (0-d for a single plan).

        Args:
            workload: what the plans belong to.
            fractions: kept fraction per group.
            removed: removed blocks.
            size: which of the workload's declared input sizes, an index or an array `[plans]`.
            batch: samples, a number or an array `[plans]`; for workloads with declared sizes.

        Raises:
            PlanError: a removed block, a size or a batch is not in the workload.
        """
        plans = (fractions or {}, removed or {}, size, batch)
        return by_size(workload, *plans, self._latency_of)[0]

    def intervals_batch(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: Any = None,
        batch: Any = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latency and its 90 % interval for a population of plans, three arrays `[plans]`.

        Arguments as of `estimate_batch`.

        Raises:
            PlanError: a removed block, a size or a batch is not in the workload.
            MetricUnavailableError: the error is not known.
        """
        plans = (fractions or {}, removed or {}, size, batch)
        found = by_size(workload, *plans, self._interval_around)
        return found[0], found[1], found[2]

    def _latency_of(self, workload: Workload, plans: Population) -> tuple[Any]:
        return (self._law.predict(self.terms(workload, plans).seconds),)

    def _interval_around(self, workload: Workload, plans: Population) -> tuple[Any, Any, Any]:
        priced = self.terms(workload, plans)
        latency = np.zeros(plans.shape) + self._law.predict(priced.seconds)
        found = self._interval_of(latency, priced)
        if found is None:
            raise MetricUnavailableError(
                f"The error of '{self.method}' is not known; calibrate it with at least two measured networks first."
            )
        return latency, *found

    def estimate(
        self,
        workload: Workload,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: int | None = None,
        batch: int | None = None,
    ) -> CostEstimate:
        """Price one plan (scalars), with a breakdown per kernel; arguments as of `estimate_batch`.

        Raises:
            PlanError: a removed block, the size or the batch is not in the workload.
        """
        workload = workload.at(size, batch)
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        priced = self.terms(workload, plans)
        latency = float(self._law.predict(priced.seconds))
        assert priced.shares is not None
        taken_apart = Breakdown(self.tiers, self._law, self._interval, self._failed, plans, priced.shares)
        costs, unmodelled = taken_apart.table(workload, self.items(workload))
        found = self._interval_of(latency, priced)
        intervals = {} if found is None else {"latency_s": (float(found[0]), float(found[1]))}
        return CostEstimate(self.method, {"latency_s": latency}, intervals, costs, unmodelled)

    # ---- calibration -----------------------------------------------------------------------
    def calibrate(
        self,
        workload: Workload,
        latency_s: float,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: int | None = None,
        batch: int | None = None,
        sd: float = MEASUREMENT_SD,
    ) -> None:
        """Add a whole-network measurement: the baseline first, then measured candidates.

        Args:
            workload: what the plan belongs to.
            latency_s: measured, on the target and with the options of the profile.
            fractions: kept fraction per group of the measured plan; nothing for the baseline.
            removed: blocks that the measured plan removes.
            size: declared input size that it was measured at.
            batch: samples of one inference.
            sd: of the logarithm of the latency; the larger, the less the measurement weighs.

        Raises:
            UsageError: the latency is not a positive number.
            PlanError: a removed block, the size or the batch is not in the workload.
        """
        if not (math.isfinite(latency_s) and latency_s > 0):
            raise UsageError(f"A latency of {latency_s} s cannot calibrate; pass positive seconds.")
        workload = workload.at(size, batch)
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        found = self.terms(workload, plans, float(latency_s)).seconds
        seconds = {term: float(v) for term, v in found.items()}
        self._observe((*self._observations, Observation(seconds, float(latency_s), sd)))

    def _observe(self, observations: tuple[Observation, ...]) -> None:
        self._observations = observations
        self._law = self._law_after(observations)
        self._noise = self._left_out()

    def _law_after(self, observations: tuple[Observation, ...]) -> Law:
        if self._known is not None:
            common = self._interval.common
            if observations:
                # Of a network in another precision, say, all that carries over is how plans differ.
                first = observations[0]
                predicted = float(self._known.predict(first.seconds))
                common = max(common, abs(math.log(first.latency_s / predicted)))
            start = self._known.for_network(common, self._interval.family)
        else:
            start = Law.prior()
            if any(sample.period_s > 0 for sample in self.profile.samples):
                # Timed inside the network, kernels add up: only how fast the machine was then is not known.
                start = Law.prior(inside=True).for_network(_SPEED_SD, 0.0)
            if observations:
                start = start.with_offset(min(o.latency_s for o in observations))
        return start.updated(observations)

    def _left_out(self) -> float | None:
        """Root mean square of the errors at each careful observation without it, with two of them or more."""
        careful = [i for i, one in enumerate(self._observations) if one.sd <= MEASUREMENT_SD]
        if len(careful) < 2:
            return None
        errors = []
        for index in careful:
            left_out = self._observations[index]
            rest = tuple(o for i, o in enumerate(self._observations) if i != index)
            errors.append(float(self._law_after(rest).predict(left_out.seconds)) / left_out.latency_s - 1.0)
        return float(np.sqrt(np.mean(np.square(errors))))

    def _interval_of(self, latency: Any, priced: Terms) -> tuple[Any, Any] | None:
        if self._known is not None:
            variance = self._law.variance(priced.seconds) + self._kernel_variance(priced)
            return self._interval.of_network(latency, variance)
        if self._noise is None:  # a law that was fitted exactly says nothing about its error
            return None
        careful = sum(one.sd <= MEASUREMENT_SD for one in self._observations)
        student = _T90[min(careful - 1, len(_T90)) - 1]
        own = Interval(noise=max(self._noise, MEASUREMENT_SD / 2), quantile=max(student, NORMAL))
        return own.of_network(latency, 0.0)

    def _kernel_variance(self, priced: Terms) -> Any:
        """What remains of the errors of single kernels once the network itself was measured: how plans differ."""
        total = sum(self._law.scale_of(f) ** 2 * v for f, v in priced.variances.items())
        return total / (1.0 + len(self._observations))

    # ---- files -----------------------------------------------------------------------------
    def to_json(self) -> str:
        """Deterministic JSON text, schema `sartor.ladder/1`: the profile and this run's measurements."""
        document = {
            "schema": SCHEMA,
            "profile": json.loads(self.profile.to_json()),
            "observations": [dataclasses.asdict(o) for o in self._observations],
        }
        return json.dumps(document, sort_keys=True, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` atomically."""
        return write_atomic(path, self.to_json().encode())

    @staticmethod
    def from_json(text: str) -> Ladder:
        """Inverse of `to_json`.

        Raises:
            UsageError: no ladder of this schema.
        """
        try:
            document = json.loads(text)
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            if found != SCHEMA:
                raise UsageError(f"Expected a cost model of schema '{SCHEMA}', found '{found}'.")
            profile = DeviceProfile.from_json(json.dumps(document["profile"]))
            observations = tuple(Observation(**entry) for entry in document["observations"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"The cost model is malformed ({type(error).__name__}: {error}); measure it again."
            ) from error
        return Ladder(profile, observations)
