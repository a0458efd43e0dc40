"""What displaced weights cost, fitted to kernels that were timed inside models of known weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cost_profiles import conv_spec, gemm_spec, grouped_spec

from sartor.cost_models import around
from sartor.cost_models.features import family_of
from sartor.cost_models.law import Caches
from sartor.cost_models.profile import Sample
from sartor.cost_models.work import work_of_spec
from sartor.profiling.shapes import moving

CACHES = Caches(near=1e6, last=16e6)
FAR = 4e-10  # seconds per byte that comes from memory
LAUNCH, PER_MAC, PER_BYTE = 2e-6, 1 / 40e9, 1 / 15e9


def waiting_s(spec, at, around_bytes):
    weights = float(work_of_spec(spec, at).weight_bytes)
    return weights * max(0.0, 1 - CACHES.last / around_bytes) * FAR


def warm_s(spec, at):
    found = work_of_spec(spec, at)
    return LAUNCH + PER_MAC * float(found.macs) + PER_BYTE * float(found.moved)


def timed(spec, at, around_bytes, factor=1.0):
    seconds = warm_s(spec, at) + waiting_s(spec, at, around_bytes)
    at = tuple(map(float, at))
    return Sample(spec, at, family_of(spec), seconds * factor, around_bytes=around_bytes)


def drawn(count, seed=0, noise=0.0, most=160e6, widest=31):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        spec = conv_spec(int(rng.choice([7, 14, 28])), 3)
        at = [16 * int(rng.integers(1, widest + 1)) for _ in range(2)]
        around_bytes = math.exp(rng.uniform(math.log(2e5), math.log(most)))
        found.append(timed(spec, at, around_bytes, math.exp(noise * rng.standard_normal())))
    return found


def test_what_a_byte_from_memory_costs_is_recovered_beside_everything_else_that_a_kernel_takes():
    for noise, tolerance in ((0.0, 0.02), (0.03, 0.15)):
        fixed, near, far = around.fitted(drawn(400, noise=noise), CACHES, {})["conv"]
        assert fixed == near == 0.0 and far == pytest.approx(FAR, rel=tolerance)


def test_where_all_weights_fit_the_last_cache_they_cost_nothing_that_is_known_of():
    assert around.fitted(drawn(200, most=14e6), CACHES, {}) == {"conv": (0.0, 0.0, 0.0)}
    assert around.fitted(drawn(200), Caches(near=1e6, last=1e9), {}) == {"conv": (0.0, 0.0, 0.0)}


def test_too_few_samples_and_kernels_timed_alone_tell_nothing():
    alone = [dataclasses.replace(s, around_bytes=0.0) for s in drawn(200)]
    assert around.fitted(alone, CACHES, {}) == {}
    few = [timed(grouped_spec(14), (4, 64, 64), 64e6), timed(gemm_spec(), (1024, 1024), 64e6)]
    found = around.fitted([*drawn(100), *few], CACHES, {})
    assert found["conv"][2] > 0 and "gemm" not in found  # not known, which is not nothing
    large = [s for s in drawn(200) if s.around_bytes > CACHES.last]
    assert around.fitted(large, CACHES, {}) == {}  # nothing says what they take with warm weights


def test_what_the_law_gets_wrong_of_heavy_kernels_is_no_waiting():
    """Kernels with many weights take half as long again as the many others say, wherever their weights are."""
    light = drawn(600, seed=1, widest=3)
    heavy = drawn(60, seed=2)
    slow = [dataclasses.replace(s, warm_s=s.warm_s + 0.5 * warm_s(s.spec, s.at)) for s in heavy]
    assert around.fitted([*light, *slow], CACHES, {})["conv"][2] == pytest.approx(FAR, rel=0.25)


def test_samples_become_those_of_warm_weights():
    samples = drawn(60)
    cold = {"conv": (0.0, 0.0, FAR)}
    warmed = around.warmed(samples, CACHES, cold)
    for sample, warm in zip(samples, warmed, strict=True):
        assert warm.warm_s == pytest.approx(warm_s(sample.spec, sample.at))
        assert dataclasses.replace(warm, warm_s=sample.warm_s) == sample
    assert any(s.warm_s > 1.3 * w.warm_s for s, w in zip(samples, warmed, strict=True))


def test_no_kernel_is_nothing_but_waiting_and_others_stay_as_they_are():
    sample = timed(gemm_spec(), (1024, 1024), 100e6)
    cold = {"gemm": (0.0, 0.0, 1e-6)}
    (least,) = around.warmed([sample], CACHES, cold)
    assert least.warm_s == pytest.approx(0.3 * sample.warm_s)
    alone = dataclasses.replace(sample, around_bytes=0.0)
    relu = moving("Relu", [[1, "*", 14, 14]], [[1, "*", 14, 14]])
    without = Sample(relu, (1e5,), "elementwise", 1e-5, around_bytes=100e6)
    assert around.warmed([alone, without], CACHES, {**cold, "elementwise": (0.0, 0.0, 1e-6)}) == (
        alone,
        without,
    )
    assert around.warmed([sample], CACHES, {}) == (sample,)
