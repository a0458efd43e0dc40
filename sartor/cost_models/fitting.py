"""Fits everything that a device profile holds beside its samples: models, law, interval, held-out errors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models import around
from sartor.cost_models import learned as boosting
from sartor.cost_models import rates as roofline
from sartor.cost_models.features import family_of
from sartor.cost_models.interval import Interval, conformal, excess_sd
from sartor.cost_models.law import Caches, Law, Observation, cold_share
from sartor.cost_models.learned import noise_of
from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample, of_role
from sartor.cost_models.scores import summary
from sartor.cost_models.table import corrections, predict_samples
from sartor.cost_models.tiers import Tiers, below, fitted_cold

_SHARED = 0.8
"""Of the error of unseen networks, expected in what all kernels share and again in each family: families
have about half of a network's time each, so that both together give the error that was seen."""
_LEAST_NOISE = 0.005
_FEWEST_NETWORKS = 4


@dataclasses.dataclass(frozen=True)
class NetworkTerms:
    """A network as the law sees it.

    Attributes:
        network: what was timed.
        seconds: predicted seconds by term of the law.
        kernel_sd: standard deviation of its sum of kernels, seconds.
    """

    network: NetworkTime
    seconds: Mapping[str, float]
    kernel_sd: float

    @property
    def noise(self) -> float:
        """Of the measurement, as a share."""
        low, high = self.network.ci95
        return max((high - low) / (2 * 1.96 * self.network.latency_s), _LEAST_NOISE)

    def observed(self, unknown: float) -> Observation:
        """As an observation of the law.

        Args:
            unknown: standard deviation of what no law knows of a network.
        """
        kernels = self.kernel_sd / self.network.latency_s
        sd = float(np.sqrt(self.noise**2 + kernels**2 + unknown**2))
        return Observation(self.seconds, self.network.latency_s, sd)


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
    measured = of_role(profile.samples, "fit")
    caches = Caches.of(profile.device)
    cold = around.fitted(measured, caches, profile.target.get("channel_grid", {}))
    samples = around.warmed(measured, caches, cold)
    rates = roofline.fitted(samples, profile.target.get("channel_grid", {}))
    fit = boosting.fit(samples, rates) if learned else None
    model = fit.model if fit is not None and fit.families else None
    models: dict[str, Any] = {
        "roofline": rates.save(),
        "cold": _plain(cold or fitted_cold(samples).by_family),
    }
    if model is not None:
        models["learned"] = model.save()
    fitted = dataclasses.replace(profile, models=models, law={}, interval={}, errors={})
    tiers = Tiers.of(fitted)
    quantiles = _kernel_quantiles(samples, tiers, None if fit is None else fit.unseen)
    interval, law = Interval(kernels=quantiles), None
    heldout = around.warmed(of_role(profile.samples, "heldout"), caches, cold)
    errors: dict[str, Any] = {"kernels": _kernel_errors(heldout, tiers, interval)}
    judged = [n for n in profile.networks if n.role in ("fit", "heldout")]
    terms = networks_terms(judged, tiers, profile)
    fitting = [t for t in terms if t.network.role == "fit"]
    if len(fitting) >= _FEWEST_NETWORKS:
        law, interval = _fit_law(fitting, interval, any(s.around_bytes for s in profile.samples))
        errors["networks"] = _network_errors([t for t in terms if t.network.role == "heldout"], law, interval)
    return dataclasses.replace(
        fitted,
        law=law.to_dict() if law is not None else {},
        interval=interval.to_dict(),
        errors=errors,
    )


def networks_terms(
    networks: Sequence[NetworkTime], tiers: Tiers, profile: DeviceProfile
) -> list[NetworkTerms]:
    """Price the kernels of networks that the profile holds."""
    kernels = [
        (number, count, Sample(spec, at, family_of(spec), 1.0))
        for number, network in enumerate(networks)
        for spec, at, count in network.kernels
    ]
    said = tiers.many([sample for _, _, sample in kernels])
    caches = Caches.of(profile.device)
    seconds: list[dict[str, float]] = [{"call": profile.call_s, "cold": 0.0} for _ in networks]
    variances = np.zeros(len(networks))
    for index, (number, count, sample) in enumerate(kernels):
        mine, weights = seconds[number], networks[number].weight_bytes
        near, last = (float(cold_share(weights, size)) for size in (caches.near, caches.last))
        mine[sample.family] = mine.get(sample.family, 0.0) + count * float(said.warm_s[index])
        mine["cold"] += count * float(near * said.near_s[index] + last * said.far_s[index])
        variances[number] += (count * float(said.sd_s[index])) ** 2
    return [
        NetworkTerms(network, mine, float(np.sqrt(variance)))
        for network, mine, variance in zip(networks, seconds, variances, strict=True)
    ]


def kind_of(network: NetworkTime) -> str:
    """What kind of network: its name up to the first separator."""
    return re.split(r"[-:/_. ]", network.name, maxsplit=1)[0]


# ---- law and interval ----------------------------------------------------------------------------
def _fit_law(terms: Sequence[NetworkTerms], interval: Interval, inside: bool = False) -> tuple[Law, Interval]:
    """The law of all, and the interval from laws that had not seen the kind of network they predict."""
    kinds = [kind_of(t.network) for t in terms]
    if len(set(kinds)) < 3:
        kinds = [str(i) for i in range(len(terms))]
    unknown = 0.05
    for _ in range(2):  # how far networks scatter decides how much each says, and the other way round
        laws = {
            kind: _law([t for t, k in zip(terms, kinds, strict=True) if k != kind], unknown, inside)
            for kind in sorted(set(kinds))
        }
        errors = [_log_error(t, laws[k]) for t, k in zip(terms, kinds, strict=True)]
        explained = [float(np.hypot(t.kernel_sd / t.network.latency_s, t.noise)) for t in terms]
        unknown = max(excess_sd(errors, explained), 0.01)
    noise = float(np.median([t.noise for t in terms]))
    shared = _SHARED * unknown
    trial = dataclasses.replace(interval, common=shared, family=shared, noise=noise)
    scores = [
        error / _sd(t, laws[kind].for_network(shared, shared), trial)
        for t, kind, error in zip(terms, kinds, errors, strict=True)
    ]
    return _law(terms, unknown, inside), dataclasses.replace(trial, quantile=conformal(scores), n=len(scores))


def _law(terms: Sequence[NetworkTerms], unknown: float, inside: bool) -> Law:
    smallest = min(t.network.latency_s for t in terms)
    return Law.prior(inside=inside).with_offset(smallest).updated([t.observed(unknown) for t in terms])


def _log_error(terms: NetworkTerms, law: Law) -> float:
    return float(np.log(law.predict(terms.seconds) / terms.network.latency_s))


def _sd(terms: NetworkTerms, law: Law, interval: Interval) -> float:
    predicted = law.predict(terms.seconds)
    variance = law.variance(terms.seconds) + terms.kernel_sd**2
    return float(np.sqrt(variance / predicted**2 + interval.noise**2))


def _network_errors(terms: Sequence[NetworkTerms], law: Law, interval: Interval) -> dict[str, float]:
    unseen = law.for_network(interval.common, interval.family)
    predicted = [float(law.predict(t.seconds)) for t in terms]
    intervals = [
        interval.of_network(p, float(unseen.variance(t.seconds)) + t.kernel_sd**2)
        for p, t in zip(predicted, terms, strict=True)
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
    errors = np.log(np.array([s.warm_s for s in samples]) / seconds)
    scores["roofline"] = list(errors / np.hypot(sd, noise))
    if unseen is not None and tiers.learned is not None:
        known = [int(i) for i in np.flatnonzero(np.isfinite(unseen))]
        _, sd = predict_samples((tiers.learned, tiers.rates), [samples[i] for i in known])
        scores["learned"] = list(unseen[known] / np.hypot(sd, noise[known]))
    return {tier: conformal(found) for tier, found in scores.items()}


def _kernel_errors(samples: Sequence[Sample], tiers: Tiers, interval: Interval) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
    said = tiers.many(samples)
    for sample, warm, sd, tier in zip(samples, said.warm_s, said.sd_s, said.tiers, strict=True):
        span = interval.of_kernel(tier, float(warm), float(np.hypot(sd / warm, noise_of(sample))))
        for name in ("all", tier, sample.family):
            rows.setdefault(name, []).append((float(warm), sample.warm_s, span))
    found = {name: summary(*zip(*entries, strict=True)) for name, entries in rows.items()}
    return {**found.pop("all", {"n": 0}), "parts": found}


def _plain(pairs: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: list(pair) for name, pair in pairs.items()}
