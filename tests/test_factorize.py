"""`factorize`: the same function at full rank, what it refuses, and that a cost model has the last word."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import sartor
from sartor import oracle
from sartor.cost_models.static import static_cost
from sartor.errors import PlanError
from sartor.ir.fx import run_twin
from sartor.ir.plan import Factorization, Plan
from sartor.passes.base import Context
from sartor.passes.factored import multiplications
from sartor.passes.factorize import Factorize
from sartor.passes.prune import apply_plan


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, (3, 5), stride=(2, 1), padding=(1, 2))
        self.deep = nn.Conv2d(16, 24, 3, padding=2, dilation=2, bias=False)
        self.point = nn.Conv2d(24, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.mixed = nn.Parameter(torch.randn(32, 20))
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.deep(torch.relu(self.first(x))))))
        return self.head(torch.tanh(self.grouped(x).mean((2, 3)) @ self.mixed))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return sartor.capture(Net().eval(), (torch.zeros(1, 3, 16, 16),))


def named(program, part):
    (name,) = [
        node.name
        for node in program.nodes()
        if part in str(node.inputs[1].name if len(node.inputs) > 1 else "")
    ]
    return name


def outputs(program):
    (name,) = program.input_shapes
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16))
    return next(iter(run_twin(program, {name: x}).values()))


FULL = [
    ("first.weight", "svd", (16,)),
    ("first.weight", "spatial", (9,)),
    ("first.weight", "tucker", (3, 16)),
    ("deep.weight", "svd", (24,)),
    ("deep.weight", "spatial", (48,)),
    ("deep.weight", "tucker", (16, 24)),
    ("point.weight", "svd", (24,)),
    ("mixed", "svd", (20,)),
    ("head.weight", "svd", (5,)),
]


@pytest.mark.parametrize(("layer", "kind", "rank"), FULL)
def test_full_rank_is_the_same_function(program, layer, kind, rank):
    """And one less is another: strides, pads and dilations are where they belong."""
    name = named(program, layer)
    for less in (0, 1):
        found = Factorization(kind, (*rank[:-1], rank[-1] - less))
        plan = Plan.from_json(Plan(program.source.sha256, factors={name: found}).to_json())
        assert plan.factors == {name: found}
        result = apply_plan(program, plan)
        error = np.abs(outputs(result) - outputs(program)).max()
        assert (error < 1e-5) == (less == 0), error
        node = next(node for node in program.nodes() if node.name == name)
        old, new = multiplications(program, node, found)
        assert static_cost(result).macs - static_cost(program).macs == new - old


def test_ranks_come_from_energy_and_refusals_say_why(program):
    done = Factorize(energy=0.5).run(program)
    assert done.modified and static_cost(done.program).macs < static_cost(program).macs
    assert done.counts["layers_factorized"] == len(done.plan.factors) >= 2
    reasons = {refusal.node: refusal.reason for refusal in done.refusals}
    assert reasons[named(program, "grouped.weight")] == "it is grouped"
    everything = Factorize(energy=1.0).run(program)
    assert not everything.modified and all(
        "multiplications instead of" in r.reason or "grouped" in r.reason for r in everything.refusals
    )
    spatial = Factorize(kind="spatial", energy=0.5).run(program)
    assert any("kernel is 1 x 1" in refusal.reason for refusal in spatial.refusals)


def test_the_cost_model_has_the_last_word(program):
    fewer = Factorize(energy=0.5).run(program).plan.factors
    slow = Context(
        extras={"latency": lambda one: float(len(list(one.nodes())))}
    )  # a launch is all that counts
    done = Factorize(energy=0.5).run(program, slow)
    assert not done.modified
    assert {r.node for r in done.refusals if "would take" in r.reason} == set(fewer)
    fast = Context(extras={"latency": lambda one: float(static_cost(one).macs)})
    assert Factorize(energy=0.5).run(program, fast).plan.factors == fewer


def test_kept_and_unnamed_layers_stay(program):
    name = named(program, "deep.weight")
    only = Factorize(energy=0.5, nodes=(name,)).run(program)
    assert list(only.plan.factors) == [name]
    kept = Factorize(energy=0.5).run(program, Context(keep=("deep.weight",)))
    assert name not in kept.plan.factors and "its weight is kept" in [r.reason for r in kept.refusals]


def test_narrowed_layers_are_factorized_and_the_cut_is_proven(program):
    plan = (
        sartor.Pipeline.parse("prune-channels{ratio=0.5}", instruments=()).run(program).results[0].result.plan
    )
    both = dataclasses.replace(plan, factors={named(program, "deep.weight"): Factorization("svd", (4,))})
    assert oracle.check(program, both).verdict == "passed"
    result = apply_plan(program, both)
    shapes = sorted(
        tuple(v.shape.numpy()) for n, v in result.initializers.items() if n.startswith("deep.weight")
    )
    assert shapes == [(4, 8, 3, 3), (12, 4, 1, 1)]


@pytest.mark.parametrize(
    ("name", "found", "says"),
    [
        ("nothing", Factorization("svd", (2,)), "does not have"),
        ("grouped.weight", Factorization("svd", (2,)), "it is grouped"),
        ("head.weight", Factorization("tucker", (2, 2)), "it has no kernel"),
        ("head.weight", Factorization("svd", (6,)), "5 at most"),
    ],
)
def test_what_cannot_be_is_an_error(program, name, found, says):
    layer = name if name == "nothing" else named(program, name)
    with pytest.raises(PlanError, match=says):
        apply_plan(program, Plan(program.source.sha256, factors={layer: found}))


def test_malformed_factors_are_refused():
    plan = json.loads(Plan("0" * 64).to_json())
    for entry in (
        {"kind": "magic", "rank": [1]},
        {"kind": "tucker", "rank": [1]},
        {"kind": "svd", "rank": [0]},
        {"kind": "svd"},
    ):
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps({**plan, "factors": {"layer": entry}}))
