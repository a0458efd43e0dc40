"""Weights as products: numbers by hand, exact at full rank, the best of their rank below."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sartor.passes import factors, polyadic


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


class TestProducts:
    @pytest.fixture(autouse=True)
    def needs_tensorly(self):
        pytest.importorskip("tensorly", reason="tensorly (the extra 'factorize') decomposes kernels")

    def test_one_product_by_hand(self):
        vectors = [
            np.array([1.0, -2.0]),
            np.array([3.0, 0.0, 4.0]),
            np.array([2.0, 1.0]),
            np.array([1.0, 1.0, 1.0]),
        ]
        weight = np.einsum("o,i,y,x->oiyx", *vectors)
        into, column, row, outer = polyadic.cp(weight, 1)
        assert [part.shape for part in (into, column, row, outer)] == [
            (1, 3, 1, 1),
            (1, 1, 2, 1),
            (1, 1, 1, 3),
            (2, 1, 1, 1),
        ]
        np.testing.assert_allclose(outer[1] / outer[0], -2.0)
        norms = [np.linalg.norm(part) for part in (into, column, row, outer)]
        np.testing.assert_allclose(norms, (5.0 * 5**0.5 * 5**0.5 * 3**0.5) ** 0.25)
        product = np.einsum(
            "ri,ry,rx,or->oiyx", into[:, :, 0, 0], column[:, 0, :, 0], row[:, 0, 0], outer[:, :, 0, 0]
        )
        np.testing.assert_allclose(product, weight, atol=1e-12)

    def test_layers_are_the_product(self, weight, x):
        layers = polyadic.cp(weight, 7)
        product = np.einsum(
            "ri,ry,rx,or->oiyx", *(p.squeeze(a) for p, a in zip(layers, polyadic._ONES, strict=True))
        )
        assert 1 - ((product - weight) ** 2).sum() / (weight**2).sum() == pytest.approx(
            polyadic.kept(weight, 7)
        )
        into, column, row, outer = (torch.from_numpy(np.ascontiguousarray(part)) for part in layers)
        made = torch.nn.functional.conv2d(x, into)
        made = torch.nn.functional.conv2d(made, column, groups=7, padding=(1, 0))
        made = torch.nn.functional.conv2d(made, row, groups=7, padding=(0, 2))
        np.testing.assert_allclose(
            torch.nn.functional.conv2d(made, outer).numpy(), convolve(x, [product], (1, 2)), atol=1e-10
        )

    def test_the_rank_that_is_found_keeps_the_energy_and_one_much_smaller_does_not(self, weight):
        rank = polyadic.cp_rank(weight, 0.8, 60)
        assert polyadic.kept(weight, rank) >= 0.8 > polyadic.kept(weight, rank - 2)
        assert polyadic.cp_rank(weight, 0.8, rank - 3) == rank - 2
        assert (
            polyadic.cp_rank(weight, 1.0, 3) == 6
        )  # its matrix of output channels has rank 6: nothing is tried

    def test_more_products_than_there_are_and_none(self):
        flat = np.ones((4, 3, 3, 3))
        assert polyadic.kept(flat, 5) == pytest.approx(1.0)
        zero = np.zeros((4, 3, 3, 3))
        assert all((part == 0).all() for part in polyadic.cp(zero, 2)) and polyadic.kept(zero, 2) == 1.0
        assert polyadic.cp_rank(zero, 0.9, 5) == 1

    def test_it_repeats(self, weight):
        first = polyadic.cp(weight, 9)
        polyadic._decomposed.cache_clear()
        np.random.default_rng(3).random(10)
        assert all((a == b).all() for a, b in zip(first, polyadic.cp(weight, 9), strict=True))
