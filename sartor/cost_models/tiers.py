"""The escalation for single kernels: measured, learned, roofline; in several states of the caches.

Built from a device profile. A profile without fitted models (samples only) has the measured tier above a
roofline that is fitted to those samples on the spot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models import rates as roofline
from sartor.cost_models.learned import BoostedResidual, as_signature
from sartor.cost_models.profile import ALONE, Company, DeviceProfile, Sample, of_role
from sartor.cost_models.protocol import KernelModel
from sartor.cost_models.rates import Rates
from sartor.cost_models.signatures import Signature, key_of, variable_names
from sartor.cost_models.surface import Range, Surface, build, ranges_of
from sartor.cost_models.table import (
    Corrections,
    KernelTable,
    by_spec,
    first_that_knows,
    predict_samples,
    sizes_of,
)
from sartor.cost_models.work import Units
from sartor.errors import UsageError
from sartor.ir.layout import FAMILY as LAYOUT

_STATES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Predicted:
    """What the tiers say of many kernels, an array each.

    Attributes:
        seconds: of each.
        sd_s: standard deviation of them.
        tiers: which tier said it.
    """

    seconds: np.ndarray
    sd_s: np.ndarray
    tiers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tiers:
    """See the module docstring.

    Attributes:
        rates: roofline; knows every kernel.
        learned: None where it was not fitted.
        table: measured.
        grid: channel grid by family or operator.
    """

    rates: Rates
    learned: BoostedResidual | None
    table: KernelTable
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
        try:
            grid = {str(k): int(v) for k, v in profile.target.get("channel_grid", {}).items()}
            known = models.get("roofline")
            rates = Rates.load(known, grid) if known is not None else roofline.fitted(samples, grid)
            learned = BoostedResidual.load(models["learned"], rates) if models.get("learned") else None
            base = below(rates, learned)
            table = KernelTable(base, Corrections(samples, base))
            # What is wrong with the models fails here, and not where a search first asks for it.
            table.corrections.make({sample.family: key_of(sample.spec) for sample in samples}.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(
                f"The models of the device profile are malformed ({type(error).__name__}: {str(error)[:200]}); build "
                "it again with 'sartor profile'."
            ) from error
        return Tiers(rates, learned, table, grid)

    def without(self, fold: int, rest: Sequence[Sample]) -> Tiers:
        """What is known without the samples of a fold.

        Args:
            fold: of the learned model.
            rest: samples of the others, all of every signature that will be asked for.
        """
        learned = None if self.learned is None else self.learned.without(fold)
        base = below(self.rates, learned)
        return Tiers(self.rates, learned, KernelTable(base, Corrections(rest, base)), self.grid)

    @property
    def periods(self) -> np.ndarray:
        """Seconds between two runs of a kernel, ascending `[states]`: the states of the caches that it is priced in."""
        low, high = self.rates.periods
        return np.geomspace(low, high, _STATES) if low else np.zeros(1)

    @property
    def prices_layout(self) -> bool:
        """Whether copies between layouts were timed; where kernels were timed alone, they were not."""
        return any(name.split("/")[0] == LAYOUT for name in self.rates.laws)

    def model_for(self, signature: Signature) -> KernelModel:
        """The best tier that knows a kernel."""
        return first_that_knows((self.table, *self.table.base), signature)

    def surface(self, signature: Signature, varies: Sequence[bool], company: Company = ALONE) -> Surface:
        """Times of a kernel over all sizes up to those that its variables have before pruning.

        Args:
            signature: of the kernel.
            varies: which of its variables a plan changes.
            company: in the whole network, with all of its twins.
        """
        fulls = tuple(v.full for v in signature.variables)
        key = (signature.key, fulls, tuple(varies), company)
        if key not in self._surfaces:
            self._surfaces[key] = build(
                self._ranges(signature, fulls, varies),
                lambda sizes: _predict(self.model_for(signature), signature, sizes, self.periods, company),
            )
        return self._surfaces[key]

    def _ranges(
        self, signature: Signature, fulls: Sequence[float], varies: Sequence[bool]
    ) -> tuple[Range, ...]:
        if signature.kind == "movement":
            units = Units.of(signature.spec)
            step = roofline.grid_step(self.grid, "conv", "Conv") if units.of_maps else 1
            return tuple(Range(full, v, step, units=units) for full, v in zip(fulls, varies, strict=True))
        step, names = (
            roofline.grid_step(self.grid, signature.family, signature.spec["op"]),
            variable_names(signature.spec),
        )
        return ranges_of(names, fulls, varies, {names[i]: step for i in roofline.stepped(signature.spec)})

    def many(self, samples: Sequence[Sample]) -> Predicted:
        """Many kernels at once, each with the period of its sample; their times are not looked at."""
        seconds, log_sd = predict_samples(self.table.base, samples)
        tiers = [""] * len(samples)
        members = by_spec(samples)
        self.table.corrections.make(members)
        for key, indices in members.items():
            one, sizes = samples[indices[0]], sizes_of(samples, indices)
            correction = self.table.corrections.get(key)
            if correction is not None:
                mean, variance = correction.at(sizes, len(indices))
                seconds[indices] *= np.exp(mean)
                log_sd[indices] = np.sqrt(variance)
            for index in indices:
                tiers[index] = self.model_for(as_signature(one)).tier
        return Predicted(seconds, seconds * log_sd, tuple(tiers))


def _predict(
    model: KernelModel,
    signature: Signature,
    sizes: Sequence[np.ndarray],
    periods: np.ndarray,
    company: Company,
) -> tuple[np.ndarray, np.ndarray]:
    """As `surface.Predict` has them."""
    companies = [company, Company(company.alike)] if company.twins > 1 else [company]
    found = [model.predict(signature, sizes, period, one) for one in companies for period in periods]
    seconds, log_sd = (
        np.stack([np.atleast_1d(part) for part in parts], -1) for parts in zip(*found, strict=True)
    )
    if len(companies) > 1:
        seconds, log_sd = (part.reshape(len(part), len(companies), -1) for part in (seconds, log_sd))
    return seconds, log_sd


def below(rates: Rates, learned: BoostedResidual | None) -> tuple[KernelModel, ...]:
    """The tiers below the measured one, best first."""
    return (rates,) if learned is None else (learned, rates)
