"""The data of the examples: digits on photographs, boxes, grades, splits that share nothing; and what trains on it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sartor.data import load_data
from sartor.errors import UsageError
from sartor.ir.capture import capture
from sartor.ir.program import Program

EXAMPLES = Path(__file__).parent.parent / "examples"
SPLITS = ("train", "evaluate", "test")


def imported(folder, name):
    """A file of an example under a name of its own: every example has its `data.py`."""
    path = EXAMPLES / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{folder}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    return imported("cluttered_digits", "data")


@pytest.fixture(scope="module")
def some(data):
    """By split: two hundred scenes, or those of the split's own."""
    return {
        "train": data.compose(np.arange(200), "train", np.random.default_rng(0)),
        "evaluate": data.scenes("evaluate"),
        "test": data.compose(np.arange(200), "test", np.random.default_rng(0)),
    }


def same(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))


# ---- scenes -------------------------------------------------------------------------------------------
def test_a_seed_decides_everything(data):
    rows = np.array([3, 3, 700])
    first, again, other = (data.compose(rows, "test", np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert same(first, again) and not np.array_equal(first.images, other.images)
    assert not np.array_equal(first.images[0], first.images[1]), "the same scan at another place"
    assert same(data.scenes("calibration"), data.scenes.__wrapped__("calibration"))


def test_train_is_drawn_anew_in_every_pass_and_the_same_for_everybody(data):
    ours, theirs = data.drawn(), data.drawn()
    passes = [next(iter(split)) for split in (ours, theirs, ours, theirs)]
    images, labels = ([batch[0]["image"] for batch in passes], [batch[1] for batch in passes])
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[2], images[3])
    assert not np.array_equal(images[0], images[2])
    assert np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], labels[2])
    assert next(iter(data.drawn(48)))[0]["image"].shape == (64, 3, 48, 48)


def test_every_scan_is_in_one_split(data):
    owned = {split: set(data.scenes(split).rows) for split in SPLITS}
    assert sorted(row for rows in owned.values() for row in rows) == list(range(1797))
    assert set(data.scenes("calibration").rows) < owned["train"]
    assert set(data.drawn().images) == owned["train"]


def test_no_pixel_of_a_photograph_is_in_two_splits(data):
    height, width = data.photographs().shape[2:]
    seen = {}
    for split in SPLITS:
        found = data.compose(np.arange(600), split, np.random.default_rng(1))
        seen[split] = np.zeros((2, height, width), bool)
        for photograph, top, left, *_ in found.places:
            seen[split][photograph, top : top + data.SIZE, left : left + data.SIZE] = True
    total = sum(shown.astype(int) for shown in seen.values())
    assert total.max() == 1 and all(shown[0].any() and shown[1].any() for shown in seen.values())


def test_labels_are_those_of_the_scans(data, some):
    _, labels = data.load_scans()
    for found in some.values():
        assert np.array_equal(found.labels, labels[found.rows]) and found.labels.dtype == np.int64


# ---- boxes --------------------------------------------------------------------------------------------
def test_a_box_holds_all_that_differs_from_the_photograph_and_little_else(data, some):
    for found in some.values():
        for image, (x0, y0, x1, y1), place in zip(found.images, found.boxes, found.places, strict=True):
            changed = (image != data.crop(place)).any(0)
            inside = np.zeros_like(changed)
            inside[y0:y1, x0:x1] = True
            assert not (changed & ~inside).any()
            ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            loose = max(ys[0] - y0, y1 - 1 - ys[-1], xs[0] - x0, x1 - 1 - xs[-1])
            assert loose <= max(x1 - x0, y1 - y0) / 4


def test_boxes_are_whole_pixels_within_the_picture(data, some):
    for found in some.values():
        x0, y0, x1, y1 = found.boxes.T
        assert found.boxes.dtype == np.int64 and found.boxes.min() >= 0 and found.boxes.max() <= data.SIZE
        sides = np.maximum(x1 - x0, y1 - y0)
        assert (np.minimum(x1 - x0, y1 - y0) > 0).all() and sides.max() <= data.SIDES[1]
        assert sides.min() >= data.SIDES[0] / 2 and sides.max() > 1.8 * sides.min()


@pytest.fixture
def grey(data, monkeypatch):
    """Photographs without anything in them, of luminance 0.4, and scans that are all pen."""
    monkeypatch.setattr(data, "photographs", lambda: np.full((2, 3, 427, 640), 102, np.uint8))
    monkeypatch.setattr(data, "load_scans", lambda: (np.full((9, 8, 8), data.INK), np.zeros(9, np.int64)))
    return data


def test_a_full_scan_on_grey_has_the_box_contrast_and_clutter_that_one_can_read_off(grey):
    found = grey.compose(np.arange(9), "test", np.random.default_rng(0))
    for image, (x0, y0, x1, y1), contrast in zip(found.images, found.boxes, found.contrast, strict=True):
        assert x1 - x0 == y1 - y0, "the whole square of the scan"
        pen = image[:, y0:y1, x0:x1]
        assert (pen == pen[:, :1, :1]).all()
        assert abs(pen[:, 0, 0] @ grey.LUMINANCE / 255 - 0.4) == pytest.approx(contrast, abs=0.004)
    assert found.clutter == pytest.approx(0, abs=1e-6)
    low, high = grey.CONTRASTS
    assert low - 0.1 < found.contrast.min() < found.contrast.max() < high + 0.1


# ---- grades -------------------------------------------------------------------------------------------
def test_what_is_larger_stronger_and_on_calmer_ground_is_easier(data):
    box = np.array([[10, 20, 30, 60]])

    def seen(contrast=0.3, clutter=0.1, box=box):
        return data.visibility(box, np.array([contrast]), np.array([clutter]))

    assert seen() == pytest.approx(40 / 96 * 0.3 / 0.15)
    assert seen(contrast=0.31) > seen() > seen(contrast=0.29)
    assert seen(clutter=0.09) > seen() > seen(clutter=0.11)
    assert seen(box=np.array([[10, 20, 30, 61]])) > seen() > seen(box=np.array([[10, 20, 30, 59]]))
    rising = np.linspace(0, 3, 400)
    grades = data.grades_of(rising)
    assert grades.dtype == np.int64 and set(grades) == {0, 1, 2} and (np.diff(grades) <= 0).all()
    assert list(data.grades_of(np.array(data.BOUNDS))) == [0, 1], "a bound belongs to the easier grade"


def test_grades_follow_from_what_a_scene_records(data, some):
    for found in some.values():
        expected = data.visibility(found.boxes, found.contrast, found.clutter)
        assert np.array_equal(found.visibility, expected)
        assert np.array_equal(found.grades, data.grades_of(expected))
        assert found.grades.min() >= 0 and found.grades.max() == len(data.GRADES) - 1


def test_clutter_is_what_the_photograph_has_around_the_digit(data, some):
    found = some["test"]
    for box, place, clutter in zip(found.boxes, found.places, found.clutter, strict=True):
        light = np.einsum("c,cyx->yx", data.LUMINANCE, data.crop(place) / 255)
        margin = max(box[2] - box[0], box[3] - box[1]) // 4
        x0, y0, x1, y1 = np.clip([*(box[:2] - margin), *(box[2:] + margin)], 0, data.SIZE)
        assert clutter == pytest.approx(light[y0:y1, x0:x1].std(), abs=1e-6)


def test_splits_are_equally_hard(data):
    shares = [
        np.bincount(data.scenes(split).grades, minlength=3) / len(data.scenes(split)) for split in SPLITS
    ]
    assert np.min(shares) > 0.2 and np.ptp(shares, axis=0).max() < 0.06


# ---- the contract -------------------------------------------------------------------------------------
def small_net(folder) -> tuple[torch.nn.Module, torch.Tensor]:
    model = imported(folder, "model")
    if folder == "digits":
        return model.DigitsNet(widths=(4, 4), depth=1), torch.zeros(1, 1, 32, 32)
    return model.ClutteredDigitsNet(widths=(4, 4), depths=(1, 1)), torch.zeros(1, 3, 96, 96)


@pytest.mark.parametrize(("folder", "counts"), [("digits", (250, 447)), ("cluttered_digits", (1000, 1788))])
def test_the_data_is_what_the_network_takes(folder, counts):
    model, example = small_net(folder)
    program: Program = capture(model.eval(), (example,))
    spec = f"{EXAMPLES / folder / 'data.py'}:{folder}"
    found = load_data(spec, list(program.input_shapes), program=program)
    for split, count in zip((found.evaluate, found.test, found.calibration), (*counts, 256), strict=True):
        batches = list(split)
        labels = np.concatenate([batch[1] for batch in batches])
        assert len(labels) == count and set(labels) == set(range(10))
        assert len(np.unique(np.bincount(labels) > count / 20)) == 1, "no class is rare"
        again = next(iter(split))
        assert all(
            np.array_equal(a, b) for a, b in zip(again[0].values(), batches[0][0].values(), strict=True)
        )
    images, _ = found.train.first()
    assert images["image"].dtype == np.float32 and abs(images["image"].mean()) < 0.3
    assert not found.test_is_evaluate
    assert found.fingerprint() == load_data(spec, ["image"], program=program).fingerprint()


def test_arrays_and_batches_are_the_same_samples_and_cannot_be_spoilt(data):
    found = data.scenes("evaluate")
    batches = list(data.cluttered_digits()["evaluate"])
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), found.labels)
    first = batches[0][0]["image"]
    np.testing.assert_allclose(first, (found.images[:64] / 255 - data.MEAN) / data.STD, atol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        found.images[0] = 0


def test_there_are_four_splits(data):
    with pytest.raises(UsageError, match=r"no split 'validation'; expected one of \['train', 'calibration'"):
        data.scenes("validation")


# ---- training -----------------------------------------------------------------------------------------
@pytest.fixture
def training(data):
    return imported("", "training")  # `data` has put the folder of what it imports on the path


class Brightest(torch.nn.Module):
    """Scores `[N, 2]` of images `[N, 1, 2, 2]`: their sum, and its negative; learnt or not."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 2)

    def forward(self, image):
        return self.conv(image).flatten(1)


def bright():
    images = np.random.default_rng(0).normal(size=(40, 1, 2, 2)).astype(np.float32)
    return [({"image": images}, (images.sum((1, 2, 3)) > 0).astype(np.int64))]


def test_training_learns_and_scores_every_sample(training, capsys):
    torch.manual_seed(0)
    model, batches = Brightest(), bright()
    training.train(
        model, torch.optim.SGD(model.parameters(), lr=1.0), {"train": batches, "evaluate": batches}, 20
    )
    assert training.right(model, batches).mean() > 0.9
    assert "epoch 20/20" in capsys.readouterr().out
    with torch.no_grad():
        model.conv.weight.neg_()
        model.conv.bias.neg_()
    assert training.right(model, batches).shape == (40,) and training.right(model, batches).mean() < 0.1


def test_what_was_trained_is_saved_and_exported_with_a_free_batch(training, tmp_path, monkeypatch, capsys):
    from sartor import load

    weights = tmp_path / "brightest" / "model.safetensors"
    weights.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3", "--threads", str(torch.get_num_threads())])
    seen = []

    def trained(epochs):
        seen.append(epochs)
        return Brightest()

    assert training.main("Trains.", trained, torch.zeros(1, 1, 2, 2), weights, epochs=9) == 0
    assert seen == [3] and load(weights.with_name("model.onnx")).batch.symbolic
    residual = imported("", "residual")
    model = Brightest()
    before = model.conv.weight.detach().clone()
    residual.load_if_trained(model, tmp_path / "missing.safetensors")
    assert torch.equal(model.conv.weight, before)
    assert (
        not torch.equal(residual.load_if_trained(model, weights).conv.weight, before) and not model.training
    )


def test_the_demo_trains_again_when_anything_that_decides_changes():
    source = (EXAMPLES / "digits" / "demo.py").read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source] == []


def test_scenes_have_one_length(data):
    found = data.scenes("calibration")
    assert {len(getattr(found, field.name)) for field in dataclasses.fields(found)} == {256} == {len(found)}
