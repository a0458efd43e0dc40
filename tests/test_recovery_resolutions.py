"""Resolution-adaptive training: the schedule of the source, sizes that a network takes, and one set of weights."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from test_recovery import Stop, network, normal, samples
from test_recovery_sizes import Net, at, smooth
from torch import nn

import sartor
from sartor.cost_models.static import static_cost
from sartor.cost_models.training import adaptive_share, epoch_resolutions, resolution_at
from sartor.errors import UsageError
from sartor.recovery import RecoveryOptions, distill
from sartor.recovery.resolutions import Resolutions, total_stride
from sartor.recovery.view import View

TABLES = json.loads((Path(__file__).parent / "fixtures" / "thesis_tables.json").read_text())["tables"]


def of_sizes(program, start=0.5):
    full = View(program, program)
    return Resolutions(program, program, full.gm, full, start)


@pytest.fixture(scope="module")
def net():
    return sartor.capture(Net().eval(), (torch.zeros(1, 3, 16, 16),))


def data_for(program, count=64, labels=False):
    (name,) = program.input_shapes
    x = smooth(count, program.input_shapes[name][2], 1)
    return [({name: x[i : i + 16]}, np.arange(16) % 6 if labels else None) for i in range(0, count, 16)]


# ---- the schedule ------------------------------------------------------------------------------
def test_equations_5_15_and_5_16_by_hand():
    """½ (cos((f + 1) π) + 1) is 0, 0.1464, 0.5, 0.8536 and 1 at quarters."""
    quarters = np.array([0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(resolution_at(quarters, 32), [16, 18.3431, 24, 29.6569, 32], atol=1e-4)
    np.testing.assert_allclose(
        resolution_at(quarters, 224, 0.75), [168, 176.2010, 196, 215.7990, 224], atol=1e-4
    )
    assert epoch_resolutions(32, 4).tolist() == [16, 18, 24, 30]


def test_shares_of_tables_5_6_and_5_11():
    """Table 5.6 (ResNet110 on CIFAR-10): 159.08 M in training, 89.77 M at inference; 5.11 has both for RAT alone."""
    assert adaptive_share(32, 200) == pytest.approx(159.08 / (3 * 89.77), rel=3e-3)
    (table,) = [t for t in TABLES if t["table"] == "5.11"]
    macs = {(model, method): value for model, method, value, *_ in table["rows"]}
    for model in ("AlexNet", "ResNet110", "DenseNet40"):
        assert adaptive_share(32, 200) == pytest.approx(
            macs[model, "RAT"] / macs[model, "Baseline"], rel=3e-3
        )
    floor = np.floor(resolution_at(np.arange(200) / 200, 32)).astype(float)
    assert np.mean(floor**2) / 32**2 != pytest.approx(159.08 / (3 * 89.77), rel=3e-3)


# ---- sizes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pixels", "sizes"), [(16, [8, 10, 12, 14, 16]), (17, [9, 11, 13, 15, 17])])
def test_sizes_keep_their_remainder_by_the_stride(net, pixels, sizes):
    found = of_sizes(at(net, 1, 3, pixels, pixels))
    assert found.reason == "" and list(found.views) == sizes


def test_total_stride():
    assert total_stride(models.captured("resnet")) == 2
    program = sartor.capture(
        nn.Sequential(nn.Conv2d(3, 4, 11, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2)), (torch.zeros(1, 3, 64, 64),)
    )
    assert total_stride(program) == 8  # 64 over 6 is 10.7
    assert total_stride(sartor.capture(nn.Conv2d(3, 4, 3, padding=1), (torch.zeros(1, 3, 9, 9),))) == 1


def test_images_that_are_not_square_and_their_share():
    program = sartor.capture(nn.Conv2d(3, 4, 4, 4), (torch.zeros(1, 3, 32, 48),))
    found = of_sizes(program)
    assert list(found.views) == [16, 20, 24, 28, 32]
    (name,) = program.input_shapes
    assert [found._shapes(size)[name] for size in (16, 20)] == [(1, 3, 16, 24), (1, 3, 20, 32)]
    found.view(0.0), found.view(1.0)
    assert found.share() == pytest.approx((16 * 24 + 32 * 48) / 2 / (32 * 48))


def test_a_view_is_the_program_at_that_size_with_the_same_weights(net):
    found = of_sizes(net)
    full, small = found.views[16].gm, found.views[8]
    x = torch.from_numpy(smooth(4, 16, 1))
    expected = View(at(net, 1, 3, 8, 8), net)
    (name,) = (value.name for value in net.graph.outputs)
    torch.testing.assert_close(small([x])[name], expected([x])[name])
    assert dict(small.gm.named_parameters()).keys() == dict(full.named_parameters()).keys()
    for key, parameter in full.named_parameters():
        assert small.gm.get_parameter(key) is parameter
    assert small.gm.get_buffer("norm.running_mean") is full.get_buffer("norm.running_mean")


# ---- training ----------------------------------------------------------------------------------
def test_sizes_follow_the_schedule_and_cost_what_they_say(net):
    """Ten steps at fractions 0 to 0.9, of 16 and with multiples of 2: by hand."""
    options = RecoveryOptions(max_steps=10, rat=0.5, learning_rate=1e-2)
    result = distill(at(net, 1, 3, 16, 16), net, data_for(net), minutes=1, seed=0, options=options)
    grid = total_stride(net)
    wanted = [8, 8.1958, 8.7639, 9.6489, 10.7639, 12.0, 13.2361, 14.3511, 15.2361, 15.8042]
    nearest = [round((16 - r) / grid) for r in wanted]
    sizes = {16 - i * grid: nearest.count(i) for i in sorted(set(nearest), reverse=True)}
    assert result.sizes == sizes
    share = sum(n * size**2 for size, n in sizes.items()) / 10 / 16**2
    assert result.training_macs == round(3 * static_cost(net).macs * share)
    assert (
        result.notes[-1].startswith("images of size 8 (") and f"{share:.0%} of the multi" in result.notes[-1]
    )
    assert min(e["distance"] for e in result.history) <= result.history[0]["distance"]


def test_the_first_step_is_one_at_the_first_size(net):
    data = data_for(net, labels=True)
    found = []
    for program, rat in ((net, 0.5), (at(net, 1, 3, 8, 8), None)):
        options = RecoveryOptions(max_steps=1, rat=rat, teacher="never", learning_rate=0.05)
        scores = iter([0.0, 0.0, 1.0, 0.0, 0.0])
        result = distill(
            program, net, data, minutes=1, seed=0, options=options, evaluate=lambda p, s=scores: next(s)
        )
        assert result.history[-2]["kept"] and result.history[-2]["phase"] == "training"
        found.append(result.program)
    # Statistics are re-estimated at the full size before, which training does not look at.
    for name in net.initializers:
        if "weight" in name or "bias" in name:
            one, other = (program.initializer_array(name) for program in found)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
            assert not np.allclose(one, net.initializer_array(name), atol=1e-3)


def test_it_learns_and_repeats_and_resumes(net, tmp_path):
    student = net.clone()
    rng = np.random.default_rng(0)
    from sartor.passes.rewriter import Rewriter

    for name in ("first.weight", "second.weight"):
        old = student.initializer_array(name)
        Rewriter(student, "test").set_initializer(
            name, (old + 0.2 * rng.standard_normal(old.shape)).astype(np.float32)
        )
    student.invalidate()

    def run(folder=None, stop_after=None):
        calls = []

        def evaluate(predict):
            calls.append(1)
            if stop_after is not None and len(calls) > stop_after:
                raise Stop
            return 0.0

        options = RecoveryOptions(max_steps=40, rat=0.5, learning_rate=1e-2)
        return distill(
            student,
            net,
            data_for(net),
            minutes=1,
            seed=0,
            evaluate=evaluate,
            checkpoint_dir=folder,
            options=options,
        )

    whole = run()
    assert min(e["distance"] for e in whole.history) < 0.6 * whole.history[0]["distance"]
    assert sum(whole.sizes.values()) == 40
    with pytest.raises(Stop):
        run(tmp_path, 4)
    resumed = run(tmp_path)
    assert resumed.program.to_bytes() == whole.program.to_bytes()
    assert (resumed.sizes, resumed.notes) == (whole.sizes, whole.notes)


def test_the_full_size_throughout_is_no_change(net):
    found = [
        distill(net, net, data_for(net), minutes=1, seed=0, options=RecoveryOptions(max_steps=3, rat=rat))
        for rat in (None, 1.0)
    ]
    assert found[0].program.to_bytes() == found[1].program.to_bytes() and found[1].sizes == {}


# ---- where it does not apply -------------------------------------------------------------------
class Positions(nn.Module):
    """Tokens with a learned table of positions."""

    def __init__(self):
        super().__init__()
        self.patches, self.table, self.head = (
            nn.Conv2d(3, 8, 2, 2),
            nn.Parameter(torch.randn(1, 8, 4, 4)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.head((self.patches(x) + self.table).mean((2, 3)))


class Fixed(nn.Module):
    """Weights that fix the input size."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("module", "shape", "says"),
    [
        (Positions(), (1, 3, 8, 8), "cannot be trained as one"),
        (Fixed(), (1, 3, 8, 8), "The input cannot have another size"),
        (nn.Sequential(nn.Linear(4, 3)), (1, 4), "no input is an image"),
    ],
)
def test_what_has_no_other_size_is_trained_at_its_own_and_says_so(module, shape, says):
    program = sartor.capture(module.eval(), (torch.zeros(shape),))
    (name,) = program.input_shapes
    lines = []
    result = distill(
        program,
        program,
        [({name: normal(16, *shape[1:])}, None)],
        minutes=1,
        seed=0,
        options=RecoveryOptions(max_steps=2, rat=0.5),
        progress=lambda fraction, text: lines.append(text),
    )
    assert result.steps == 2 and result.sizes == {} and result.training_macs is None
    (note,) = result.notes
    assert note.startswith("resolution-adaptive training does not apply: ") and says in note
    assert lines[0] == note, "it is said before anything is trained"


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_are_checked(share):
    with pytest.raises(UsageError, match="'rat' is"):
        RecoveryOptions(rat=share)


def test_small_maps(monkeypatch):
    """A network of 6 x 6 images begins with 3 x 3."""
    result = distill(
        network(noise=0.3),
        network(),
        samples(),
        minutes=1,
        seed=0,
        options=RecoveryOptions(max_steps=8, rat=0.5),
    )
    assert min(result.sizes) == 3 and max(result.sizes) == 6
