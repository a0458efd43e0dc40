"""`factorize`: the same function at full rank, what it refuses, and that a cost model has the last word."""

from __future__ import annotations

import dataclasses
import json
import sys

import models
import numpy as np
import pytest
import torch
from torch import nn

import sartor
from sartor import oracle
from sartor.cost_models.static import static_cost
from sartor.errors import PlanError, UsageError
from sartor.ir.fx import run_twin
from sartor.ir.plan import Factorization, Plan
from sartor.ir.verify import verify_program
from sartor.passes import polyadic
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


class Products(nn.Module):
    """Kernels that are sums of 3 and 4 products of vectors; windows differ along every axis."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 16, (3, 5), stride=(2, 3), padding=(1, 2))
        self.deep = nn.Conv2d(16, 12, 3, padding=2, dilation=2, bias=False)
        self.flat = nn.Conv2d(12, 8, (1, 3))
        generator = torch.Generator().manual_seed(0)
        for layer, rank in ((self.first, 3), (self.deep, 4)):
            parts = [torch.randn(n, rank, generator=generator) for n in layer.weight.shape]
            layer.weight.data = torch.einsum("or,ir,yr,xr->oiyx", *parts) / 4

    def forward(self, x):
        return self.flat(torch.relu(self.deep(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def products():
    pytest.importorskip("tensorly", reason="tensorly (the extra 'factorize') decomposes kernels")
    torch.manual_seed(0)
    return sartor.capture(Products().eval(), (torch.zeros(1, 6, 16, 15),))


def run(program, seed=0):
    (name,) = program.input_shapes
    x = np.random.default_rng(seed).standard_normal((2, *program.input_shapes[name][1:]))
    return next(iter(run_twin(program, {name: x}).values()))


@pytest.mark.parametrize(("layer", "rank"), [("first.weight", 3), ("deep.weight", 4)])
def test_as_many_products_as_there_are_give_the_same_function(products, layer, rank):
    """And one less another. MACs by hand, of maps of 16 x 15 that become 8 x 15 by columns and 8 x 5 by rows."""
    name = named(products, layer)
    node = next(node for node in products.nodes() if node.name == name)
    for less in (0, 1):
        r = rank - less
        plan = Plan(products.source.sha256, factors={name: Factorization("cp", (r,))})
        assert Plan.from_json(plan.to_json()) == plan
        result = apply_plan(products, plan)
        polyadic._decomposed.cache_clear()
        assert apply_plan(products, plan).to_bytes() == result.to_bytes()
        verify_program(result)
        error = np.abs(run(result) - run(products)).max()
        assert (error < 1e-5) == (less == 0), error
        by_hand = {
            "first.weight": (16 * 6 * 15 * 8 * 5, r * (6 * 16 * 15 + 3 * 8 * 15 + (5 + 16) * 8 * 5)),
            "deep.weight": (12 * 16 * 9 * 8 * 5, r * (16 * 8 * 5 + 3 * 8 * 5 + (3 + 12) * 8 * 5)),
        }[layer]
        assert multiplications(products, node, plan.factors[name]) == by_hand
        assert static_cost(result).macs - static_cost(products).macs == by_hand[1] - by_hand[0]
    made = [n for n in result.nodes() if (n.name + ".").startswith(name + ".")]
    assert [n.attributes.get_int("group", 1) for n in made] == [1, r, r, 1]
    assert [len(n.inputs) for n in made][:3] == [2, 2, 2]  # the last one has the bias


def test_ranks_of_products_come_from_energy(products):
    done = Factorize(kind="cp", energy=1.0).run(products)
    ranks = {name: found.rank for name, found in done.plan.factors.items()}
    assert ranks == {named(products, "first.weight"): (3,), named(products, "deep.weight"): (4,)}
    assert {r.node: r.reason for r in done.refusals} == {
        named(products, "flat.weight"): "its kernel is 1 x 3"
    }
    assert np.abs(run(done.program) - run(products)).max() < 1e-5
    fewer = Factorize(kind="cp", energy=0.5).run(products)
    assert all(fewer.plan.factors[name].rank < rank for name, rank in ranks.items())


def test_products_that_do_not_pay_and_what_the_cost_model_says(program, products):
    pytest.importorskip("tensorly", reason="tensorly (the extra 'factorize') decomposes kernels")
    reasons = {r.node: r.reason for r in Factorize(kind="cp", energy=1.0).run(program).refusals}
    assert "multiplications instead of" in reasons[named(program, "deep.weight")]  # noise has no products
    assert reasons[named(program, "head.weight")] == "it has no kernel"
    assert reasons[named(program, "grouped.weight")] == "it is grouped"
    slow = Context(extras={"latency": lambda one: float(len(list(one.nodes())))})
    done = Factorize(kind="cp", energy=1.0).run(products, slow)
    assert not done.modified and sum("rank 3 would take" in r.reason for r in done.refusals) == 1
    fast = Context(extras={"latency": lambda one: float(static_cost(one).macs)})
    assert len(Factorize(kind="cp", energy=1.0).run(products, fast).plan.factors) == 2


@pytest.mark.parametrize("name", sorted(models.ALL))
def test_products_in_networks_of_every_family(name):
    pytest.importorskip("tensorly", reason="tensorly (the extra 'factorize') decomposes kernels")
    before = models.captured(name)
    done = Factorize(kind="cp", energy=0.6).run(before)
    verify_program(done.program)
    assert (
        done.program.shapes()[before.graph.outputs[0].name] == before.shapes()[before.graph.outputs[0].name]
    )
    assert done.modified == (name not in ("vit", "vit_manual"))
    if done.modified:
        assert static_cost(done.program).macs < static_cost(before).macs


def test_without_tensorly_the_extra_is_named(program, monkeypatch):
    polyadic._decomposed.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorly", None)
    plan = Plan(program.source.sha256, factors={named(program, "deep.weight"): Factorization("cp", (4,))})
    for act in (lambda: apply_plan(program, plan), lambda: Factorize(kind="cp", energy=0.1).run(program)):
        with pytest.raises(
            UsageError, match=r"'cp' of 'factorize' needs .*pip install 'sartor\[factorize\]'"
        ):
            act()


@pytest.mark.parametrize(
    ("name", "found", "says"),
    [
        ("deep.weight", Factorization("cp", (145,)), "144 at most"),
        ("head.weight", Factorization("cp", (2,)), "it has no kernel"),
        ("point.weight", Factorization("cp", (2,)), "kernel is 1 x 1"),
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
        {"kind": "cp", "rank": [2, 2]},
    ):
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps({**plan, "factors": {"layer": entry}}))
