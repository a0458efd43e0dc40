"""The staircase: what is measured inside carriers is the kernel's own time, and steps are those of both passes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from profile_machine import STEP, Machine, law, waiting_units

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import staircase

from sartor.cost_models.samples import weight_bytes
from sartor.profiling.inside import Inside

WIDTHS = range(1, 41)
POINT = "1x1, 128 to C"


def true_units(name, width, period=0.0):
    spec, before = staircase.specs(28)[name]
    pixels = 28 * 28
    macs = pixels * 128 * math.ceil(width / STEP) * STEP
    moved = 4 * pixels * (128 + width)
    return law(macs, moved, width % 4 != 0) + waiting_units(
        weight_bytes(spec, (*before, float(width))), period
    )


def test_what_is_measured_is_the_kernels_own_time():
    spec, before = staircase.specs(28)[POINT]
    found, period = staircase.measured(spec, before, WIDTHS, Machine(), 0)
    assert period > 1
    # An empty call has a kernel, too, and carriers do not all take the same time.
    expected = [true_units(POINT, width, period) for width in WIDTHS]
    np.testing.assert_allclose([own for own, _ in found], expected, rtol=6e-3)
    np.testing.assert_allclose([half for _, half in found], 0.0, atol=6e-3)
    noisy, _ = staircase.measured(spec, before, WIDTHS, Machine(noise=0.05), 0)
    assert 0.01 < np.median([half for _, half in noisy]) < 0.1


def test_a_carrier_that_fails_and_a_kernel_of_which_nothing_is_told_are_not_numbers():
    spec, before = staircase.specs(28)[POINT]

    class Failing(Machine):
        def __call__(self, models, effort):
            found = super().__call__(models, effort)
            return [found[0], Inside(None, reason="planted"), *found[2:]]

    found, _ = staircase.measured(spec, before, WIDTHS, Failing(), 0)
    missing = [math.isnan(own) for own, _ in found]
    assert sum(missing) >= 32
    assert all(
        own == pytest.approx(true_units(POINT, w), rel=3e-3)
        for w, (own, _), nan in zip(WIDTHS, found, missing, strict=True)
        if not nan
    )


def test_a_step_is_seen_in_both_passes_beyond_its_noise_and_predicted_if_it_is_large_enough():
    times = [1.0, 1.0, 1.5, 1.5, 1.52]
    passes = [[(t, 0.01) for t in times]] * 2
    (step,) = staircase.steps(range(1, 6), passes, np.array([1.0, 1.0, 1.2, 1.2, 1.2]))
    assert (step["from"], step["to"]) == (2, 3) and step["is_predicted"]
    assert not staircase.steps(range(1, 6), passes, np.array([1.0, 1.0, 1.1, 1.2, 1.2]))[0]["is_predicted"]
    assert not staircase.steps(range(1, 6), passes, np.array([1.2, 1.2, 1.0, 1.0, 1.0]))[0]["is_predicted"]
    unsure = [passes[0], [(t, 0.4) for t in times]]
    assert staircase.steps(range(1, 6), unsure, np.ones(5)) == []
    opposite = [passes[0], [(1 / t, 0.01) for t in times]]
    assert staircase.steps(range(1, 6), opposite, np.ones(5)) == []
    assert staircase.steps(range(1, 6), [[(math.nan, math.nan)] * 5] * 2, np.ones(5)) == []
