"""The law from kernels to networks, and intervals that hold what they promise."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cost_profiles import make_profile, sample

from sartor.cost_models.fitting import NetworkTerms, _fit_law, fit_profile, kind_of
from sartor.cost_models.interval import NORMAL, Interval, conformal, excess_sd
from sartor.cost_models.items import Terms
from sartor.cost_models.law import TERMS, Law, Observation
from sartor.cost_models.profile import NetworkTime

SCALES = {"conv": 0.9, "depthwise": 1.3, "elementwise": 1.1}
KINDS = ("plain", "residual", "inverted", "grouped", "dense")


def simulated(rng, count, *, bias=0.04, kernel_sd=0.02, noise=0.01, kind_bias=0.0, kinds=KINDS):
    """Networks of a known law: scales, a bias of each network, one of its kind, kernel errors, noise."""
    biases = {kind: kind_bias * rng.standard_normal() for kind in kinds}
    found = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        seconds = {f: float(math.exp(rng.normal(-7, 0.7))) for f in SCALES}
        total = sum(SCALES[f] * s for f, s in seconds.items())
        error = bias * rng.standard_normal() + kernel_sd * rng.standard_normal() + biases[kind]
        latency = total * math.exp(error + noise * rng.standard_normal())
        half = 1.96 * noise * latency
        timed = NetworkTime(f"{kind}-{number}", (), latency, (latency - half, latency + half))
        by_state = {family: np.array([value]) for family, value in seconds.items()}
        terms = Terms(by_state, {"conv": np.array([(kernel_sd * total) ** 2])})
        found.append(NetworkTerms(timed, terms, np.zeros(1)))
    return found


def covered(law, interval, terms):
    law = law.for_network(interval.common, interval.family)
    hits = 0
    for t in terms:
        seen = t.seen()
        predicted = float(law.predict(seen.seconds))
        own = float(seen.variances["conv"])
        low, high = interval.of_network(predicted, float(law.variance(seen.seconds)) + own)
        hits += low <= t.network.latency_s <= high
    return hits


def wilson(hits, n, z=1.96):
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


# ---- coverage ------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [0.0, 0.05])
def test_ninety_per_cent_of_unseen_networks_lie_in_their_intervals(bias):
    rng = np.random.default_rng(1)
    hits = n = 0
    widths = []
    for _ in range(12):
        known = simulated(rng, 40, bias=bias)
        law, interval = _fit_law(known, known, Interval())
        unseen = simulated(rng, 50, bias=bias)
        hits, n = hits + covered(law, interval, unseen), n + len(unseen)
        widths.append(interval.quantile)
    low, high = wilson(hits, n)
    assert low < 0.95 and high > 0.85, (hits / n, low, high)
    assert 0.85 < hits / n < 0.97
    # an interval that is any narrower does not
    narrow = dataclasses.replace(interval, quantile=0.5 * interval.quantile)
    assert covered(law, narrow, simulated(rng, 400, bias=bias)) / 400 < 0.8


def test_a_kind_that_was_never_seen_is_covered_too():
    """Errors that the networks of a kind share: leaving networks out one by one would miss them."""
    rng = np.random.default_rng(2)
    hits = n = alone_hits = 0
    for _ in range(16):
        kinds = tuple(f"kind{i}" for i in range(9))
        terms = simulated(rng, 63, bias=0.01, kind_bias=0.08, kinds=kinds)
        seen = [t for t in terms if kind_of(t.network) != "kind8"]
        new = [t for t in terms if kind_of(t.network) == "kind8"]
        law, interval = _fit_law(seen, seen, Interval())
        hits, n = hits + covered(law, interval, new), n + len(new)
        pretend = [
            dataclasses.replace(t, network=dataclasses.replace(t.network, name=f"each{i}-0"))
            for i, t in enumerate(seen)
        ]
        alone_law, alone = _fit_law(pretend, pretend, Interval())
        alone_hits += covered(alone_law, alone, new)
    assert hits / n > 0.8 and hits >= alone_hits


def test_a_profile_knows_its_errors():
    """Errors on what was held out; with kernels left out, they grow and the profile says so."""
    found = fit_profile(make_profile(400, networks=40, bias=0.02))
    kernels, networks = found.errors["kernels"], found.errors["networks"]
    assert networks["n"] == 20 and networks["mape"] < 0.06 and networks["spearman"] > 0.97
    assert (
        kernels["mape"] < 0.08
        and kernels["coverage_90"] > 0.75
        and set(kernels["parts"]) >= {"conv", "measured"}
    )
    assert found.interval["confidence"] == 0.9 and found.interval["n"] == 20
    rough = fit_profile(make_profile(60, networks=40, bias=0.02), learned=False)
    assert rough.errors["networks"]["mape"] > 1.2 * networks["mape"]
    assert "learned" not in rough.models


@pytest.mark.parametrize(("samples", "learned"), [(400, True), (60, False)])
def test_profiles_of_many_and_of_few_samples_promise_what_they_keep(samples, learned):
    found = [
        fit_profile(make_profile(samples, networks=40, bias=0.02, seed=seed), learned=learned)
        for seed in range(3)
    ]
    hits = sum(round(20 * one.errors["networks"]["coverage_90"]) for one in found)
    low, high = wilson(hits, 60)
    assert low < 0.95 and high > 0.85


def test_held_out_samples_and_networks_change_nothing_but_the_errors():
    profile = make_profile(200, networks=20)
    heldout = [dataclasses.replace(s, seconds=9.0) if s.role == "heldout" else s for s in profile.samples]
    nets = [dataclasses.replace(n, latency_s=9.0) if n.role == "heldout" else n for n in profile.networks]
    other = dataclasses.replace(profile, samples=tuple(heldout), networks=tuple(nets))
    first, second = fit_profile(profile, learned=False), fit_profile(other, learned=False)
    assert (first.models, first.law, first.interval) == (second.models, second.law, second.interval)
    assert first.errors != second.errors


# ---- quantiles -----------------------------------------------------------------------------------
def test_conformal_quantiles():
    assert conformal(np.arange(1.0, 100.0)) == pytest.approx(90.0)  # of 99 scores, the 90th
    assert conformal(np.arange(1.0, 28.0)) == pytest.approx(25.2)  # the 26th would cover 93 %
    assert conformal([-5.0, 1.0, 2.0]) == 5.0 and conformal([0.1, 0.2]) == NORMAL  # too few to promise less
    assert conformal([]) == NORMAL
    rng = np.random.default_rng(0)
    misses = [abs(rng.standard_t(3)) > conformal(rng.standard_t(3, 30)) for _ in range(4000)]
    assert 0.08 < np.mean(misses) < 0.12  # whatever the distribution


def test_excess_over_what_was_expected():
    rng = np.random.default_rng(0)
    errors = 0.05 * rng.standard_normal(4000)
    assert excess_sd(errors, np.full(4000, 0.03)) == pytest.approx(0.04, rel=0.25)
    assert excess_sd(errors, np.full(4000, 0.2)) == 0.0 and excess_sd([], []) == 0.0


# ---- the law -------------------------------------------------------------------------------------
def observations(rng, count, scales=SCALES, offset=0.0, sd=0.01):
    found = []
    for _ in range(count):
        seconds = {f: float(rng.uniform(1e-4, 1e-3)) for f in scales}
        total = offset + sum(scales[f] * s for f, s in seconds.items())
        found.append(Observation(seconds, total * math.exp(sd * rng.standard_normal()), max(sd, 0.005)))
    return found


def test_scales_are_recovered_and_become_certain():
    rng = np.random.default_rng(0)
    law = Law.prior().updated(observations(rng, 30))
    for family, scale in SCALES.items():
        assert law.scale_of(family) == pytest.approx(scale, rel=0.03)
    one = observations(rng, 1)[0].seconds
    assert law.variance(one) < 0.01 * Law.prior().variance(one)


def test_one_network_sets_one_scale_for_all_families():
    law = Law.prior().updated([Observation({"conv": 1e-3, "pool": 5e-4}, 4.5e-3)])
    assert law.predict({"conv": 1e-3, "pool": 5e-4}) == pytest.approx(4.5e-3, rel=0.01)
    for family in ("conv", "pool", "gemm"):
        assert law.scale_of(family) == pytest.approx(3.0, rel=0.15)


def test_the_order_of_observations_is_of_no_account():
    found = observations(np.random.default_rng(3), 6)
    first, second = (Law.prior().with_offset(1e-4).updated(o) for o in (found, found[::-1]))
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-9)
    np.testing.assert_allclose(first.covariance, second.covariance, atol=1e-12)


def test_an_offset_is_found_only_where_it_is_allowed_and_nothing_runs_backwards():
    found = observations(np.random.default_rng(0), 40, {"conv": 1.0}, offset=1e-5, sd=0.001)
    assert Law.prior().updated(found).offset_s == 0.0
    assert Law.prior().with_offset(1e-3).updated(found).offset_s == pytest.approx(1e-5, rel=0.3)
    nonsense = [Observation({"conv": 1e-3, "pool": 1e-3 * i}, 1e-3 / i, 0.001) for i in range(1, 6)]
    law = Law.prior().updated(nonsense)
    assert all(law.scale_of(t) > 0 for t in ("conv", "pool")) and law.offset_s >= 0


def test_a_law_survives_its_file():
    law = Law.prior().with_offset(1e-3).updated(observations(np.random.default_rng(0), 3))
    again = Law.from_dict(law.to_dict())
    np.testing.assert_array_equal(again.covariance, law.covariance)
    with pytest.raises(ValueError, match="terms"):
        Law.from_dict({**law.to_dict(), "terms": list(TERMS[:-1])})


def test_samples_of_one_signature_still_give_a_law():
    """They share a fold, without which nothing is known."""
    known = make_profile(300, networks=20)
    spec = known.samples[0].spec
    few = dataclasses.replace(known, samples=tuple(s for s in known.samples if s.spec == spec))
    assert fit_profile(few, learned=False).interval["n"] == 10


def test_the_error_of_networks_is_that_of_networks_whose_kernels_no_model_has_seen():
    """Networks are slower or faster as a whole; models that have seen their kernels would know by how much."""
    rng, known = np.random.default_rng(0), make_profile(200, networks=120, bias=0.0, in_models=True)
    networks, samples = [], []
    for network in known.networks:
        own = math.exp(0.1 * rng.standard_normal())
        networks.append(
            dataclasses.replace(
                network,
                latency_s=own * network.latency_s,
                ci95=tuple(own * edge for edge in network.ci95),
            )
        )
        for spec, at, _ in network.kernels:
            one = sample(spec, at, rng, 0.01, network.role, network.latency_s)
            samples.append(dataclasses.replace(one, seconds=own * one.seconds, network=network.name))
    profile = dataclasses.replace(known, samples=(*known.samples, *samples), networks=tuple(networks))
    found = fit_profile(profile, learned=False)
    assert 0.05 < found.interval["common"] < 0.15
    assert found.errors["networks"]["mape"] > 0.05  # of those that were held out
    assert found.errors["networks"]["coverage_90"] > 0.75  # it would be below a half
