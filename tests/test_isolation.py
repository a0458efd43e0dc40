"""What a backend may leave behind, answer or do to its subprocess, and what the caller sees of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import null_backend
import numpy as np
import pytest
import wrong_lowerings
from backend_programs import small_cnn
from processes import ends

from sartor import backends
from sartor.backends import isolation, process
from sartor.backends.measure import measure, profile
from sartor.backends.protocol import TargetOptions
from sartor.cli import main
from sartor.errors import BackendError, UsageError


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Every backend of `wrong_lowerings` and `null_backend`."""
    site = tmp_path_factory.mktemp("site")
    null_backend.install(site, {**null_backend.ENTRIES, **wrong_lowerings.ENTRIES})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        backends.REGISTRY.refresh()
        yield
    backends.REGISTRY.refresh()


@pytest.fixture(scope="module")
def artifact(registered, tmp_path_factory):
    return backends.get("null").lower(small_cnn(4), tmp_path_factory.mktemp("null") / "a", TargetOptions())


def lower(name, folder, **limits):
    return isolation.lower(name, small_cnn(4), folder, TargetOptions(), **limits)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- how it ends -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lower-fork", "lower-daemon"])
def test_a_death_is_seen_while_a_child_holds_the_pipe(registered, tmp_path, name):
    started = time.monotonic()
    with pytest.raises(BackendError, match="ended by SIGSEGV"):
        lower(name, tmp_path / "a", time_limit_s=60.0)
    assert time.monotonic() - started < 15
    assert names(tmp_path) == []
    deadline = time.monotonic() + 5
    while name == "lower-fork" and workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert name == "lower-daemon" or workers() == []


def workers():
    """Running workers that this process, or a worker of it that died, has started."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as stream:
                words = stream.read().split(b"\0")
            with open(f"/proc/{entry}/environ", "rb") as stream:
                ours = f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}".encode() in stream.read()
        except OSError:
            continue
        if ours and b"sartor.backends.worker" in words:
            found.append(int(entry))
    return found


def test_a_plugin_that_exits_is_an_error_that_says_so(registered, tmp_path):
    with pytest.raises(BackendError, match=r"'lower-exit' failed: SystemExit: 3\."):
        lower("lower-exit", tmp_path / "a")


def test_a_session_outlives_the_thread_that_made_it(artifact):
    x = {"x": np.zeros((1, 3, 16, 16), np.float32)}
    made = []

    def make():
        made.append(isolation.Session(artifact, TargetOptions(shapes={"x": (1, 3, 16, 16)})))
        made.append(made[0].run(x))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    time.sleep(0.3)  # a signal for its end would have come
    with made[0] as session:
        with pytest.raises(UsageError, match="Input 'x' is a list; a session takes numpy arrays"):
            session.run({"x": [[1.0]]})
        assert session.run(x)["y"].shape == made[1]["y"].shape == (1,)


def test_children_of_a_worker_end_with_the_caller(registered, tmp_path):
    """Also where the caller is killed, and the worker hangs."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom backend_programs import small_cnn\n"
        "from sartor import backends\nfrom sartor.backends import isolation\n"
        "from sartor.backends.protocol import TargetOptions\nimport dataclasses\n"
        "a = backends.get('null').lower(small_cnn(4), Path(sys.argv[3]), TargetOptions())\n"
        "with isolation.Session(dataclasses.replace(a, target='stubborn'), TargetOptions()) as session:\n"
        "    session.run({})\n"
    )
    site = next(p for p in sys.path if "site" in p and os.path.exists(f"{p}/nullvendor-0.1.dist-info"))
    folder = tmp_path / "a"
    command = [sys.executable, "-c", code, os.path.dirname(__file__), site, str(folder)]
    parent = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 30
    while not (folder / "child").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    child = int((folder / "child").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends(child, 30)


# ---- what it leaves --------------------------------------------------------------------------
def test_files_may_have_any_name(registered, tmp_path):
    made = lower("of-its-own-name", tmp_path / "a")
    assert made.files == ("artifact",) and names(made.folder) == ["artifact", "artifact.json"]
    assert lower("of-its-own-name", tmp_path / "a") == made  # and replaces itself


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lower-nothing", "'artifact.json' cannot be read"),
        ("lower-no-manifest", "'artifact.json' cannot be read"),
        ("lower-other-target", "its target is 'null'"),
        ("lower-later-change", "does not match its manifest"),
    ],
)
def test_what_is_no_artifact_is_the_backends_defect(registered, tmp_path, name, says):
    old = backends.get("of-its-own-name").lower(small_cnn(4), tmp_path / "a", TargetOptions())
    with pytest.raises(BackendError, match=f"'{name}' reported success.*{says}.*defect of the backend") as e:
        lower(name, tmp_path / "a")
    assert "Write one with" not in str(e.value)
    assert names(tmp_path) == ["a"] and (old.folder / "artifact").is_file()


def test_fresh_lowering_asks_for_no_cache(registered, tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    assert lower("cached", tmp_path / "a").main_file.read_text() == str(tmp_path)
    assert lower("cached", tmp_path / "a", fresh=True).main_file.read_text() == "off"
    assert os.environ["SARTOR_CACHE"] == str(tmp_path)


# ---- what it answers -------------------------------------------------------------------------
def test_an_answer_that_json_cannot_hold_is_named(artifact):
    with pytest.raises(BackendError, match=r"'answer\.kernels\[1\]\.median_s' is nan"):
        profile("not-a-number", artifact)
    with pytest.raises(
        BackendError, match=r"'answer\.conditions\.session\[0\]\.device' is <object .*type object"
    ):
        measure("odd-settings", [artifact], min_rounds=6, max_rounds=6, visit_s=0.001, time_limit_s=0.0)


# ---- limits ----------------------------------------------------------------------------------
def test_the_address_space_that_a_driver_reserves(artifact):
    options = {"min_rounds": 6, "max_rounds": 6, "visit_s": 0.001, "time_limit_s": 0.0}
    assert measure("wide", [artifact], **options).rounds
    with pytest.raises(BackendError, match="Cannot allocate memory"):
        measure("narrow", [artifact], **options)
    with pytest.raises(BackendError, match="Cannot allocate memory"):  # a limit that is asked for is set
        measure("wide", [artifact], memory_limit_bytes=8 << 30, **options)


def test_limits_are_named_where_they_end_something(registered, tmp_path):
    with pytest.raises(BackendError, match="'time_limit_s', 'sartor lower --time-limit'"):
        lower("lower-hang", tmp_path / "a", time_limit_s=3.0)
    with pytest.raises(
        BackendError, match=r"was 2\.0 GiB \('memory_limit_bytes', 'sartor lower --memory-limit'\)"
    ):
        lower("lower-killed", tmp_path / "a", memory_limit_bytes=2 << 30)
    with pytest.raises(BackendError, match=r"SIGKILL\. It could use the [\d.]+ GiB of memory that are here"):
        lower("lower-killed", tmp_path / "a")


@pytest.fixture(scope="module")
def facts(artifact):
    return dict(kernel.name.split("=", 1) for kernel in profile("facts", artifact))


@pytest.mark.skipif(not os.path.exists("/proc/self/oom_score_adj"), reason="the kernel is not Linux")
def test_the_kernel_ends_the_worker_first(facts):
    assert facts["offered"] == "1000"


def test_a_vendors_telemetry_is_off_whoever_imports_it(facts):
    assert facts["telemetry"] == "refused"


def test_variables_are_the_workers_own(monkeypatch):
    monkeypatch.delenv("PLANTED", raising=False)
    seen = []
    original = subprocess.Popen

    def record(*arguments, **keywords):
        seen.append(keywords["env"])
        return original(*arguments, **keywords)

    monkeypatch.setattr(process.subprocess, "Popen", record)
    with process.Worker(threads=1, variables={"PLANTED": "1"}):
        pass
    assert seen[0]["PLANTED"] == "1" and "PLANTED" not in os.environ


def test_options_of_the_command_line_are_these_limits(registered, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    small_cnn(4).save(tmp_path / "m.onnx")

    def command(target, *options):
        arguments = ["lower", str(tmp_path / "m.onnx"), "--target", target, "-o", str(tmp_path / "a")]
        return main([*arguments, "--no-verify", *options]), capsys.readouterr().err

    code, err = command("lower-hang", "--time-limit", "2.5")
    assert code == 2 and "did not finish within 2.5 s" in err and "'sartor lower --time-limit'" in err
    code, err = command("lower-hog", "--memory-limit", "2")
    assert code == 2 and "MemoryError" in err and not (tmp_path / "a").exists()
    assert command("lower-hog", "--memory-limit", "1e-10")[0] == 2  # less than a byte is not no limit
    assert command("lower-hog")[0] == 0 and (tmp_path / "a" / "half").is_file()
