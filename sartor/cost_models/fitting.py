"""Fits everything that a device profile holds beside its samples: models, law, interval, held-out errors."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models import learned as boosting
from sartor.cost_models import rates as roofline
from sartor.cost_models.features import family_of
from sartor.cost_models.interval import Interval, conformal, excess_sd
from sartor.cost_models.items import Terms, settled_shares, shares_at
from sartor.cost_models.law import Law, Observation
from sartor.cost_models.learned import noise_of
from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample, of_role
from sartor.cost_models.scores import summary
from sartor.cost_models.signatures import key_of
from sartor.cost_models.table import corrections, predict_samples
from sartor.cost_models.tiers import Tiers, below
from sartor.ir.layout import FAMILY as LAYOUT

_SHARED = 0.8
"""Of the error of unseen networks, expected in what all kernels share and again in each family: families
have about half of a network's time each, so that both together give the error that was seen."""
_LEAST_NOISE = 0.005
_FEWEST_NETWORKS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkTerms:
    """A network as the law sees it.

    Attributes:
        network: what was timed.
        terms: in every state of the caches.
        periods: of these states, seconds.
    """

    network: NetworkTime
    terms: Terms
    periods: np.ndarray

    @property
    def noise(self) -> float:
        """Of the measurement, as a share."""
        low, high = self.network.ci95
        return max((high - low) / (2 * 1.96 * self.network.latency_s), _LEAST_NOISE)

    def seen(self) -> Terms:
        """In the state that its measured latency says."""
        return self.terms.settled(shares_at(self.network.latency_s, self.periods))

    def expected(self, law: Law) -> Terms:
        """In the state that a law says; its measured latency is not looked at."""
        return self.terms.settled(settled_shares(law.predict(self.terms.seconds), self.periods))

    def observed(self, unknown: float) -> Observation:
        """As an observation of the law.

        Args:
            unknown: standard deviation of what no law knows of a network.
        """
        seen = self.seen()
        variance = _kernel_variance(seen) / self.network.latency_s**2
        seconds = {name: float(value) for name, value in seen.seconds.items()}
        return Observation(
            seconds, self.network.latency_s, float(np.sqrt(self.noise**2 + variance + unknown**2))
        )


def _kernel_variance(found: Terms) -> float:
    """Of the sum of the kernels, seconds squared."""
    return float(sum(found.variances.values()))


def fit_profile(profile: DeviceProfile, *, learned: bool = True) -> DeviceProfile:
    """The profile with models, law, interval and errors, all fitted to what it measured.

    Samples and networks of role `heldout` are used for the errors only.

    Args:
        profile: with samples; networks, if it has any, give law and interval.
        learned: also fit the learned tier, which needs LightGBM; without it, kernels whose signature was not
            timed are left to the roofline.

    Raises:
        MetricUnavailableError: there are no samples.
        UsageError: LightGBM is not installed.
    """
    samples = of_role(profile.samples, "fit")
    rates = roofline.fitted(samples, profile.target.get("channel_grid", {}))
    fit = boosting.fit(samples, rates) if learned else None
    model = fit.model if fit is not None and fit.families else None
    models: dict[str, Any] = {"roofline": rates.save()}
    if model is not None:
        models["learned"] = model.save()
    fitted = dataclasses.replace(profile, models=models, law={}, interval={}, errors={})
    tiers = Tiers.of(fitted)
    quantiles = _kernel_quantiles(samples, tiers, None if fit is None else fit.unseen)
    interval, law = Interval(kernels=quantiles), None
    heldout = of_role(profile.samples, "heldout")
    errors: dict[str, Any] = {"kernels": _kernel_errors(heldout, tiers, interval)}
    fitting = [n for n in profile.networks if n.role == "fit"]
    if len(fitting) >= _FEWEST_NETWORKS:
        inside = any(s.period_s for s in profile.samples)
        seen = networks_terms(fitting, tiers, profile)
        unseen = _unseen_terms(fitting, tiers, profile)
        law, interval = _fit_law(seen, unseen, interval, inside)
        judged = networks_terms([n for n in profile.networks if n.role == "heldout"], tiers, profile)
        errors["networks"] = _network_errors(judged, law, interval)
    return dataclasses.replace(
        fitted,
        law=law.to_dict() if law is not None else {},
        interval=interval.to_dict(),
        errors=errors,
    )


def _unseen_terms(
    networks: Sequence[NetworkTime], tiers: Tiers, profile: DeviceProfile
) -> list[NetworkTerms]:
    """Price networks by models that have not seen their kernels, so that these are as far off as those of a new one.

    Reference: R. F. Barber, E. J. Candès, A. Ramdas and R. J. Tibshirani, "Predictive inference with the jackknife+",
    Annals of Statistics 49 (2021).
    """
    samples = of_role(profile.samples, "fit")
    keys = [key_of(sample.spec) for sample in samples]
    folds = [boosting.fold_of_sample(sample) for sample in samples]
    found: dict[str, NetworkTerms] = {}
    for fold in range(boosting.FOLDS):
        mine = [n for n in networks if boosting.fold_of(n.name) == fold]
        asked = {key_of(spec) for network in mine for spec, _, _ in network.kernels}
        rest = [
            s for s, key, own in zip(samples, keys, folds, strict=True) if own != fold and key in asked
        ]  # tables of other signatures would not be looked at
        if mine:
            found |= {t.network.name: t for t in networks_terms(mine, tiers.without(fold, rest), profile)}
    return [found[network.name] for network in networks]


def networks_terms(
    networks: Sequence[NetworkTime], tiers: Tiers, profile: DeviceProfile
) -> list[NetworkTerms]:
    """Price the kernels of networks that the profile holds."""
    periods = tiers.periods
    kernels = [
        (
            number,
            count,
            Sample(spec, at, family, 1.0, alike=alike[family, spec["op"]], twins=twins_of(family, count)),
        )
        for number, network in enumerate(networks)
        for alike in [alike_in(network.kernels)]
        for spec, at, count in network.kernels
        for family in [family_of(spec)]
    ]
    alone = [sample for _, _, sample in kernels]
    said = tiers.many([dataclasses.replace(s, period_s=period) for s in alone for period in periods])
    seconds, sds = (part.reshape(len(alone), len(periods)) for part in (said.seconds, said.sd_s))
    parts: list[dict[str, Any]] = [{"call": np.full(len(periods), profile.call_s)} for _ in networks]
    variances: list[dict[str, Any]] = [{} for _ in networks]
    for (number, count, sample), one, sd in zip(kernels, seconds, sds, strict=True):
        mine, spread = parts[number], variances[number]
        mine[sample.family] = mine.get(sample.family, 0.0) + count * one
        spread[sample.family] = spread.get(sample.family, 0.0) + np.square(count * sd)
    return [
        NetworkTerms(network, Terms(mine, spread), periods)
        for network, mine, spread in zip(networks, parts, variances, strict=True)
    ]


def alike_in(kernels: Iterable[tuple[Mapping[str, Any], Any, int]]) -> Counter[tuple[str, str]]:
    """How many kernels of a family and operator there are, of `(spec, sizes, how often)`."""
    found: Counter[tuple[str, str]] = Counter()
    for spec, _, count in kernels:
        found[family_of(spec), spec["op"]] += count
    return found


def twins_of(family: str, count: int) -> int:
    """`Sample.twins` of a kernel that a network has so many times."""
    return 1 if family == LAYOUT else count


def kind_of(network: NetworkTime) -> str:
    """What kind of network: its name up to the first separator."""
    return re.split(r"[-:/_. ]", network.name, maxsplit=1)[0]


# ---- law and interval ----------------------------------------------------------------------------
def _fit_law(
    seen: Sequence[NetworkTerms], terms: Sequence[NetworkTerms], interval: Interval, inside: bool = False
) -> tuple[Law, Interval]:
    """The law of all, and the interval from laws that had not seen the kind of network they predict.

    Args:
        seen: networks as models price them that know their kernels.
        terms: as models price them that do not.
    """
    kinds = [kind_of(t.network) for t in terms]
    if len(set(kinds)) < 3:
        kinds = [str(i) for i in range(len(terms))]
    unknown = 0.05
    for _ in range(2):  # how far networks scatter decides how much each says, and the other way round
        laws = {
            kind: _law([t for t, k in zip(seen, kinds, strict=True) if k != kind], unknown, inside)
            for kind in sorted(set(kinds))
        }
        errors = [_log_error(t, laws[k]) for t, k in zip(terms, kinds, strict=True)]
        explained = [
            float(np.sqrt(_kernel_variance(t.seen()) / t.network.latency_s**2 + interval.noise**2))
            for t in terms
        ]
        unknown = max(excess_sd(errors, explained), 0.01)
    shared = _SHARED * unknown
    trial = dataclasses.replace(interval, common=shared, family=shared)
    scores = [
        error / _sd(t, laws[kind].for_network(shared, shared), trial)
        for t, kind, error in zip(terms, kinds, errors, strict=True)
    ]
    return _law(seen, unknown, inside), dataclasses.replace(trial, quantile=conformal(scores), n=len(scores))


def _law(terms: Sequence[NetworkTerms], unknown: float, inside: bool) -> Law:
    smallest = min(t.network.latency_s for t in terms)
    return Law.prior(inside=inside).with_offset(smallest).updated([t.observed(unknown) for t in terms])


def _log_error(terms: NetworkTerms, law: Law) -> float:
    return float(np.log(law.predict(terms.expected(law).seconds) / terms.network.latency_s))


def _sd(terms: NetworkTerms, law: Law, interval: Interval) -> float:
    found = terms.expected(law)
    predicted = law.predict(found.seconds)
    variance = law.variance(found.seconds) + _kernel_variance(found)
    return float(np.sqrt(variance / predicted**2 + interval.noise**2))


def _network_errors(terms: Sequence[NetworkTerms], law: Law, interval: Interval) -> dict[str, float]:
    unseen = law.for_network(interval.common, interval.family)
    found = [t.expected(law) for t in terms]
    predicted = [float(law.predict(f.seconds)) for f in found]
    intervals = [
        interval.of_network(p, float(unseen.variance(f.seconds)) + _kernel_variance(f))
        for p, f in zip(predicted, found, strict=True)
    ]
    return summary(predicted, [t.network.latency_s for t in terms], intervals or None)


# ---- kernels -------------------------------------------------------------------------------------
def _kernel_quantiles(samples: Sequence[Sample], tiers: Tiers, unseen: np.ndarray | None) -> dict[str, float]:
    """Per tier, how many standard deviations cover what it had not seen."""
    scores: dict[str, list[float]] = {}
    for found in corrections(samples, below(tiers.rates, tiers.learned), unseen).values():
        if len(found.points) > 1:
            errors, expected = found.left_out()
            scores.setdefault("measured", []).extend(errors / expected)
    noise = np.array([noise_of(s) for s in samples])
    seconds, sd = predict_samples((tiers.rates,), samples)
    errors = np.log(np.array([s.seconds for s in samples]) / seconds)
    scores["roofline"] = list(errors / np.hypot(sd, noise))
    if unseen is not None and tiers.learned is not None:
        known = [int(i) for i in np.flatnonzero(np.isfinite(unseen))]
        _, sd = predict_samples((tiers.learned, tiers.rates), [samples[i] for i in known])
        scores["learned"] = list(unseen[known] / np.hypot(sd, noise[known]))
    return {tier: conformal(found) for tier, found in scores.items()}


def _kernel_errors(samples: Sequence[Sample], tiers: Tiers, interval: Interval) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
    said = tiers.many(samples)
    for sample, own, sd, tier in zip(samples, said.seconds, said.sd_s, said.tiers, strict=True):
        span = interval.of_kernel(tier, float(own), float(np.hypot(sd / own, noise_of(sample))))
        for name in ("all", tier, sample.family):
            rows.setdefault(name, []).append((float(own), sample.seconds, span))
    found = {name: summary(*zip(*entries, strict=True)) for name, entries in rows.items()}
    return {**found.pop("all", {"n": 0}), "parts": found}
