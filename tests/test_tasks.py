"""A task is plain data, does what was done before there were tasks, and fails as an error of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from backend_programs import small_cnn

from sartor import backends, errors
from sartor.backends import isolation
from sartor.backends.measure import LatencyStats, Measurement, Ratio
from sartor.backends.protocol import TargetOptions
from sartor.backends.rounds import Round
from sartor.scoring import score
from sartor.tasks import LocalRunner, Result, Task, open_runner, requests
from sartor.tasks.task import error_from_dict, error_to_dict


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return backends.get("reference").lower(small_cnn(8), folder, TargetOptions())


def split(batches=3, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ({"x": rng.normal(size=(size, 3, 16, 16)).astype(np.float32)}, rng.integers(0, 10, size))
        for _ in range(batches)
    ]


def measure_task(artifact, **changes):
    given = {"time_limit_s": 0.2, "target_half_width": 0.5, "seed": 3} | changes
    return requests.measure_task("reference", [artifact, artifact], TargetOptions(), **given)


class InProcess(isolation.Session):
    """A session without its subprocess, which takes seconds to start."""

    def __init__(self, artifact, options):
        self.run = backends.get(artifact.target).load(artifact, options).run

    def close(self):
        pass


class Counting(LocalRunner):
    """A local runner that keeps the tasks it was given, as another machine would see them."""

    def __init__(self, chunk_bytes):
        self.chunk_bytes, self.seen = chunk_bytes, []

    def run(self, task):
        self.seen.append(json.loads(json.dumps(task.to_dict())))
        return super().run(task)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolation, "Session", InProcess)


# ---- plain data ------------------------------------------------------------------------------------
def test_a_task_names_no_place_of_this_machine(artifact):
    text = json.dumps(measure_task(artifact).to_dict())
    assert str(artifact.folder) not in text and str(Path.home()) not in text


def test_equal_work_is_an_equal_task_wherever_the_files_are(artifact, tmp_path):
    again = backends.get("reference").lower(small_cnn(8), tmp_path / "b", TargetOptions())
    assert measure_task(again).to_dict() == measure_task(artifact).to_dict()
    other = backends.get("reference").lower(small_cnn(12), tmp_path / "c", TargetOptions())
    assert measure_task(other).to_dict() != measure_task(artifact).to_dict()


@pytest.mark.parametrize("payload", [{"f": print}, {"f": float("nan")}, {"f": b"x"}])
def test_a_payload_is_json(payload):
    with pytest.raises((TypeError, ValueError)):
        Task("measure", payload, {}, {})


def test_an_unknown_kind_is_our_bug():
    with pytest.raises(errors.InternalError, match="Unknown kind of task 'train'"):
        Task("train", {}, {}, {})


def test_a_measurement_survives_the_way():
    measured = Measurement(
        {"name": "reference", "shapes": {"x": [1, 3]}},
        {"cpu": "c", "load": [0.1]},
        (LatencyStats(1e-3, 0.9e-3, 1.1e-3), LatencyStats(2e-3, 1.9e-3, 2.1e-3)),
        (Ratio(2.0, (1.9, 2.1)),),
        (Round((0, 1, 1, 0), (1e-3, 2e-3, 2e-3, 1e-3)),),
        "interval",
    )
    sent = json.loads(json.dumps(requests.measurement_to_dict(measured)))
    assert requests.measurement(Result(sent)) == measured


# ---- errors ----------------------------------------------------------------------------------------
def test_an_error_comes_back_as_its_class_with_its_notes():
    original = errors.UsageError("The model 'm' is too large.")
    original.add_note("line 7")
    back = error_from_dict(json.loads(json.dumps(error_to_dict(original))))
    assert type(back) is errors.UsageError and str(back) == str(original) and back.__notes__ == ["line 7"]


def test_any_other_error_becomes_one_of_ours_with_its_traceback():
    try:
        raise ValueError("odd")
    except ValueError as error:
        back = error_from_dict(error_to_dict(error))
    assert type(back) is errors.BackendError and "ValueError: odd" in str(back)
    assert "Traceback" in back.__notes__[0]


@pytest.mark.parametrize("kind", ["Path", "annotations", "Exception", "nothing"])
def test_a_kind_that_is_no_error_of_ours_is_not_looked_up(kind):
    back = error_from_dict({"kind": kind, "message": "m", "notes": []})
    assert type(back) is errors.BackendError


def test_a_backend_that_is_not_there_is_an_error_of_the_caller(artifact):
    task = requests.measure_task(
        "nowhere", [artifact], TargetOptions(), time_limit_s=0.1, target_half_width=0.5, seed=0
    )
    with pytest.raises(errors.UsageError, match="nowhere"):
        LocalRunner().run(task)


# ---- the three kinds on this machine ---------------------------------------------------------------
def test_measuring(artifact):
    measured = requests.measurement(LocalRunner().run(measure_task(artifact)))
    assert measured.ratio.latency > 0 and len(measured.latencies) == 2 and measured.rounds
    assert measured.conditions["seed"] == 3 and measured.conditions["time_limit_s"] == 0.2


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 4 * 3 * 16 * 16 * 4, 1 << 30])
def test_scores_do_not_depend_on_the_pieces(artifact, chunk_bytes, in_process):
    batches = split(5)
    with isolation.Session(artifact, TargetOptions()) as session:
        expected = score(session.run, batches)
    runner = Counting(chunk_bytes)
    answers = requests.Predictions(runner, artifact, TargetOptions(), batches)
    assert score(answers.predict, answers) == expected
    assert [t["payload"]["batches"] for t in runner.seen] == {1: [1] * 5, 1 << 30: [5]}.get(
        chunk_bytes, [2, 2, 1]
    )


def test_outputs_stand_beside_their_own_batch(artifact, in_process):
    batches = split(3)
    answers = requests.Predictions(Counting(1), artifact, TargetOptions(), batches)
    with isolation.Session(artifact, TargetOptions()) as session:
        for (inputs, _), (given, labels) in zip(answers, batches, strict=True):
            np.testing.assert_array_equal(inputs["x"], given["x"])
            expected = session.run(given)
            assert labels is not None
            np.testing.assert_array_equal(answers.predict(inputs)["y"], expected["y"])


def test_a_source_may_fill_one_array_again_and_again(artifact, in_process):
    class Reusing:
        def __iter__(self):
            buffer, labels = np.empty((4, 3, 16, 16), np.float32), np.empty(4, np.int64)
            for inputs, own in split(3):
                buffer[:], labels[:] = inputs["x"], own
                yield {"x": buffer}, labels

    def run(batches):
        answers = requests.Predictions(LocalRunner(), artifact, TargetOptions(), batches)
        return [(i["x"].copy(), y.copy(), answers.predict(i)["y"]) for i, y in answers]

    for ours, theirs in zip(run(Reusing()), run(split(3)), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_equal_inputs_are_equal_files_for_every_candidate(artifact, in_process):
    runner = Counting(1 << 30)
    for _ in range(2):
        list(requests.Predictions(runner, artifact, TargetOptions(), split(2)))
    assert runner.seen[0]["files"]["inputs"] == runner.seen[1]["files"]["inputs"]


def test_scoring_runs_the_artifact_in_a_subprocess(artifact):
    batches = split(2)
    answers = requests.Predictions(LocalRunner(), artifact, TargetOptions(), batches)
    found = score(answers.predict, answers)
    with InProcess(artifact, TargetOptions()) as session:
        assert found == score(session.run, batches) and found[1] == 8


def test_timing_models_keeps_failures_by_their_index(tmp_path):
    models, options = [small_cnn(4).to_bytes(), b"no model"], TargetOptions(shapes={"x": (1, 3, 16, 16)})
    task = requests.time_models_task("onnxruntime", models, options, tmp_path, repeats=1)
    times = requests.model_times(LocalRunner().run(task))
    assert times[0] > 0 and set(times.failures) == {1} and times.total == 2


# ---- a fit's bench ---------------------------------------------------------------------------------
def test_a_bench_measures_and_scores_nowhere_but_on_its_runner(tmp_path, monkeypatch, in_process):
    from sartor.backends import measure
    from sartor.budget import parse_budget
    from sartor.data import load_data
    from sartor.workbench import FitOptions, Workbench

    samples = np.concatenate([inputs["x"] for inputs, _ in split(4)])
    np.savez(tmp_path / "data.npz", x=samples, labels=np.arange(len(samples)) % 10)
    program = small_cnn(8)
    data = load_data(str(tmp_path / "data.npz"), ["x"], program=program)
    answer = measure.Measurement({}, {"cpu": "c"}, (), (), (), "interval")
    times = measure.ModelTimes({0: 1e-3}, {}, 1e-3, {}, 1)
    monkeypatch.setattr(measure, "measure", lambda *_, **__: answer)
    monkeypatch.setattr(measure, "time_models", lambda *_, **__: times)
    runner = Counting(1 << 30)
    bench = Workbench(program, FitOptions("reference", parse_budget("macs=0.5x")), data, tmp_path, runner)
    with InProcess(bench.baseline, TargetOptions()) as session:
        assert bench.score(bench.baseline, "test") == score(session.run, data.test)
    assert bench.measure_all([[bench.baseline], [bench.baseline] * 2], 0.1, seed=4) == [answer, answer]
    assert bench.time_models([b"model"], TargetOptions(), repeats=1) == times
    assert [task["kind"] for task in runner.seen] == ["score", "measure", "measure", "time-models"]
    assert [task["payload"]["seed"] for task in runner.seen[1:3]] == [4, 4]


# ---- the option ------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [None, "local"])
def test_this_machine_is_the_default(workers):
    assert isinstance(open_runner(workers, "reference"), LocalRunner)
