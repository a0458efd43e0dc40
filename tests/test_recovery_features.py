"""Attention maps: by hand, whatever the widths and sizes, and what they add to a recovery."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest
import torch
from test_recovery import Stop, network, normal, steps
from test_recovery_sizes import at
from torch import nn

import sartor
from sartor.errors import UsageError
from sartor.ir.fx import to_fx
from sartor.passes.pipeline import Pipeline
from sartor.recovery import RecoveryOptions, distill
from sartor.recovery.features import attention_loss, attention_map, attention_points
from sartor.recovery.student import Student
from sartor.recovery.view import View, share_weights


def cut(program, text):
    return Pipeline.parse(text).run(program).program


def data_for(program, count=32, seed=0):
    (name,) = program.input_shapes
    x = normal(count, *program.input_shapes[name][1:], seed=seed)
    return [({name: x[i : i + 16]}, None) for i in range(0, count, 16)]


# ---- maps --------------------------------------------------------------------------------------
def test_map_and_loss_by_hand():
    """Two channels, two positions: 3² + 4² and 0; then 1² + 0² and 0² + 2²."""
    value = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]], [[[1.0, 0.0]], [[0.0, 2.0]]]])
    found = attention_map(value, 1)
    want = [[[1.0, 0.0]], [[1 / math.sqrt(17), 4 / math.sqrt(17)]]]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(attention_map(value.movedim(1, 3), 3).numpy(), want, rtol=1e-6)
    other = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    first = 1.0 + 1.0
    second = (1 / math.sqrt(17) - 1) ** 2 + 16 / 17
    assert float(attention_loss({"a": found}, {"a": other})) == pytest.approx((first + second) / 2, rel=1e-6)
    two = attention_loss({"a": found, "b": other}, {"a": other, "b": other})
    assert float(two) == pytest.approx((first + second) / 4, rel=1e-6)


def test_maps_of_two_sizes_compare_at_the_smaller_one():
    small = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]) / 5
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert float(attention_loss({"a": small}, {"a": large})) < 0.05
    assert float(attention_loss({"a": large}, {"a": small})) < 0.05
    assert float(attention_loss({"a": small.flip(1)}, {"a": large})) > 1.0


def test_a_map_of_zeros_has_a_gradient():
    value = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss({"a": attention_map(value, 1)}, {"a": attention_map(torch.ones(2, 3, 4, 4), 1)}).backward()
    assert torch.isfinite(value.grad).all()


# ---- where -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "axis", "count"), [("resnet", 1, 2), ("vit", 2, 2)])
def test_points_are_blocks_of_any_width(name, axis, count):
    original = models.captured(name)
    student = cut(original, "prune-channels{ratio=0.5,criterion=l1}")
    points = attention_points(student, original)
    assert len(points) >= count and set(points.values()) == {axis}
    views = [View(program, original, points) for program in (student, original)]
    (shape,) = original.input_shapes.values()
    x = torch.from_numpy(normal(3, *shape[1:]))
    maps = [{key: view([x])[key] for key in points} for view in views]
    for key in points:
        assert maps[0][key].shape == maps[1][key].shape and maps[0][key].shape[0] == 3
        np.testing.assert_allclose(maps[1][key].flatten(1).norm(dim=1).detach().numpy(), 1.0, rtol=1e-5)
        assert (student.shapes()[key] != original.shapes()[key]) == (name == "resnet")


class Last(nn.Module):
    """Maps [N, H, W, C]."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.up(self.norm(x)).mean((1, 2))


class Line(nn.Module):
    """Signals [N, C, L]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 2, 3)

    def forward(self, x):
        return self.second(x + self.first(x)).mean(2)


@pytest.mark.parametrize(("module", "shape", "axis"), [(Last(), (1, 5, 6, 4), 3), (Line(), (1, 4, 9), 1)])
def test_channels_are_where_readers_have_them(module, shape, axis):
    program = sartor.capture(module.eval(), (torch.zeros(shape),))
    assert list(attention_points(program, program).values()) == [axis]


def test_removed_blocks_are_left_out_and_chains_have_a_point_per_size():
    original = models.captured("resnet")
    student = cut(original, "remove-blocks{count=1}")
    assert set(attention_points(student, original)) < set(attention_points(original, original))
    chain = models.captured("vgg")
    points = attention_points(chain, chain)
    sizes = [chain.shapes()[name][2:] for name in points]
    assert len(sizes) == len(set(sizes)) > 1


# ---- training ----------------------------------------------------------------------------------
class Blocks(nn.Module):
    """Two residual blocks, and a head that sees next to nothing of where things are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(torch.relu(x))
        x = x + self.second(torch.relu(x))
        return self.head(x.mean((2, 3)))


def apart(program, original, data):
    """Distance of attention maps on the data."""
    points = attention_points(program, original)
    views = [View(each, original, points) for each in (program, original)]
    total = 0.0
    for inputs, _ in data:
        x = [torch.from_numpy(array) for array in inputs.values()]
        with torch.no_grad():
            ours, theirs = ({k: view(x)[k] for k in points} for view in views)
        total += float(attention_loss(ours, theirs))
    return total / len(data)


def test_features_bring_maps_closer():
    original = sartor.capture(Blocks().eval(), (torch.zeros(1, 3, 8, 8),))
    student = cut(original, "prune-channels{ratio=0.5,criterion=l1}")
    data = data_for(original, 64)
    found = {}
    for weight in (0.0, 10.0):
        options = steps(80, learning_rate=1e-2, features=weight)
        result = distill(student, original, data, minutes=1, seed=0, options=options)
        assert result.notes == ()
        found[weight] = apart(result.program, original, data)
    assert found[10.0] < 0.5 * found[0.0]
    assert found[10.0] < 0.5 * apart(student, original, data)


def test_features_of_a_smaller_size_and_of_misclassified_samples():
    original = sartor.capture(Blocks().eval(), (torch.zeros(1, 3, 8, 8),))
    data = [(inputs, np.arange(16) % 3) for inputs, _ in data_for(original)]
    options = RecoveryOptions(teacher="wrong", features=1.0, max_steps=3)
    result = distill(at(original, 1, 3, 4, 4), original, data, minutes=1, seed=0, options=options)
    assert result.steps == 3 and 0 < result.asked < 32


def test_no_maps_in_common_is_a_note():
    program = sartor.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.zeros(1, 4),))
    result = distill(program, program, data_for(program), minutes=1, seed=0, options=steps(2, features=1.0))
    assert result.notes == ("features were not compared: the programs have no maps in common",)


def test_a_loss_of_ones_own_sees_outputs_only():
    original = sartor.capture(Blocks().eval(), (torch.zeros(1, 3, 8, 8),))
    seen = set()

    def own(outputs, labels):
        seen.update(outputs)
        return next(iter(outputs.values())).square().mean()

    distill(
        original, original, data_for(original), minutes=1, seed=0, loss=own, options=steps(2, features=1.0)
    )
    assert seen == {value.name for value in original.graph.outputs}


def test_resuming_with_features_equals_an_uninterrupted_run(tmp_path):
    original = sartor.capture(Blocks().eval(), (torch.zeros(1, 3, 8, 8),))
    student = cut(original, "prune-channels{ratio=0.5,criterion=l1}")

    def run(folder, stop_after=None):
        calls = []

        def evaluate(predict):
            calls.append(1)
            if stop_after is not None and len(calls) > stop_after:
                raise Stop
            return 0.0

        options = steps(20, learning_rate=1e-2, features=2.0)
        data = data_for(original)
        result = distill(
            student,
            original,
            data,
            minutes=1,
            seed=0,
            evaluate=evaluate,
            checkpoint_dir=folder,
            options=options,
        )
        return result.program.to_bytes()

    whole = run(None)
    with pytest.raises(Stop):
        run(tmp_path, 3)
    assert run(tmp_path) == whole


def test_views_share_weights_and_statistics():
    student = Student(network(), network(), RecoveryOptions(), {"r": 1})
    x = torch.from_numpy(normal(8, 3, 6, 6))
    before = student.gm.get_buffer("bn.running_mean").clone()
    assert set(student.learn([x], 0.0, frozen=False)) == {"y", "r"}
    assert not torch.equal(student.gm.get_buffer("bn.running_mean"), before)
    with torch.no_grad():
        student.gm.get_parameter("head.weight").mul_(2.0)
    student.gm.eval()
    torch.testing.assert_close(student.learn([x], 0.0, frozen=True)["y"], student.view([x])["y"])


def test_weights_of_another_shape_are_not_shared():
    wide, narrow = (
        models.captured("vgg"),
        cut(models.captured("vgg"), "prune-channels{ratio=0.5,criterion=l1}"),
    )
    with pytest.raises(UsageError, match="they cannot be trained as one"):
        share_weights(to_fx(wide), to_fx(narrow))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": -1.0}, "'features' is -1.0; it must be at least 0"),
        ({"features": float("nan")}, "'features' is nan"),
        ({"features": 1.0, "teacher": "never"}, "which teacher 'never' does not ask"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(UsageError, match=says):
        RecoveryOptions(**options)
