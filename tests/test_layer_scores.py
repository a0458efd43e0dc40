"""Scores of layers: the formulas by hand, and imprinting on data whose answer is known."""

from __future__ import annotations

import dataclasses

import models
import numpy as np
import pytest
from builders import node, program_from_nodes

from sartor.errors import UsageError
from sartor.ir.blocks import residual_blocks
from sartor.passes.base import Context
from sartor.passes.remove_blocks import RemoveBlocks
from sartor.passes.remove_layers import RemoveLayers
from sartor.strategies.imprinting import accuracy, embedding, embedding_length, imprint
from sartor.strategies.layer_scores import LAYER_CRITERIA, layer_scores


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    nodes: tuple[str, ...]
    input: str
    output: str
    removable: bool = True
    last_affine: tuple[str, ...] = ()


A = np.array([[3.0, 0.0], [4.0, 2.0]])  # MatMul: filters are the columns (3, 4) and (0, 2)
B = np.array([[1.0, -1.0], [0.0, 2.0]])  # Gemm with transB: filters are the rows


def network():
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="first"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Gemm", ["r", "b"], ["g"], name="second", transB=1),
        node("Relu", ["g"], ["y"], name="last"),
    ]
    arrays = {"a": A.astype(np.float32), "b": B.astype(np.float32)}
    return program_from_nodes(nodes, {"x": ["N", 2]}, ["y"], arrays)


LAYERS = (Layer("one", ("first", "relu"), "x", "r"), Layer("two", ("second", "last"), "r", "y"))


def scores(name, **more):
    return layer_scores(name, network(), LAYERS, **more)


def test_weights_are_the_mean_norm_of_filters():
    """(5.1): (5 + 2) / 2 and (√2 + 2) / 2."""
    assert scores("l2") == pytest.approx({"one": 3.5, "two": (np.sqrt(2) + 2) / 2})
    assert scores("l1") == pytest.approx({"one": 4.5, "two": 2.0})


def test_taylor_weights_are_the_mean_norm_of_gradient_times_weight():
    """(5.2) at x = (1, 1): r = (7, 2), g = (5, 4) = y, L = y · y; dL/db = 2 y r, dL/da = x (2 y b)."""
    data = [({"x": np.ones((1, 2), np.float32)}, None)]
    y, r = np.array([5.0, 4.0]), np.array([7.0, 2.0])
    by_b = np.linalg.norm(2 * np.outer(y, r) * B, axis=1).mean()
    by_a = np.linalg.norm(np.outer([1.0, 1.0], 2 * y @ B) * A, axis=0).mean()
    assert scores("taylor-weight", data=data) == pytest.approx({"one": by_a, "two": by_b})


def test_gamma_is_the_mean_square():
    """(5.3)"""
    program = models.captured("resnet")
    blocks = [block for block in residual_blocks(program) if block.removable]
    found = layer_scores("bn-gamma", program, blocks)
    for block in blocks:
        scales = [
            program.initializer_array(n.inputs[1].name)
            for n in program.nodes()
            if n.name in block.nodes and n.op_type == "BatchNormalization"
        ]
        assert found[block.name] == pytest.approx((np.concatenate(scales) ** 2).mean(), rel=1e-6)
    with pytest.raises(UsageError, match="needs a BatchNormalization"):
        scores("bn-gamma")


def test_an_ensemble_is_the_sum_of_ranks():
    """(5.4): l2 and l1 both put `two` below `one`; activation puts r = (7, 2) above g = (5, 4) by the same mean."""
    assert scores("l1+l2") == {"one": 2.0, "two": 0.0}
    data = [({"x": np.ones((1, 2), np.float32)}, None)]
    assert scores("activation", data=data) == pytest.approx({"one": 4.5, "two": 4.5})
    assert scores("l2+l1+activation", data=data) == {"one": 2.0, "two": 1.0}


def test_pooled_embeddings_have_about_the_length():
    """(4.1): d = round(sqrt(64 / 4)) = 4, round(sqrt(64 / 40)) = 1."""
    assert embedding(np.zeros((2, 4, 16, 16)), 64).shape == (2, 64)
    assert embedding(np.zeros((2, 40, 16, 16)), 64).shape == (2, 40)
    ramp = np.arange(16.0).reshape(1, 1, 4, 4)
    np.testing.assert_allclose(embedding(ramp, 4)[0], [2.5, 4.5, 10.5, 12.5])
    assert embedding_length(network()) == 2


def test_a_class_is_the_largest_product_with_its_mean():
    """(4.2), (4.3): means (1, 0) and (0, 2) of samples 0, 2 and 4; samples 1, 3 and 5 are judged, two of them right."""
    embeddings = np.array([[2.0, 0.0], [3.0, 1.0], [0.0, 2.0], [0.1, 1.0], [0.0, 0.0], [0.0, 5.0]])
    labels = np.array([7, 7, 9, 9, 7, 7])
    assert accuracy(embeddings, labels) == pytest.approx(2 / 3)


def test_imprint_credits_the_layer_that_tells_classes_apart():
    """Classes are the axes, on both sides of the origin: means are 0 until relu(±x) folds the sides apart."""
    nodes = [
        node("MatMul", ["x", "split"], ["h"], name="n1"),
        node("Relu", ["h"], ["r"], name="n2"),
        node("MatMul", ["r", "keep"], ["g"], name="n3"),
        node("Relu", ["g"], ["y"], name="n4"),
    ]
    arrays = {
        "split": np.hstack([np.eye(2), -np.eye(2)]).astype(np.float32),
        "keep": np.eye(4, dtype=np.float32),
    }
    program = program_from_nodes(nodes, {"x": ["N", 2]}, ["y"], arrays)
    layers = (Layer("split", ("n1", "n2"), "x", "r"), Layer("keep", ("n3", "n4"), "r", "y"))
    points = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    x = np.repeat(points, 2, axis=0)  # pairs: one shown, one judged
    labels = np.repeat([0, 0, 1, 1], 2)
    assert imprint(program, layers, [({"x": x}, labels)]) == {"split": 0.5, "keep": 0.0}
    halves = [({"x": x[:4]}, labels[:4]), ({"x": x[4:]}, labels[4:])]
    assert imprint(program, layers, halves) == {"split": 0.5, "keep": 0.0}


@pytest.mark.parametrize("name", [c for c in LAYER_CRITERIA if c != "imprint"] + ["l2+fpgm"])
def test_every_criterion_ranks_blocks(name):
    program = models.captured("resnet")
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    blocks = residual_blocks(program)
    found = layer_scores(name, program, blocks, data=[({"x": x}, None)])
    assert set(found) == {b.name for b in blocks if b.removable}
    assert all(np.isfinite(score) and score >= 0 for score in found.values())


def test_passes_rank_blocks_and_layers_by_these():
    program = models.captured("resnet")
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    data = {"calibration": [({"x": x}, np.array([0, 0, 1, 1, 2, 2, 0, 1]))]}
    blocks = residual_blocks(program)
    for name in ("l2", "imprint", "l1+taylor-weight"):
        found = layer_scores(name, program, blocks, data=data["calibration"])
        step = RemoveBlocks(count=1, criterion=name)
        assert step.run(program, Context(data=data)).plan.blocks == (min(found, key=found.get),)
    assert RemoveLayers(layers=("*",), count=1, connect=True, criterion="l1+l2").run(program).modified


def test_imprint_needs_classes():
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(UsageError, match="one class id per sample"):
        imprint(network(), LAYERS, [({"x": x}, None)])
    with pytest.raises(UsageError, match="two classes or more"):
        imprint(network(), LAYERS, [({"x": x}, np.zeros(4, np.int64))])
    with pytest.raises(UsageError, match="are empty"):
        imprint(network(), LAYERS, [])
    with pytest.raises(UsageError, match="Unknown criterion 'magic'"):
        scores("l2+magic")
