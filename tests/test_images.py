"""Images at another size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sartor.errors import UsageError
from sartor.images import resized, weights_of


@pytest.mark.parametrize("size", [(5, 9), (12, 16), (24, 40), (23, 37)])
def test_equal_to_antialiased_bilinear(size):
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images), size=size, mode="bilinear", antialias=True
    )
    found = resized(images, (1, 3, *size))
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(resized(torch.from_numpy(images), (1, 3, *size)).numpy(), found, atol=1e-5)


def test_channels_last_and_integers():
    images = np.random.default_rng(1).integers(0, 256, size=(2, 8, 8, 3), dtype=np.uint8)
    found = resized(images, (1, 4, 6, 3))
    floats = resized(images.astype(np.float64).transpose(0, 3, 1, 2), (1, 3, 4, 6)).transpose(0, 2, 3, 1)
    assert found.dtype == np.uint8 and np.abs(found - floats).max() <= 0.5 + 1e-5
    assert resized(torch.from_numpy(images), (1, 4, 6, 3)).dtype == torch.uint8


def test_the_same_size_is_the_same_array():
    images = np.zeros((2, 3, 4, 4), np.float32)
    assert resized(images, (7, 3, 4, 4)) is images


def test_halves_are_means_by_hand():
    np.testing.assert_allclose(weights_of(4, 2), np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7)


def test_refusals():
    with pytest.raises(UsageError, match="cannot be resized"):
        resized(np.zeros((2, 3, 4)), (2, 3, 4, 4))
    with pytest.raises(UsageError, match="cannot be resized"):
        resized(np.zeros((2, 0, 4)), (2, 3, 4))
