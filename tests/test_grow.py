"""Wider and deeper networks compute the same: every group and block, on every structure, in float64."""

from __future__ import annotations

import functools

import models
import numpy as np
import pytest
import torch
from builders import random_inputs
from torch import nn

import sartor
from sartor import oracle
from sartor.errors import PlanError, UsageError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin, to_fx
from sartor.ir.plan import GroupPlan, Plan, Widening
from sartor.passes import deepen, widen, widths
from sartor.passes.base import Context
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan
from sartor.writeback import apply_to_module


class Joined(nn.Module):
    """Concat, halves that multiply, a shuffle, grouped convolutions, a norm of groups, a flattened map."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8))
        self.both = nn.Conv2d(14, 16, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x):
        a, b = self.both(torch.cat([self.left(x), self.right(x)], 1)).chunk(2, 1)
        x = torch.sigmoid(a) * b
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.up(self.grouped(torch.tanh(x)))
        return self.head(nn.functional.avg_pool2d(x, 8).flatten(1))


NAMES = (*models.ALL, "joined")


def program_of(name):
    return joined() if name == "joined" else models.captured(name)


@functools.cache
def joined():
    return sartor.capture(models.seeded(Joined()), models.example(1, 3, 16, 16))


def outputs(program):
    return next(iter(run_twin(program, random_inputs(program), dtype="float64").values()))


def assert_same(program, grown, tolerance=3e-6):
    """Weights are rounded to float32 once more where they are shared out."""
    want, found = outputs(program), outputs(grown)
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()
    assert np.abs(want).max() > 1e-3 and np.ptp(want) > 1e-3


def some_copies(size, seed):
    generator = np.random.default_rng(seed)
    return tuple(sorted(generator.integers(0, size, 1 + size // 2).tolist()))


@pytest.mark.parametrize("name", NAMES)
class TestWider:
    def test_each_group_alone(self, name):
        program = program_of(name)
        analysis = channel_groups(program)
        wide = 0
        for number, group in enumerate(analysis.groups):
            if widen.obstacle(analysis, group):
                continue
            copies = some_copies(group.size, number)
            plan = Plan(program.source.sha256, widened={group.name: Widening(group.size, copies)})
            grown = apply_plan(program, Plan.from_json(plan.to_json()), analysis)
            assert_same(program, grown)
            first = group.members[0]
            often = (1 + np.bincount(copies, minlength=group.size))[
                first.index_map[first.index_map >= 0]
            ].sum()
            rest = (first.index_map < 0).sum()
            assert grown.initializer_shape(first.initializer)[first.axis] == often + rest
            wide += 1
        assert wide >= 3

    def test_all_at_once_beside_others_that_shrink(self, name):
        program = program_of(name)
        analysis = channel_groups(program)
        groups = [g for g in analysis.groups if not widen.obstacle(analysis, g)]
        widened = {
            g.name: Widening(g.size, some_copies(g.size, n)) for n, g in enumerate(groups) if n % 2 == 0
        }
        keep = {g.name: GroupPlan(g.size, tuple(range(1, g.size))) for n, g in enumerate(groups) if n % 2}
        shrunk = apply_plan(program, Plan(program.source.sha256, keep), analysis)
        both = apply_plan(program, Plan(program.source.sha256, keep, widened=widened), analysis)
        assert_same(shrunk, both)
        assert sum(map(np.size, weights(both))) > sum(map(np.size, weights(shrunk)))


def weights(program):
    return [program.initializer_array(name) for name in program.initializers]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "vit_manual"])
def test_deeper(name):
    program = program_of(name)
    blocks = [block for block in residual_blocks(program) if block.removable]
    plan = Plan(program.source.sha256, deepened={blocks[0].name: 2, blocks[-1].name: 1})
    grown = apply_plan(program, Plan.from_json(plan.to_json()))
    assert len(residual_blocks(grown)) == len(residual_blocks(program)) + 3
    np.testing.assert_array_equal(outputs(grown), outputs(program))
    known = {tuple(map(int, a.shape)) for a in weights(program)}
    assert all(tuple(a.shape) in known for a in weights(grown))


def test_added_blocks_learn():
    """Zeros hold back nothing but the first step: the last layer of an added block has a gradient."""
    program = program_of("resnet")
    block = next(block for block in residual_blocks(program) if block.removable)
    grown = apply_plan(program, Plan(program.source.sha256, deepened={block.name: 1}))
    twin = to_fx(grown)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    twin(x)[0].square().sum().backward()
    zeros = [n for n, p in twin.named_parameters() if not p.detach().any()]
    assert zeros and all(p.grad.abs().max() > 0 for n, p in twin.named_parameters() if n in zeros)


def test_copies_do_not_learn_the_same():
    program = program_of("mobilenet")
    analysis = channel_groups(program)
    group = analysis.groups[0]
    grown = apply_plan(program, Plan(program.source.sha256, widened={group.name: Widening(group.size, (0,))}))
    consumer = group.members_with("consumer")[0]
    array = np.moveaxis(grown.initializer_array(consumer.initializer), consumer.axis, 0)
    np.testing.assert_allclose(array[1], 2 * array[0], rtol=1e-6)
    old = np.moveaxis(program.initializer_array(consumer.initializer), consumer.axis, 0)
    np.testing.assert_allclose(array[0] + array[1], old[0], rtol=1e-6)


class TestPlantedErrors:
    """The comparison sees them: otherwise the tests above would prove nothing."""

    def widen_all(self, name="joined"):
        program = program_of(name)
        analysis = channel_groups(program)
        groups = [g for g in analysis.groups if not widen.obstacle(analysis, g)]
        wide = {g.name: Widening(g.size, some_copies(g.size, n)) for n, g in enumerate(groups)}
        grown = apply_plan(program, Plan(program.source.sha256, widened=wide), analysis)
        with pytest.raises(AssertionError):
            assert_same(program, grown)

    def test_what_reads_is_not_divided(self, monkeypatch):
        monkeypatch.setattr(widen, "scale_reads", lambda *_: None)
        self.widen_all()

    def test_positions_are_copied_instead_of_runs(self, monkeypatch):
        right = widths._repeated
        monkeypatch.setattr(widths, "_repeated", lambda runs, times: right(np.arange(len(runs)), times))
        self.widen_all()

    def test_last_layer_is_not_zero(self, monkeypatch):
        monkeypatch.setattr(deepen.np, "zeros_like", lambda array: array.copy())
        program = program_of("resnet")
        block = next(block for block in residual_blocks(program) if block.removable)
        grown = apply_plan(program, Plan(program.source.sha256, deepened={block.name: 1}))
        with pytest.raises(AssertionError):
            assert_same(program, grown)


class TestPass:
    @pytest.mark.parametrize("name", NAMES)
    def test_growing_is_exact_and_grows(self, name):
        program = program_of(name)
        (step,) = Pipeline.parse("rescale{width=1.5,depth=2}").passes
        result = step.run(program, Context())
        assert_same(program, result.program)
        assert sum(map(np.size, weights(result.program))) > 1.2 * sum(map(np.size, weights(program)))
        replayed = step.replay(program, Plan.from_json(result.plan.to_json()))
        np.testing.assert_array_equal(outputs(replayed.program), outputs(result.program))

    def test_shrinking_removes_what_matters_least(self):
        program = program_of("resnet")
        (step,) = Pipeline.parse("rescale{width=0.5,depth=0.5,criterion=l1}").passes
        result = step.run(program, Context())
        assert len(result.plan.blocks) == round(sum(b.removable for b in residual_blocks(program)) / 2)
        assert all(len(entry.keep) * 2 == entry.size for entry in result.plan.groups.values())
        assert oracle.check(program, result.plan).verdict == "passed"

    def test_heads_are_multiplied_and_not_their_features(self):
        (step,) = Pipeline.parse("rescale{width=2}").passes
        plan = step.run(program_of("vit"), Context()).plan
        heads = [w for name, w in plan.widened.items() if "qkv" in name]
        assert [w.size for w in heads] == [3, 3] and all(w.copies == (0, 1, 2) for w in heads)

    def test_widths_lie_on_the_grid(self):
        (step,) = Pipeline.parse("rescale{width=1.3,channel_grid=8}").passes
        plan = step.run(program_of("mobilenet"), Context()).plan
        assert plan.widened and all((w.size + len(w.copies)) % 8 == 0 for w in plan.widened.values())

    def test_kept_stays(self):
        (step,) = Pipeline.parse("rescale{width=2,depth=2}").passes
        program = program_of("resnet")
        result = step.run(program, Context(keep=("*",)))
        assert not result.modified


class TestBadPlans:
    def plan(self, program, **more):
        return Plan(program.source.sha256, **more)

    def test_other_size(self):
        program = program_of("mobilenet")
        name = channel_groups(program).groups[0].name
        with pytest.raises(PlanError, match="has 8 units, the plan was made for 9"):
            apply_plan(program, self.plan(program, widened={name: Widening(9, (0,))}))

    def test_unknown_block(self):
        with pytest.raises(PlanError, match="repeats block 'b', which cannot be: the program has none"):
            apply_plan(program_of("mobilenet"), self.plan(program_of("mobilenet"), deepened={"b": 1}))

    @pytest.mark.parametrize("copies", [(), (1, 0), (3,), (-1,)])
    def test_copies(self, copies):
        with pytest.raises(PlanError, match="ascending within"):
            Widening(3, copies)

    def test_both_directions(self):
        with pytest.raises(PlanError, match="both shrinks and grows"):
            Plan("0", {"g": GroupPlan(2, (0,))}, widened={"g": Widening(2, (0,))})

    def test_unknown_entry(self):
        text = self.plan(program_of("mobilenet")).to_json().replace('"scale": {}', '"scale": {"layers": {}}')
        with pytest.raises(PlanError, match="expected only inputs, groups and blocks"):
            Plan.from_json(text)

    def test_module(self):
        with pytest.raises(UsageError, match="adds units or blocks"):
            apply_to_module(nn.ReLU(), self.plan(program_of("mobilenet"), deepened={"b": 1}))
