"""Criteria that look at maps and gradients, by hand on one small convolution."""

from __future__ import annotations

import models
import numpy as np
import pytest
from builders import node, program_from_nodes

from sartor.errors import UsageError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.passes.base import Context
from sartor.passes.pipeline import Pipeline
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import Subject

MAP = np.array([[1.0, 2.0], [3.0, 4.0]])
FIRST, SECOND = np.array([1.0, -1.0, 0.5]), np.array([2.0, 7.0, -3.0])


def network():
    """`y = sum over units and pixels of second * relu(first * x)`."""
    nodes = [
        node("Conv", ["x", "first"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "second"], ["c"]),
        node("GlobalAveragePool", ["c"], ["p"]),
        node("Flatten", ["p"], ["y"]),
    ]
    arrays = {
        "first": FIRST.reshape(3, 1, 1, 1).astype(np.float32),
        "second": SECOND.reshape(1, 3, 1, 1).astype(np.float32),
    }
    return program_from_nodes(nodes, {"x": ["N", 1, 2, 2]}, ["y"], arrays)


def batches(*maps):
    return [({"x": np.array([[each] for each in maps], np.float32)}, None)]


def scores(name, data):
    program = network()
    found = criterion(name).unit_importance(Subject(program, channel_groups(program), data=data))
    return found.groups["first"]


def test_activation_is_the_mean_of_absolute_values():
    """Maps x, 0 and x / 2 (relu): means 2.5, 0, 1.25; of -x only the second unit lives."""
    np.testing.assert_allclose(scores("activation", batches(MAP)), [2.5, 0, 1.25])
    np.testing.assert_allclose(scores("activation", batches(MAP, -MAP)), [1.25, 1.25, 0.625])
    apart = [*batches(MAP), *batches(-MAP, -MAP)]
    np.testing.assert_allclose(scores("activation", apart), [2.5 / 3, 5 / 3, 1.25 / 3], rtol=1e-6)


def test_hrank_is_the_mean_rank():
    """[[1, 2], [3, 4]] has rank 2, [[1, 2], [2, 4]] rank 1, zeros rank 0."""
    flat = np.array([[1.0, 2.0], [2.0, 4.0]])
    np.testing.assert_array_equal(scores("hrank", batches(MAP)), [2, 0, 2])
    np.testing.assert_array_equal(scores("hrank", batches(flat)), [1, 0, 1])
    np.testing.assert_array_equal(scores("hrank", batches(MAP, flat)), [1.5, 0, 1.5])


def test_taylor_of_maps_is_a_mean_over_positions_and_samples():
    """L = y², y = (2 - 1.5) * 2.5 = 1.25; dL/da = 2 y w2 / 4, and the mean of a dL/da is 2 y w2 mean(a) / 4."""
    y = 1.25
    by_hand = np.abs(2 * y * SECOND * np.array([2.5, 0, 1.25]) / 4)
    np.testing.assert_allclose(scores("taylor-map", batches(MAP)), by_hand, rtol=1e-6)
    y = 7 * 2.5  # of -x
    other = np.abs(2 * y * SECOND * np.array([0, 2.5, 0]) / 4)
    np.testing.assert_allclose(scores("taylor-map", batches(MAP, -MAP)), (by_hand + other) / 2, rtol=1e-6)


def test_taylor_of_weights_is_gradient_times_weight_squared():
    """dL/dw1_u = 2 y w2_u mean(relu'(w1 x) x) = 2 y w2_u 2.5 where w1 > 0; times w1, squared."""
    y = 1.25
    by_hand = (2 * y * SECOND * 2.5 * (FIRST > 0) * FIRST) ** 2
    np.testing.assert_allclose(scores("taylor-weight", batches(MAP)), by_hand, rtol=1e-6)


@pytest.mark.parametrize("name", ["taylor-map", "taylor-weight", "activation", "hrank"])
class TestReal:
    def test_blocks_and_units(self, name):
        program = models.captured("resnet")
        blocks = residual_blocks(program)
        x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
        found = criterion(name).unit_importance(
            Subject(program, channel_groups(program), blocks, [({"x": x}, None)])
        )
        assert set(found.blocks) == {b.name for b in blocks if b.removable}
        assert all(np.isfinite(score) and score > 0 for score in found.blocks.values())

    def test_by_name_in_a_pipeline(self, name):
        program = models.captured("mobilenet")
        x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
        context = Context(data={"calibration": [({"x": x}, None)]})
        text = f"prune-channels{{ratio=0.5,criterion={name}}}"
        assert Pipeline.parse(text).run(program, context).program is not program
        with pytest.raises(UsageError, match="needs data"):
            Pipeline.parse(text).run(program)


def test_features_without_maps_have_no_rank():
    program = models.captured("vit")
    x = np.random.default_rng(0).standard_normal(next(iter(program.input_shapes.values()))).astype(np.float32)
    data = [({next(iter(program.input_shapes)): x}, None)]
    with pytest.raises(UsageError, match="needs maps of height and width"):
        criterion("hrank").unit_importance(Subject(program, channel_groups(program), data=data))
    found = criterion("activation").unit_importance(Subject(program, channel_groups(program), data=data))
    assert all((values > 0).all() for values in found.groups.values())
