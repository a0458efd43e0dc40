"""Importance: numbers by hand, gate gradients by finite differences, what each criterion refuses."""

from __future__ import annotations

import dataclasses
import functools

import models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes

from sartor.errors import UsageError
from sartor.ir.capture import capture
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.program import Program
from sartor.passes import base
from sartor.recovery import losses
from sartor.strategies.criteria import CRITERIA, criterion
from sartor.strategies.gates import gate_gradients, gate_members
from sartor.strategies.importance import Subject


@functools.cache
def captured(name: str) -> Program:
    return capture(*models.ALL[name]())


@dataclasses.dataclass(frozen=True, eq=False)
class FakeMember:
    initializer: str
    axis: int
    role: str
    index_map: np.ndarray


@dataclasses.dataclass(frozen=True)
class FakeGroup:
    name: str
    size: int
    members: tuple[FakeMember, ...]


@dataclasses.dataclass(frozen=True)
class FakeAnalysis:
    groups: tuple[FakeGroup, ...]


@dataclasses.dataclass(frozen=True)
class FakeBlock:
    name: str
    nodes: tuple[str, ...]
    removable: bool
    last_affine: tuple[str, ...]


def mlp(w1: np.ndarray, w2: np.ndarray) -> Program:
    """`y = relu(x w1) w2`."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["y"]),
    ]
    arrays = {"w1": w1.astype(np.float32), "w2": w2.astype(np.float32)}
    return program_from_nodes(nodes, {"x": ["N", w1.shape[0]]}, ["y"], arrays)


def hidden_group(size: int, index_map: list[int] | None = None) -> FakeAnalysis:
    index = np.array(index_map if index_map is not None else range(size))
    members = (FakeMember("w1", 1, "producer", index), FakeMember("w2", 0, "consumer", index))
    return FakeAnalysis((FakeGroup("hidden", size, members),))


W1 = np.array([[1.0, -2.0, 3.0], [0.0, 2.0, 4.0]])
W2 = np.array([[1.0], [10.0], [-1.0]])


def score(name: str, program: Program, analysis: object, blocks: tuple = (), **options: object):
    return criterion(name).unit_importance(Subject(program, analysis, blocks, **options))


# ---- weights -----------------------------------------------------------------------------------
def test_l1_and_l2_by_hand() -> None:
    program, analysis = mlp(W1, W2), hidden_group(3)
    np.testing.assert_allclose(score("l1", program, analysis).groups["hidden"], [1, 4, 7])
    np.testing.assert_allclose(score("l2", program, analysis).groups["hidden"], [1, np.sqrt(8), 5])


def test_index_map_merges_and_skips() -> None:
    """Positions 0 and 2 form one unit, position 1 belongs to another group."""
    analysis = hidden_group(1, [0, -1, 0])
    program = mlp(W1, W2)
    np.testing.assert_allclose(score("l1", program, analysis).groups["hidden"], [8])
    np.testing.assert_allclose(score("l2", program, analysis).groups["hidden"], [np.sqrt(26)])


def test_every_producer_counts() -> None:
    """A residual sum has several producers; a unit is removed from all of them."""
    arrays = {"a": W1, "b": 10 * W1}
    nodes = [
        node("MatMul", ["x", "a"], ["p"]),
        node("MatMul", ["x", "b"], ["q"]),
        node("Add", ["p", "q"], ["y"]),
    ]
    program = program_from_nodes(
        nodes, {"x": ["N", 2]}, ["y"], {k: v.astype(np.float32) for k, v in arrays.items()}
    )
    index = np.arange(3)
    members = (FakeMember("a", 1, "producer", index), FakeMember("b", 1, "producer", index))
    analysis = FakeAnalysis((FakeGroup("sum", 3, members),))
    np.testing.assert_allclose(score("l1", program, analysis).groups["sum"], [11, 44, 77])


def test_weight_norm_of_blocks() -> None:
    blocks = (FakeBlock("b", ("node_h",), True, ("w1",)), FakeBlock("stuck", ("node_y",), False, ()))
    result = score("l1", mlp(W1, W2), hidden_group(3), blocks)
    assert result.blocks == {"b": 12.0}


def bn_program() -> tuple[Program, FakeAnalysis]:
    arrays = {
        "w": np.ones((3, 2, 1, 1)),
        "gamma": np.array([0.5, -2.0, 0.0]),
        "beta": np.ones(3),
        "mean": np.zeros(3),
        "var": np.ones(3),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], name="bn"),
    ]
    program = program_from_nodes(
        nodes, {"x": ["N", 2, 4, 4]}, ["y"], {k: v.astype(np.float32) for k, v in arrays.items()}
    )
    index = np.arange(3)
    members = [FakeMember("w", 0, "producer", index)]
    members += [FakeMember(name, 0, "affine", index) for name in ("gamma", "beta", "mean", "var")]
    return program, FakeAnalysis((FakeGroup("g", 3, tuple(members)),))


def test_bn_gamma() -> None:
    program, analysis = bn_program()
    block = FakeBlock("b", ("bn",), True, ("gamma", "beta"))
    result = score("bn-gamma", program, analysis, (block,))
    np.testing.assert_allclose(result.groups["g"], [0.5, 2.0, 0.0])
    assert result.blocks == {"b": 2.5}


def test_bn_gamma_refuses_groups_and_blocks_without_it() -> None:
    with pytest.raises(UsageError, match=r"'hidden' has none .*Use criterion l1"):
        score("bn-gamma", mlp(W1, W2), hidden_group(3))
    program, analysis = bn_program()
    with pytest.raises(UsageError, match="'b' has none"):
        score("bn-gamma", program, analysis, (FakeBlock("b", ("elsewhere",), True, ("w",)),))


def test_random_depends_on_seed_and_name_only() -> None:
    program, analysis = mlp(W1, W2), hidden_group(3)
    first = score("random", program, analysis, seed=1).groups["hidden"]
    more = FakeAnalysis((FakeGroup("other", 5, ()), *analysis.groups))
    np.testing.assert_array_equal(score("random", program, more, seed=1).groups["hidden"], first)
    assert not np.array_equal(score("random", program, analysis, seed=2).groups["hidden"], first)
    assert not np.array_equal(score("random", program, more, seed=1).groups["other"][:3], first)


# ---- gates -------------------------------------------------------------------------------------
def test_taylor_by_hand() -> None:
    """One sample x = (1, 1): r = (1, 0, 7), y = 1 - 7 = -6; L = y², dL/dg_u = 2 y r_u w2_u."""
    data = [({"x": np.ones((1, 2), np.float32)}, None)]
    gradients = gate_gradients(mlp(W1, W2), hidden_group(3), (), data)
    np.testing.assert_allclose(gradients.groups["hidden"], [-12.0, 0.0, 84.0], rtol=1e-6)
    result = score("taylor", mlp(W1, W2), hidden_group(3), data=data)
    np.testing.assert_allclose(result.groups["hidden"], [144.0, 0.0, 7056.0], rtol=1e-6)


def test_geometric_median_by_hand() -> None:
    """Columns (1, 0), (-2, 2) and (3, 4): distances sqrt 13, sqrt 20 and sqrt 29."""
    result = score("fpgm", mlp(W1, W2), hidden_group(3), (FakeBlock("b", ("node_h",), True, ("w1",)),))
    near, far, across = np.sqrt(13), np.sqrt(20), np.sqrt(29)
    np.testing.assert_allclose(result.groups["hidden"], [near + far, near + across, far + across])
    assert result.blocks["b"] == pytest.approx(
        2 * np.sqrt(1 + 16 + 1)
    )  # rows (1, -2, 3) and (0, 2, 4), both ways
    merged = score("fpgm", mlp(W1, W2), hidden_group(2, [0, 1, 1]))  # a unit of one column, and one of two
    assert merged.groups["hidden"][0] == pytest.approx(np.sqrt(9 + 4 + 9 + 16))


def test_fisher_by_hand() -> None:
    """Samples 3 and -1: y = 2 x, L = y², the gradient of each gate is 2 y x w2; half the mean of squares."""
    program = mlp(np.array([[1.0, -1.0]]), np.array([[2.0], [3.0]]))
    x = np.array([[3.0], [-1.0]], np.float32)
    result = score("fisher", program, hidden_group(2), data=[({"x": x}, None)])
    first, second = 2 * (2 * 3) * (2 * 3), 2 * (3 * 1) * (3 * 1)  # relu: unit 0 sees 3, unit 1 sees 1
    np.testing.assert_allclose(result.groups["hidden"], [first**2 / 4, second**2 / 4], rtol=1e-6)
    split = score("fisher", program, hidden_group(2), data=[({"x": x[:1]}, None), ({"x": x[1:]}, None)])
    np.testing.assert_allclose(split.groups["hidden"], result.groups["hidden"], rtol=1e-6)


def test_square_of_the_mean_not_mean_of_squares() -> None:
    """Two samples whose gate gradients cancel: TECO scores 0, and Fisher does not."""
    program = mlp(np.array([[1.0, 1.0]]), np.array([[1.0], [1.0]]))

    def signed(outputs: dict, labels: torch.Tensor) -> torch.Tensor:
        return (outputs["y"][:, 0] * labels).mean()

    x, sign = np.array([[3.0], [3.0]], np.float32), np.array([1.0, -1.0], np.float32)
    both = score("taylor", program, hidden_group(2), data=[({"x": x}, sign)], loss=signed)
    apart = [({"x": x[i : i + 1]}, sign[i : i + 1]) for i in range(2)]
    split = score("taylor", program, hidden_group(2), data=apart, loss=signed)
    np.testing.assert_allclose(both.groups["hidden"], [0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(split.groups["hidden"], [0.0, 0.0], atol=1e-12)
    alone = [score("taylor", program, hidden_group(2), data=[b], loss=signed).groups["hidden"] for b in apart]
    np.testing.assert_allclose(np.mean(alone, axis=0), [9.0, 9.0], rtol=1e-6)
    fisher = score("fisher", program, hidden_group(2), data=[({"x": x}, sign)], loss=signed)
    np.testing.assert_allclose(fisher.groups["hidden"], [4.5, 4.5], rtol=1e-6)


def test_unequal_batches_weigh_by_samples() -> None:
    rng = np.random.default_rng(0)
    program, x = mlp(W1, W2), rng.standard_normal((5, 2)).astype(np.float32)
    whole = gate_gradients(program, hidden_group(3), (), [({"x": x}, None)])
    parts = [({"x": x[:4]}, None), ({"x": x[4:]}, None)]
    np.testing.assert_allclose(
        gate_gradients(program, hidden_group(3), (), parts).groups["hidden"],
        whole.groups["hidden"],
        rtol=1e-5,
    )


def scaled(program: Program, members: list, unit: int, gate: float) -> Program:
    result = program.clone()
    for member in members:
        array = result.initializer_array(member.initializer).astype(np.float64).copy()
        moved = np.moveaxis(array, member.axis, 0)
        moved[np.asarray(member.index_map) == unit] *= gate
        value = result.graph.initializers[member.initializer]
        value.const_value = ir.Tensor(array, name=member.initializer)
    return result


def mean_loss(program: Program, inputs: np.ndarray, labels: np.ndarray) -> float:
    output = torch.from_numpy(next(iter(run_twin(program, {"x": inputs}).values())))
    return float(losses.label_loss({"y": output}, torch.from_numpy(labels)))


@pytest.mark.parametrize("name", ["resnet", "se", "vgg"])
def test_gate_gradient_is_the_derivative_of_masking(name: str) -> None:
    """Really scale the consumers' slices, in float64, and compare slopes."""
    program = captured(name)
    analysis = channel_groups(program)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, *program.input_shapes["x"][1:])).astype(np.float32)
    labels = rng.integers(0, 10, 6)
    gradients = gate_gradients(
        program, analysis, (), [({"x": x[:4]}, labels[:4]), ({"x": x[4:]}, labels[4:])]
    )
    step = 1e-4
    checked = 0
    for group in analysis.groups:
        members = gate_members(analysis, group)
        unit = int(rng.integers(group.size))
        slope = (
            mean_loss(scaled(program, members, unit, 1 + step), x, labels)
            - mean_loss(scaled(program, members, unit, 1 - step), x, labels)
        ) / (2 * step)
        scale = np.abs(gradients.groups[group.name]).max()
        assert gradients.groups[group.name][unit] == pytest.approx(slope, rel=1e-3, abs=2e-3 * scale)
        checked += scale > 0
    assert checked == len(analysis.groups)


def test_block_gate_is_the_last_affine() -> None:
    program = captured("resnet")
    affine = ("layer1.0.bn2.weight", "layer1.0.bn2.bias")
    block = FakeBlock("layer1.0", (), True, affine)
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((4, 3, 16, 16)).astype(np.float32), rng.integers(0, 10, 4)
    gradients = gate_gradients(program, FakeAnalysis(()), (block,), [({"x": x}, labels)])
    members = [FakeMember(name, 0, "affine", np.zeros(8, dtype=int)) for name in affine]
    step = 1e-4
    slope = (
        mean_loss(scaled(program, members, 0, 1 + step), x, labels)
        - mean_loss(scaled(program, members, 0, 1 - step), x, labels)
    ) / (2 * step)
    assert gradients.blocks["layer1.0"] == pytest.approx(slope, rel=1e-3)
    assert score("taylor", program, FakeAnalysis(()), (block,), data=[({"x": x}, labels)]).blocks[
        "layer1.0"
    ] == pytest.approx(slope**2, rel=2e-3)


def test_masked_members_of_the_analysis_win() -> None:
    @dataclasses.dataclass(frozen=True)
    class Knowing(FakeAnalysis):
        def masked_members(self, group: FakeGroup) -> list[FakeMember]:
            return [m for m in group.members if m.role == "producer"]

    data = [({"x": np.ones((1, 2), np.float32)}, None)]
    plain = gate_gradients(mlp(W1, W2), hidden_group(3), (), data).groups["hidden"]
    knowing = gate_gradients(mlp(W1, W2), Knowing(hidden_group(3).groups), (), data).groups["hidden"]
    np.testing.assert_allclose(knowing, plain, rtol=1e-6)  # ReLU is homogeneous: both gates are the same


# ---- refusals ----------------------------------------------------------------------------------
def test_refusals() -> None:
    program, analysis = mlp(W1, W2), hidden_group(3)
    with pytest.raises(UsageError, match="Unknown criterion 'magic'"):
        criterion("magic")
    for name in ("taylor", "fisher", "taylor-map", "taylor-weight"):
        with pytest.raises(UsageError, match=f"'{name}' needs data"):
            score(name, program, analysis)
    with pytest.raises(UsageError, match="calibration data are empty"):
        score("taylor", program, analysis, data=[])
    producers = FakeAnalysis((FakeGroup("g", 3, analysis.groups[0].members[:1]),))
    with pytest.raises(UsageError, match="'g' has no consumer"):
        score("taylor", program, producers, data=[({"x": np.ones((1, 2), np.float32)}, None)])
    with pytest.raises(UsageError, match="no last affine"):
        gate_gradients(program, analysis, (FakeBlock("b", (), True, ()),), [])
    with pytest.raises(UsageError, match="loss returned a tensor of shape"):
        data = [({"x": np.ones((2, 2), np.float32)}, None)]
        score("taylor", program, analysis, data=data, loss=lambda outputs, labels: outputs["y"])
    with pytest.raises(UsageError, match="3 classes"):
        wide = mlp(W1, np.ones((3, 3)))
        score("taylor", wide, analysis, data=[({"x": np.ones((1, 2), np.float32)}, np.array([3]))])


def test_passes_name_every_criterion() -> None:
    """Passes do not know criteria: their help is a text, which must not be behind."""
    assert set(base.CRITERIA.split(", ")) == set(CRITERIA)


def test_every_criterion_scores_a_real_network() -> None:
    program = captured("resnet")
    analysis = channel_groups(program)
    rng = np.random.default_rng(0)
    data = [({"x": rng.standard_normal((4, 3, 16, 16)).astype(np.float32)}, None)]
    for name in CRITERIA:
        result = score(name, program, analysis, data=data)
        assert list(result.groups) == [g.name for g in analysis.groups]
        for group in analysis.groups:
            scores = result.groups[group.name]
            assert scores.shape == (group.size,) and np.isfinite(scores).all() and (scores >= 0).all()
            assert np.ptp(scores) > 0 or name == "hrank"  # noise has full rank everywhere


def test_gradient_of_a_gate_on_an_unused_initializer_is_zero() -> None:
    program = mlp(W1, W2)
    program.graph.register_initializer(
        ir.Value(name="spare", const_value=ir.Tensor(np.ones(3, np.float32), name="spare"))
    )
    analysis = FakeAnalysis((FakeGroup("g", 3, (FakeMember("spare", 0, "consumer", np.arange(3)),)),))
    data = [({"x": np.ones((1, 2), np.float32)}, None)]
    np.testing.assert_array_equal(gate_gradients(program, analysis, (), data).groups["g"], np.zeros(3))
