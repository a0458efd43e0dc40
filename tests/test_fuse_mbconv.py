"""An expansion and its depthwise convolution as one: exact where that can be, by hand where not, and every refusal."""

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
from sartor.ir.plan import Plan
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.fuse_mbconv import FuseMbconv
from sartor.passes.masked import masked
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan
from sartor.passes.remove_dead import RemoveDead


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Mb(nn.Module):
    """Expansion, norm, activation, depthwise convolution, norm, activation, projection."""

    def __init__(self, act=None, bias=False, norm=True, pads=0, times=1, kernel=3, stride=1):
        super().__init__()
        self.expand = nn.Conv2d(4, 10, 1, bias=bias)
        self.norm1 = nn.BatchNorm2d(10) if norm else nn.Identity()
        self.act = act or nn.Identity()
        self.depthwise = nn.Conv2d(10, 10 * times, kernel, stride, pads, groups=10, bias=bias)
        self.norm2, self.project = nn.BatchNorm2d(10 * times), nn.Conv2d(10 * times, 6, 1)

    def forward(self, x):
        x = self.depthwise(self.act(self.norm1(self.expand(x))))
        return self.project(torch.relu(self.norm2(x)))


def captured(**options):
    return sartor.capture(models.seeded(Mb(**options)), models.example(1, 4, 9, 11))


def outputs(program, seed=0):
    return next(iter(run_twin(program, random_inputs(program, seed)).values()))


def depthwise(program):
    return [n for n in program.nodes() if n.op_type == "Conv" and n.attributes.get_int("group", 1) > 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"norm": False, "bias": True},
        {"norm": False, "pads": 1},  # the expansion adds nothing
        {"times": 3, "kernel": (5, 2), "stride": (2, 1)},
        {"times": 2, "bias": True},
    ],
)
def test_exact_where_it_can_be(options):
    program = captured(**options)
    done = FuseMbconv().run(program)
    verify_program(done.program)
    np.testing.assert_allclose(outputs(done.program), outputs(program), rtol=1e-5, atol=1e-5)
    assert done.counts["pairs_fused"] == 1 and not depthwise(done.program)
    assert not [n for n in done.program.initializers if n.startswith(("expand", "norm1"))]
    assert len(list(done.program.nodes())) < len(list(program.nodes()))


def test_padding_after_a_bias_is_the_one_place_that_differs():
    program = captured(pads=1)
    done = FuseMbconv().run(program)
    before, after = outputs(program), outputs(done.program)
    np.testing.assert_allclose(after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], rtol=1e-5, atol=1e-5)
    for edge in (np.s_[..., 0, :], np.s_[..., -1, :], np.s_[..., 0], np.s_[..., -1]):
        assert np.abs(after[edge] - before[edge]).max() > 1e-2


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.PReLU(10), nn.GELU()])
def test_an_activation_goes_and_the_rest_is_the_product(act):
    """The same as without the activation, and otherwise the same module."""
    program, plain = captured(act=act, bias=True), captured(bias=True)
    shared = {
        name: program.initializer_array(name) for name in plain.initializers if name in program.initializers
    }
    for name, array in shared.items():
        plain.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    plain.invalidate()
    done = FuseMbconv().run(program)
    verify_program(done.program)
    np.testing.assert_allclose(outputs(done.program), outputs(plain), rtol=1e-5, atol=1e-5)
    assert np.abs(outputs(program) - outputs(plain)).max() > 1e-2
    (left,) = [n for n in done.program.nodes() if n.name == depthwise(program)[0].name]
    assert left.attributes.get_int("group", 1) == 1 and done.plan.fused == (left.name,)
    tidy = RemoveDead().run(done.program).program  # a slope may have been reshaped
    assert not [n for n in tidy.initializers if n.startswith(("expand", "norm1", "act"))]


def test_kernel_by_hand():
    """W[c, i] = D[c] s[c] E[c, i], and the bias t[c] Σ D[c]."""
    arrays = {
        "e": np.array([[1, 2], [3, 4]], np.float32).reshape(2, 2, 1, 1),
        "d": np.array([[1, 1], [2, 0]], np.float32).reshape(2, 1, 1, 2),
        "scale": np.array([2, 1], np.float32),
        "bias": np.array([5, 0], np.float32),
        "mean": np.array([1, 1], np.float32),
        "var": np.array([1, 4], np.float32),
    }
    nodes = [
        node("Conv", ["x", "e"], ["a"], "expand"),
        node("BatchNormalization", ["a", "scale", "bias", "mean", "var"], ["b"], "norm", epsilon=0.0),
        node("Relu", ["b"], ["c"], "act"),
        node("Conv", ["c", "d"], ["y"], "depthwise", group=2),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 2, 3, 4)}, ["y"], arrays)
    done = FuseMbconv().run(program).program
    # s = (2, 1/2), t = (5 - 2, 0 - 1/2)
    expected = [[[[2, 2]], [[4, 4]]], [[[3, 0]], [[4, 0]]]]
    np.testing.assert_allclose(done.initializer_array("d"), expected)
    (left,) = done.nodes()
    assert left.name == "depthwise" and left.inputs[0].name == "x"
    np.testing.assert_allclose(left.inputs[2].const_value.numpy(), [3 * 2, -0.5 * 2])


@pytest.mark.parametrize("name", sorted(models.ALL))
def test_networks_of_every_family(name):
    program = models.captured(name)
    done = FuseMbconv().run(program)
    verify_program(done.program)
    assert done.modified == (name in ("mobilenet", "se"))
    if not done.modified:
        return
    count = len(depthwise(program))
    assert done.counts["pairs_fused"] == count == len(done.plan.fused) and not done.refusals
    assert static_cost(done.program).macs > static_cost(program).macs
    assert outputs(done.program).shape == outputs(program).shape
    data = {k: normal(64, *shape[1:]) for k, shape in program.input_shapes.items()}
    context = Context(data={"calibration": [(data, None)]})
    verify_program(Pipeline.parse("fuse-mbconv,reestimate-batch-norm").run(program, context).program)


def test_the_cost_model_has_the_last_word():
    program = captured(act=nn.ReLU())
    (name,) = (n.name for n in depthwise(program))
    dear = Context(extras={"latency": lambda one: float(static_cost(one).macs)})
    done = FuseMbconv().run(program, dear)
    assert not done.modified and "one convolution would take" in done.refusals[0].reason
    launches = Context(extras={"latency": lambda one: float(len(list(one.nodes())))})
    assert FuseMbconv().run(program, launches).plan.fused == (name,)


def test_only_what_is_named_and_not_what_is_kept():
    program = models.captured("mobilenet")
    names = [n.name for n in depthwise(program)]
    assert FuseMbconv(nodes=(names[1],)).run(program).plan.fused == (names[1],)
    assert not FuseMbconv(nodes=("nothing",)).run(program).modified
    parts = {v.name for n in program.nodes() if n.name == names[0] for v in n.inputs if v.is_initializer()}
    expansion = [n for n in program.nodes() if n.op_type == "Conv"]
    before = expansion[[n.name for n in expansion].index(names[0]) - 1]
    for keep in (names[0], next(iter(parts)), before.name, before.inputs[1].name):
        done = FuseMbconv().run(program, Context(keep=(keep,)))
        assert [r.reason for r in done.refusals] == [f"'{keep}' is kept"] and names[0] not in done.plan.fused


# ---- refusals ----------------------------------------------------------------------------------------
WEIGHTS = {
    "e": (6, 3, 1, 1),
    "d": (6, 1, 3, 3),
    "g": (6, 3, 3, 3),
    "k": (6, 3, 1, 3),
    "s": (6, 1, 1, 1),
    "b": (6,),
}


def chain(*nodes, outputs=("y",), more=None):
    used = {name for one in nodes for name in one.input}
    arrays = {name: np.abs(normal(*shape, seed=1)) + 0.1 for name, shape in WEIGHTS.items() if name in used}
    return program_from_nodes(nodes, {"x": ("N", 3, 8, 8)}, list(outputs), arrays | (more or {}))


EXPAND, LAST = node("Conv", ["x", "e"], ["a"], "expand"), node("Conv", ["a", "d"], ["y"], "last", group=6)
NORM = node("BatchNormalization", ["a", "b", "b", "b", "b"], ["n"], "norm")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda: chain(EXPAND, LAST, outputs=("y", "a")), "'a' before it is read elsewhere"),
        (
            lambda: chain(EXPAND, LAST, node("Relu", ["a"], ["z"]), outputs=("y", "z")),
            "'a' before it is read elsewhere",
        ),
        (
            lambda: chain(
                EXPAND,
                node("Relu", ["a"], ["r"]),
                node("Conv", ["r", "d"], ["y"], "last", group=6),
                node("Abs", ["r"], ["z"]),
                outputs=("y", "z"),
            ),
            "'r' before it is read elsewhere",
        ),
        (
            lambda: chain(
                EXPAND,
                NORM,
                node("Conv", ["n", "d"], ["y"], "last", group=6),
                node("Abs", ["n"], ["z"]),
                outputs=("y", "z"),
            ),
            "'n' before it is read elsewhere",
        ),
        (
            lambda: chain(EXPAND, NORM, node("Conv", ["n", "d"], ["y"], "last", group=6), outputs=("y", "a")),
            "'a' before it is read elsewhere",
        ),
        (
            lambda: chain(
                EXPAND,
                node("Sigmoid", ["a"], ["s1"]),
                node("Mul", ["a", "s1"], ["m"]),
                node("Conv", ["m", "d"], ["y"], "last", group=6),
                node("Abs", ["a"], ["z"]),
                outputs=("y", "z"),
            ),
            "'a' before it is read elsewhere",
        ),
        *(
            (
                lambda gate=gate, kept=kept: chain(
                    EXPAND,
                    node("Sigmoid", [gate], ["s1"]),
                    node("Mul", ["a", "s1"], ["m"]),
                    node("Conv", ["m", "d"], ["y"], "last", group=6),
                    outputs=("y", *kept),
                    more={"b1": normal(6, 1, 1)} if gate == "b1" else None,
                ),
                "it follows Mul, expected a 1 x 1 convolution",
            )
            for gate, kept in (("a", ("s1",)), ("b1", ()))
        ),
        (
            lambda: chain(
                EXPAND,
                node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2]),
                node("Conv", ["p", "d"], ["y"], "last", group=6),
            ),
            "it follows MaxPool, expected a 1 x 1 convolution",
        ),
        (
            lambda: chain(
                node("Conv", ["x", "three"], ["y"], "last", group=3), more={"three": normal(3, 1, 3, 3)}
            ),
            "it follows an input, expected a 1 x 1 convolution",
        ),
        (
            lambda: chain(node("Conv", ["x", "g"], ["a"], "expand"), LAST),
            "the kernel of 'expand' before it is 3 x 3, expected 1 x 1",
        ),
        (
            lambda: chain(node("Conv", ["x", "k"], ["a"], "expand"), LAST),
            "the kernel of 'expand' before it is 1 x 3, expected 1 x 1",
        ),
        *(
            (
                lambda options=options: chain(
                    node("Conv", ["x", options.pop("w", "e")], ["a"], "expand", **options), LAST
                ),
                "'expand' before it has strides, pads or groups",
            )
            for options in ({"strides": [2, 2]}, {"pads": [0, 1, 0, 0]}, {"group": 3, "w": "s"})
        ),
        (
            lambda: chain(node("Abs", ["e"], ["w"]), node("Conv", ["x", "w"], ["a"], "expand"), LAST),
            "the weight or bias of 'expand' before it is computed",
        ),
        (
            lambda: chain(node("Abs", ["b"], ["w"]), node("Conv", ["x", "e", "w"], ["a"], "expand"), LAST),
            "the weight or bias of 'expand' before it is computed",
        ),
        (
            lambda: chain(
                EXPAND, node("Abs", ["b"], ["w"]), node("Conv", ["a", "d", "w"], ["y"], "last", group=6)
            ),
            "its bias is computed",
        ),
        (
            lambda: chain(
                EXPAND,
                node("Abs", ["b"], ["w"]),
                node("BatchNormalization", ["a", "b", "b", "w", "b"], ["n"], "norm"),
                node("Conv", ["n", "d"], ["y"], "last", group=6),
            ),
            "the parameters of 'norm' before it are computed",
        ),
        (
            lambda: chain(
                EXPAND,
                node(
                    "BatchNormalization", ["a", "b", "b", "b", "b"], ["n", "m", "v"], "norm", training_mode=1
                ),
                node("Conv", ["n", "d"], ["y"], "last", group=6),
            ),
            "the parameters of 'norm' before it are computed",
        ),
    ],
)
def test_refusals(program, says):
    program = program()
    done = FuseMbconv().run(program)
    assert not done.modified and {r.node: r.reason for r in done.refusals}["last"] == says
    with pytest.raises(PlanError, match="fuses 'last' with the layer before it, which is not possible"):
        apply_plan(program, Plan(program.source.sha256, fused=("last",)))


def test_shared_weights_of_others_stay():
    """Another layer reads the depthwise kernel and the expansion's weight: they keep theirs."""
    nodes = [
        EXPAND,
        LAST,
        node("Conv", ["x", "e"], ["o"], "other"),
        node("Conv", ["o", "d"], ["z"], "second", group=6),
    ]
    program = chain(*nodes, outputs=("y", "z"))
    done = FuseMbconv(nodes=("last",)).run(program)
    verify_program(done.program)
    feeds = random_inputs(program)
    before, after = run_twin(program, feeds), run_twin(done.program, feeds)
    for name in ("y", "z"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-5)


# ---- plans -------------------------------------------------------------------------------------------
def test_plans_are_read_back_proven_and_refused_where_they_must_be():
    program = models.captured("mobilenet")
    fused = FuseMbconv().run(program)
    plan = Plan.from_json(fused.plan.to_json())
    assert plan.fused == fused.plan.fused and plan.replaces_layers and not plan.only_removes
    assert apply_plan(program, plan).to_bytes() == fused.program.to_bytes()
    for bad in (("nothing",), (next(n.name for n in program.nodes() if n.op_type == "Conv"),)):
        with pytest.raises(PlanError, match="no depthwise convolution of this program"):
            apply_plan(program, Plan(program.source.sha256, fused=bad))
    document = json.loads(plan.to_json())
    for wrong in ("abc", [1], {"a": 1}):
        with pytest.raises(PlanError, match="malformed"):
            Plan.from_json(json.dumps({**document, "fused": wrong}))
    with pytest.raises(PlanError, match=r"fuses pairs of layers into one; it has no MASKED form.*'fused'"):
        masked(program, plan)
    with pytest.raises(UsageError, match="leave its section 'fused' away"):
        sartor.apply_to_module(models.tiny_mobilenet()[0], plan, models.example(1, 3, 32, 32))
    pruned = Pipeline.parse("prune-channels{ratio=0.5}").run(program).results[0].result.plan
    both = dataclasses.replace(pruned, fused=plan.fused)
    assert oracle.check(program, both).verdict == "passed"
    result = apply_plan(program, both)
    verify_program(result)
    assert not depthwise(result) and static_cost(result).macs < static_cost(fused.program).macs


def test_from_the_command_line(tmp_path, capsys):
    program = models.captured("mobilenet")
    model, out, plan, again = (tmp_path / n for n in ("m.onnx", "o.onnx", "p.json", "a.onnx"))
    program.save(model)
    assert main(["run", str(model), "--passes", "fuse-mbconv", "-o", str(out), "--plan-out", str(plan)]) == 0
    capsys.readouterr()
    assert main(["apply", str(model), str(plan), "-o", str(again)]) == 0
    assert "3 pairs of layers fused" in capsys.readouterr().out and again.read_bytes() == out.read_bytes()
    assert main(["apply", str(model), str(plan), "-o", str(again), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["fused"]) == 3
