"""Masks of filters: the same function while they are open, the plan's function when some are shut, and they learn."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from builders import random_inputs
from torch import nn

import sartor
from sartor.backends.protocol import TargetOptions
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin, to_fx
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.torch_ops.dialect import filter_mask
from sartor.passes.base import Context
from sartor.passes.insert_masks import SUFFIX, HardenMasks, InsertMasks, masks_of
from sartor.passes.prune import apply_plan
from sartor.passes.rewriter import Rewriter
from sartor.recovery.distillation import RecoveryOptions, distill
from sartor.recovery.masks import kept_share, mask_parameters


def outputs(program):
    return next(iter(run_twin(program, random_inputs(program), dtype="float64").values()))


def shut(program, seed=0):
    """The program with masks, about half of them closed, and the plan that says the same."""
    masked = InsertMasks().run(program).program.clone()
    rewriter, generator = Rewriter(masked, "test"), np.random.default_rng(seed)
    groups = {}
    for name, values in masks_of(masked).items():
        values = generator.uniform(-1, 1, len(values)).astype(values.dtype)
        keep = channel_groups(program).group(name).keep_best(values, int((values >= 0).sum()))
        values[list(keep)] = np.abs(values[list(keep)])
        rewriter.set_initializer(name + SUFFIX, values)
        if len(keep) < len(values):
            groups[name] = GroupPlan(len(values), keep)
    masked.invalidate()
    return masked, Plan(program.source.sha256, groups)


@pytest.mark.parametrize("name", models.ALL)
def test_open_masks_change_nothing(name):
    program = models.captured(name)
    result = InsertMasks().run(program)
    np.testing.assert_allclose(outputs(result.program), outputs(program), rtol=1e-12)
    assert set(masks_of(result.program)) == {group.name for group in channel_groups(program).groups}
    back = HardenMasks().run(result.program).program
    assert set(back.initializers) == set(program.initializers) and not back.model.functions
    assert [node.op_type for node in back.nodes()] == [node.op_type for node in program.nodes()]


@pytest.mark.parametrize("name", models.ALL)
def test_shut_masks_are_the_plan(name):
    program = models.captured(name)
    masked, plan = shut(program)
    want = outputs(apply_plan(program, plan))
    scale = np.abs(want).max()
    np.testing.assert_allclose(outputs(masked), want, rtol=0, atol=1e-9 * scale)
    hard = HardenMasks().run(masked)
    np.testing.assert_allclose(outputs(hard.program), want, rtol=0, atol=1e-12 * scale)
    assert {k: v.keep for k, v in hard.plan.groups.items()} == {k: v.keep for k, v in plan.groups.items()}
    assert np.abs(want - outputs(program)).max() > 1e-3 * scale


def test_a_mask_on_the_wrong_axis_is_seen(monkeypatch):
    """Otherwise the comparison above would prove nothing."""
    from sartor.passes import insert_masks

    right = insert_masks._places

    def rolled(analysis, group):
        return [{**place, "index": np.roll(place["index"], 1).tolist()} for place in right(analysis, group)]

    monkeypatch.setattr(insert_masks, "_places", rolled)
    program = models.captured("resnet")
    masked, plan = shut(program)
    want = outputs(apply_plan(program, plan))
    assert np.abs(outputs(masked) - want).max() > 1e-3 * np.abs(want).max()


def test_gradient_is_that_of_the_sigmoid():
    """METHODS.md (3.4), (3.5): y = sum of w * b over open filters, loss = y; by hand at m = 0.2, -0.3 and 0."""
    mask = torch.tensor([0.2, -0.3, 0.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    kept = filter_mask(mask, torch.tensor([0, 1, 2, -1]))
    assert kept.tolist() == [1.0, 0.0, 1.0, 1.0]
    (kept * weight).sum().backward()
    by_hand = [2.0 * 0.5498339973 * 0.4501660027, 3.0 * 0.4255574832 * 0.5744425168, 5.0 * 0.25]
    np.testing.assert_allclose(mask.grad.numpy(), by_hand, rtol=1e-8)


def test_loss_is_the_share_of_units_that_stay():
    """METHODS.md (3.2): 2 of 3 and 1 of 2 are 3 of 5."""
    masks = [
        torch.tensor([0.1, -0.1, 2.0], requires_grad=True),
        torch.tensor([-1.0, 0.0], requires_grad=True),
    ]
    share = kept_share(masks)
    assert float(share.detach()) == pytest.approx(0.6)
    share.backward()
    assert float(masks[1].grad[1]) == pytest.approx(0.25 / 5)


class Net(nn.Module):
    """A target that half of the filters say nothing about."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)
        with torch.no_grad():
            self.second.weight[:, 4:] *= 1e-3
            self.head.weight *= 10

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def test_training_shuts_what_says_nothing():
    torch.manual_seed(0)
    program = sartor.capture(Net().eval(), models.example(1, 3, 8, 8))
    masked = InsertMasks().run(program).program
    generator = np.random.default_rng(0)
    data = [({"x": generator.standard_normal((16, 3, 8, 8)).astype(np.float32)}, None) for _ in range(4)]
    options = RecoveryOptions(max_steps=80, mask_weight=0.003)
    trained = distill(masked, program, data, minutes=5, seed=0, options=options).program
    first = masks_of(trained)["first"]
    assert (first[4:] < 0).all() and (first[:4] >= 0).sum() >= 2
    hard = HardenMasks().run(trained)
    assert hard.plan.groups["first"].keep == tuple(np.flatnonzero(first >= 0))
    np.testing.assert_allclose(outputs(hard.program), outputs(trained), rtol=1e-6)
    untouched = RecoveryOptions(max_steps=80, mask_weight=0.0)
    trained = distill(masked, program, data, minutes=5, seed=0, options=untouched).program
    assert all((values >= 0).all() for values in masks_of(trained).values())


def test_one_unit_stays():
    program = models.captured("vgg")
    masked = InsertMasks().run(program).program.clone()
    rewriter = Rewriter(masked, "test")
    (name, values), *_ = masks_of(masked).items()
    rewriter.set_initializer(name + SUFFIX, np.linspace(-2, -1, len(values)).astype(values.dtype))
    masked.invalidate()
    result = HardenMasks().run(masked)
    assert result.plan.groups[name].keep == (len(values) - 1,)
    assert "1 of the units that are off have to stay" in result.refusals[0].reason


def test_kept_groups_have_no_mask():
    program = models.captured("vgg")
    group = channel_groups(program).groups[0]
    kept = Context(keep=(group.members[0].initializer,))
    assert group.name not in masks_of(InsertMasks().run(program, kept).program)
    assert not HardenMasks().run(program).modified


def test_runtimes_run_masks(tmp_path):
    program = models.captured("resnet")
    masked, plan = shut(program)
    backend = sartor.backends.get("onnxruntime")
    options = TargetOptions(threads=1)
    found = []
    for name, one in (("masked", masked), ("plan", apply_plan(program, plan))):
        artifact = backend.lower(one, tmp_path / name, options)
        session = backend.load(artifact, options)
        found.append(next(iter(session.run(random_inputs(program)).values())))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_masks_of_a_twin():
    twin = to_fx(InsertMasks(start=0.5).run(models.captured("vgg")).program)
    masks = mask_parameters(twin)
    assert len(masks) == len(channel_groups(models.captured("vgg")).groups)
    assert all(torch.equal(mask, torch.full_like(mask, 0.5)) for mask in masks)
