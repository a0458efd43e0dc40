"""What displaced weights cost, fitted to kernels that were timed inside models of known weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cost_profiles import conv_spec, depthwise_spec, gemm_spec

from sartor.cost_models import around
from sartor.cost_models.features import family_of
from sartor.cost_models.law import Caches
from sartor.cost_models.profile import Sample
from sartor.cost_models.work import work_of_spec
from sartor.profiling.shapes import moving

CACHES = Caches(near=1e6, last=16e6)
NEAR, FAR = 1e-10, 3e-10  # seconds per byte
LAUNCH, PER_MAC, PER_BYTE = 2e-6, 1 / 40e9, 1 / 15e9


def waiting_s(spec, at, around_bytes):
    weights = float(work_of_spec(spec, at).weight_bytes)
    near, last = (max(0.0, 1 - size / around_bytes) for size in (CACHES.near, CACHES.last))
    return weights * (near * NEAR + last * FAR)


def warm_s(spec, at):
    found = work_of_spec(spec, at)
    return LAUNCH + PER_MAC * float(found.macs) + PER_BYTE * float(found.moved)


def timed(spec, at, around_bytes, factor=1.0):
    seconds = warm_s(spec, at) + waiting_s(spec, at, around_bytes)
    at = tuple(map(float, at))
    return Sample(spec, at, family_of(spec), seconds * factor, around_bytes=around_bytes)


def drawn(count, seed=0, noise=0.0, most=160e6):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        spec = conv_spec(int(rng.choice([7, 14, 28])), 3)
        at = [16 * int(rng.integers(1, 32)) for _ in range(2)]
        around_bytes = math.exp(rng.uniform(math.log(2e5), math.log(most)))
        found.append(timed(spec, at, around_bytes, math.exp(noise * rng.standard_normal())))
    return found


def test_both_coefficients_are_recovered_beside_everything_else_that_a_kernel_takes():
    for noise, tolerance in ((0.0, 0.02), (0.03, 0.1)):
        fixed, near, far = around.fitted(drawn(400, noise=noise), CACHES, {})["conv"]
        assert fixed == 0.0
        assert near == pytest.approx(NEAR, rel=tolerance) and far == pytest.approx(FAR, rel=tolerance)


def test_what_no_cache_of_the_samples_lacked_costs_nothing_that_is_known_of():
    _, near, far = around.fitted(drawn(200, most=14e6), CACHES, {})["conv"]
    assert near == pytest.approx(NEAR, rel=0.02) and far == 0.0


def test_too_few_samples_and_kernels_timed_alone_tell_nothing():
    alone = [dataclasses.replace(s, around_bytes=0.0) for s in drawn(200)]
    assert around.fitted(alone, CACHES, {}) == {}
    few = [timed(depthwise_spec(14), (16 * c,), 4e6) for c in range(1, 9)]
    found = around.fitted([*drawn(100), *few], CACHES, {})
    assert set(found) == {"conv"}


def test_samples_become_those_of_warm_weights():
    samples = drawn(60)
    cold = {"conv": (0.0, NEAR, FAR)}
    warmed = around.warmed(samples, CACHES, cold)
    for sample, warm in zip(samples, warmed, strict=True):
        assert warm.warm_s == pytest.approx(warm_s(sample.spec, sample.at))
        assert dataclasses.replace(warm, warm_s=sample.warm_s) == sample
    assert any(s.warm_s > 1.3 * w.warm_s for s, w in zip(samples, warmed, strict=True))


def test_no_kernel_is_nothing_but_waiting_and_others_stay_as_they_are():
    sample = timed(gemm_spec(), (1024, 1024), 100e6)
    cold = {"gemm": (0.0, 1e-6, 1e-6)}
    (least,) = around.warmed([sample], CACHES, cold)
    assert least.warm_s == pytest.approx(0.3 * sample.warm_s)
    alone = dataclasses.replace(sample, around_bytes=0.0)
    relu = moving("Relu", [[1, "*", 14, 14]], [[1, "*", 14, 14]])
    without = Sample(relu, (1e5,), "elementwise", 1e-5, around_bytes=100e6)
    assert around.warmed([alone, without], CACHES, {**cold, "elementwise": (0.0, 1e-6, 1e-6)}) == (
        alone,
        without,
    )
    assert around.warmed([sample], CACHES, {}) == (sample,)


def test_shares_are_of_both_caches():
    sample = timed(gemm_spec(), (64, 64), 32e6)
    assert around.shares(sample, CACHES) == (1 - 1 / 32, 0.5)
    assert around.shares(sample, Caches()) == (0.0, 0.0)  # nothing is known of the machine's caches
