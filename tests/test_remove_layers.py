"""Layers of chains go, by hand-made comparison with the module that never had them."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from builders import random_inputs
from torch import nn

import sartor
from sartor.cli import main
from sartor.errors import PlanError, UsageError
from sartor.ir.fx import run_twin
from sartor.ir.layers import chain_layers
from sartor.ir.plan import Plan
from sartor.passes.base import Context
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.remove_layers import RemoveLayers


def unit(i, o, **more):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **more), nn.BatchNorm2d(o), nn.ReLU())


class Chain(nn.Module):
    """Two layers of the same shape, one that widens, one with a stride, a residual block and a Linear."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList([unit(3, 6), unit(6, 6), unit(6, 8), unit(8, 8, stride=2), unit(8, 8)])
        self.block, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x, without=()):
        for index, layer in enumerate(self.units):
            x = x if index in without else layer(x)
        return self.head((x + self.block(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    module = models.seeded(Chain())
    return module, sartor.capture(module, models.example(1, 3, 12, 12))


def outputs(program):
    return next(iter(run_twin(program, random_inputs(program), dtype="float64").values()))


def test_layers_that_are_found(chain):
    found = chain_layers(chain[1])
    assert [layer.removable for layer in found] == [False, True, False, False, True, False]
    assert [len(layer.nodes) for layer in found] == [3, 3, 3, 3, 3, 1]
    assert found[0].reason == "it makes shape [1, 6, 12, 12] of [1, 3, 12, 12]"


def test_dropped_layers_are_as_if_they_never_were(chain):
    module, program = chain
    names = [layer.name for layer in chain_layers(program)]
    result = RemoveLayers(layers=(names[1], names[4])).run(program)
    x = torch.from_numpy(next(iter(random_inputs(program).values()))).double()
    with torch.no_grad():
        want = module.double()(x, without=(1, 4)).numpy()
    module.float()
    np.testing.assert_allclose(outputs(result.program), want, rtol=1e-6)
    assert result.counts["layers_removed"] == 2 and result.plan.layers == {names[1]: "drop", names[4]: "drop"}
    left = {name.split(".")[1] for name in result.program.initializers if name.startswith("units.")}
    assert left == {"0", "2", "3"}


def test_connecting_convolution_has_the_sums_of_the_taps(chain):
    """By hand: the module with 1 x 1 kernels that are the sums."""
    module, program = chain
    names = [layer.name for layer in chain_layers(program)]
    result = RemoveLayers(layers=(names[2], names[3]), connect=True).run(program)
    other = Chain()
    other.load_state_dict(module.state_dict())
    for index in (2, 3):
        old = other.units[index][0]
        new = nn.Conv2d(old.in_channels, old.out_channels, 1, stride=old.stride)
        new.weight.data, new.bias.data = old.weight.data.sum((2, 3), keepdim=True), old.bias.data
        other.units[index][0] = new
    x = torch.from_numpy(next(iter(random_inputs(program).values()))).double()
    with torch.no_grad():
        want = other.eval().double()(x).numpy()
    np.testing.assert_allclose(outputs(result.program), want, rtol=1e-5)
    assert set(result.plan.layers.values()) == {"connect"}


def test_the_least_important_goes(chain):
    _, program = chain
    names = [layer.name for layer in chain_layers(program)]
    clone = program.clone()
    from sartor.passes.rewriter import Rewriter

    rewriter = Rewriter(clone, "test")
    rewriter.derive_initializer("units.4.0.weight", lambda array: array * np.float32(1e-3))
    clone.invalidate()
    assert list(RemoveLayers(count=1, criterion="l2").run(clone).plan.layers) == [names[4]]
    rewriter.derive_initializer("units.1.0.weight", lambda array: array * np.float32(1e-4))
    assert list(RemoveLayers(count=1, criterion="l2").run(clone).plan.layers) == [names[1]]
    refused = RemoveLayers(count=3, criterion="l2").run(clone).refusals
    assert any("3 layers are to be removed, but only 2 can be" in one.reason for one in refused)


def test_kept_layers_stay(chain):
    _, program = chain
    result = RemoveLayers(count=2).run(program, Context(keep=("units.1.*", "units.4.1.weight")))
    assert not result.modified
    assert sum("is kept" in one.reason for one in result.refusals) == 2


def test_refusals(chain):
    _, program = chain
    names = [layer.name for layer in chain_layers(program)]
    result = RemoveLayers(layers=("*",)).run(program)
    assert len(result.plan.layers) == 2 and len(result.refusals) == 4
    result = RemoveLayers(layers=(names[5],), connect=True).run(program)
    assert not result.modified and "it is no convolution" in result.refusals[0].reason
    with pytest.raises(UsageError, match="matches 'nothing'"):
        RemoveLayers(layers=("nothing",)).run(program)


def test_bad_plans(chain):
    _, program = chain
    names = [layer.name for layer in chain_layers(program)]
    plan = Plan(program.source.sha256, layers={names[0]: "drop"})
    with pytest.raises(PlanError, match="cannot be: it makes shape"):
        apply_plan(program, plan)
    with pytest.raises(PlanError, match="does not have outside blocks"):
        apply_plan(program, Plan(program.source.sha256, layers={"no": "drop"}))
    with pytest.raises(PlanError, match=r"no MASKED form\. Leave its section 'layers' away"):
        masked(program, plan)
    with pytest.raises(PlanError, match="'drop' or 'connect'"):
        Plan.from_json(plan.to_json().replace('"drop"', '"cut"'))


def test_from_the_command_line(chain, tmp_path, capsys):
    _, program = chain
    model, out, plan = tmp_path / "m.onnx", tmp_path / "o.onnx", tmp_path / "p.json"
    program.save(model)
    text = ["run", str(model), "--passes", "remove-layers{count=2}", "-o", str(out), "--plan-out", str(plan)]
    assert main(text) == 0
    again = tmp_path / "again.onnx"
    assert main(["apply", str(model), str(plan), "-o", str(again), "--json"]) == 0
    assert again.read_bytes() == out.read_bytes()
    assert '"layers": {"node_conv2d_1": "drop"' in capsys.readouterr().out
