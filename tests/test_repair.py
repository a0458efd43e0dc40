"""Least squares by hand, exact where the removed is made of the kept, optimal everywhere, and every refusal."""

from __future__ import annotations

import dataclasses

import models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes
from onnx import TensorProto, helper
from torch import nn

import sartor
from sartor.cli import main
from sartor.errors import PlanError, UsageError
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin, to_fx, twin_info
from sartor.ir.fx_lockstep import Lockstep
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan
from sartor.passes.reestimate_batch_norm import ReestimateBatchNorm
from sartor.passes.repair import Repair, Repaired
from sartor.passes.slices import kept_slices
from sartor.recovery.twins import predictor


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def data_of(program, count=64, seed=1):
    return {name: normal(count, *shape[1:], seed=seed) for name, shape in program.input_shapes.items()}


def context_of(program, data, **more):
    return Context(data={"calibration": [(data, None)]}, original=program, **more)


def captured(module, *shape):
    models.randomise(module, 3)
    return sartor.capture(module.eval(), (torch.zeros(1, *shape),))


def cut(program, keep):
    """Every group narrowed to the units that `keep` gives for its size."""
    groups = channel_groups(program).groups
    plan = {g.name: GroupPlan(g.size, tuple(keep(g.size))) for g in groups}
    return apply_plan(program, Plan(program.source.sha256, plan))


def halved(program):
    return cut(program, lambda size: range(0, size, 2))


def outputs(program, data):
    return next(iter(run_twin(program, data).values()))


def distance(program, other, data):
    want, got = (next(iter(predictor(one)(data).values())) for one in (program, other))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - want.mean(axis=0)))


# ---- by hand ---------------------------------------------------------------------------------------
def test_a_line_through_three_points():
    """y = 2 a + 3 b + 1 with b cut; the line through (0, 1), (1, 9), (2, 5) is 2 a + 3."""
    arrays = {
        "first": np.eye(2, dtype=np.float32),
        "second": np.array([[2.0, 3.0], [0.0, 1.0]], np.float32),
        "bias": np.array([1.0, 0.0], np.float32),
    }
    nodes = [
        node("Gemm", ["x", "first"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "second", "bias"], ["y"], "last", transB=1),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 2)}, ["y"], arrays)
    x = np.array([[0, 0], [1, 2], [2, 0]], np.float32)
    result = Repair(ridge=0.0).run(cut(program, lambda size: [0]), context_of(program, {"x": x}))
    np.testing.assert_allclose(result.program.initializer_array("second"), [[2.0], [0.0]], atol=1e-6)
    np.testing.assert_allclose(result.program.initializer_array("bias"), [3.0, 2.0 / 3.0], rtol=1e-6)
    assert result.counts["layers_repaired"] == 1
    # y is (1, 9, 5) and (0, 2, 0); without b, (0, 6, 0) and (0, 2, 0) are missing, about whose means lie the rest
    before, after = result.plan.errors["last"]
    scale = 1**2 + 9**2 + 5**2 + 2**2
    assert before == pytest.approx(np.sqrt((6**2 + 2**2) / scale))
    assert after == pytest.approx(np.sqrt((24 + 8 / 3) / scale))


def test_ridge_holds_the_weights_by_hand():
    """One feature of variance 2/3: the slope that is missing, cov(a, y) / var(a), becomes cov / (var (1 + ridge))."""
    arrays = {"first": np.eye(2, dtype=np.float32), "second": np.array([[2.0, 3.0]], np.float32)}
    nodes = [
        node("Gemm", ["x", "first"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "second"], ["m"], "last", transB=1),
        node("BatchNormalization", ["m", "one", "one", "zero", "one"], ["y"], "norm", epsilon=0.0),
    ]
    arrays |= {"one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)}
    program = program_from_nodes(nodes, {"x": ("N", 2)}, ["y"], arrays)
    x = np.array([[0, 0], [1, 2], [2, 4]], np.float32)  # b = 2 a
    pruned = cut(program, lambda size: [0])
    for ridge, slope in ((0.0, 8.0), (1.0, 5.0), (5.0, 3.0)):
        result = Repair(ridge=ridge).run(pruned, context_of(program, {"x": x})).program
        np.testing.assert_allclose(result.initializer_array("second"), [[slope]], rtol=1e-6)
        # the norm takes the constant part: the mean of y is 8
        np.testing.assert_allclose(result.initializer_array("zero"), [slope - 8.0], atol=1e-6)


class Linear(nn.Module):
    """Nothing between the layers: of 8 features of 3 inputs, any 4 make the others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.norm, self.third = nn.BatchNorm2d(6), nn.Conv2d(6, 5, (1, 3), dilation=(1, 2))

    def forward(self, x):
        return self.third(torch.relu(self.norm(self.second(self.first(x)))))


def test_what_is_made_of_the_kept_is_made_again():
    program = captured(Linear(), 3, 11, 13)
    group = next(g for g in channel_groups(program).groups if g.size == 8)
    plan = Plan(program.source.sha256, {group.name: GroupPlan(8, (0, 2, 3, 6))})
    pruned = apply_plan(program, plan)
    data, other = data_of(program), data_of(program, seed=2)
    result = Repair(ridge=0.0).run(pruned, context_of(program, data))
    verify_program(result.program)
    assert distance(program, pruned, other) > 0.5
    assert distance(program, result.program, other) < 1e-5


# ---- it is the optimum -----------------------------------------------------------------------------
class Many(nn.Module):
    """Strides, dilations, pads, a Linear behind a flattened map, one on three axes; norms, biases and neither."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.norm = nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 2), bias=False), nn.BatchNorm2d(12)
        self.third = nn.Conv2d(12, 6, 3, padding=2, dilation=2, bias=False)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.tokens, self.hidden = nn.Linear(8, 10), nn.Linear(10, 4)
        self.flat, self.last = nn.Linear(4 * 30, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        x = torch.relu(self.third(x)).flatten(2)
        x = torch.relu(self.line(x)).transpose(1, 2)
        x = self.hidden(torch.nn.functional.gelu(self.tokens(x)))
        return self.last(torch.relu(self.flat(x.flatten(1))))


def test_no_weight_of_any_layer_can_be_better():
    """The gradient of each layer's squared error is 0, on inputs that the repaired layers before it make."""
    program = captured(Many(), 3, 10, 6)
    data = data_of(program, 300)
    pruned = halved(program)
    result = Repair(ridge=0.0, positions=10_000, samples=300).run(pruned, context_of(program, data))
    assert len(result.plan.errors) == 7 and not result.refusals
    results = {n.name: n.outputs[0].name for n in program.nodes() if n.name in result.plan.errors}
    want = run_twin(program, data, taps=list(results.values()))
    for name, (before, after) in result.plan.errors.items():
        assert after < before
        for candidate, optimal in ((result.program, True), (pruned, False)):
            here = next(n for n in candidate.nodes() if n.name == name)
            value = next(n for n in result.program.nodes() if n.name == name).inputs[0].name
            x = run_twin(result.program, data, taps=[value])[value]
            gradients = gradients_of(candidate, here, x, want[results[name]], program)
            assert (gradients < 1e-4) == optimal, (name, gradients)


def gradients_of(program, here, x, want, original):
    """Largest gradient of a layer's squared error by its weight and constant, over that of a random weight."""
    arrays = [np.array(v.const_value.numpy(), np.float64) for v in weights_of(here)]
    parts = [torch.from_numpy(a).requires_grad_() for a in arrays]
    rows = kept_rows(original, program, here)
    target = torch.from_numpy(np.take(want, rows, axis=1 if here.op_type == "Conv" else -1))
    x = torch.from_numpy(x)
    if here.op_type == "Conv":
        bias = parts[1] if len(here.inputs) > 2 else None
        ints = here.attributes.get_ints
        rank = parts[0].dim() - 2
        assert list(ints("pads", [0] * 2 * rank))[:rank] == list(ints("pads", [0] * 2 * rank))[rank:]
        convolve = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[rank]
        y = convolve(
            x,
            parts[0],
            bias,
            tuple(ints("strides", [1] * rank)),
            tuple(ints("pads", [0] * 2 * rank))[:rank],
            tuple(ints("dilations", [1] * rank)),
        )
        if bias is None and len(parts) > 1:
            y = y - parts[1][:, None, None]
    else:
        y = x @ parts[0].T + parts[1]
        if here.op_type == "MatMul":  # its own result is without the bias of the Add behind it
            old = next(n for n in original.nodes() if n.name == here.name)
            target = target + torch.from_numpy(
                weights_of(old)[1].const_value.numpy()[rows].astype(np.float64)
            )
    if here.op_type == "Conv" and len(here.inputs) == 2 and len(parts) > 1:
        old = next(n for n in original.nodes() if n.name == here.name)
        mean = weights_of(old)[1].const_value.numpy()[rows].astype(np.float64)
        target = target - torch.from_numpy(mean)[:, None, None]
    ((y - target) ** 2).sum().backward()
    size = float((target**2).sum())
    return max(float(part.grad.abs().max()) for part in parts) / size


def weights_of(here):
    """The weight of a node and what holds its constant part."""
    value = here.inputs[1]
    if not value.is_initializer():
        value = value.producer().inputs[0]
    if here.op_type != "MatMul" and len(here.inputs) > 2:
        return [value, here.inputs[2]]
    (user,) = {user for user, _ in here.outputs[0].uses()}
    if user.op_type == "BatchNormalization":
        return [value, user.inputs[3]]
    if user.op_type == "Add":
        return [value, next(v for v in user.inputs if v.is_initializer())]
    return [value]


def kept_rows(original, program, here):
    """Even ones where outputs are fewer: `halved` keeps these."""
    old = next(n for n in original.nodes() if n.name == here.name)
    before, after = (weights_of(n)[0].shape[0] for n in (old, here))
    return np.arange(0, before, before // after)


@pytest.mark.parametrize("name", sorted(models.ALL))
def test_networks_of_every_family_come_nearer(name):
    program = models.captured(name)
    data, other = data_of(program, 512), data_of(program, 512, seed=4)
    program = ReestimateBatchNorm().run(program, context_of(program, data)).program
    pruned = Pipeline.parse("prune-channels{ratio=0.5,criterion=l1}").run(program).program
    result = Repair(samples=512).run(pruned, context_of(program, data))
    verify_program(result.program)
    assert all(after < before for before, after in result.plan.errors.values())
    before, after = distance(program, pruned, other), distance(program, result.program, other)
    assert after < before * {"unet": 0.7}.get(name, 0.6), (before, after)


def test_everything_that_is_repaired_is_replayed():
    program = captured(Linear(), 3, 11, 13)
    pruned = halved(program)
    result = Repair().run(pruned, context_of(program, data_of(program)))
    again = Repair().replay(pruned, Repaired.from_json(result.plan.to_json()))
    assert again.program.to_bytes() == result.program.to_bytes()
    assert (
        Repair().run(pruned, context_of(program, data_of(program))).program.to_bytes()
        == again.program.to_bytes()
    )
    for text in ("{", "[]", '{"weights": {}}'):
        with pytest.raises(PlanError, match="malformed"):
            Repaired.from_json(text)


@pytest.mark.parametrize(
    "other", [{"samples": 8}, {"positions": 3}, {"ridge": 0.5}, {"seed": 1, "positions": 3}]
)
def test_every_option_matters(other):
    program = captured(Linear(), 3, 11, 13)
    pruned, context = halved(program), context_of(program, data_of(program))
    base = {"positions": 3} if "seed" in other else {}
    plain, changed = (Repair(**options).run(pruned, context).program for options in (base, other))
    assert plain.to_bytes() != changed.to_bytes()


def test_large_weights_that_are_read_when_needed(monkeypatch):
    """The twin of a streamed weight sees the repaired one, behind a Transpose, too."""
    program = captured(Many(), 3, 10, 6)
    pruned, context = halved(program), context_of(program, data_of(program))
    plain = Repair().run(pruned, context).program.to_bytes()
    monkeypatch.setattr("sartor.ir.fx_build.is_large", lambda tensor: True)
    assert Repair().run(pruned, context).program.to_bytes() == plain


def test_lockstep_is_the_twin():
    program = models.captured("se")
    batches = [data_of(program, 3, seed) for seed in (5, 6)]
    convs = [n.name for n in program.nodes() if n.op_type == "Conv"]
    run = Lockstep(program, batches, convs[:3])
    gm = to_fx(
        program,
        dtype=torch.float32,
        taps=[f"{n.inputs[0].name}" for n in program.nodes() if n.name == convs[4]],
    )
    entering = run.entering(convs[4])
    for inputs, found in zip(batches, entering, strict=True):
        expected = gm(*(torch.from_numpy(inputs[name]) for name in twin_info(gm).inputs))[-1]
        torch.testing.assert_close(found, expected)
    assert len(run.result(convs[0])) == 2
    with pytest.raises(sartor.errors.InternalError, match="was not kept"):
        run.result(convs[0])
    with pytest.raises(sartor.errors.InternalError, match="has run already"):
        run.entering(convs[0])


# ---- what stays as it is -----------------------------------------------------------------------------
def reasons(result):
    return {refusal.node: refusal.reason for refusal in result.refusals}


def test_nothing_pruned_nothing_changed():
    program = models.captured("resnet")
    context = dataclasses.replace(context_of(program, data_of(program, 8)), original=None)
    result = Pipeline.parse("fold-constants,repair").run(program, context)
    assert not result.modified and result.program.to_bytes() == program.to_bytes()
    assert not result.results[-1].result.refusals


def test_without_data_one_error_before_anything_runs():
    program = models.captured("resnet")
    pipeline = Pipeline.parse("prune-channels{ratio=0.5},repair")
    with pytest.raises(UsageError, match="There is no calibration data: pass 'repair' runs the network"):
        pipeline.run(program)
    with pytest.raises(
        UsageError, match=r"Pass 'repair' compares with the program before pruning.*Context\(original"
    ):
        Repair().run(program, dataclasses.replace(context_of(program, data_of(program)), original=None))


def test_the_original_that_is_given_stays():
    program = models.captured("vgg")
    pruned = halved(program)
    result = Pipeline([Repair()]).run(pruned, context_of(program, data_of(program)))
    assert result.modified  # not compared with what the pipeline was given


def test_grouped_and_transposed_layers_stay():
    program = models.captured("mobilenet")
    pruned = halved(program)
    result = Repair(samples=16).run(pruned, context_of(program, data_of(program, 16)))
    depthwise = [
        n.name for n in pruned.nodes() if n.op_type == "Conv" and n.attributes.get_int("group", 1) > 1
    ]
    assert reasons(result) == {name: "it is grouped: its outputs go with its inputs" for name in depthwise}
    program = models.captured("unet")
    result = Repair(samples=4).run(halved(program), context_of(program, data_of(program, 4)))
    assert list(reasons(result).values()) == [
        "it is a ConvTranspose; only Conv, Gemm and MatMul are repaired"
    ]


def test_kept_layers_stay():
    program = models.captured("vgg")
    pruned = halved(program)
    name = next(
        n.name for n in pruned.nodes() if len(n.inputs) > 1 and n.inputs[1].name == "features.3.weight"
    )
    for keep in ("features.3.weight", name):
        result = Repair(samples=16).run(pruned, context_of(program, data_of(program, 16), keep=(keep,)))
        assert reasons(result) == {name: f"'{keep}' is kept"}
        same = result.program.initializer_array("features.3.weight") == pruned.initializer_array(
            "features.3.weight"
        )
        assert same.all()
    kept = Repair(samples=16).run(
        pruned, context_of(program, data_of(program, 16), keep=("features.3.bias",))
    )
    assert (
        kept.program.initializer_array("features.3.bias") == pruned.initializer_array("features.3.bias")
    ).all()


def test_folded_norms_are_no_part_of_the_original():
    program = models.captured("resnet")
    context = dataclasses.replace(context_of(program, data_of(program, 8)), original=None)
    text = "prune-channels{ratio=0.5,criterion=l1},fold-batch-norm,repair{samples=8}"
    result = Pipeline.parse(text).run(program, context).results[-1].result
    assert set(reasons(result).values()) == {
        "its weights are not a part of the original's; let this pass come right after pruning"
    }
    assert set(result.plan.errors) == {n.name for n in program.nodes() if n.op_type == "Gemm"}


def test_other_input_shapes():
    program = models.captured("resnet")
    other = sartor.capture(models.tiny_resnet()[0], models.example(1, 3, 24, 24))
    result = Repair().run(halved(program), context_of(other, data_of(program)))
    assert not result.modified and "its inputs have other shapes" in result.refusals[0].reason


def pair(
    op="Conv", shape=("N", 3, 8, 8), weight=(4, 6, 3, 3), inputs=("r", "w"), more=None, extra=(), **attributes
):
    """A layer behind a convolution (or Gemm) whose 6 outputs can go."""
    arrays = {"first": normal(6, *weight_of_first(shape)), "w": normal(*weight, seed=1), **(more or {})}
    first = (
        node("Conv", ["x", "first"], ["h"])
        if len(shape) > 2
        else node("Gemm", ["x", "first"], ["h"], transB=1)
    )
    nodes = [first, node("Relu", ["h"], ["r"]), *extra, node(op, list(inputs), ["y"], "last", **attributes)]
    return program_from_nodes(nodes, {"x": shape}, ["y"], arrays)


def weight_of_first(shape):
    return (3, *[1] * (len(shape) - 2))


def narrowed_by_hand(program, **changes):
    """The program with three of six units of the first layer, and what else changes."""
    clone = program.clone()
    keep = [0, 2, 5]
    arrays = {"first": clone.initializer_array("first")[keep], **changes}
    for name, array in arrays.items():
        value = clone.graph.initializers[name]
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
        value.shape = ir.Shape(array.shape)
    clone.invalidate()
    return clone


KEEP = [0, 2, 5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": (4, 6, 1, 1, 1), "shape": ("N", 3, 4, 4, 4)}, "its kernel has 3 axes"),
        ({"auto_pad": "SAME_UPPER"}, "it pads by itself (auto_pad)"),
        (
            {"weight": (4, 6), "shape": (5, 3), "op": "Gemm", "transB": 1, "alpha": 2.0},
            "transposes or scales its operands",
        ),
        (
            {"weight": (4, 6), "shape": (5, 3), "op": "Gemm", "transB": 1, "beta": 2.0}
            | {"inputs": ("r", "w", "c"), "more": {"c": normal(4)}},
            "it scales its bias",
        ),
        (
            {"weight": (4, 6), "shape": (5, 3), "op": "Gemm", "transB": 1}
            | {"inputs": ("r", "w", "c"), "more": {"c": normal(5, 4)}},
            "its bias is computed, or no vector",
        ),
        (
            {"extra": [node("Abs", ["w"], ["v"])], "inputs": ("r", "v")},
            "its weight is computed, or read by other",
        ),
    ],
)
def test_layers_that_are_not_repaired(options, says):
    program = pair(**options)
    pruned = narrowed_by_hand(program, w=program.initializer_array("w")[:, KEEP])
    result = Repair().run(pruned, context_of(program, data_of(program, 5)))
    assert not result.modified and says in reasons(result)["last"]


def test_weights_that_are_shared_or_of_three_axes_stay():
    weight = normal(6, 6, 1, 1, seed=1)
    nodes = [
        node("Conv", ["x", "first"], ["h"]),
        node("Conv", ["h", "w"], ["a"], "one"),
        node("Conv", ["h", "w"], ["b"], "two"),
        node("Add", ["a", "b"], ["y"]),
    ]
    program = program_from_nodes(
        nodes, {"x": ("N", 3, 4, 4)}, ["y"], {"first": normal(6, 3, 1, 1), "w": weight}
    )
    pruned = narrowed_by_hand(program, w=weight[:, KEEP])
    result = Repair().run(pruned, context_of(program, data_of(program, 5)))
    assert reasons(result) == dict.fromkeys(("one", "two"), "its weight is computed, or read by other nodes")
    stacked = normal(2, 6, 4, seed=1)
    program = pair(op="MatMul", shape=(5, 3), weight=(2, 6, 4))
    pruned = narrowed_by_hand(program, w=stacked[:, KEEP])
    result = Repair().run(pruned, context_of(program, data_of(program, 5)))
    assert reasons(result) == {"last": "its weight has 3 axes, expected 2"}


def test_results_at_other_places_stay():
    program, other = pair(), pair(strides=[2, 2])
    pruned = narrowed_by_hand(program, w=program.initializer_array("w")[:, KEEP])
    result = Repair().run(pruned, context_of(other, data_of(program, 5)))
    assert reasons(result) == {"last": "its results lie at other places than the original's"}


def test_trained_or_computed_weights_of_the_original_are_not_compared():
    program = pair()
    trained = narrowed_by_hand(program, w=program.initializer_array("w")[:, KEEP] * 1.5)
    result = Repair().run(trained, context_of(program, data_of(program, 5)))
    assert "not a part of the original's" in reasons(result)["last"]
    computed = pair(extra=[node("Abs", ["w"], ["v"])], inputs=("r", "v"))
    result = Repair().run(trained, context_of(computed, data_of(program, 5)))
    assert reasons(result) == {"last": "the original's weight is computed"}


def test_recurrent_layers_and_bodies_stay():
    arrays = {"first": normal(6, 3), "w": normal(1, 12, 6, seed=1), "r": normal(1, 12, 4, seed=2)}
    arrays["shape"] = np.array([2, 1, 6])
    nodes = [
        node("Gemm", ["x", "first"], ["h"], transB=1),
        node("Reshape", ["h", "shape"], ["s"]),
        node("GRU", ["s", "w", "r"], ["y"], "last", hidden_size=4),
    ]
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"], arrays)
    pruned = narrowed_by_hand(program, w=arrays["w"][:, :, KEEP], shape=np.array([2, 1, 3]))
    result = Repair().run(pruned, context_of(program, {"x": normal(2, 3)}))
    assert reasons(result) == {"last": "it is a GRU; only Conv, Gemm and MatMul are repaired"}

    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("then", "else")]
    then = helper.make_graph([node("Gemm", ["h", "w"], ["then"], "inner", transB=1)], "then", [], out[:1])
    other = helper.make_graph([node("Mul", ["h", "two"], ["else"], "outer")], "else", [], out[1:])
    nodes = [
        node("Gemm", ["x", "first"], ["h"], transB=1),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["flag"]),
        node("If", ["flag"], ["c"], "choice", then_branch=then, else_branch=other),
        node("ReduceMean", ["c"], ["y"]),
    ]
    arrays = {"first": normal(6, 3), "w": normal(6, 6, seed=1), "zero": np.zeros((), np.float32)}
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"], arrays | {"two": np.full((), 2.0, np.float32)})
    pruned = narrowed_by_hand(program, w=arrays["w"][:3, KEEP])
    result = Repair().run(pruned, context_of(program, {"x": normal(2, 3)}))
    assert reasons(result) == {"inner": "it lies in a body of If"}


def test_overflow_is_said():
    program = pair()
    huge = {"x": np.full((4, 3, 8, 8), 3e38, np.float32) * np.sign(normal(4, 3, 8, 8))}
    pruned = narrowed_by_hand(program, w=program.initializer_array("w")[:, KEEP])
    with pytest.raises(UsageError, match="weights that are not finite"), np.errstate(all="ignore"):
        Repair().run(pruned, context_of(program, huge))


# ---- slices ------------------------------------------------------------------------------------------
class TestSlices:
    def test_found_again(self):
        whole = normal(12, 9, 4)
        for rows, columns in (
            ([0, 3, 11], [1, 2, 8]),
            (range(12), [0]),
            ([5], range(9)),
            (range(12), range(9)),
        ):
            found = kept_slices(whole, whole[np.ix_(list(rows), list(columns))])
            assert [list(part) for part in found] == [list(rows), list(columns)]

    def test_most_weights_may_be_zero_or_alike(self):
        whole = normal(12, 9, 1) * (normal(12, 9, 1, seed=1) > 0.5)
        whole[:, 4] = whole[:, 5]
        rows, columns = kept_slices(whole, whole[:, [0, 2, 7]])
        assert list(columns) == [0, 2, 7] and len(rows) == 12

    @pytest.mark.parametrize(
        ("rows", "columns", "says"),
        [
            ([0, 1], [0, 1, 2], "outputs cannot be told apart"),
            (range(6), [3, 4], "inputs cannot be told apart"),
        ],
    )
    def test_what_cannot_be_told_apart(self, rows, columns, says):
        whole = normal(6, 5, 1)
        whole[1] = whole[2]
        whole[:, 4] = whole[:, 3]
        assert says in kept_slices(whole, whole[np.ix_(list(rows), columns)])

    @pytest.mark.parametrize(
        "part",
        [
            lambda w: w * 2,
            lambda w: np.concatenate([w, w]),
            lambda w: w.astype(np.float64),
            lambda w: w[:, :, :1],
            lambda w: w[:, :4] + (np.arange(6) == 2)[:, None, None],
        ],
    )
    def test_no_part_of_it(self, part):
        whole = normal(6, 5, 2)
        assert "not a part of the original's" in kept_slices(whole, np.ascontiguousarray(part(whole)))


def test_from_the_command_line(tmp_path, capsys):
    program = models.captured("vgg")
    model, data, out = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx"
    program.save(model)
    np.savez(data, **data_of(program, 40))
    text = ["run", str(model), "--passes", "prune-channels{ratio=0.5,criterion=l1},repair", "-o", str(out)]
    assert main(text) == 2 and "There is no calibration data" in capsys.readouterr().err and not out.exists()
    assert main([*text, "--data", str(data)]) == 0
    assert "layers_repaired 3" in capsys.readouterr().out
