"""Groups by hand, the order that keeps most, equality where nothing lies outside, and every refusal."""

from __future__ import annotations

import dataclasses
import json

import models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes, random_inputs
from torch import nn

import sartor
from sartor import oracle
from sartor.cli import main
from sartor.cost_models.static import static_cost
from sartor.errors import PlanError, UsageError
from sartor.ir.fx import run_twin
from sartor.ir.plan import Factorization, Plan
from sartor.ir.verify import verify_program
from sartor.passes import grouped
from sartor.passes.base import Context
from sartor.passes.group_conv import GroupConv
from sartor.passes.masked import masked
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(program, seed=0):
    return next(iter(run_twin(program, random_inputs(program, seed)).values()))


def named(program, weight):
    """The node that reads a weight."""
    return next(n for n in program.nodes() if len(n.inputs) > 1 and n.inputs[1].name == weight)


# ---- orders ------------------------------------------------------------------------------------------
def kept(energy, groups, **free):
    rows, columns = grouped.orders(energy, groups, **free)
    assert sorted(rows) == list(range(len(rows))) and sorted(columns) == list(range(len(columns)))
    blocks = grouped.diagonal(energy[rows][:, columns], groups)
    return float(blocks.sum() / energy.sum()), list(rows), list(columns)


def test_order_by_hand():
    """Outputs 0 and 1 are one group, 2 and 3 the other; of inputs 0 and 2 go with the first."""
    energy = np.array([[9.0, 0, 1, 0], [1, 0, 5, 1], [0, 4, 0, 3], [1, 2, 0, 2]])
    assert kept(energy, 2, inputs=False, outputs=False) == (15 / 29, [0, 1, 2, 3], [0, 1, 2, 3])
    share, rows, columns = kept(energy, 2, inputs=True, outputs=False)
    assert (share, rows, columns) == (27 / 29, [0, 1, 2, 3], [0, 2, 1, 3])
    share, rows, columns = kept(energy.T, 2, inputs=False, outputs=True)
    assert (share, rows, columns) == (27 / 29, [0, 2, 1, 3], [0, 1, 2, 3])


def test_who_loses_most_chooses_first():
    """Both want group 0, which has room for one; the second loses 5 elsewhere and the first only 1."""
    assert list(grouped._balanced(np.array([[9.0, 8.0], [6.0, 1.0]]))) == [1, 0]
    assert list(grouped._balanced(np.zeros((4, 2)))) == [0, 0, 1, 1]


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_hidden_blocks_are_found_and_noise_is_not_worse_than_as_it_is(groups):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows, columns = (rng.permutation(np.repeat(np.arange(groups), n)) for n in (16, 8))
        energy = rng.standard_normal((16 * groups, 8 * groups)) ** 2
        hidden = energy * (rows[:, None] == columns[None])
        assert kept(hidden, groups, inputs=True, outputs=True)[0] == pytest.approx(1.0)
        plain = kept(energy, groups, inputs=False, outputs=False)[0]
        one = [kept(energy, groups, inputs=i, outputs=not i)[0] for i in (True, False)]
        assert plain < min(one) and max(one) < kept(energy, groups, inputs=True, outputs=True)[0]


# ---- the function ------------------------------------------------------------------------------------
class Chain(nn.Module):
    """Between two regular convolutions whatever passes channels on: norm, activations, pool, depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.middle, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 3, bias=False)

    def forward(self, x):
        x = self.depthwise(nn.functional.silu(self.norm(self.first(x))))
        x = self.norm2(nn.functional.relu6(self.middle(x)))
        return self.last(torch.nn.functional.max_pool2d(nn.functional.hardswish(x), 2))


def chain(groups=2, seed=0):
    """With a middle layer whose weights are blocks in a hidden order."""
    module = models.seeded(Chain())
    rng = np.random.default_rng(seed)
    rows, columns = (rng.permutation(np.repeat(np.arange(groups), n // groups)) for n in (12, 8))
    module.middle.weight.data *= torch.from_numpy(rows[:, None] == columns[None])[:, :, None, None]
    return sartor.capture(module, models.example(1, 3, 12, 14))


@pytest.mark.parametrize("groups", [2, 4])
def test_the_same_function_where_nothing_lies_outside(groups):
    """Weights, biases, both norms, the depthwise kernel and the next layer's inputs come into one order."""
    program = chain(groups)
    name = named(program, "middle.weight").name
    done = GroupConv(groups=groups, nodes=(name,)).run(program)
    verify_program(done.program)
    np.testing.assert_allclose(outputs(done.program), outputs(program), rtol=1e-5, atol=1e-5)
    assert done.plan.grouped == {name: groups} and done.counts["layers_grouped"] == 1
    assert done.program.initializer_shape("middle.weight") == (12, 8 // groups, 3, 3)
    assert not (
        done.program.initializer_array("first.weight") == program.initializer_array("first.weight")
    ).all()
    saved = static_cost(program).macs - static_cost(done.program).macs
    assert saved == 12 * 8 * 9 * 10 * 12 * (1 - 1 / groups)


def test_by_hand_what_lies_outside_is_lost_and_orders_stay_where_they_are_not_free():
    """Input and output of the graph: blocks as they come."""
    weight = normal(4, 4, 3, 3)
    arrays = {"w": weight, "b": normal(4, seed=1)}
    program = program_from_nodes(
        [node("Conv", ["x", "w", "b"], ["y"], "conv")], {"x": ("N", 4, 5, 5)}, ["y"], arrays
    )
    done = GroupConv().run(program)
    expected = np.concatenate([weight[:2, :2], weight[2:, 2:]])
    np.testing.assert_array_equal(done.program.initializer_array("w"), expected)
    np.testing.assert_array_equal(done.program.initializer_array("b"), arrays["b"])
    clone = program.clone()
    zeroed = weight.copy()
    zeroed[:2, 2:] = zeroed[2:, :2] = 0
    clone.graph.initializers["w"].const_value = ir.Tensor(zeroed, name="w")
    clone.invalidate()
    np.testing.assert_allclose(outputs(done.program), outputs(clone), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(models.ALL))
def test_networks_of_every_family(name):
    """What it becomes is the network with zeros outside the blocks, in any order: neighbours only change places."""
    program = models.captured(name)
    done = GroupConv().run(program)
    verify_program(done.program)
    assert done.modified == (name in ("resnet", "densenet", "unet", "vgg"))
    if done.modified:
        assert static_cost(done.program).macs < static_cost(program).macs
        assert outputs(done.program).shape == outputs(program).shape
        assert sorted(done.program.initializers) == sorted(program.initializers)


@pytest.mark.parametrize("name", ["resnet", "vgg", "densenet", "unet"])
def test_orders_change_no_function(name, monkeypatch):
    """With all weights left in place of blocks, each layer and its neighbours compute what they did."""
    program = models.captured(name)
    rng = np.random.default_rng(0)
    moved = []

    def anywhere(energy, groups, *, inputs, outputs):
        moved.append((inputs, outputs))
        free = (outputs, inputs)
        return tuple(
            rng.permutation(n) if f else np.arange(n) for n, f in zip(energy.shape, free, strict=True)
        )

    monkeypatch.setattr(grouped, "orders", anywhere)
    monkeypatch.setattr(grouped, "diagonal", lambda weight, groups: weight)
    real = grouped.Rewriter.set_attribute
    monkeypatch.setattr(
        grouped.Rewriter,
        "set_attribute",
        lambda self, n, key, v: None if key == "group" else real(self, n, key, v),
    )
    done = GroupConv().run(program)
    np.testing.assert_allclose(outputs(done.program), outputs(program), rtol=1e-5, atol=1e-5)
    assert {"resnet": (False, True), "vgg": (True, False)}.get(name) in {None, *moved}


def test_the_cost_model_has_the_last_word():
    program = models.captured("vgg")
    fewer = GroupConv().run(program).plan.grouped
    even = Context(extras={"latency": lambda one: float(len(list(one.nodes())))})
    done = GroupConv().run(program, even)
    assert not done.modified
    assert {r.node for r in done.refusals if r.reason == "2 groups would take 1.000x the time"} == set(fewer)
    fast = Context(extras={"latency": lambda one: float(static_cost(one).macs)})
    assert GroupConv().run(program, fast).plan.grouped == fewer


def test_only_what_is_named_and_not_what_is_kept():
    program = chain()
    middle, first = named(program, "middle.weight").name, named(program, "first.weight").name
    assert set(GroupConv(nodes=(middle,)).run(program).plan.grouped) == {middle}
    assert not GroupConv(nodes=("nothing",)).run(program).modified
    for keep in (middle, "middle.weight", "middle.bias"):
        reasons = {r.node: r.reason for r in GroupConv().run(program, Context(keep=(keep,))).refusals}
        assert reasons[middle] == f"'{keep}' is kept"
    for keep in ("norm.*", "first.weight", "depthwise.bias", "last.weight"):
        reasons = {r.node: r.reason for r in GroupConv().run(program, Context(keep=(keep,))).refusals}
        assert "which would come into another order, is kept" in reasons[middle]
    assert first not in GroupConv(nodes=(middle,)).run(program).plan.grouped


# ---- what is not free --------------------------------------------------------------------------------
WEIGHTS = {"a": (6, 4, 1, 1), "w": (4, 6, 3, 3), "z": (5, 4, 1, 1), "n": (6,), "m": (4,), "g": (6, 2, 1, 1)}
FIRST, CONV = node("Conv", ["x", "a"], ["f"], "first"), node("Conv", ["f", "w"], ["c"], "conv")
LAST = node("Conv", ["c", "z"], ["y"], "last")


def small(*nodes, outputs=("y",), more=None):
    used = {name for one in nodes for name in one.input}
    arrays = {k: normal(*shape, seed=i) for i, (k, shape) in enumerate(WEIGHTS.items()) if k in used}
    return program_from_nodes(nodes, {"x": ("N", 4, 8, 8)}, list(outputs), arrays | (more or {}))


@pytest.mark.parametrize(
    ("program", "inputs", "behind"),
    [
        (lambda: small(FIRST, CONV, LAST), True, True),
        (lambda: small(FIRST, CONV, LAST, outputs=("y", "f")), False, True),
        (lambda: small(FIRST, CONV, LAST, outputs=("y", "c")), True, False),
        (lambda: small(FIRST, CONV, LAST, node("Relu", ["f"], ["o"]), outputs=("y", "o")), False, True),
        (lambda: small(FIRST, CONV, LAST, node("Relu", ["c"], ["o"]), outputs=("y", "o")), True, False),
        (lambda: small(FIRST, CONV, LAST, node("Conv", ["x", "a"], ["o"]), outputs=("y", "o")), False, True),
        (lambda: small(FIRST, CONV, LAST, node("Conv", ["c", "z"], ["o"]), outputs=("y", "o")), True, False),
        (lambda: small(node("Conv", ["x", "g"], ["f"], "first", group=2), CONV, LAST), False, True),
        (
            lambda: small(node("Abs", ["a"], ["t"]), node("Conv", ["x", "t"], ["f"], "first"), CONV, LAST),
            False,
            True,
        ),
        (
            lambda: small(
                FIRST,
                CONV,
                node("PRelu", ["c", "slope"], ["p"]),
                node("Conv", ["p", "z"], ["y"], "last"),
                more={"slope": normal(4, 1, 1)},
            ),
            True,
            False,
        ),
        (
            lambda: small(FIRST, CONV, node("Add", ["c", "c"], ["s"]), node("Conv", ["s", "z"], ["y"])),
            True,
            False,
        ),
        (
            lambda: small(
                FIRST, node("Concat", ["f"], ["t"], axis=1), node("Conv", ["t", "w"], ["c"], "conv"), LAST
            ),
            False,
            True,
        ),
        (
            lambda: small(
                FIRST,
                CONV,
                node("BatchNormalization", ["c", "m", "m", "m", "v"], ["b"], "norm"),
                node("Conv", ["b", "z"], ["y"], "last"),
                more={"v": np.ones(4, np.float32)},
            ),
            True,
            False,  # one initializer is three parameters
        ),
        (
            lambda: small(
                FIRST,
                CONV,
                node("MaxPool", ["c"], ["p", "places"], kernel_shape=[2, 2]),
                node("Conv", ["p", "z"], ["y"], "last"),
                node("Abs", ["places"], ["o"]),
                outputs=("y", "o"),
            ),
            True,
            False,
        ),
        (
            lambda: small(
                FIRST, CONV, node("GlobalAveragePool", ["c"], ["p"]), node("Conv", ["p", "z"], ["y"], "last")
            ),
            True,
            False,
        ),
    ],
)
def test_orders_are_free_only_where_all_that_follows_is_known(program, inputs, behind):
    program = program()
    conv = next(n for n in program.nodes() if n.name == "conv")
    assert (grouped.channels_before(conv) is not None) == inputs
    assert (grouped.channels_behind(conv) is not None) == behind
    verify_program(GroupConv(nodes=("conv",)).run(program).program)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda: small(node("Conv", ["x", "g"], ["y"], "conv", group=2)), "it is grouped"),
        (lambda: small(node("Conv", ["x", "a"], ["y"], "conv")), "its kernel is 1 x 1"),
        (
            lambda: small(node("Conv", ["x", "o"], ["y"], "conv"), more={"o": normal(5, 4, 3, 3)}),
            "its 4 inputs and 5 outputs do not divide into 2 groups",
        ),
        (
            lambda: small(
                node("Abs", ["s"], ["t"]),
                node("Conv", ["x", "t"], ["y"], "conv"),
                more={"s": normal(4, 4, 3, 3)},
            ),
            "its weight or bias is computed, or read by other nodes",
        ),
        (
            lambda: small(
                node("Abs", ["m"], ["t"]),
                node("Conv", ["x", "s", "t"], ["y"], "conv"),
                more={"s": normal(4, 4, 3, 3)},
            ),
            "its weight or bias is computed, or read by other nodes",
        ),
        (
            lambda: small(
                node("Conv", ["x", "s"], ["y"], "conv"),
                node("Conv", ["x", "s"], ["z"]),
                outputs=("y", "z"),
                more={"s": normal(4, 4, 3, 3)},
            ),
            "its weight or bias is computed, or read by other nodes",
        ),
    ],
)
def test_refusals(program, says):
    program = program()
    done = GroupConv().run(program)
    assert not done.modified and {r.node: r.reason for r in done.refusals}["conv"] == says
    with pytest.raises(PlanError, match=f"cuts 'conv' into 2 groups, which is not possible: {says}"):
        apply_plan(program, Plan(program.source.sha256, grouped={"conv": 2}))


# ---- plans -------------------------------------------------------------------------------------------
def test_plans_are_read_back_proven_and_refused_where_they_must_be():
    program = models.captured("vgg")
    done = GroupConv(groups=4).run(program)
    plan = Plan.from_json(done.plan.to_json())
    assert plan == done.plan and plan.replaces_layers and not plan.only_removes
    assert apply_plan(program, plan).to_bytes() == done.program.to_bytes()
    (name,) = plan.grouped
    with pytest.raises(PlanError, match="no such convolution"):
        apply_plan(program, Plan(program.source.sha256, grouped={"nothing": 2}))
    document = json.loads(plan.to_json())
    for wrong in ({name: 1}, {name: 2.0}, {name: None}, [name]):
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps({**document, "grouped": wrong}))
    with pytest.raises(PlanError, match=r"cuts layers into groups.*no MASKED form.*'grouped'"):
        masked(program, plan)
    with pytest.raises(UsageError, match="leave its section 'grouped' away"):
        sartor.apply_to_module(models.tiny_vgg()[0], plan, models.example(1, 3, 16, 16))
    both = dataclasses.replace(plan, factors={name: Factorization("svd", (2,))})
    with pytest.raises(PlanError, match=r"factorizes layer.*it is grouped"):
        apply_plan(program, both)
    pruned = Pipeline.parse("prune-channels{ratio=0.5}").run(program).results[0].result.plan
    both = dataclasses.replace(pruned, grouped={name: 2})
    assert oracle.check(program, both).verdict == "passed"
    verify_program(apply_plan(program, both))


def test_a_fused_layer_can_be_cut_by_the_same_plan():
    program = models.captured("mobilenet")
    names = [n.name for n in program.nodes() if n.op_type == "Conv" and n.attributes.get_int("group", 1) > 1]
    plan = Plan(program.source.sha256, fused=tuple(names), grouped=dict.fromkeys(names, 4))
    result = apply_plan(program, Plan.from_json(plan.to_json()))
    verify_program(result)
    assert [n.attributes.get_int("group", 1) for n in result.nodes() if n.name in names] == [4, 4, 4]


def test_from_the_command_line(tmp_path, capsys):
    program = models.captured("resnet")
    model, out, plan, again = (tmp_path / n for n in ("m.onnx", "o.onnx", "p.json", "a.onnx"))
    program.save(model)
    assert (
        main(["run", str(model), "--passes", "group-conv{groups=4}", "-o", str(out), "--plan-out", str(plan)])
        == 0
    )
    capsys.readouterr()
    assert main(["apply", str(model), str(plan), "-o", str(again)]) == 0
    assert "8 layers cut into groups" in capsys.readouterr().out and again.read_bytes() == out.read_bytes()
    assert main(["apply", str(model), str(plan), "-o", str(again), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["grouped"].values()) == {4}
