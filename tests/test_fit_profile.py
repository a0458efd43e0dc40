"""`sartor fit --profile`: one of this target and machine predicts, one that no longer holds is replaced."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from cost_networks import residual
from profile_machine import REFERENCE_S, Machine
from test_kernel_table import STEP, Target

from sartor import backends
from sartor.backends import host
from sartor.backends.many_models import ModelTimes
from sartor.cli import main
from sartor.cost_models.interval import Interval
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.law import Law
from sartor.cost_models.sampling import sample_kernels
from sartor.errors import UsageError
from sartor.fit_profile import outdated, sampled_precision
from sartor.ir.workload import build_workload
from sartor.profiling.inside import Inside, InsideEffort
from sartor.selection import Selection
from sartor.workbench import Workbench


@pytest.fixture(scope="module")
def profile():
    program = residual({"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}).program(("logits",))
    version = backends.get("onnxruntime").capabilities().version
    return sample_kernels(
        build_workload(program),
        Target(),
        target={"name": "onnxruntime", "version": version, "threads": 1, "precision": "f32"},
        device=host.device(),
        channel_grid=lambda _: STEP,
        seconds=1e9,
    )


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Runs `sartor fit` on a small network, with a profile or without; returns (exit code, standard error)."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    model = residual({"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}).program(("logits",))
    model.save(tmp_path / "model.onnx")

    def run(profile, *more):
        command = ["fit", "model.onnx", "--target", "onnxruntime", "--budget", "latency=0.8x"]
        command += ["--recovery", "none", "--out", "out", *more]
        if profile is not None:
            profile.save(tmp_path / "device.json")
            command += ["--profile", "device.json"]
        return main(command), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "openvino"}, "of target 'openvino', and this fit of 'onnxruntime'"),
        ({"threads": 2}, "of threads '2', and this fit of '1'"),
        ({"precision": "bf16"}, "of precision 'bf16', and this fit of 'f32'"),
    ],
)
def test_a_profile_of_something_else_is_refused(fit, profile, change, said, tmp_path):
    code, error = fit(dataclasses.replace(profile, target={**profile.target, **change}))
    assert code == 2 and said in error and "sartor profile --target onnxruntime" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["device.json", "model.onnx"]


INTERVAL = {**Interval(noise=0.02).to_dict()}
OUTDATED = {
    "it is of version '0.1'": lambda p: dataclasses.replace(p, target={**p.target, "version": "0.1"}),
    "it is of processor 'another'": lambda p: dataclasses.replace(p, device={**p.device, "cpu": "another"}),
    "it is of fusion rules 'others'": lambda p: dataclasses.replace(
        p, target={**p.target, "settings": {"fusion_sha256": "others"}}
    ),
    "it says": lambda p: dataclasses.replace(
        p, law=Law.prior(inside=True).to_dict(), interval=INTERVAL, call_s=1.0
    ),
}


@pytest.mark.parametrize("said", [*OUTDATED, ""])
def test_a_profile_that_no_longer_holds_is_replaced_by_a_small_one(fit, profile, monkeypatch, said):
    """Of another version or machine, or one that is wrong about the original."""
    seen = []

    def look(selection):
        selection.baseline = {"latency": float(Ladder(profile).estimate_batch(selection.workload))}
        selection.decisions.clear()
        seen.append(original(selection).profile.samples == profile.samples)
        seen.append([*selection.decisions])
        raise UsageError("Enough was seen.")

    original = Selection._cost_model
    monkeypatch.setattr(Selection, "_cost_model", look)
    small = dataclasses.replace(profile, samples=profile.samples[:-1])
    monkeypatch.setattr(Selection, "_sampled", lambda _: (small, (), ["kernels were timed"]))
    code, error = fit(OUTDATED.get(said, lambda p: p)(profile))
    assert code == 2 and "Enough was seen" in error, error
    same, decisions = seen
    assert same == (not said)
    if said:
        assert (
            f"the device profile is not used: {said}" in decisions[0] and decisions[1] == "kernels were timed"
        )


def test_a_profile_of_this_machine_is_no_help_on_another(profile):
    backend = backends.get("onnxruntime")
    assert outdated(profile, backend, SimpleNamespace(device="")) == ""
    assert outdated(profile, backend, SimpleNamespace(device="shelf")) == "candidates are measured on 'shelf'"


def test_a_profile_that_fits_predicts(fit, profile, monkeypatch):
    """Nothing of the network is timed kernel by kernel."""

    seen = []

    def look(selection):
        selection.baseline = {"latency": 2e-3}
        model = original(selection)
        seen.append((model.profile.samples, len(model.observations)))
        seen.append(float(model.estimate_batch(selection.workload)))
        raise UsageError("Enough was seen.")

    original = Selection._cost_model
    monkeypatch.setattr(Selection, "_cost_model", look)
    monkeypatch.setattr(Selection, "_sampled", lambda _: pytest.fail("kernels were timed"))
    code, error = fit(profile)
    assert code == 2 and "Enough was seen" in error
    assert seen == [(profile.samples, 1), pytest.approx(2e-3, rel=0.05)]


@pytest.mark.parametrize(("precision", "tells"), [("f32", True), ("f32", False), ("int8", True)])
def test_without_a_profile_kernels_are_timed_inside_the_network_where_the_target_tells(
    fit, monkeypatch, tmp_path, precision, tells
):
    """And one by one where it does not, or where the network will be in a precision in which they cannot be timed."""
    seen, machine = {}, Machine()
    inside_it = tells and precision == "f32"

    def inside(_, models, options, effort):
        assert precision == options.precision == "f32"
        return machine(models, effort) if tells else [Inside(None, reason="it is mute") for _ in models]

    def alone(_, models, options, repeats):
        assert options.precision == "f32"
        return ModelTimes({n: 1e-4 for n in range(len(models))}, {}, 1e-3, {}, len(models))

    def look(selection):
        (whole,) = Machine()([selection.program.to_bytes()], InsideEffort())
        selection.baseline = {"latency": 1.1 * whole.latency.ratio * REFERENCE_S}
        selection.decisions.clear()
        seen["model"], seen["decisions"] = original(selection), [*selection.decisions]
        seen["error"] = (
            float(seen["model"].estimate_batch(selection.workload)) / selection.baseline["latency"]
        )
        selection.decisions.clear()
        assert original(selection).to_json() == seen["model"].to_json(), "from the journal"
        assert selection.decisions == seen["decisions"]
        raise UsageError("Enough was seen.")

    original = Selection._cost_model
    monkeypatch.setattr(Selection, "_cost_model", look)
    monkeypatch.setattr(Workbench, "time_inside", inside)
    monkeypatch.setattr(Workbench, "time_models", alone)
    monkeypatch.setattr("sartor.selection._TABLE_S", 1.0)
    np.savez(tmp_path / "data.npz", x=np.zeros((64, 3, 16, 16), np.float32), labels=np.arange(64) % 10)
    data = ("--data", "data.npz", "--recovery", "none", "--max-drop", "100") if precision != "f32" else ()
    code, error = fit(None, "--precision", precision, *data)
    assert code == 2 and "Enough was seen" in error, error
    samples = seen["model"].profile.samples
    assert samples and all(bool(sample.network) == inside_it for sample in samples)
    assert (len(seen["model"].observations) > 3) == inside_it
    assert seen["error"] == pytest.approx(1.0, rel=0.06)
    (line,) = seen["decisions"]
    assert ("random prunings" in line) == inside_it
    assert ("it is mute" in line) == (not tells) and ("in f32 for int8" in line) == (precision == "int8")


def test_kernels_of_precisions_that_passes_make_are_timed_in_float32():
    assert [sampled_precision(p) for p in ("f32", "bf16", "f16", "int8")] == ["f32", "bf16", "f32", "f32"]
