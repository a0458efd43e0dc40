"""The escalation for single kernels: measured, learned, roofline; and what cold weights add to each.

Built from a device profile. A profile without fitted models (samples only) has the measured tier above a
roofline that is fitted to those samples on the spot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models import around
from sartor.cost_models import rates as roofline
from sartor.cost_models.law import Caches
from sartor.cost_models.learned import BoostedResidual, as_signature
from sartor.cost_models.profile import DeviceProfile, Sample, of_role
from sartor.cost_models.protocol import KernelModel
from sartor.cost_models.rates import Rates
from sartor.cost_models.signatures import Signature, variable_names
from sartor.cost_models.surface import Surface, build, ranges_of
from sartor.cost_models.table import (
    KernelTable,
    by_spec,
    corrections,
    first_that_knows,
    predict_samples,
    sizes_of,
)
from sartor.cost_models.work import work_of_spec
from sartor.errors import UsageError
from sartor.ir.layout import FAMILY as LAYOUT

_ANY = "*"
_FEW = 8


@dataclasses.dataclass(frozen=True)
class Cold:
    """Seconds that a kernel takes longer when its weights are not in the nearest cache.

    `fixed + per_byte · weight bytes`, and `per_far_byte · weight bytes` more if they are in no cache at all.

    Attributes:
        by_family: the three coefficients, none negative.
    """

    by_family: Mapping[str, tuple[float, float, float]]

    def coefficients(self, family: str) -> tuple[float, float, float]:
        """Those of one family; zero where nothing was timed cold."""
        return self.by_family.get(family) or self.by_family.get(_ANY, (0.0, 0.0, 0.0))


def waiting_s(coefficients: tuple[float, float, float], weight_bytes: Any) -> tuple[Any, Any]:
    """Seconds that a kernel waits for weights that are not in the nearest cache; and besides, if they are in none.

    Args:
        coefficients: of `Cold`.
        weight_bytes: of the kernel, a scalar or an array.
    """
    fixed, per_byte, per_far_byte = coefficients
    weights = np.asarray(weight_bytes, float)
    return np.where(weights > 0, fixed + per_byte * weights, 0.0), per_far_byte * weights


@dataclasses.dataclass(frozen=True, eq=False)
class Predicted:
    """What the tiers say of many kernels, an array each.

    Attributes:
        warm_s: seconds with warm weights.
        sd_s: standard deviation of them.
        near_s: what weights add that are in another cache.
        far_s: what weights add besides that are in none.
        tiers: which tier said it.
    """

    warm_s: np.ndarray
    sd_s: np.ndarray
    near_s: np.ndarray
    far_s: np.ndarray
    tiers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tiers:
    """See the module docstring.

    Attributes:
        rates: roofline; knows every kernel.
        learned: None where it was not fitted.
        table: measured.
        cold: see `Cold`.
        grid: channel grid by family or operator.
    """

    rates: Rates
    learned: BoostedResidual | None
    table: KernelTable
    cold: Cold
    grid: Mapping[str, int]
    _surfaces: dict[Any, Surface] = dataclasses.field(default_factory=dict, repr=False)

    @staticmethod
    def of(profile: DeviceProfile) -> Tiers:
        """Of a profile, fitted or not.

        Raises:
            UsageError: its models are malformed.
            MetricUnavailableError: it has no samples.
        """
        samples = of_role(profile.samples, "fit")
        models = profile.models
        caches = Caches.of(profile.device)
        try:
            grid = {str(k): int(v) for k, v in profile.target.get("channel_grid", {}).items()}
            cold = {name: tuple(map(float, found)) for name, found in models.get("cold", {}).items()}
            coefficients = {name: (near, far, farther) for name, (near, far, farther) in cold.items()}
            if "cold" not in models:
                coefficients = around.fitted(samples, caches, grid) or dict(fitted_cold(samples).by_family)
            samples = around.warmed(samples, caches, coefficients)
            known = models.get("roofline")
            rates = Rates.load(known, grid) if known is not None else roofline.fitted(samples, grid)
            learned = BoostedResidual.load(models["learned"], rates) if models.get("learned") else None
            base = below(rates, learned)
            table = KernelTable(base, corrections(samples, base))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(
                f"The models of the device profile are malformed ({type(error).__name__}: {str(error)[:200]}); build "
                "it again with 'sartor profile'."
            ) from error
        return Tiers(rates, learned, table, Cold(coefficients), grid)

    @property
    def prices_layout(self) -> bool:
        """Whether copies between layouts were timed; where kernels were timed alone, they were not."""
        return any(name.split("/")[0] == LAYOUT for name in self.rates.laws)

    def model_for(self, signature: Signature) -> KernelModel:
        """The best tier that knows a kernel."""
        return first_that_knows((self.table, *self.table.base), signature)

    def surface(self, signature: Signature, varies: Sequence[bool]) -> Surface:
        """Times of a kernel over all sizes up to those that its variables have before pruning."""
        fulls = tuple(v.full for v in signature.variables)
        key = (signature.key, fulls, tuple(varies))
        if key not in self._surfaces:
            step = roofline.grid_step(self.grid, signature.family, signature.spec["op"])
            names = variable_names(signature.spec)
            steps = {names[i]: step for i in roofline.stepped(signature.spec)}
            model = self.model_for(signature)
            self._surfaces[key] = build(
                ranges_of(names, fulls, varies, steps), lambda sizes: _predict(model, signature, sizes)
            )
        return self._surfaces[key]

    def many(self, samples: Sequence[Sample]) -> Predicted:
        """Many kernels at once; their times are not looked at."""
        seconds, log_sd = predict_samples(self.table.base, samples)
        near, far = np.zeros(len(samples)), np.zeros(len(samples))
        tiers = [""] * len(samples)
        for key, indices in by_spec(samples).items():
            one, sizes = samples[indices[0]], sizes_of(samples, indices)
            correction = self.table.corrections.get(key)
            if correction is not None:
                mean, variance = correction.at(sizes or [np.zeros(len(indices))])
                seconds[indices] *= np.exp(mean)
                log_sd[indices] = np.sqrt(variance)
            near[indices], far[indices] = waiting_s(
                self.cold.coefficients(one.family), work_of_spec(one.spec, sizes).weight_bytes
            )
            for index in indices:
                tiers[index] = self.model_for(as_signature(one)).tier
        return Predicted(seconds, seconds * log_sd, near, far, tuple(tiers))


def _predict(
    model: KernelModel, signature: Signature, sizes: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    seconds, log_sd = model.predict(signature, sizes)
    return np.atleast_1d(seconds), np.atleast_1d(log_sd)


def below(rates: Rates, learned: BoostedResidual | None) -> tuple[KernelModel, ...]:
    """The tiers below the measured one, best first."""
    return (rates,) if learned is None else (learned, rates)


def fitted_cold(samples: Sequence[Sample]) -> Cold:
    """Fit what cold weights cost, per family, relative to the warm time."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for sample in samples:
        if sample.cold_s is None:
            continue
        weights = float(work_of_spec(sample.spec, [np.asarray(s) for s in sample.at]).weight_bytes)
        if weights:
            for family in (sample.family, _ANY):
                rows.setdefault(family, []).append((weights, sample.cold_s - sample.warm_s, sample.warm_s))
    return Cold({f: (*_fit_cold(np.array(r)), 0.0) for f, r in rows.items() if f == _ANY or len(r) >= _FEW})


def _fit_cold(rows: np.ndarray) -> tuple[float, float]:
    weights, extra, warm = rows.T
    design = np.stack([1.0 / warm, weights / warm], 1)
    target = extra / warm
    both, *_ = np.linalg.lstsq(design, target, rcond=None)
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    singles = [max(0.0, float(c @ target / (c @ c))) for c in design.T]
    errors = [float(np.square(c * s - target).sum()) for c, s in zip(design.T, singles, strict=True)]
    return (singles[0], 0.0) if errors[0] < errors[1] else (0.0, singles[1])
