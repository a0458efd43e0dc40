"""Another input size, against the same module captured at that size."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import sartor
from sartor import oracle
from sartor.cli import main
from sartor.cost_models.static import static_cost
from sartor.errors import PlanError, UsageError
from sartor.ir.plan import Plan
from sartor.passes import positions, resolution
from sartor.passes.prune import apply_plan


def resized(program, pixels):
    """The program at another input size, by a plan that went through its JSON."""
    (name,) = program.input_shapes
    shape = (*program.input_shapes[name][:2], pixels, pixels)
    plan = Plan.from_json(Plan(program.source.sha256, sizes={name: shape}).to_json())
    return apply_plan(program, plan)


def lively(module, seed=0):
    """All parameters and buffers random, activations of order one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dtype.is_floating_point and "mask" not in name:
                scale = 1.0 / max(tensor[0].numel(), 1) ** 0.5 if tensor.ndim > 1 else 0.3
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if "var" in name else scale * torch.randn_like(tensor)
                )
    return module.eval()


def outputs(program, x):
    from sartor.ir.fx import run_twin

    (name,) = program.input_shapes
    return list(run_twin(program, {name: x}).values())


class Unet(nn.Module):
    """Two scales, joined once by the size of the other map and once by a factor."""

    def __init__(self, by_size):
        super().__init__()
        self.by_size = by_size
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.low, self.norm = nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(14, 4, 1)

    def forward(self, x):
        high = torch.relu(self.first(x))
        low = self.norm(self.low(torch.relu(self.down(high))))
        size = {"size": high.shape[-2:]} if self.by_size else {"scale_factor": 2.0}
        return self.last(torch.cat([high, nn.functional.interpolate(low, mode="nearest", **size)], 1))


class Windows(nn.Module):
    """Attention inside windows of 4 x 4, as Swin partitions and joins them."""

    def __init__(self, shifted=False):
        super().__init__()
        self.embed, self.shifted = nn.Conv2d(3, 8, 2, stride=2), shifted
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.randn(2, 16, 16))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        n, h, w, c = x.shape
        if self.shifted:
            x = torch.roll(x, (-1, -1), (1, 2))
        y = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-1, -2) * 0.5 + self.bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        y = self.out(y).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.head((x + y).mean((1, 2)))


def published(name):
    import zoo_models

    torchvision = zoo_models.import_torchvision()
    return torchvision.models.get_model(name, weights=None)


MODULES = {
    "unet by factor": (lambda: Unet(False), [(16, 24), (16, 12)]),
    "unet by size": (lambda: Unet(True), [(16, 24), (16, 12)]),
    "windows": (Windows, [(16, 24), (24, 16)]),
    "mobilenet_v3_small": (lambda: published("mobilenet_v3_small"), [(64, 63)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_module_captured_at_that_size(name):
    make, sizes = MODULES[name]
    module = lively(make())
    for now, then in sizes:
        program = sartor.capture(module, (torch.zeros(1, 3, now, now),))
        other = resized(program, then)
        x = np.random.default_rng(1).standard_normal((2, 3, then, then))
        expected = outputs(sartor.capture(module, (torch.zeros(1, 3, then, then),)), x)
        for mine, theirs in zip(outputs(other, x), expected, strict=True):
            assert mine.shape == theirs.shape
            assert np.abs(theirs).max() > 0
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())
        assert other.shapes() == resized(other, then).shapes()  # nothing is left to do


class Patches(nn.Module):
    """A transformer over patches with a class token and a table of positions."""

    def __init__(self, side):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 1 + side * side, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        return self.head(self.block(tokens)[:, 0])


def test_positions_are_interpolated_and_the_class_token_stays():
    module, other = lively(Patches(4)), lively(Patches(6))
    state = module.state_dict()
    table = state["positions"]
    grid = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    other.load_state_dict(
        {**state, "positions": torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, 8)], 1)}
    )
    program = resized(sartor.capture(module, (torch.zeros(1, 3, 16, 16),)), 24)
    x = np.random.default_rng(1).standard_normal((2, 3, 24, 24))
    with torch.no_grad():
        expected = other.double()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs(program, x)[0], expected, rtol=1e-6)


class Flattened(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 5))


class Corner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x)[:, :, 3:9, 2:7].sum((2, 3))


@pytest.mark.parametrize(
    ("make", "now", "then", "says"),
    [
        (Flattened, 16, 24, "weights for 1024 features, which would become 2304"),
        (Corner, 16, 24, "positions 3 to 9 out of 16"),
        (Windows, 16, 20, "4 does not divide 10"),
        (lambda: Windows(True), 16, 24, "positions"),
    ],
)
def test_what_has_no_other_size_is_refused_with_its_place(make, now, then, says):
    program = sartor.capture(make().eval(), (torch.zeros(1, 3, now, now),))
    before = program.to_bytes()
    with pytest.raises(PlanError, match=says) as caught:
        resized(program, then)
    assert " at " in str(caught.value)
    assert program.to_bytes() == before


def test_the_pass_rounds_to_what_divides_the_network():
    program = sartor.capture(lively(published("resnet18")), (torch.zeros(1, 3, 224, 224),))
    for options, pixels in (
        ("resolution=0.75", 160),
        ("resolution=0.75,grid=8", 168),
        ("resolution=1.2", 256),
    ):
        done = sartor.Pipeline.parse(f"rescale{{{options}}}", instruments=()).run(program).program
        assert list(done.input_shapes.values()) == [(1, 3, pixels, pixels)]
    plan = sartor.Pipeline.parse("rescale{resolution=1}", instruments=()).run(program)
    assert plan.program is program


def test_refusals_of_the_pass_are_reported_and_nothing_changes():
    program = sartor.capture(Flattened().eval(), (torch.zeros(1, 3, 16, 16),))
    (done,) = sartor.Pipeline.parse("rescale{resolution=0.5}", instruments=()).run(program).results
    assert not done.result.modified and "1024 features" in done.result.refusals[0].reason


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"nothing": (1, 3, 8, 8)}, "does not have"),
        ({"x": (2, 3, 8, 8)}, "batch"),
        ({"x": (1, 3, 8)}, "cannot have shape"),
    ],
)
def test_sizes_that_fit_no_input_are_refused(sizes, says):
    program = sartor.capture(Unet(False).eval(), (torch.zeros(1, 3, 16, 16),))
    with pytest.raises(PlanError, match=says):
        apply_plan(program, Plan(program.source.sha256, sizes=sizes))


def both(program, pixels):
    """A plan that narrows every group to half and gives another input size."""
    run = sartor.Pipeline.parse("prune-channels{ratio=0.5}", instruments=()).run(program)
    (name,) = program.input_shapes
    return dataclasses.replace(run.results[0].result.plan, sizes={name: (1, 3, pixels, pixels)})


def test_cuts_and_sizes_are_one_plan_that_is_proven_and_priced(tmp_path, capsys):
    program = sartor.capture(lively(Unet(False)), (torch.zeros(1, 3, 16, 16),))
    plan = both(program, 24)
    verdict = oracle.check(program, plan)
    assert verdict.verdict == "passed" and verdict.max_rel_error < 1e-12
    small = apply_plan(program, plan)
    program.save(tmp_path / "m.onnx")
    (tmp_path / "p.json").write_text(plan.to_json())
    loaded = sartor.load(tmp_path / "m.onnx")
    (tmp_path / "p.json").write_text(dataclasses.replace(plan, source_sha256=loaded.source.sha256).to_json())
    command = [
        "predict",
        tmp_path / "m.onnx",
        "--target",
        "raspberry-pi-4",
        "--plan",
        tmp_path / "p.json",
        "--json",
    ]
    assert main([str(word) for word in command]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["static"]["macs"] == static_cost(small).macs
    assert document["baseline"]["metrics"] != document["metrics"]


def test_a_planted_error_in_a_table_of_positions_is_seen(monkeypatch):
    """Rows of the table in the order of columns: right shapes, wrong numbers."""
    original = positions.resampled
    monkeypatch.setattr(
        resolution, "resampled", lambda array, axes: np.ascontiguousarray(original(array, axes)[:, ::-1])
    )
    with pytest.raises(AssertionError):
        test_positions_are_interpolated_and_the_class_token_stays()


def test_a_module_takes_its_size_with_its_inputs():
    module = Unet(False).eval()
    program = sartor.capture(module, (torch.zeros(1, 3, 16, 16),))
    with pytest.raises(UsageError, match="another input size"):
        sartor.apply_to_module(module, both(program, 24), (torch.zeros(1, 3, 16, 16),))


def test_plans_with_sizes_are_read_back_and_checked():
    plan = Plan("0" * 64, sizes={"x": (1, 3, 8, 8)})
    assert Plan.from_json(plan.to_json()) == plan
    for scale in ({"width": 2}, {"inputs": {"x": [1, 0]}}, {"inputs": {"x": [1.5]}}, {"inputs": 3}, 4):
        with pytest.raises(PlanError, match="malformed"):
            Plan.from_json(json.dumps({**json.loads(plan.to_json()), "scale": scale}))
