"""The subprocess: crashes, hangs, memory, noise on standard output, and plugins outside the tree."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import null_backend
import numpy as np
import pytest
from backend_programs import small_cnn
from processes import ends

from sartor import backends
from sartor.backends import isolation, process
from sartor.backends.arrays import load_arrays, save_arrays
from sartor.backends.many_models import time_models
from sartor.backends.measure import measure, profile
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError, UsageError


@pytest.fixture
def artifact(tmp_path, monkeypatch):
    """An artifact of the out-of-tree backend; every backend of `null_backend` is registered."""
    null_backend.install(tmp_path / "site", null_backend.ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    backends.REGISTRY.refresh()
    yield backends.get("null").lower(small_cnn(8), tmp_path / "artifact", TargetOptions())
    monkeypatch.undo()
    backends.REGISTRY.refresh()


def quick(name, artifact, **changes):
    return measure(name, [artifact], min_rounds=6, max_rounds=6, visit_s=0.004, **changes)


def test_a_plugin_outside_the_tree_is_measured(artifact):
    result = quick("null", artifact)
    nodes = 9
    assert result.baseline.median == pytest.approx(nodes * null_backend.SECONDS_PER_NODE, rel=0.05)
    assert result.target["version"] == "1.0"
    assert profile("null", artifact)[0].name == "all"


def test_a_crash_is_an_error_with_the_last_words(artifact):
    with pytest.raises(BackendError, match="SIGABRT") as raised:
        quick("crash", artifact)
    assert any("planted last words" in note for note in raised.value.__notes__)


def test_a_hang_is_stopped_in_time_with_the_place(artifact, monkeypatch):
    monkeypatch.setattr("sartor.backends.measure._START_S", 1.0)
    started = time.monotonic()
    with pytest.raises(BackendError, match="did not finish within 1 s") as raised:
        measure("hang", [artifact], time_limit_s=0.0)
    assert time.monotonic() - started < 10
    assert any("in load" in note for note in raised.value.__notes__)  # the stack trace


def test_a_stubborn_worker_is_killed_with_its_children(artifact, monkeypatch):
    monkeypatch.setattr("sartor.backends.measure._START_S", 1.5)
    monkeypatch.setattr(process, "_GRACE_S", 0.1)
    started = time.monotonic()
    with pytest.raises(BackendError, match=r"did not finish within 1\.5 s"):
        measure("stubborn", [artifact], time_limit_s=0.0)
    assert time.monotonic() - started < 10
    child = int((artifact.folder / "child").read_text())
    assert ends(child, 5)


def test_memory_is_limited(artifact):
    with pytest.raises(BackendError, match="MemoryError"):
        quick("hog", artifact, memory_limit_bytes=2 << 30)
    assert quick("hog", artifact, memory_limit_bytes=6 << 30).baseline.median > 0


def test_prints_of_a_vendor_do_not_reach_the_answer(artifact, capfd):
    seen = []
    result = quick("chatty", artifact, on_round=seen.append)
    assert result.rounds == tuple(seen) and len(seen) == 6
    assert capfd.readouterr().out == ""


def test_errors_keep_class_message_and_notes(artifact):
    with pytest.raises(UsageError, match="planted refusal") as raised:
        quick("refuse", artifact)
    assert raised.value.__notes__ == ["planted note"]


def test_thread_pools_are_fixed(artifact, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = process._environment(2)
    assert environment["OMP_NUM_THREADS"] == environment["OPENBLAS_NUM_THREADS"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_model_that_crashes_the_worker_costs_only_itself(artifact):
    times = time_models("null", [b"1234", b"crash", b"12345678", b"fail"], repeats=2)
    assert set(times.failures) == {1, 3}
    assert "SIGABRT" in times.failures[1] and "planted failure" in times.failures[3]
    assert times[2] == pytest.approx(2 * times[0], rel=0.1)


def test_modules_in_the_working_folder_are_not_imported(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working folder')")
    code = (
        "import sys\nsys.path = [p for p in sys.path if p]\n"
        "from sartor.backends import process\n"
        "try:\n    process.call({'command': 'profile', 'backend': 'zzz', 'options': {}, 'artifact': {}, "
        "'folder': '', 'runs': 1}, threads=1, time_limit_s=60)\n"
        "except Exception as error:\n    assert 'zzz' in str(error), error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_no_process_is_left_behind(artifact, monkeypatch):
    started = []
    original = subprocess.Popen

    def record(*arguments, **keywords):
        started.append(original(*arguments, **keywords))
        return started[-1]

    monkeypatch.setattr(process.subprocess, "Popen", record)
    quick("null", artifact)
    with pytest.raises(BackendError):
        quick("crash", artifact)
    assert len(started) == 2 and all(p.poll() is not None for p in started)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lower-crash", "SIGSEGV"),
        ("lower-hang", "did not finish within"),
        ("lower-hog", "MemoryError"),
        ("lower-killed", "SIGKILL"),
        ("lower-raise", "planted failure"),
    ],
)
def test_lowering_that_ends_badly_is_an_error_and_leaves_nothing(name, says, artifact, tmp_path):
    before = sorted(p.name for p in artifact.folder.iterdir())
    limits = {"time_limit_s": 4.0} if name == "lower-hang" else {"memory_limit_bytes": 2 << 30}
    for folder in (tmp_path / "out" / "new", artifact.folder):
        with pytest.raises(BackendError, match=says) as raised:
            isolation.lower(name, small_cnn(8), folder, TargetOptions(), **limits)
    assert not list((tmp_path / "out").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "out", "site"]
    assert sorted(p.name for p in artifact.folder.iterdir()) == before
    if name in ("lower-crash", "lower-hang", "lower-killed"):
        assert any("planted last words" in note for note in raised.value.__notes__)


def test_lowering_in_a_subprocess_is_what_the_backend_writes(artifact, tmp_path):
    program = small_cnn(8)
    for name in ("null", "onnxruntime"):
        here = backends.get(name).lower(program, tmp_path / f"{name}-here", TargetOptions())
        there = isolation.lower(name, program, tmp_path / f"{name}-there", TargetOptions())
        assert there.to_dict() == here.to_dict()
        for file in there.files:
            assert (there.folder / file).read_bytes() == (here.folder / file).read_bytes()


def test_a_session_in_a_subprocess_answers_as_one_here(tmp_path):
    program = small_cnn(8)
    artifact = isolation.lower("onnxruntime", program, tmp_path / "a", TargetOptions())
    here = backends.get("onnxruntime").load(artifact, TargetOptions())
    with isolation.Session(artifact, TargetOptions()) as session:
        for seed in range(3):
            x = np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)
            name = artifact.inputs[0].name
            expected = here.run({name: x})
            found = session.run({name: x})
            assert list(found) == list(expected)
            assert all(np.array_equal(found[k], expected[k]) for k in expected)
        with pytest.raises(UsageError, match="this session takes"):  # and survives it
            session.run({name: x[:, :1]})
        assert np.array_equal(session.run({name: x})[next(iter(expected))], next(iter(expected.values())))


@pytest.mark.parametrize(("name", "says"), [("crash", "SIGABRT"), ("hang", "did not finish within 3 s")])
def test_a_session_that_dies_is_an_error(name, says, artifact):
    broken = dataclasses.replace(artifact, target=name)
    with isolation.Session(broken, TargetOptions(), time_limit_s=3.0) as session:
        for _ in range(2):
            with pytest.raises(BackendError, match=says):
                session.run({"x": np.zeros((1, 3, 16, 16), np.float32)})
            says = "ended|exited|did not"


def test_arrays_travel_whatever_their_name_and_type(tmp_path):
    import ml_dtypes

    arrays = {
        "file": np.arange(3),
        "a/b::c": np.zeros((0, 2), np.float16),
        "names": np.array(True),
        "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    }
    save_arrays(tmp_path / "a.npz", arrays)
    found = load_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
