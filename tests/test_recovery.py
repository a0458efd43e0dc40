"""Distillation: it improves, never harms, respects its budget, repeats, resumes, and refuses clearly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes

from sartor.errors import UsageError
from sartor.ir.fx import pull_weights, to_fx
from sartor.ir.program import Batch, Program
from sartor.recovery import RecoveryOptions, RecoveryResult, distill, losses, predictor
from sartor.recovery.samples import Samples
from sartor.recovery.teacher import Teacher
from sartor.recovery.training import Training
from sartor.recovery.twins import reestimate_statistics
from sartor.recovery.view import View

CLASSES = 5
AXIS = Batch(True, ("x",))
Data = list[tuple[dict[str, np.ndarray], np.ndarray | None]]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(seed: int = 0, *, softmax: bool = False, dense: bool = False, noise: float = 0.0) -> Program:
    """Conv, BatchNormalization, Relu, then a class head or a map of classes."""
    arrays = {
        "conv.weight": normal(6, 3, 3, 3, seed=seed) * 0.4,
        "bn.weight": np.abs(normal(6, seed=seed + 1)) + 0.5,
        "bn.bias": normal(6, seed=seed + 2) * 0.3,
        "bn.running_mean": normal(6, seed=seed + 3) * 0.3,
        "bn.running_var": np.abs(normal(6, seed=seed + 4)) + 0.5,
        "head.weight": normal(CLASSES, 6, 1, 1, seed=seed + 5),
        "axes": np.array([2, 3], dtype=np.int64),
    }
    for i, name in enumerate(("conv.weight", "bn.weight", "bn.bias", "head.weight")):
        arrays[name] = arrays[name] + noise * normal(*arrays[name].shape, seed=100 + i)
    nodes = [
        node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "head.weight"], ["m" if not dense else "y"]),
    ]
    if not dense:
        nodes.append(node("ReduceMean", ["m", "axes"], ["s" if softmax else "y"], keepdims=0))
    if softmax:
        nodes.append(node("Softmax", ["s"], ["y"]))
    used = {name for n in nodes for name in n.input}
    arrays = {
        k: v.astype(v.dtype if v.dtype == np.int64 else np.float32) for k, v in arrays.items() if k in used
    }
    return program_from_nodes(nodes, {"x": ["N", 3, 6, 6]}, ["y"], arrays)


def samples(count: int = 64, *, labels: str = "", batch: int = 16) -> Data:
    x = normal(count, 3, 6, 6, seed=9)
    y = predictor(network())({"x": x})["y"]
    targets = {"": None, "ids": y.argmax(1), "column": y.argmax(1)[:, None], "float": y * 2}[labels]
    return [
        ({"x": x[i : i + batch]}, None if targets is None else targets[i : i + batch])
        for i in range(0, count, batch)
    ]


def steps(count: int, **options: float) -> RecoveryOptions:
    return RecoveryOptions(max_steps=count, **options)


# ---- results -----------------------------------------------------------------------------------
def test_distillation_recovers_a_damaged_network() -> None:
    original, damaged = network(), network(noise=0.3)
    before = original.to_bytes(), damaged.to_bytes()
    result = distill(damaged, original, samples(), minutes=1, seed=0, options=steps(80, learning_rate=1e-2))
    assert result.steps == 80
    assert [entry["phase"] for entry in result.history[:2]] == ["start", "statistics"]
    assert result.history[-1]["phase"] == "final"
    start = result.history[0]["distance"]
    best = min(entry["distance"] for entry in result.history)
    assert best < 0.2 * start
    x = samples()[0][0]
    want, was, now = (predictor(p)(x)["y"] for p in (original, damaged, result.program))
    assert np.abs(now - want).mean() < 0.5 * np.abs(was - want).mean()
    assert (original.to_bytes(), damaged.to_bytes()) == before
    assert [n.name for n in result.program.nodes()] == [n.name for n in damaged.nodes()]
    types = {name: result.program.initializer_array(name).dtype for name in result.program.initializers}
    assert types == {name: damaged.initializer_array(name).dtype for name in damaged.initializers}


def test_never_worse_than_the_start() -> None:
    """When everything scores below the start, the start comes back, bit for bit."""
    damaged = network(noise=0.3)
    scores = iter([0.9, *[0.5] * 99])
    result = distill(
        damaged,
        network(),
        samples(),
        minutes=1,
        seed=0,
        options=steps(20),
        evaluate=lambda predict: next(scores),
    )
    assert result.program.to_bytes() == damaged.to_bytes()
    assert [e["kept"] for e in result.history] == [True] + [False] * (len(result.history) - 1)


def test_evaluate_selects() -> None:
    """The best score wins although later weights are closer to the original."""
    scores = iter([0.1, 0.2, 0.8, *[0.3] * 99])
    result = distill(
        network(noise=0.3),
        network(),
        samples(),
        minutes=1,
        seed=0,
        options=steps(40),
        evaluate=lambda p: next(scores),
    )
    kept = [entry for entry in result.history if entry["kept"]]
    assert kept[-1]["score"] == 0.8
    assert kept[-1]["distance"] > min(entry["distance"] for entry in result.history)
    assert math.isclose(distance(result.program), kept[-1]["distance"], rel_tol=1e-4)


def distance(program: Program) -> float:
    """The distance that a recovery would report at its start."""
    return distill(program, network(), samples(), minutes=1, seed=0, options=steps(1)).history[0]["distance"]


def test_nan_scores_are_never_kept() -> None:
    scores = iter([float("nan"), *[float("nan")] * 3, 0.5, *[float("nan")] * 99])
    result = distill(
        network(noise=0.3),
        network(),
        samples(),
        minutes=1,
        seed=0,
        options=steps(20),
        evaluate=lambda p: next(scores),
    )
    assert [e["score"] for e in result.history if e["kept"]][-1] == 0.5


def test_same_seed_same_bytes() -> None:
    def run(seed: int) -> bytes:
        damaged = network(noise=0.3)
        return distill(
            damaged, network(), samples(), minutes=1, seed=seed, options=steps(12)
        ).program.to_bytes()

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_time_budget() -> None:
    lines: list[tuple[float, str]] = []
    start = time.perf_counter()
    result = distill(
        network(noise=0.3),
        network(),
        samples(),
        minutes=2 / 60,
        seed=0,
        progress=lambda fraction, text: lines.append((fraction, text)),
        threads=1,
    )
    assert time.perf_counter() - start < 4.0
    assert 1.0 < result.seconds < 3.0
    assert result.steps > 10
    training = [entry for entry in result.history if entry["phase"] == "training"]
    assert training[-1]["learning_rate"] < 0.1 * max(entry["learning_rate"] for entry in training)
    assert lines[-1][0] == 1.0 and all(0 <= fraction <= 1 for fraction, _ in lines)


def test_slow_evaluation_stays_in_budget() -> None:
    def slow(predict: object) -> float:
        time.sleep(0.5)
        return 0.5

    result = distill(network(noise=0.3), network(), samples(), minutes=1.5 / 60, seed=0, evaluate=slow)
    assert result.seconds < 3.5


SET_THREADS = torch.set_num_threads


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, in earnest: what `Slow` times are its sleeps."""
    before = torch.get_num_threads()
    SET_THREADS(1)
    yield
    SET_THREADS(before)


class Slow:
    """Twins that take a time per sample, and longer with several threads, as beside other work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float):
        self.seconds, self.threads = seconds, 1
        monkeypatch.setattr("sartor.recovery.view.to_fx", self.twin)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)

    def twin(self, program: Program, **options: object) -> torch.fx.GraphModule:
        gm = to_fx(program, **options)  # type: ignore[arg-type]
        gm.register_forward_pre_hook(lambda module, inputs: self.wait(len(inputs[0])))
        return gm

    def wait(self, samples: int) -> None:
        time.sleep(self.seconds * samples * (10 if self.threads > 1 else 1))


@pytest.mark.usefixtures("one_thread")
def test_a_short_recovery_of_a_slow_network_trains_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging 256 samples with two threads would take twenty times the budget."""
    slow = Slow(monkeypatch, 2e-3)
    damaged, data = network(noise=0.3), samples(256, batch=64)
    result = distill(damaged, network(), data, minutes=2 / 60, seed=0, threads=2)
    assert slow.threads == 1 and result.steps >= 10 and result.notes == ()
    assert result.seconds < 2.4
    assert result.history[-1]["phase"] == "final", "time is kept for the last statistics"


@pytest.mark.usefixtures("one_thread")
def test_no_step_in_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, 8e-3)
    result = distill(network(noise=0.3), network(), samples(64), minutes=0.2 / 60, seed=0, threads=1)
    assert result.steps == 0
    assert result.notes == ("no training step fitted into 0 s; give recovery more time",)


# ---- labels, losses, outputs -------------------------------------------------------------------
def accuracy(program: Program, data: Data) -> float:
    predict = predictor(program)
    hits = [
        (predict(inputs)["y"].argmax(1) == np.asarray(labels).reshape(-1)).mean() for inputs, labels in data
    ]
    return float(np.mean(hits))


def test_labels_teach_what_the_original_does_not_know() -> None:
    """Original and program are the same wrong network; only labels can help."""
    wrong, data = network(seed=50), samples(labels="ids")
    options = steps(150, learning_rate=2e-2, label_weight=20.0)
    result = distill(
        wrong, wrong, data, minutes=1, seed=0, options=options, evaluate=lambda p: score(p, data)
    )
    assert accuracy(result.program, data) > accuracy(wrong, data) + 0.2
    without = distill(wrong, wrong, samples(), minutes=1, seed=0, options=options)
    assert accuracy(without.program, data) < accuracy(result.program, data)


def score(predict: object, data: Data) -> float:
    return float(np.mean([(predict(x)["y"].argmax(1) == y).mean() for x, y in data]))  # type: ignore[operator]


@pytest.mark.parametrize("labels", ["ids", "column", "float"])
def test_kinds_of_labels(labels: str) -> None:
    result = distill(
        network(noise=0.3), network(), samples(labels=labels), minutes=1, seed=0, options=steps(3)
    )
    assert result.notes == ()


def test_labels_that_do_not_fit_are_left_out_and_reported() -> None:
    data = [(inputs, np.zeros((len(inputs["x"]), 7), np.int64)) for inputs, _ in samples()]
    result = distill(network(noise=0.3), network(), data, minutes=1, seed=0, options=steps(3))
    assert len(result.notes) == 1 and result.notes[0].startswith("labels were not used: Output 'y'")


def test_dense_output_with_and_without_label_maps() -> None:
    original, damaged = network(dense=True), network(dense=True, noise=0.3)
    x = normal(32, 3, 6, 6, seed=9)
    maps = predictor(original)({"x": x})["y"].argmax(1)
    for labels in (None, maps):
        data: Data = [
            ({"x": x[i : i + 8]}, None if labels is None else labels[i : i + 8]) for i in range(0, 32, 8)
        ]
        result = distill(damaged, original, data, minutes=1, seed=0, options=steps(40, learning_rate=1e-2))
        assert min(e["distance"] for e in result.history) < 0.5 * result.history[0]["distance"]
        assert result.notes == ()


def test_network_that_ends_in_softmax() -> None:
    program = network(softmax=True)
    assert losses.probability_outputs(program) == {"y"}
    x, ids = torch.from_numpy(normal(8, 3, 6, 6)), torch.arange(8) % CLASSES
    plain = {"y": to_fx(network())(x)[0]}
    ending = {"y": to_fx(program)(x)[0]}
    torch.testing.assert_close(
        losses.label_loss(ending, ids, frozenset({"y"})), losses.label_loss(plain, ids)
    )
    other = {"y": plain["y"].roll(1, 0)}
    other_ending = {"y": torch.softmax(other["y"], 1)}
    torch.testing.assert_close(
        losses.distillation_loss(ending, other_ending, 3.0, frozenset({"y"})),
        losses.distillation_loss(plain, other, 3.0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_distillation_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    want = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    got = losses.distillation_loss({"y": student}, {"y": teacher}, 1.0)
    assert float(got) == pytest.approx(want, rel=1e-5)
    got = losses.distillation_loss({"y": student * 2}, {"y": teacher * 2}, 2.0)
    assert float(got) == pytest.approx(4 * want, rel=1e-5)
    vectors = losses.distillation_loss(
        {"y": torch.tensor([[1.0], [1.0]])}, {"y": torch.tensor([[3.0], [1.0]])}, 2.0
    )
    assert float(vectors) == pytest.approx(2.0 / 5.0)


def test_own_loss_is_used() -> None:
    seen = []

    def own(outputs: dict[str, torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
        seen.append((sorted(outputs), labels))
        return outputs["y"].square().mean()

    options = steps(30, learning_rate=1e-2, label_weight=100.0)
    distill(network(), network(), samples(), minutes=1, seed=0, loss=own, options=options)
    assert seen[0] == (["y"], None)
    with pytest.raises(UsageError, match="loss returned a tensor"):
        distill(
            network(), network(), samples(), minutes=1, seed=0, loss=lambda o, t: o["y"], options=steps(1)
        )


def test_a_gradient_that_is_not_finite_does_no_harm() -> None:
    calls = []

    def breaks(outputs: dict[str, torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
        calls.append(1)
        return outputs["y"].sum() * (float("nan") if len(calls) == 3 else 0.0)

    damaged = network(noise=0.3)
    result = distill(damaged, network(), samples(), minutes=1, seed=0, loss=breaks, options=steps(20))
    assert result.notes == ("step 2: the gradient was not finite; weights were put back",)
    assert all(np.isfinite(result.program.initializer_array(n)).all() for n in result.program.initializers)
    assert min(e["distance"] for e in result.history) < result.history[0]["distance"]


# ---- statistics --------------------------------------------------------------------------------
def test_statistics_are_the_plain_average() -> None:
    program = network()
    gm = to_fx(program)
    batches = [[torch.from_numpy(normal(8, 3, 6, 6, seed=i))] for i in range(4)]
    weight = torch.from_numpy(program.initializer_array("conv.weight").copy())
    convolved = [torch.nn.functional.conv2d(b[0], weight, padding=1) for b in batches]
    assert reestimate_statistics(gm, batches) == 4
    mean = torch.stack([c.mean((0, 2, 3)) for c in convolved]).mean(0)
    variance = torch.stack([c.var((0, 2, 3)) for c in convolved]).mean(0)
    torch.testing.assert_close(gm.get_buffer("bn.running_mean"), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gm.get_buffer("bn.running_var"), variance, rtol=1e-4, atol=1e-5)
    assert not gm.training
    pulled = pull_weights(program, gm)
    np.testing.assert_allclose(
        pulled.initializer_array("bn.running_mean"), mean.numpy(), rtol=1e-4, atol=1e-5
    )


def test_statistics_come_first_and_help() -> None:
    original, damaged = network(), network()
    data = samples()
    gm = to_fx(original)
    reestimate_statistics(gm, [[torch.from_numpy(inputs["x"])] for inputs, _ in data])
    original = pull_weights(original, gm)
    for name in ("bn.running_mean", "bn.running_var"):
        wrong = original.initializer_array(name) * 3 + 1
        damaged.graph.initializers[name].const_value = ir.Tensor(wrong, name=name)
    result = distill(damaged, original, data, minutes=1, seed=0, options=steps(1))
    assert result.history[1]["phase"] == "statistics" and result.history[1]["kept"]
    assert result.history[1]["distance"] < 0.01 * result.history[0]["distance"]


def test_tiny_batches_keep_running_statistics() -> None:
    damaged = network(noise=0.3)
    result = distill(damaged, network(), samples(2), minutes=1, seed=0, options=steps(5))
    assert "kept its running statistics" in result.notes[0]
    for name in ("bn.running_mean", "bn.running_var"):
        np.testing.assert_array_equal(result.program.initializer_array(name), damaged.initializer_array(name))


# ---- samples -----------------------------------------------------------------------------------
def test_cached_samples() -> None:
    teacher = to_fx(network())
    data = Samples(samples(70, labels="ids"), ["x"], AXIS, seed=0)
    ask = Teacher(View(network(), network()), data)
    assert data.cached and data.count == 70
    first = list(data.epoch(0))
    assert [len(b.inputs[0]) for b in first] == [16] * 4
    for batch in [*first, *data.sample(40)]:
        torch.testing.assert_close(ask(batch)["y"], teacher(*batch.inputs)[0])
        assert batch.labels is not None
        torch.testing.assert_close(batch.labels, ask(batch)["y"].argmax(1))
    again = list(data.epoch(0, start=2))
    torch.testing.assert_close(again[0].inputs[0], first[2].inputs[0], rtol=0, atol=0)
    assert not torch.equal(next(iter(data.epoch(1))).inputs[0], first[0].inputs[0])


def test_batches_are_limited_from_below() -> None:
    data = Samples(samples(64, batch=64), ["x"], AXIS, seed=0)
    for most, expected in ((1000, 64), (40, 40), (3, 16), (50, 16)):
        data.limit_batch(most)
        assert data.batch_size == expected == len(next(data.epoch(0)).inputs[0])


def test_streamed_samples_keep_their_order() -> None:
    source = samples(64)
    data = Samples(source, ["x"], AXIS, seed=0, cache_bytes=1000)
    ask = Teacher(View(network(), network()), data)
    assert not data.cached and data.count is None
    for batch, (inputs, _) in zip(data.epoch(5), source, strict=True):
        np.testing.assert_array_equal(batch.inputs[0].numpy(), inputs["x"])
        assert set(ask(batch)) == {"y"}
    assert sum(len(b.inputs[0]) for b in data.sample(20)) == 32
    assert len(list(data.inputs(3))) == 3


def scaled() -> Program:
    """A network whose second input is a scale for all samples."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "s"], ["y"])]
    inputs: dict[str, list[int | str]] = {"x": ["N", 3, 6, 6], "s": [1, 5, 1, 1]}
    program = program_from_nodes(nodes, inputs, ["y"], {"w": normal(5, 3, 1, 1)})
    assert program.batch == AXIS
    return program


@pytest.mark.parametrize("same", [True, False])
def test_an_input_without_samples_stays_whole(same: bool) -> None:
    """Equal in all batches, it is held once; else the batches are kept as they are."""
    program = scaled()
    source = [
        ({"x": normal(16, 3, 6, 6, seed=i), "s": normal(1, 5, 1, 1, seed=0 if same else i)}, None)
        for i in range(4)
    ]
    data = Samples(source, ["x", "s"], program.batch, seed=0)
    ask = Teacher(View(program, program), data)
    assert data.cached == same and data.count == (64 if same else None)
    assert [len(t) for t in data.probe(3)[0]] == [3, 1] and data.probe(3)[1] == 3
    for batch in [*data.epoch(0), *data.sample(20)]:
        assert batch.count == len(batch.inputs[0]) <= 16
        assert batch.inputs[1].shape == (1, 5, 1, 1)
        torch.testing.assert_close(ask(batch)["y"], to_fx(program)(*batch.inputs)[0])
    result = distill(program, program, source, minutes=1, seed=0, options=steps(2))
    assert result.steps == 2 and result.history[0]["distance"] == pytest.approx(0, abs=1e-6)


def test_batches_of_a_fixed_size_are_not_cut() -> None:
    axis = Batch(False, (), "it is fixed")
    data = Samples(samples(64), ["x"], axis, seed=0)
    assert not data.cached and len(data.probe(3)[0][0]) == 16
    assert [batch.count for batch in data.epoch(0)] == [16] * 4


# ---- checkpoints -------------------------------------------------------------------------------
class Stop(Exception):
    """Stands for a kill."""


def test_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    def run(folder: Path | None, stop_after: int | None = None) -> tuple[bytes, list]:
        calls = []

        def evaluate(predict: object) -> float:
            calls.append(1)
            if stop_after is not None and len(calls) > stop_after:
                raise Stop
            return 0.0  # ties, so the distance decides

        result = distill(
            network(noise=0.3),
            network(),
            samples(),
            minutes=1,
            seed=0,
            evaluate=evaluate,
            checkpoint_dir=folder,
            options=steps(30, learning_rate=1e-2),
        )
        return result.program.to_bytes(), [(e["step"], e["distance"], e["kept"]) for e in result.history]

    whole = run(None)
    assert [step for step, _, kept in whole[1] if kept][-1] > 20  # training decides the result
    for stop_after in (1, 4):
        folder = tmp_path / str(stop_after)
        with pytest.raises(Stop):
            run(folder, stop_after)
        assert run(folder) == whole
        assert run(folder, 0) == whole  # finished: nothing is evaluated again
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        assert len(list(folder.iterdir())) == 2


@pytest.mark.usefixtures("one_thread")
def test_resume_judges_on_the_same_samples_and_keeps_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has become faster meanwhile, both would be chosen larger."""
    data = samples(256, batch=64)

    def run(stop: bool) -> RecoveryResult:
        options = {"minutes": 2 / 60, "seed": 0, "threads": 1, "checkpoint_dir": tmp_path}
        with monkeypatch.context() as patched:
            Slow(patched, 2e-3 if stop else 0.0)
            if stop:
                patched.setattr(Training, "_train", lambda self: (_ for _ in ()).throw(Stop()))
            return distill(network(noise=0.3), network(), data, evaluate=lambda predict: 0.0, **options)

    with pytest.raises(Stop):
        run(stop=True)
    state = json.loads((tmp_path / "recovery.json").read_text())
    assert 16 <= state["judged_samples"] < 200 and state["batch_size"] == 16
    result = run(stop=False)
    after = json.loads((tmp_path / "recovery.json").read_text())
    assert [after[k] for k in ("judged_samples", "batch_size")] == [state["judged_samples"], 16]
    assert result.steps > 0 and result.history[0] == state["history"][0]


def test_checkpoint_of_another_recovery_is_refused(tmp_path: Path) -> None:
    def run(seed: int) -> None:
        distill(
            network(noise=0.3),
            network(),
            samples(),
            minutes=1,
            seed=seed,
            checkpoint_dir=tmp_path,
            options=steps(2),
        )

    run(0)
    with pytest.raises(UsageError, match="belongs to another recovery: 'seed' is '0', expected '1'"):
        run(1)
    state = tmp_path / "recovery.json"
    document = json.loads(state.read_text())
    state.write_text(json.dumps({**document, "tensors": "../elsewhere.safetensors"}))
    with pytest.raises(UsageError, match="lies outside the folder"):
        run(0)
    state.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        run(0)


# ---- refusals ----------------------------------------------------------------------------------
def test_refusals() -> None:
    program, data = network(), samples()
    fixed = network()
    fixed.batch = Batch(symbolic=False, reason="node 'view' (Reshape) mixes samples")
    with pytest.raises(UsageError, match=r"batch axis.*fixed: node 'view' \(Reshape\) mixes samples"):
        distill(fixed, program, data, minutes=1, seed=0)
    with pytest.raises(UsageError, match="0 minutes"):
        distill(program, program, data, minutes=0, seed=0)
    with pytest.raises(UsageError, match="training data are empty"):
        distill(program, program, [], minutes=1, seed=0)
    with pytest.raises(UsageError, match="lack input 'x'"):
        distill(program, program, [({"z": normal(2, 3)}, None)], minutes=1, seed=0)
    other = program_from_nodes([node("Relu", ["x"], ["z"])], {"x": ["N", 3, 6, 6]}, ["z"])
    with pytest.raises(UsageError, match="must be the same"):
        distill(other, program, data, minutes=1, seed=0)
    with pytest.raises(UsageError, match="no trainable weights"):
        distill(other, other, data, minutes=1, seed=0)
    with pytest.raises(UsageError, match="'temperature' is 0"):
        RecoveryOptions(temperature=0)


def test_data_that_can_be_read_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(samples() if self.passes < 4 else [])

    monkeypatch.setattr("sartor.recovery.samples.CACHE_BYTES", 1000)
    with pytest.raises(UsageError, match="gave no batch when iterated again"):
        distill(network(), network(), Once(), minutes=0.1, seed=0)
