"""Weights as products: numbers by hand, exact at full rank, the best of their rank below."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sartor.passes import factors


def convolve(x, weights, padding, stride=1):
    """The layers one after another; the window moves along each axis in the layer that has its kernel."""
    for weight in weights:
        size = weight.shape[2:]
        pads = [p if k > 1 else 0 for k, p in zip(size, padding, strict=True)]
        steps = [stride if k > 1 else 1 for k in size]
        x = torch.nn.functional.conv2d(
            x, torch.from_numpy(np.ascontiguousarray(weight)), stride=steps, padding=pads
        )
    return x.numpy()


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal((6, 4, 3, 5))


@pytest.fixture
def x():
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 9, 11)))


def test_energy_decides_the_rank():
    """Squares 16, 4, 4, 1: 64, 80, 96 and 100 %."""
    values = np.array([4.0, 2.0, 2.0, 1.0])
    ranks = [factors.energy_rank(values, share) for share in (0.01, 0.64, 0.65, 0.96, 0.97, 1.0)]
    assert ranks == [1, 1, 2, 3, 4, 4]
    assert factors.energy_rank(np.zeros(3), 0.9) == 1


def test_a_matrix_by_hand():
    """diag(3, 1) without its smaller value."""
    first, second = factors.svd(np.diag([3.0, 1.0]), 1)
    np.testing.assert_allclose(second @ first, np.diag([3.0, 0.0]), atol=1e-12)
    assert np.abs(first).max() == pytest.approx(np.sqrt(3)) == pytest.approx(np.abs(second).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_full_rank_is_the_layer(weight, x, stride):
    expected = convolve(x, [weight], (1, 2), stride)
    matrix = min(4 * 3, 6 * 5)
    for layers in (factors.spatial_svd(weight, matrix), factors.tucker2(weight, 4, 6)):
        np.testing.assert_allclose(convolve(x, layers, (1, 2), stride), expected, atol=1e-10)


def test_what_is_lost_is_what_the_singular_values_say(weight):
    values = factors.singular_values(weight, "spatial")
    for rank in (1, 3, 7):
        vertical, horizontal = factors.spatial_svd(weight, rank)
        assert vertical.shape == (rank, 4, 3, 1) and horizontal.shape == (6, rank, 1, 5)
        product = np.einsum("rihy,oryw->oihw", vertical, horizontal)
        assert ((product - weight) ** 2).sum() == pytest.approx((values[rank:] ** 2).sum())


def test_iteration_is_at_least_as_close_as_truncation(weight):
    def error(into, core, outer):
        return ((np.einsum("is,rshw,or->oihw", into, core, outer) - weight) ** 2).sum()

    first, core, last = factors.tucker2(weight, 2, 3)
    assert first.shape == (2, 4, 1, 1) and core.shape == (3, 2, 3, 5) and last.shape == (6, 3, 1, 1)
    into = factors._leading(np.moveaxis(weight, 1, 0), 2)
    outer = factors._leading(weight, 3)
    truncated = error(into, np.einsum("oihw,is,or->rshw", weight, into, outer), outer)
    found = error(first[:, :, 0, 0].T, core, last[:, :, 0, 0])
    assert found < truncated
    assert found == pytest.approx((weight**2).sum() - (core**2).sum())  # what orthogonal factors leave out
