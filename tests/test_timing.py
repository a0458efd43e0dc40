"""The timer of whole models and its subprocess: crashes cost one model; interruptions; the command line around it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import null_backend
import pytest
from profile_machine import Machine

from sartor import backends
from sartor.backends import host, kernel_timing
from sartor.cli.main import main
from sartor.cost_models.profile import DeviceProfile
from sartor.errors import BackendError, UsageError
from sartor.profiling import build, networks, timing
from sartor.profiling.timing import BATCH, Effort, KernelTimer, reference_model

QUICK = Effort(half_width=0.5, fewest=3, most=3, visit_s=0.001)


@pytest.fixture
def null(tmp_path, monkeypatch):
    """The null backend: a model takes 0.2 ms for every byte, and some bytes crash."""
    null_backend.install(tmp_path / "site", null_backend.ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    backends.REGISTRY.refresh()
    monkeypatch.setattr(timing, "reference_model", lambda: b"12345")
    yield "null"
    monkeypatch.undo()
    backends.REGISTRY.refresh()


def test_a_model_that_crashes_or_fails_costs_only_itself(null):
    with KernelTimer(null) as timer:
        batch = timer([b"1234567890" * 10, b"crash", b"12345", b"fail"], QUICK)
        # Five bytes against a hundred, on a busy machine.
        assert batch.times[2].warm.ratio < batch.times[0].warm.ratio
        assert "SIGABRT" in batch.times[1].reason and "planted failure" in batch.times[3].reason
        assert batch.times[1].warm is batch.times[3].warm is None
        assert batch.reference_s > 0
        again = timer([b"12345"], QUICK)  # the same subprocess answers
        assert again.times[0].warm.ratio > 0


def test_the_worker_is_pinned_and_says_where(null):
    with KernelTimer(null) as timer:
        pinned = timer([b"1"], QUICK).conditions["pinned"]
    assert len(pinned) == 1
    with KernelTimer(null, pin=False) as timer:
        assert timer([b"1"], QUICK).conditions["pinned"] == []


def test_a_target_without_a_reference_is_an_error(null, monkeypatch):
    monkeypatch.setattr(timing, "reference_model", lambda: b"fail")
    with KernelTimer(null) as timer, pytest.raises(BackendError, match=r"reference kernel.*planted failure"):
        timer([b"1"], QUICK)
    with KernelTimer(null) as timer, pytest.raises(UsageError, match="33 models"):
        timer([b"1"] * (BATCH + 1), QUICK)


def test_a_real_kernel_is_timed_on_a_real_target():
    with KernelTimer("onnxruntime") as timer:
        batch = timer([reference_model()], dataclasses.replace(QUICK, fewest=4, most=6))
    (timed,) = batch.times
    assert timed.warm.ratio == pytest.approx(1.0, rel=0.9)  # it is the reference
    assert batch.reference_s > 0 and batch.conditions["runtime"]


def test_the_machine_is_described():
    device = host.device()
    assert device["cores"] >= device["cores_allowed"] >= 1 and device["memory_bytes"] > 1 << 20
    assert set(device["clocks"]) >= {"governor"}
    assert all(size > 0 for size in device["caches"].values())
    assert host.least_busy([3, 1, 2], 3) == (1, 2, 3)


def test_the_least_busy_processors_are_chosen(monkeypatch):
    looks = iter([{0: 100, 1: 100, 2: 100}, {0: 101, 1: 109, 2: 105}])
    monkeypatch.setattr(host, "_idle_ticks", lambda: next(looks))
    assert host.least_busy([0, 1, 2], 2, look_s=0.0) == (1, 2)


# ---- command line --------------------------------------------------------------------------------
@pytest.fixture
def synthetic(monkeypatch):
    """`sartor profile` on a synthetic machine, without models."""
    machine = Machine(noise=0.002)
    machine.close = lambda: None
    monkeypatch.setattr(build, "ModelTimer", lambda *_, **__: machine)
    monkeypatch.setattr("sartor.profiling.check.ModelTimer", lambda *_, **__: machine)
    monkeypatch.setattr(networks, "KINDS", {k: networks.KINDS[k] for k in ("residual", "inverted")})
    monkeypatch.setattr(build, "_NETWORKS_AT_ONCE", 6)  # families are judged by three networks and more
    monkeypatch.setattr(build, "default_fit", lambda profile: profile)
    return machine


def test_profile_and_check_from_the_command_line(tmp_path, capsys, synthetic):
    out = tmp_path / "device.json"
    assert (
        main(["profile", "--target", "onnxruntime", "--out", str(out), "--minutes", "0.001", "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sartor.profile/1" and document["kernels"] > 20
    assert DeviceProfile.load(out).target["threads"] == 1
    assert main(["profile", "--check", str(out)]) == 0
    assert "The profile holds." in capsys.readouterr().out
    synthetic.speed["Conv"] = 1.6
    assert main(["profile", "--check", str(out), "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False and any("'conv'" in change for change in found["changes"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "onnxruntime"], "--out FILE"),
        (["--check", "a.json", "--target", "onnxruntime"], "leave out"),
        (["--check", "a.json"], "cannot be read"),
        (["--target", "onnxruntime", "--out", "d.json", "--precision", "int8"], "one by one"),
        (["--target", "tensorrt", "--out", "d.json"], "tensorrt"),
        (["--target", "nothing", "--out", "d.json"], "nothing"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- interruptions -------------------------------------------------------------------------------
class Scheduler:
    """A processor that is taken away during some runs: wall time goes on, computing and the counter tell."""

    def __init__(self, monkeypatch, taken):
        self.wall = self.computed = self.switches = 0
        self.taken = iter(taken)
        monkeypatch.setattr(kernel_timing.time, "perf_counter_ns", lambda: self.wall)
        monkeypatch.setattr(kernel_timing.time, "process_time_ns", lambda: self.computed)
        usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_nivcsw=self.switches))
        monkeypatch.setattr(kernel_timing, "resource", usage)

    def run(self):
        away = next(self.taken)
        self.wall += 1_000_000 + away
        self.computed += 1_000_000
        self.switches += away > 0


def test_time_that_other_processes_had_is_not_the_kernels(monkeypatch):
    scheduler = Scheduler(monkeypatch, [0, 3_000_000, 3_000_000])
    assert kernel_timing.undisturbed(scheduler.run, alone=True) == (1e-3, False)
    assert kernel_timing.undisturbed(scheduler.run, alone=True) == (1e-3, False)
    assert kernel_timing.undisturbed(scheduler.run, alone=False) == (4e-3, True)


def test_disturbed_runs_count_only_if_there_are_no_others(monkeypatch):
    subject = kernel_timing._Subject.__new__(kernel_timing._Subject)
    for taken, expected in (([0, 9, 0, 9], 1e-3), ([0, 9, 9, 9], 1e-3 + 9e-9)):
        scheduler = Scheduler(monkeypatch, taken)
        subject.run, subject.runs = scheduler.run, 3
        assert subject.visit(0.0, 0.1, alone=False) == pytest.approx(expected, rel=1e-12)


def test_a_visit_begins_when_the_model_has_settled(monkeypatch):
    """After another model the first runs are slower; as many as the time says do not count, at least one."""
    subject, now = kernel_timing._Subject.__new__(kernel_timing._Subject), [0.0]
    runs = iter(range(10_000))

    def run():
        now[0] += 0.005 if next(runs) < 6 else 0.001

    monkeypatch.setattr(kernel_timing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(kernel_timing, "undisturbed", lambda run, alone: (timed(run), False))

    def timed(run):
        begun = now[0]
        run()
        return now[0] - begun

    subject.run, subject.runs = run, 3
    assert subject.visit(0.0, 0.5, alone=True) == pytest.approx(0.005)
    assert subject.visit(0.03, 0.5, alone=True) == pytest.approx(0.001)


# ---- new models are slow -------------------------------------------------------------------------
@pytest.mark.parametrize("slow_s", [0.0, 0.06, 0.3, 9.0])
def test_a_model_is_timed_when_it_becomes_no_faster(monkeypatch, slow_s):
    """It begins at twice what it takes, and comes down to that steadily; runs of a millisecond."""
    now = [0.0]

    def once():
        now[0] += 1e-3 * (1.0 + max(0.0, 1.0 - now[0] / slow_s) if slow_s else 1.0)

    def undisturbed(run, alone):
        before = now[0]
        run()
        return now[0] - before, False

    monkeypatch.setattr(kernel_timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(kernel_timing, "undisturbed", undisturbed)
    seconds = kernel_timing.warmed(once, True, 0.12)
    assert now[0] >= 0.12
    if slow_s > 1:  # what takes too long is not waited for
        assert now[0] < 0.6 and seconds < 2e-3
    else:
        assert now[0] < slow_s + 0.2 and seconds == pytest.approx(1e-3, rel=0.05)
