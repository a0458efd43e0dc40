"""What a sample pays beyond its kernel: calls, and the layout, where a convolution uses it."""

from __future__ import annotations

import math

import pytest

from sartor.cost_models.boundary import Boundary, boundary_from, ends_of, enters
from sartor.cost_models.signatures import Signature, key_of
from sartor.profiling.shapes import convolution

CALL = 1.0


def signature(spec, family="conv"):
    return Signature(key_of(spec), family, "contraction", spec, ())


def boundary(aligned_only=False):
    """Every element that is converted costs 1 / 1000."""
    maps = [(where, c) for where in ((1, 8, 8), (1, 16, 16)) for c in (16, 64)]
    gaps = [CALL + 2 * math.prod(where) * c / 1000 for where, c in maps]
    seconds = [CALL] + [s for gap in gaps for s in (gap + 0.5, gap + 1.5)]
    return boundary_from(maps, seconds, aligned_only=aligned_only)


DENSE = convolution((8, 8), (3, 3), 1)
GROUPED = convolution((8, 8), (3, 3), 1, grouped=True)
DEPTHWISE = convolution((8, 8), (3, 3), 1, depthwise=True)


@pytest.mark.parametrize(
    ("spec", "at", "expected"),
    [
        (DENSE, (32, 17), (True, True)),  # other output channels are filled up
        (DENSE, (3, 32), (False, True)),  # few input channels are read as they are
        (DENSE, (34, 32), (False, False)),
        (DEPTHWISE, (36,), (True, True)),
        (DEPTHWISE, (38,), (False, False)),
        (GROUPED, (4, 16, 32), (True, True)),
        (GROUPED, (32, 4, 4), (False, False)),
        ({**DENSE, "op": "ConvTranspose"}, (32, 32), (False, False)),
    ],
)
def test_which_convolutions_enter_the_layout(spec, at, expected):
    assert enters(spec, at) == expected


def test_what_is_not_converted_is_not_subtracted():
    always, aligned = boundary(), boundary(aligned_only=True)
    total = 50.0
    one_end = 64 * 32 / 1000
    assert always.own_s(signature(DENSE), (32, 32), total) == pytest.approx(total - CALL - 2 * one_end)
    assert aligned.own_s(signature(DENSE), (32, 32), total) == pytest.approx(total - CALL - 2 * one_end)
    assert aligned.own_s(signature(GROUPED), (8, 4, 4), total) == total - CALL
    assert always.own_s(signature(GROUPED), (8, 4, 4), total) == pytest.approx(total - CALL - 2 * one_end)


def test_wider_maps_and_unknown_ones_follow_their_elements():
    known = boundary()
    base = 64 * 64 / 1000
    wide = known.own_s(signature(DENSE), (256, 256), 500.0)
    assert 500.0 - CALL - wide == pytest.approx(8 * base)
    between = convolution((12, 12), (3, 3), 1)
    own = known.own_s(signature(between), (64, 64), 500.0)
    assert 500.0 - CALL - own == pytest.approx(2 * 144 * 64 / 1000)
    assert Boundary(CALL, {}).own_s(signature(DENSE), (32, 32), 50.0) == 50.0 - CALL


def test_ends_have_all_channels_of_all_groups():
    spec = convolution((8, 8), (3, 3), 2, [["Add", {}]], grouped=True)
    assert ends_of(signature(spec), (4, 8, 6)) == [((1, 8, 8), 32), ((1, 4, 4), 24), ((1, 4, 4), 24)]
