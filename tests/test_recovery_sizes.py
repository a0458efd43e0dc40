"""Recovery of a program at another input size: the data stay at the original's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from builders import node, program_from_nodes
from test_recovery import AXIS, CLASSES, network, normal, steps
from torch import nn

import sartor
from sartor.errors import UsageError
from sartor.images import resized
from sartor.ir.fx import to_fx
from sartor.ir.plan import Plan
from sartor.ir.program import Batch
from sartor.passes.prune import apply_plan
from sartor.recovery import distill, losses, predictor
from sartor.recovery.sizes import Sizes

SMALL = (1, 3, 4, 4)


def at(program, *shape):
    (name,) = program.input_shapes
    return apply_plan(program, Plan(program.source.sha256, sizes={name: shape}))


def data(count=64, pixels=6, batch=16):
    x = normal(count, 3, pixels, pixels, seed=9)
    return [({"x": x[i : i + batch]}, None) for i in range(0, count, batch)]


class Net(nn.Module):
    """What it says depends on edges, which look different at half the size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 12, 3, 2, padding=1), nn.Linear(12, 6)
        with torch.no_grad():
            self.first.weight *= 3
            self.second.weight *= 3
            self.head.weight *= 8
            self.norm.running_var.uniform_(0.5, 1.5)
            self.head.bias -= self.eval()(torch.from_numpy(smooth(256, 16, 1))).mean(0)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def smooth(count, pixels, seed):
    """Images with structure at several scales."""
    coarse = torch.from_numpy(normal(count, 3, pixels // 4, pixels // 4, seed=seed))
    fine = torch.from_numpy(normal(count, 3, pixels, pixels, seed=seed + 1))
    large = nn.functional.interpolate(coarse, size=(pixels, pixels), mode="bilinear")
    return (large + 0.3 * fine).numpy()


def test_a_plan_that_only_changes_the_size_is_recovered():
    original = sartor.capture(Net().eval(), (torch.zeros(1, 3, 16, 16),))
    (name,) = original.input_shapes
    student = at(original, 1, 3, 8, 8)
    x, unseen = smooth(128, 16, 1), smooth(256, 16, 5)
    train = [({name: x[i : i + 32]}, None) for i in range(0, 128, 32)]
    want = next(iter(predictor(original)({name: unseen}).values())).argmax(1)

    def agreement(predict):
        (found,) = predict({name: unseen}).values()  # at the original's size
        return float((found.argmax(1) == want).mean())

    options = steps(120, learning_rate=1e-2)
    result = distill(student, original, train, minutes=1, seed=0, options=options, evaluate=agreement)
    scores = [entry["score"] for entry in result.history]
    assert max(scores) > scores[0] + 0.1
    assert min(entry["distance"] for entry in result.history) < 0.6 * result.history[0]["distance"]
    assert result.program.input_shapes == student.input_shapes
    by_hand = agreement(lambda arrays: predictor(result.program)({name: resized(arrays[name], (1, 3, 8, 8))}))
    assert by_hand == pytest.approx(max(scores))


def test_the_first_distance_and_the_statistics_are_those_by_hand():
    original = network()
    student = at(network(noise=0.3), *SMALL)
    result = distill(student, original, data(), minutes=1, seed=0, options=steps(1))
    x = np.concatenate([inputs["x"] for inputs, _ in data()])
    small = torch.from_numpy(resized(x, SMALL))
    ours, theirs = to_fx(student), to_fx(original)
    want = losses.distillation_loss({"y": ours(small)[0]}, {"y": theirs(torch.from_numpy(x))[0]}, 2.0)
    assert result.history[0]["distance"] == pytest.approx(float(want.detach()), rel=1e-4)
    kept = [entry["phase"] for entry in result.history if entry["kept"]]
    assert "statistics" in kept  # so the means below are re-estimated ones
    convolved = nn.functional.conv2d(
        small, torch.from_numpy(student.initializer_array("conv.weight").copy()), padding=1
    )
    again = distill(student, original, data(), minutes=1, seed=0, options=steps(1, learning_rate=1e-9))
    np.testing.assert_allclose(
        again.program.initializer_array("bn.running_mean"),
        convolved.mean((0, 2, 3)).numpy(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_data_at_the_programs_size_are_refused():
    with pytest.raises(UsageError, match=r"shape \[16, 3, 4, 4\], but the original takes \['N', 3, 6, 6\]"):
        distill(at(network(), *SMALL), network(), data(pixels=4), minutes=1, seed=0)


def dense(pixels, *, softmax=False):
    nodes = [node("Conv", ["x", "w"], ["s" if softmax else "y"], pads=[1, 1, 1, 1], strides=[2, 2])]
    if softmax:
        nodes.append(node("Softmax", ["s"], ["y"], axis=1))
    return program_from_nodes(nodes, {"x": ["N", 3, pixels, pixels]}, ["y"], {"w": normal(CLASSES, 3, 3, 3)})


def test_maps_are_compared_at_the_originals_size():
    original, student = dense(16), dense(8)
    x = smooth(32, 16, 1)
    maps = predictor(original)({"x": x})["y"].argmax(1)
    batches = [({"x": x[i : i + 16]}, maps[i : i + 16]) for i in (0, 16)]
    found = []

    def evaluate(predict):
        output = predict({"x": x})["y"]
        assert output.shape == (32, CLASSES, 8, 8)
        found.append(float((output.argmax(1) == maps).mean()))
        return found[-1]

    result = distill(
        student,
        original,
        batches,
        minutes=1,
        seed=0,
        evaluate=evaluate,
        options=steps(60, learning_rate=1e-2),
    )
    assert result.notes == () and max(found) > found[0]
    assert min(e["distance"] for e in result.history) < 0.9 * result.history[0]["distance"]


def test_no_resizing_at_the_same_size_whatever_the_batch():
    original, same = network(), network()
    same.input_shapes = {"x": (8, 3, 6, 6)}
    same.invalidate()
    assert Sizes.between(same, original) == Sizes()
    inputs = [torch.zeros(2, 3, 9, 9)]  # a network that takes any size is trained on any size
    assert Sizes.between(same, original).given(["x"], inputs)[0] is inputs[0]


def of_inputs(shape, kind=onnx.TensorProto.FLOAT):
    nodes = [node("Relu", ["x"], ["y"])] if kind == onnx.TensorProto.FLOAT else [node("Abs", ["x"], ["y"])]
    return program_from_nodes(nodes, {"x": shape}, ["y"], dtype=kind)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (of_inputs(["N", 3, 16]), of_inputs(["N", 3, 4, 4]), "only images of the same rank"),
        (of_inputs(["N", 8]), of_inputs(["N", 16]), "only images of the same rank"),
        (
            of_inputs(["N", 8, 2], onnx.TensorProto.INT64),
            of_inputs(["N", 9, 2], onnx.TensorProto.INT64),
            "only images of the same rank",
        ),
        (of_inputs(["N", 3, 4]), of_inputs(["N", 3, 8]), r"only maps \[N, C, H, W\]"),
    ],
)
def test_what_cannot_be_resized_is_refused_before_anything_runs(ours, theirs, says):
    assert theirs.batch == AXIS == Batch(True, ("x",))
    batches = [({"x": np.zeros((4, *theirs.input_shapes["x"][1:]), np.float32)}, None)]
    with pytest.raises(UsageError, match=says):
        distill(ours, theirs, batches, minutes=1, seed=0)
