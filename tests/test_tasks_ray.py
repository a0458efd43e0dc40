"""Tasks on a cluster: the node's side called directly, the sender's side on a cluster that is a stand-in.

A real one of several nodes is in `test_tasks_cluster.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from backend_programs import small_cnn

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.backends.visits import Summary
from sartor.cli.main import main
from sartor.errors import BackendError, UsageError
from sartor.profiling.inside import Inside, InsideEffort
from sartor.tasks import open_runner, ray, remote, requests
from sartor.tasks.ray import RayRunner, Workers, parse_workers
from sartor.tasks.task import Result, Task


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return backends.get("reference").lower(small_cnn(4), folder, TargetOptions())


@pytest.fixture
def measured(monkeypatch):
    """Measuring takes no time: what is tested here is the way there and back."""
    from sartor.backends import measure

    answer = measure.Measurement({"name": "reference"}, {"cpu": "c"}, (), (), (), "interval")
    monkeypatch.setattr(measure, "measure", lambda *_, **__: answer)
    return answer


def measure_task(artifact, count=1, seed=0):
    return requests.measure_task(
        "reference",
        [artifact] * count,
        TargetOptions(),
        time_limit_s=0.1,
        target_half_width=0.5,
        seed=seed,
    )


def request_of(task, **changes):
    contents = {sha: task.roots[label] / name for label, f in task.files.items() for name, sha in f.items()}
    request = {
        "task": task.to_dict(),
        "versions": remote.versions("reference"),
        "device": "left",
        "contents": list(contents),
    }
    return json.dumps(request | changes), [path.read_bytes() for path in contents.values()]


# ---- the option ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ray://10.0.0.2:10001", Workers("10.0.0.2", 10001)),
        ("ray://head.lab:10001/", Workers("head.lab", 10001)),
        ("ray://head:1/pi-4.b", Workers("head", 1, "pi-4.b")),
        ("ray://[::1]:65535/x", Workers("[::1]", 65535, "x")),
    ],
)
def test_workers_are_one_named_cluster(text, expected):
    assert parse_workers(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "auto",
            "ray",
            "ray://",
            "ray://auto",
            "ray://head",
            "head:10001",
            "http://head:8265",
            "ray://head:0",
        ),
        *(
            "ray://head:65536",
            "ray://a:1,ray://b:1",
            "ray://u:p@head:1",
            "ray://head:1/a/b",
            "ray://head:1?x=1",
        ),
        *("ray://head:1/a b", " ray://head:1", "ray://head:1\n", ""),
    ],
)
def test_whatever_else_is_refused_before_anything_is_done(text, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setattr(ray, "_connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(UsageError, match="names no cluster"):
        open_runner(text, "reference")


def test_fit_refuses_workers_before_it_opens_the_model(capsys, tmp_path):
    model = tmp_path / "model.py"
    model.write_text("raise SystemExit('the model was opened')\n")
    options = ["--target", "reference", "--budget", "macs=0.5x", "--recovery", "none"]
    code = main(
        ["fit", f"{model}:make", *options, "--workers", "auto", "--out", str(tmp_path / "o"), "--json"]
    )
    assert code == 2 and "names no cluster" in json.loads(capsys.readouterr().out)["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.py"]


def test_a_port_that_nobody_listens_at_is_said_at_once():
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UsageError, match=r"Nothing answers at ray://127.0.0.1:\d+ .*ray start --head"):
            open_runner(f"ray://127.0.0.1:{taken.getsockname()[1]}", "reference")


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[ray\]'"):
        open_runner("ray://127.0.0.1:1", "reference")


def test_the_environment_sends_ray_nowhere_and_comes_back(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    with ray._environment_unread():
        assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_ADDRESS"] == "elsewhere:6379"


def test_the_way_out_at_sigterm_stays_ours():
    before = signal.getsignal(signal.SIGTERM)
    with ray._signals_kept():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ray_is_imported_with_its_statistics_and_its_surprises_off():
    pytest.importorskip("ray")
    code = (
        "import os, json\nfrom sartor.errors import UsageError\nfrom sartor.tasks import open_runner\n"
        "try:\n    open_runner('ray://127.0.0.1:1', 'reference')\nexcept UsageError:\n    pass\n"
        "from ray._common.usage import usage_lib\nfrom ray._private import auto_init_hook, ray_constants\n"
        "print(json.dumps([usage_lib.usage_stats_enabled(), auto_init_hook.enable_auto_connect,"
        " ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, False, False]


# ---- on the node -----------------------------------------------------------------------------------
def test_a_node_does_a_task_from_contents_alone_and_says_where(artifact, measured, monkeypatch):
    seen = {}

    def measure(target, artifacts, *_, **__):
        for a in artifacts:
            seen.update({name: (a.folder / name).read_bytes() for name in a.files})
        assert all(a.folder != artifact.folder for a in artifacts)
        return measured

    monkeypatch.setattr("sartor.backends.measure.measure", measure)
    request, contents = request_of(measure_task(artifact, 2))
    assert len(contents) == len(artifact.files)  # baseline and candidate are one content
    answer = remote.run_task(request, *contents)
    assert answer["value"]["conditions"] == {"cpu": "c", "device": "left"}
    assert seen == {name: (artifact.folder / name).read_bytes() for name in artifact.files}


def test_a_node_times_what_is_inside_models(tmp_path, monkeypatch):
    timed = [Inside(Summary(1.5, math.inf, 2, 4), (), 3e-4), Inside(None, reason="crashed")]

    def timer(self, models, effort):
        assert models == [b"one", b"two"] and effort == InsideEffort(visits=2)
        self.conditions = {"cpu": "c"}
        return timed

    monkeypatch.setattr("sartor.profiling.inside.ModelTimer.__call__", timer)
    task = requests.time_inside_task(
        "reference", [b"one", b"two"], TargetOptions(), tmp_path, InsideEffort(visits=2)
    )
    request, contents = request_of(task)
    answer = json.loads(json.dumps(remote.run_task(request, *contents)["value"], allow_nan=False))
    assert answer["conditions"] == {"cpu": "c", "device": "left"}
    assert requests.insides(Result(answer)) == timed


def test_a_content_that_changed_is_refused(artifact, measured):
    request, contents = request_of(measure_task(artifact))
    answer = remote.run_task(request, b"changed", *contents[1:])
    expected = hashlib.sha256(b"changed").hexdigest()
    assert answer["error"]["kind"] == "BackendError" and expected in answer["error"]["message"]
    assert os.uname().nodename in answer["error"]["notes"][-1]


@pytest.mark.parametrize("name", ["sartor", "python", "reference"])
def test_another_version_is_refused_before_the_task_is_begun(name, artifact, monkeypatch):
    monkeypatch.setattr("sartor.backends.measure.measure", lambda *_, **__: pytest.fail("it measured"))
    versions = remote.versions("reference") | {name: "0.0"}
    request, contents = request_of(measure_task(artifact), versions=versions)
    error = remote.run_task(request, *contents)["error"]
    assert error["kind"] == "UsageError" and f"has {name} " in error["message"]
    assert "this process has 0.0" in error["message"]


def test_a_target_that_a_node_lacks_is_an_error_not_a_crash():
    assert remote.describe("nowhere")["error"]["kind"] == "UsageError"
    assert set(remote.describe("reference")["versions"]) == {"sartor", "python", "reference"}


def test_two_measurements_never_run_at_once_on_one_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order, entered = [], threading.Event()

    def second():
        entered.set()
        with remote.alone():
            order.append("second")

    with remote.alone():
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    with open(next(tmp_path.iterdir())) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up


def test_scoring_waits_for_nobody(artifact, monkeypatch):
    monkeypatch.setattr(remote, "alone", lambda: pytest.fail("it waited"))
    task = Task(
        "score",
        {
            "target": "reference",
            "options": TargetOptions().to_dict(),
            "artifact": artifact.to_dict(),
            "batches": 0,
        },
        {"artifact": dict(artifact.sha256), "inputs": {}},
        {"artifact": artifact.folder, "inputs": artifact.folder},
    )
    request, contents = request_of(task)
    assert remote.run_task(request, *contents) == {"value": {}, "files": {}}


# ---- on this side ----------------------------------------------------------------------------------
def node(name="a", alive=True, **resources):
    given = {"CPU": 2.0} | {k.replace("_", ":"): float(v) for k, v in resources.items()}
    return {"Alive": alive, "NodeName": name, "Resources": given}


class Cluster:
    """As much of Ray as the runner uses; tasks run when they are waited for."""

    def __init__(self, *nodes):
        self.there, self.stored, self.asked, self.cancelled = list(nodes), [], [], []
        self.fails = None

    def nodes(self):
        return self.there

    def put(self, content):
        self.stored.append(content)
        return content

    def remote(self, **settings):
        return lambda function: Function(self, function, settings)

    def wait(self, references, timeout):
        return (references, []) if any(n["Alive"] for n in self.there) else ([], references)

    def get(self, reference):
        if self.fails is not None:
            raise self.fails
        return reference()

    def cancel(self, reference, force):
        self.cancelled.append(reference)

    def shutdown(self):
        self.there = None


class Function:
    def __init__(self, cluster, function, settings):
        self.cluster, self.function, self.settings = cluster, function, settings

    def options(self, **options):
        return Function(self.cluster, self.function, self.settings | options)

    def remote(self, *arguments):
        self.cluster.asked.append((self.function.__name__, self.settings))
        return lambda: self.function(*arguments)


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(ray, "_LOOK_S", 0.0)

    def make(*nodes, device="", threads=1, **options):
        cluster = Cluster(*nodes)
        monkeypatch.setattr(ray, "_connect", lambda workers: cluster)
        return RayRunner(Workers("head", 1, device), "reference", threads, **options), cluster

    return make


def test_the_only_device_needs_no_name(runner):
    made, _ = runner(node("head"), node(sartor_pi=1), node("b", sartor_pi=1), node("c", False, sartor_old=1))
    assert made.device == "pi"


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([node()], {}, "offers no device; .*ray start --address"),
        ([node(), node(sartor_a=1), node(sartor_b=1)], {}, "devices 'a', 'b'; name one .*ray://head:1/a"),
        ([node(sartor_a=1)], {"device": "b"}, "offers no device 'b'"),
        ([node("x", False, sartor_a=1)], {"device": "a"}, "offers no device 'a'"),
        ([node("twice", sartor_a=2)], {}, "'twice' offers .*more than one measurement"),
        ([node("two", sartor_a=1, sartor_b=1)], {"device": "a"}, "'two' offers .*more than one measurement"),
        ([node(sartor_a=1)], {"threads": 4}, "fewer than 4 processors"),
    ],
)
def test_a_cluster_that_cannot_measure_is_refused(runner, nodes, options, message):
    with pytest.raises(UsageError, match=message):
        runner(*nodes, **options)


NOT_STARTED = (
    "Initialization failure from server:\nTraceback (most recent call last):\n  File 'proxier.py', line 765\n"
    "RuntimeError: Starting Ray client server failed. See a log.\n"
)


@pytest.mark.parametrize(
    ("failures", "asked", "message"),
    [
        ([NOT_STARTED] * 2, 3, None),
        (
            [NOT_STARTED] * 3,
            3,
            "head:1 cannot be joined: Initialization failure from server: RuntimeError: Starting Ray client",
        ),
        (["Version mismatch"], 1, "head:1 cannot be joined: Version mismatch"),
    ],
)
def test_a_head_that_was_too_busy_to_serve_is_asked_again(monkeypatch, failures, asked, message):
    monkeypatch.setattr(ray, "_LOOK_S", 0.0)
    calls = []

    class Head:
        def init(self, address, **_):
            calls.append("init")
            if len(calls) <= len(failures):
                raise ConnectionAbortedError(failures[len(calls) - 1])

        def shutdown(self):
            pass

    if message is None:
        ray._join(Head(), "ray://head:1")
    else:
        with pytest.raises(UsageError, match=message):
            ray._join(Head(), "ray://head:1")
    assert len(calls) == asked


def test_versions_are_compared_when_the_cluster_is_joined(runner, monkeypatch):
    def describe(target):
        return {"versions": remote.versions(target) | {"sartor": "0.0.1"}, "node": "old"}

    monkeypatch.setattr(remote, "describe", describe)
    with pytest.raises(UsageError, match=r"'old' has sartor 0\.0\.1 and this process has"):
        runner(node(sartor_a=1))


def test_a_target_that_the_nodes_lack_is_said_with_the_node(runner, monkeypatch):
    monkeypatch.setattr(remote, "versions", lambda target: {})
    there = {"error": {"kind": "UsageError", "message": "No module 'x'.", "notes": []}, "node": "b7"}
    monkeypatch.setattr(remote, "describe", lambda target: there)
    with pytest.raises(UsageError, match=r"The node 'b7' cannot run 'reference': No module 'x'\."):
        runner(node(sartor_a=1))


def test_a_cluster_without_sartor_is_told_what_to_install(runner, artifact):
    made, cluster = runner(node(sartor_a=1))
    cluster.fails = RuntimeError("The remote function failed to import: No module named 'sartor.tasks'")
    with pytest.raises(UsageError, match=r"cannot import this version .*pip install 'sartor\[ray\]'"):
        made.run(measure_task(artifact))


def test_a_cluster_that_fails_before_its_devices_are_known_is_an_error_of_ours(runner, monkeypatch):
    def gone(self):
        raise RuntimeError("gone")

    monkeypatch.setattr(Cluster, "nodes", gone)
    with pytest.raises(BackendError, match=r"device '\?' of ray://head:1 was lost"):
        runner(node(sartor_a=1))


def test_a_measurement_has_the_device_to_itself_and_scores_share_it(runner, artifact, measured):
    made, cluster = runner(node(sartor_a=1), threads=2)
    made.run(measure_task(artifact))
    list(requests.Predictions(made, artifact, TargetOptions(), []))
    made._submit(Task("score", {"target": "reference"}, {}, {}))
    (_, described), (_, measuring), (_, scoring) = cluster.asked
    assert measuring["resources"] == {"sartor:a": 1} and measuring["num_cpus"] == 2
    shares = described["resources"]["sartor:a"], scoring["resources"]["sartor:a"]
    assert all(0 < share < 0.1 for share in shares) and scoring["num_cpus"] == 2
    assert measuring["max_retries"] > 0 and measuring["retry_exceptions"] is False


def test_a_content_goes_out_once(runner, artifact, measured):
    made, cluster = runner(node(sartor_a=1))
    for seed in range(3):
        made.run(measure_task(artifact, 2, seed))
    assert sorted(cluster.stored) == sorted((artifact.folder / n).read_bytes() for n in artifact.files)


def test_the_contents_that_are_kept_are_bounded_and_the_last_used_stay(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "_KEPT_BYTES", 25)
    made, cluster = runner(node(sartor_a=1))
    for name in "abaca":  # a is used again before c comes, which drives b out
        path = tmp_path / name
        path.write_bytes(name.encode() * 10)
        made._put(name, path)
    assert [c[:1].decode() for c in cluster.stored] == ["a", "b", "c"]
    made._put("b", tmp_path / "b")
    assert len(cluster.stored) == 4


def test_results_are_in_order_and_as_many_are_under_way_as_there_are_devices(runner, artifact, measured):
    made, cluster = runner(node(sartor_a=1), node("b", sartor_a=1))
    taken = []

    def tasks():
        for seed in range(6):
            taken.append(seed)
            yield measure_task(artifact, seed=seed)

    results = made.run_all(tasks())
    next(results)
    assert taken == [0, 1, 2]
    results.close()
    assert len(cluster.cancelled) == 2


def test_an_error_of_a_task_comes_back_as_its_class(runner, artifact, monkeypatch):
    def fails(*_, **__):
        raise UsageError("The model is too large.")

    monkeypatch.setattr("sartor.backends.measure.measure", fails)
    made, _ = runner(node(sartor_a=1))
    with pytest.raises(UsageError, match=r"^The model is too large\.\n.*on the node"):
        made.run(measure_task(artifact))


def test_whatever_ray_raises_is_an_error_of_ours(runner, artifact, measured):
    made, cluster = runner(node(sartor_a=1))
    cluster.fails = RuntimeError("worker died\nin two lines")
    with pytest.raises(BackendError, match=r"device 'a' of ray://head:1 was lost \(RuntimeError\)") as caught:
        made.run(measure_task(artifact))
    assert caught.value.__notes__ == ["worker died\nin two lines"]
    cluster.fails = ConnectionError("gone")
    with pytest.raises(BackendError, match="connection to ray://head:1 was lost: gone"):
        made.run(measure_task(artifact))


def test_a_device_that_is_gone_for_good_ends_the_wait(runner, artifact):
    made, cluster = runner(node(sartor_a=1), patience_s=0.05)
    cluster.there[0]["Alive"] = False
    with pytest.raises(BackendError, match=r"No node .* offers the device 'a' any more, for 0\.05 s"):
        made.run(measure_task(artifact))


def test_a_refused_cluster_is_left_again(runner, monkeypatch):
    left = []
    monkeypatch.setattr(Cluster, "shutdown", lambda self: left.append(self))
    with pytest.raises(UsageError):
        runner(node())
    assert len(left) == 1


def test_no_file_is_named_by_where_it_is(runner, artifact, measured):
    request, _ = request_of(measure_task(artifact))
    assert str(artifact.folder) not in request and str(Path.home()) not in request
