"""Tasks on a real Ray cluster of several nodes, all of them on this machine: devices, a killed node, a whole score."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from backend_programs import small_cnn
from test_tasks import InProcess, split

from sartor import backends
from sartor.backends import telemetry
from sartor.backends.protocol import TargetOptions
from sartor.cli import main
from sartor.errors import BackendError, UsageError
from sartor.scoring import score
from sartor.tasks import open_runner, requests
from sartor.tasks.ray import RayRunner, parse_workers

pytest.importorskip("ray", reason="the extra sartor[ray] is not installed")
pytest.importorskip("grpc", reason="the extra sartor[ray] is not installed")
pytestmark = pytest.mark.slow

STORE_BYTES = 80 << 20


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """A head without devices, a node that offers `alone`, and two that offer `shelf`."""
    telemetry.disable()  # before the import, and for every process of the cluster
    from ray.cluster_utils import Cluster

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")  # as docs/scale_out.md advises
        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "ray_client_server_port": port,
                "object_store_memory": STORE_BYTES,
                "_system_config": {  # a killed node is missed after two seconds, and not after fifteen
                    "health_check_initial_delay_ms": 0,
                    "health_check_period_ms": 500,
                    "health_check_failure_threshold": 4,
                },
            },
        )
    try:
        made.client = f"ray://127.0.0.1:{port}"
        made.of = {
            name: made.add_node(
                num_cpus=1, resources={f"sartor:{device}": 1}, object_store_memory=STORE_BYTES, wait=False
            )
            for name, device in (("alone", "alone"), ("first", "shelf"), ("second", "shelf"))
        }
        made.wait_for_nodes(120)
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def runner(cluster):
    made = []

    def connect(device, **options):
        made.append(RayRunner(parse_workers(f"{cluster.client}/{device}"), "reference", **options))
        return made[-1]

    yield connect
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return backends.get("reference").lower(small_cnn(8), folder, TargetOptions())


def measure_task(artifact, seed=0, time_limit_s=0.2):
    return requests.measure_task(
        "reference",
        [artifact, artifact],
        TargetOptions(),
        time_limit_s=time_limit_s,
        target_half_width=1e-9,
        seed=seed,
    )


def test_a_device_is_named_where_there_are_several(cluster):
    with pytest.raises(UsageError, match=r"offers the devices 'alone', 'shelf'; name one of them"):
        open_runner(cluster.client, "reference")


def test_measuring_and_scoring_on_a_device(runner, artifact):
    alone = runner("alone")
    measured = requests.measurement(alone.run(measure_task(artifact, seed=5)))
    assert measured.conditions["device"] == "alone" and measured.conditions["seed"] == 5
    assert measured.ratio.latency > 0 and measured.rounds
    batches = split(2)
    alone.chunk_bytes = 1  # a task per batch
    answers = requests.Predictions(alone, artifact, TargetOptions(), batches)
    with InProcess(artifact, TargetOptions()) as session:
        assert score(answers.predict, answers) == score(session.run, batches)


def test_an_error_on_a_node_is_the_one_of_here(runner, artifact):
    task = requests.measure_task(
        "reference",
        [artifact],
        TargetOptions(shapes={"nothing": (1,)}),
        time_limit_s=0.1,
        target_half_width=0.5,
        seed=0,
    )
    with pytest.raises(UsageError, match="nothing"):
        runner("alone").run(task)


def test_the_environment_does_not_choose_the_cluster(cluster):
    """With RAY_ADDRESS set to the test's cluster, an address where nobody listens is still an error."""
    code = (
        "import sys\nfrom sartor.errors import UsageError\nfrom sartor.tasks import open_runner\n"
        "try:\n    open_runner(f'ray://127.0.0.1:{sys.argv[1]}', 'reference')\n"
        "except UsageError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": cluster.client}
    done = subprocess.run(
        [sys.executable, "-c", code, str(free_port())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Nothing answers at" in done.stdout, done.stderr


def test_the_cluster_counts_nothing(cluster):
    """The switch is in the environment of every process of the cluster, where it is read."""
    seen = 0
    for node in (cluster.head_node, *cluster.worker_nodes):
        for processes in node.all_processes.values():
            for info in processes:
                environment = Path(f"/proc/{info.process.pid}/environ").read_bytes().split(b"\0")
                assert b"RAY_USAGE_STATS_ENABLED=0" in environment
                seen += 1
    assert seen >= 4


def test_a_whole_fit_measures_on_a_device(cluster, tmp_path, monkeypatch, capsys):
    """Kernels inside the network, candidates and the result are timed there; what it says names the device."""
    times = {"selection": {"_TABLE_S": 30.0, "_SELECT_S": 3.0}, "fit": {"_BASELINE_S": 2.0, "_FINAL_S": 3.0}}
    for module, seconds in times.items():
        for name, value in seconds.items():
            monkeypatch.setattr(importlib.import_module(f"sartor.{module}"), name, value)
    monkeypatch.setenv("CI", "1")
    small_cnn(16).save(tmp_path / "model.onnx")
    out = tmp_path / "out"
    command = ["fit", str(tmp_path / "model.onnx"), "--target", "onnxruntime", "--budget", "latency=0.9x"]
    command += ["--recovery", "none", "--workers", f"{cluster.client}/alone", "--out", str(out), "--json"]
    code = main(command)
    printed = capsys.readouterr()
    assert code in (0, 3), printed.err
    report = json.loads(printed.out)
    assert report["history"] and report["conditions"]["device"] == "alone"
    assert any("kernels were timed" in line for line in report["decisions"])
    assert not any("one by one" in line for line in report["decisions"]), report["decisions"]


def test_a_killed_node_costs_nothing_while_another_offers_the_device(cluster, runner, artifact):
    shelf = runner("shelf")
    results = shelf.run_all(measure_task(artifact, seed, time_limit_s=3.0) for seed in range(2))
    killed = []

    def kill_one_that_measures():
        # Both nodes hold a task by now; one of them measures and the other waits for its turn.
        time.sleep(2.0)
        cluster.remove_node(cluster.of["first"], allow_graceful=False)
        killed.append(True)

    thread = threading.Thread(target=kill_one_that_measures)
    thread.start()
    measured = [requests.measurement(result) for result in results]
    thread.join()
    assert killed and [m.conditions["seed"] for m in measured] == [0, 1]


def test_a_device_that_is_lost_for_good_is_an_error(cluster, runner, artifact):
    alone = runner("alone", patience_s=1.0)
    cluster.remove_node(cluster.of["alone"], allow_graceful=False)
    with pytest.raises(BackendError, match="offers the device 'alone' any more"):
        alone.run(measure_task(artifact))
