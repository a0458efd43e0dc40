"""Times of one kernel over all widths: what a model says at a size, a surface says, too."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sartor.cost_models.surface import Range, build, ranges_of
from sartor.cost_models.work import Units
from sartor.profiling.shapes import moving

STEP = 16


def at(surface, *sizes):
    return surface.interpolate([np.asarray(s, float) for s in sizes])[0][..., 0]


def one_state(seconds):
    return np.asarray(seconds)[:, None], np.full((len(seconds), 1), 0.1)


def convolution(sizes):
    """A runtime whose blocked kernel wants multiples of 4 to read and fills blocks of 16 up; the plain one does not."""
    inner, outer = sizes
    blocked = 2e-9 * inner * np.ceil(outer / STEP) * STEP + 1e-6
    plain = 1e-9 * inner * (outer + 150.0) + 5e-6  # dearer for few outputs, cheaper for many
    return one_state(np.where(inner % 4 == 0, blocked, plain))


@pytest.mark.parametrize("full", [(96, 128), (512, 320), (60, 60), (24, 1000)])
def test_other_code_off_the_grid_is_seen_at_all_sizes(full):
    """What leaving the grid costs depends on the other width; the plain kernel is taken as it is."""
    names, steps = ("c_in", "c_out"), {"c_in": STEP, "c_out": STEP}
    surface = build(ranges_of(names, full, (True, True), steps), convolution)
    rng = np.random.default_rng(0)
    inner, outer = (rng.integers(n // 8 + 1, n + 1, 4000) for n in full)
    truth = convolution((inner.astype(float), outer.astype(float)))[0][:, 0]
    lower = convolution((np.floor(inner / STEP) * STEP, outer.astype(float)))[0][:, 0]
    error = np.abs(at(surface, inner, outer) / truth - 1)
    told = (inner < STEP) | (truth >= lower)  # what is cheaper off the grid is not believed, see below
    assert (
        np.median(error[told]) < 0.02 and np.quantile(error[told], 0.95) < 0.1
    )  # a step of 16 in 128 is 12 %


def test_a_staircase_is_one():
    def steps(sizes):
        return one_state(1e-6 * np.ceil(sizes[0] / STEP))

    surface = build(ranges_of(("channels",), (256.0,), (True,), {"channels": STEP}), steps)
    widths = np.arange(1, 257)
    np.testing.assert_allclose(at(surface, widths), 1e-6 * np.ceil(widths / STEP))


def test_one_depthwise_channel_is_no_reason_for_two_to_take_as_long():
    """It is a convolution of one group, and fills a block; two and three leave the layout and are cheaper."""

    def few(sizes):
        (c,) = sizes
        times = np.where((c == 1) | (c % 4 == 0), 1e-4 * np.ceil(c / 16), 2e-5 * c)[:, None]
        return times, np.full(times.shape, 0.1)

    widths = np.array([1.0, 2.0, 3.0, 4.0, 16.0])
    for full in (32.0, 512.0):
        surface = build(ranges_of(("channels",), (full,), (True,), {"channels": 16}), few)
        np.testing.assert_allclose(surface.interpolate([widths])[0], few([widths])[0], rtol=1e-9)


def test_slow_images_of_few_channels_do_not_lift_what_more_channels_take():
    def image(sizes):
        inner, outer = sizes
        return one_state(np.where(inner < STEP, 5e-8, 5e-9) * inner * outer + 1e-6)

    names, steps, full = ("c_in", "c_out"), {"c_in": STEP, "c_out": STEP}, (90.0, 1000.0)
    surface = build(ranges_of(names, full, (True, True), steps), image)
    for inner in (3.0, 8.0, 15.0, 17.0, 20.0, 61.0):
        expected = image((np.array([inner]), np.array([846.0])))[0][0, 0]
        assert at(surface, [inner], [846.0])[0] == pytest.approx(expected, rel=0.1)


def test_maps_of_whole_blocks_have_a_kernel_of_their_own():
    """Its one variable is bytes, of which only whole channels exist."""
    spec = moving("AveragePool", [[1, "2*", 8, 8]], [[1, "2*", 8, 8]], {"kernel_shape": [3, 3]})
    units = Units.of(spec)
    assert units.of_maps and units.multiple == 2
    assert units.channels_of(units.bytes_of(np.array([6.0, 32.0]))) == pytest.approx([6, 32])
    assert not Units.of(moving("Gelu", [[1, 50, "*"]], [[1, 50, "*"]])).of_maps

    def pool(sizes):
        channels = units.channels_of(sizes[0])
        return one_state(np.where(channels % STEP == 0, 1e-9, 8e-9) * channels + 1e-6)

    full = float(units.bytes_of(np.array(320.0)))
    surface = build([Range(full, True, STEP, units=units)], pool)
    channels = np.arange(20, 321)
    size = units.bytes_of(channels.astype(float))
    np.testing.assert_allclose(at(surface, size), pool([size])[0][:, 0], rtol=0.02)


@pytest.mark.parametrize("dims", [[1, 197, 3, "3*", "64*"], ["3*", 197, "64*"], [1, 50, "96*"]])
def test_less_than_a_unit_of_what_no_plan_leaves_whole_costs_less(dims):
    """Seen: heads of attention are parts of several axes, of which the whole is one unit; a plan saved nothing."""
    units = Units.of(moving("Transpose", [dims], [dims]))
    full = float(units.bytes_of(np.array(float(units.multiple))))
    surface = build([Range(full, True, units=units)], lambda sizes: one_state(1e-6 + 1e-10 * sizes[0]))
    sizes = full * np.array([0.03, 0.1, 0.2, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(at(surface, sizes), 1e-6 + 1e-10 * sizes, rtol=0.03)


def test_what_has_no_units_is_interpolated_between_bytes():
    spec = moving("Slice", [[1, 64, 8, 8]], [[1, 32, 8, 8]])
    surface = build(
        [Range(1e6, True, units=Units.of(spec))], lambda sizes: one_state(1e-6 + 1e-12 * sizes[0])
    )
    sizes = np.geomspace(2e4, 1e6, 50)
    np.testing.assert_allclose(at(surface, sizes), 1e-6 + 1e-12 * sizes, rtol=0.02)


def test_numbers_of_groups_and_channels_of_a_few_are_all_asked_for():
    def grouped(sizes):
        return one_state(1e-6 + 1e-9 * sizes[0] * (sizes[1] + 3.0) * (sizes[2] + 5.0))

    names = ("groups", "in_per_group", "out_per_group")
    full = (40.0, 5.0, 5.0)
    steps = dict.fromkeys(names[1:], STEP)
    surface = build(ranges_of(names, full, (True, True, True), steps), grouped)
    every = np.array(list(itertools.product(range(1, 41), range(1, 6), range(1, 6))), float).T
    np.testing.assert_allclose(at(surface, *every), grouped(every)[0][:, 0], rtol=0.02)


def test_a_surface_never_falls_on_the_grid_whatever_the_model_says():
    rng = np.random.default_rng(0)

    def noisy(sizes):
        times = 1e-6 * (sizes[0] + sizes[1])[:, None] * np.exp(0.3 * rng.standard_normal((len(sizes[0]), 3)))
        return times, np.full(times.shape, 0.3)

    surface = build([Range(96.0, True, STEP), Range(128.0, True, STEP, True)], noisy)
    inner, outer = np.arange(STEP, 97, STEP), np.arange(STEP, 129, STEP)
    times, sd = surface.interpolate(np.meshgrid(inner, outer, indexing="ij"))
    assert all((np.diff(times, axis=axis) >= 0).all() for axis in range(3))  # nor with a longer period
    assert times.shape == sd.shape == (6, 8, 3) and (sd > 0).all()
    off, _ = surface.interpolate([np.full(16, 96.0), np.arange(112, 128)])
    assert (
        off >= off[0] * (1 - 1e-12)
    ).all()  # a width off the grid is no cheaper than the multiple below it


def test_what_no_plan_changes_is_asked_for_once():
    asked = []

    def predict(sizes):
        asked.append(len(sizes[0]))
        return one_state(1e-6 * sizes[0])

    surface = build([Range(48.0, False, STEP), Range(70.0, False, STEP, True)], predict)
    assert asked == [1] and at(surface, 48, 70) == pytest.approx(48e-6)
