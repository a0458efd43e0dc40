"""When the original is asked: always, never, or about misclassified samples only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import node, program_from_nodes
from test_recovery import CLASSES, Stop, network, normal, samples, score, steps
from test_recovery_sizes import SMALL, at

from sartor.errors import UsageError
from sartor.images import resized
from sartor.recovery import RecoveryOptions, distill, losses, predictor
from sartor.recovery.objective import Objective
from sartor.recovery.samples import Batch, Samples
from sartor.recovery.teacher import Teacher
from sartor.recovery.view import View


def plain(seed=0):
    """Scores without normalisation: the same in training and in evaluation."""
    nodes = [node("Conv", ["x", "w"], ["m"]), node("ReduceMean", ["m", "axes"], ["y"], keepdims=0)]
    arrays = {"w": normal(CLASSES, 3, 3, 3, seed=seed), "axes": np.array([2, 3], dtype=np.int64)}
    return program_from_nodes(nodes, {"x": ["N", 3, 6, 6]}, ["y"], arrays)


@pytest.fixture
def asked(monkeypatch):
    """Samples that the original was run on, by their bytes."""
    found = []

    def view(*programs):
        original = View(*programs)
        original.gm.register_forward_pre_hook(
            lambda module, inputs: found.extend(x.numpy().tobytes() for x in inputs[0])
        )
        return original

    monkeypatch.setattr("sartor.recovery.training.View", view)
    return found


def misclassified(program, data):
    predict = predictor(program)
    return {
        x.tobytes()
        for inputs, ids in data
        for x, wrong in zip(inputs["x"], predict(inputs)["y"].argmax(1) != ids, strict=True)
        if wrong
    }


class Fixed:
    """Stands for a teacher with known answers."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def meet(self, batch):
        pass

    def __call__(self, batch, which=None):
        self.asked.append(which)
        return {"y": self.answers if which is None else self.answers[which]}


# ---- the formula -------------------------------------------------------------------------------
def test_equations_7_3_and_7_4_by_hand():
    """Two classes; samples 0 and 2 are misclassified, and the original is asked about these."""
    third = math.log(3.0)
    student = torch.tensor([[third, 0.0], [0.0, third], [0.0, 0.0], [0.0, 2 * third]], requires_grad=True)
    original = torch.tensor([[0.0, third], [9.0, 9.0], [third, 0.0], [-9.0, 0.0]])
    labels = torch.tensor([1, 1, 1, 1])
    batch, teacher = Batch([], labels, 4), Fixed(original)
    options = RecoveryOptions(teacher="wrong", temperature=1.0)
    objective = Objective(plain(), options, None, teacher, [])
    value = objective({"y": student}, batch)
    assert [which.tolist() for which in teacher.asked] == [[True, False, True, False]]
    # Cross-entropy of (3/4, 1/4) against (1/4, 3/4), and of (1/2, 1/2) against (3/4, 1/4); of labels on all four.
    queried = (-0.25 * math.log(0.75) - 0.75 * math.log(0.25) + math.log(2.0)) / 2
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    labelled = (math.log(4.0) + math.log(4 / 3) + math.log(2.0) + math.log(10 / 9)) / 4
    assert float(value.detach()) == pytest.approx(queried - entropy + labelled, rel=1e-5)
    value.backward()
    # Softmax minus target, by hand: the mean over two queries, and over four labels.
    want = [(0.75 - 0.25) / 2 + 0.75 / 4, (1 / 4) / 4, (0.5 - 0.75) / 2 + 0.5 / 4, (1 / 10) / 4]
    np.testing.assert_allclose(student.grad[:, 0].numpy(), want, rtol=1e-5, atol=1e-6)
    assert options.weight_of_labels == 1.0 and RecoveryOptions().weight_of_labels == 0.5


def test_nothing_is_asked_where_nothing_is_wrong():
    teacher = Fixed(None)
    objective = Objective(plain(), RecoveryOptions(teacher="wrong"), None, teacher, [])
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    value = objective({"y": scores}, Batch([], torch.tensor([0, 1]), 2))
    assert teacher.asked == [] and float(value) == pytest.approx(math.log(1 + math.exp(-2.0)))


# ---- calls -------------------------------------------------------------------------------------
def test_the_original_runs_on_misclassified_samples_only_and_once(asked):
    student, original, data = plain(1), plain(), samples(64, labels="ids", batch=64)
    wrong = misclassified(student, data)
    assert 8 < len(wrong) < 60
    options = RecoveryOptions(teacher="wrong", max_steps=1, learning_rate=1e-9)
    result = distill(student, original, data, minutes=1, seed=0, options=options)
    assert set(asked) == wrong and len(asked) == len(wrong) == result.asked
    saved = 1 - len(wrong) / 64
    assert result.notes == (f"the original was asked about {len(wrong)} of 64 samples: {saved:.0%} saved",)
    asked.clear()
    options = RecoveryOptions(teacher="wrong", max_steps=40, learning_rate=1e-2)
    result = distill(student, original, data, minutes=1, seed=0, options=options)
    assert len(asked) == len(set(asked)) == result.asked < 64 and set(asked) >= wrong
    assert min(e["distance"] for e in result.history) < 0.9 * result.history[0]["distance"]


def test_streamed_samples_are_asked_about_when_they_are_wrong(asked, monkeypatch):
    monkeypatch.setattr("sartor.recovery.samples.CACHE_BYTES", 1000)
    student, data = plain(1), samples(64, labels="ids")
    wrong = misclassified(student, data)
    options = RecoveryOptions(teacher="wrong", max_steps=8, learning_rate=1e-9)
    result = distill(student, plain(), data, minutes=1, seed=0, options=options)
    assert set(asked) == wrong and result.asked == len(asked) == 2 * len(wrong)
    assert f"asked about {2 * len(wrong)} of 128 samples" in result.notes[0]


def test_answers_that_do_not_fit_into_memory_are_asked_for_again(monkeypatch):
    data = Samples(samples(32), ["x"], network().batch, seed=0)
    monkeypatch.setattr("sartor.recovery.samples.CACHE_BYTES", 32 * CLASSES * 4)
    teacher = Teacher(View(network(), network()), data)
    for batch in [*data.epoch(0), *data.epoch(0)]:
        teacher(batch)
    assert teacher.asked == 32
    monkeypatch.setattr("sartor.recovery.samples.CACHE_BYTES", 32 * CLASSES * 4 - 1)
    teacher = Teacher(View(network(), network()), data)
    batches = [*data.epoch(0), *data.epoch(1)]
    answers = [teacher(batch) for batch in batches]
    assert teacher.asked >= 64
    for batch, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(answer["y"], View(network(), network())(batch.inputs)["y"])
    before = teacher.asked
    teacher.remember(batches[:1])
    half = torch.arange(16) < 8
    torch.testing.assert_close(teacher(batches[0], half)["y"], answers[0]["y"][:8])
    assert teacher.asked == before + 16


def test_never_runs_no_original_and_learns_from_labels(asked):
    data = samples(128, labels="ids")
    student = network(noise=0.5)
    options = RecoveryOptions(teacher="never", max_steps=120, learning_rate=1e-2)
    result = distill(
        student, network(), data, minutes=1, seed=0, options=options, evaluate=lambda p: score(p, data)
    )
    assert asked == [] and result.asked == 0 and result.notes == ()
    scores = [entry["score"] for entry in result.history]
    assert max(scores) > scores[0] + 0.1
    assert result.history[-1]["distance"] < 0.5 * result.history[0]["distance"]
    predict = predictor(student)
    want = [losses.label_loss({"y": torch.from_numpy(predict(x)["y"])}, torch.from_numpy(y)) for x, y in data]
    assert result.history[0]["distance"] == pytest.approx(float(np.mean(want)), rel=1e-5)


def test_never_with_a_loss_and_no_labels():
    options = RecoveryOptions(teacher="never", max_steps=30, learning_rate=1e-2)
    result = distill(
        network(),
        network(),
        samples(),
        minutes=1,
        seed=0,
        options=options,
        loss=lambda o, t: o["y"].square().mean(),
    )
    assert result.history[-1]["distance"] < 0.5 * result.history[0]["distance"]


def test_the_programs_size_is_as_if_resized_data_were_given():
    student, data = at(network(noise=0.3), *SMALL), samples(64, labels="ids")
    by_hand = [({"x": resized(inputs["x"], SMALL)}, labels) for inputs, labels in data]
    options = RecoveryOptions(teacher="never", max_steps=25, learning_rate=1e-2)
    found = [
        distill(student, original, given, minutes=1, seed=0, options=options).program
        for original, given in ((network(), data), (at(network(), *SMALL), by_hand))
    ]
    for name in student.initializers:
        one, other = (program.initializer_array(name) for program in found)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert not np.allclose(
        found[0].initializer_array("head.weight"), student.initializer_array("head.weight")
    )


# ---- resuming and refusals ---------------------------------------------------------------------
def test_counts_are_resumed(tmp_path):
    def run(folder, stop_after=None):
        calls = []

        def evaluate(predict):
            calls.append(1)
            if stop_after is not None and len(calls) > stop_after:
                raise Stop
            return 0.0

        return distill(
            plain(1),
            plain(),
            samples(64, labels="ids"),
            minutes=1,
            seed=0,
            evaluate=evaluate,
            checkpoint_dir=folder,
            options=RecoveryOptions(teacher="wrong", max_steps=30, learning_rate=1e-4),
        )

    whole = run(None)
    with pytest.raises(Stop):
        run(tmp_path, 4)
    resumed = run(tmp_path)
    assert resumed.program.to_bytes() == whole.program.to_bytes()
    assert resumed.asked >= whole.asked and "of 64 samples" in resumed.notes[0]


@pytest.mark.parametrize(
    ("labels", "teacher", "says"),
    [
        ("", "wrong", "have no labels"),
        ("float", "wrong", r"labels of shape \[16, 5\] and type torch.float32. Use teacher 'always'"),
        ("", "never", "but there are none"),
        ("ids", "sometimes", "'teacher' is 'sometimes'; it must be one of always, never, wrong"),
    ],
)
def test_labels_that_are_needed(labels, teacher, says):
    ran = []
    with pytest.raises(UsageError, match=says):
        distill(
            plain(),
            plain(),
            samples(labels=labels),
            minutes=1,
            seed=0,
            options=steps(3, teacher=teacher),
            evaluate=lambda predict: ran.append(1) or 0.0,
        )
    assert not ran


def test_labels_that_do_not_fit_are_refused_without_a_teacher():
    data = [(inputs, np.zeros((len(inputs["x"]), 7), np.int64)) for inputs, _ in samples()]
    with pytest.raises(UsageError, match=r"but Output 'y' has shape .* Give them with the data"):
        distill(plain(), plain(), data, minutes=1, seed=0, options=steps(3, teacher="never"))
