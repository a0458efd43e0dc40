"""Several processes train one program as one process does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recovery_processes
import torch
from test_recovery import AXIS, Stop, normal, samples

from sartor.errors import UsageError
from sartor.recovery.processes import Processes, together
from sartor.recovery.samples import Samples


def torchrun(*command: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run two processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and what two found; a checkpoint of one that was killed was there before."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    calls: list[int] = []

    def evaluate(predict: object) -> float:
        calls.append(1)
        if len(calls) > 5:
            raise Stop
        return 0.0

    with pytest.raises(Stop):
        recovery_processes.resumed(two / "checkpoint", evaluate=evaluate)
    shutil.copytree(two / "checkpoint", one / "checkpoint")
    recovery_processes.write(one, Processes())
    done = torchrun(str(Path(recovery_processes.__file__)), str(two))
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"{name}.{rank}.npz"))


def said(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


RUNS = ("plain", "norms", "wrong", "resumed", "timed", "streamed")


def test_two_processes_are_one(folders):
    """One test, because the processes are started once per worker of the tests."""
    for name in RUNS:
        the_processes_agree(name, folders[1])
    for name in ("plain", "wrong", "resumed", "streamed"):
        two_find_what_one_finds(name, *folders)
    assert said(folders[1], "plain")["asked"] == 64, "no sample is asked about twice"
    assert 0 < said(folders[1], "wrong")["asked"] < 64
    assert "of 64 samples" in said(folders[1], "wrong")["notes"][0]
    statistics_are_averaged(*folders)


def the_processes_agree(name: str, two: Path) -> None:
    first, second = (weights(two, name, rank) for rank in (0, 1))
    assert all(np.array_equal(first[key], second[key]) for key in first), name
    assert said(two, name, 0) == said(two, name, 1)


def two_find_what_one_finds(name: str, one: Path, two: Path) -> None:
    for key, array in weights(one, name).items():
        np.testing.assert_allclose(weights(two, name)[key], array, rtol=1e-4, atol=1e-6, err_msg=name)
    alone, shared = said(one, name), said(two, name)
    assert [alone[k] for k in ("steps", "asked", "notes")] == [shared[k] for k in ("steps", "asked", "notes")]
    distances = [[distance for _, distance, _ in each["history"]] for each in (alone, shared)]
    np.testing.assert_allclose(*distances, rtol=1e-3, err_msg=name)
    if name != "wrong":
        start = recovery_processes.plain(1).initializer_array("w")
        assert np.abs(weights(one, name)["w"] - start).max() > 0.01, "it learned"


def statistics_are_averaged(one: Path, two: Path) -> None:
    """Weights have learned from other batch statistics, and the running ones are those of all samples."""
    alone, shared = weights(one, "norms"), weights(two, "norms")
    assert not np.allclose(alone["conv.weight"], shared["conv.weight"], atol=1e-5)
    np.testing.assert_allclose(shared["conv.weight"], alone["conv.weight"], atol=0.05)
    data = np.concatenate([inputs["x"] for inputs, _ in samples(64, batch=32)])
    weight = torch.from_numpy(shared["conv.weight"])
    convolved = torch.nn.functional.conv2d(torch.from_numpy(data), weight, padding=1)
    kept = [phase for phase, _, kept in said(two, "norms")["history"] if kept]
    assert kept[-1] == "final", "the statistics below are re-estimated ones"
    np.testing.assert_allclose(shared["bn.running_mean"], convolved.mean((0, 2, 3)).numpy(), atol=1e-4)


# ---- shares ------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache_bytes", [None, 1000])
def test_shares_make_up_the_batch(cache_bytes):
    def of(rank, count):
        processes = Processes(rank, count)
        return Samples(
            samples(64, labels="ids"), ["x"], AXIS, seed=0, processes=processes, cache_bytes=cache_bytes
        )

    whole, parts = of(0, 1), [of(rank, 3) for rank in range(3)]
    for batch, *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert [share.count for share in shares] == [6, 5, 5]
        assert [share.weight for share in shares] == [6 / 16, 5 / 16, 5 / 16] and batch.weight == 1.0
        for rank, share in enumerate(shares):
            torch.testing.assert_close(share.inputs[0], batch.inputs[0][rank::3])
            torch.testing.assert_close(share.labels, batch.labels[rank::3])
            assert len(share.inputs[0]) == share.count
    assert [len(x[0]) for x in parts[1].inputs(2)] == [5, 5]
    assert sum(b.count for b in parts[1].sample(32)) == 32, "what is judged is not shared"


def test_batches_that_cannot_be_shared_are_refused():
    data = Samples([({"x": normal(2, 3, 6, 6)}, None)], ["x"], AXIS, seed=0, processes=Processes(0, 3))
    with pytest.raises(UsageError, match="A batch of 2 samples cannot be shared among 3 processes"):
        next(data.epoch(0))


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together() as found:
        assert found == Processes(0, 1) and found.alone and found.first
        assert found.decided(3) == 3 and found.numbers([1.0]) == [1.0] and found.gathered("a") == ["a"]
