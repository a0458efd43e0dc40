"""What the programs in `benchmarks/` make of their measurements; the measurements themselves are not tested."""

from __future__ import annotations

import contextlib
import io
import types

import int8
import lowered_networks
import lowering
import pytest
from backend_programs import small_cnn

from sartor.backends import isolation
from sartor.backends.protocol import KernelTime
from sartor.backends.rounds import Round
from sartor.errors import BackendError


def cell(model, **more):
    return {"model": model, "target": "onnxruntime", "precision": "f32", "filled": False, **more}


FILLED = {"filled": True, "rel_error": 1e-6, "tolerance": 1e-4, "verified": True, "executed": True}


def test_the_worst_error_is_that_of_artifacts_that_are_not_equal_too():
    rows = [
        cell("a", **FILLED, latency_s={}),
        cell("b", rel_error=0.3, tolerance=1e-4, verified=False, executed=True, reason="not equal: 0.3"),
        cell("c", filled=True, executed=False),
        cell("d", reason="the target has no f32 here"),
        cell("e", **FILLED | {"filled": False, "reason": "BackendError: planted"}),
    ]
    found = lowering.summarise(rows)
    assert (found["cells"], found["filled"], found["executed"], found["measured"]) == (5, 2, 3, 1)
    assert found["worst_rel_error"] == 0.3 == found["worst_rel_error_by_precision"]["f32"]
    assert [entry["model"] for entry in found["unverified"]] == ["b"]
    assert found["unverified"][0]["rel_error"] == 0.3 and found["unverified"][0]["tolerance"] == 1e-4
    assert len(found["reasons"]) == 3 and "BackendError: planted" in found["reasons"]
    infinite = [*rows, cell("f", rel_error=None, tolerance=1e-4, verified=False, reason="not equal")]
    found = lowering.summarise(infinite)
    assert found["worst_rel_error"] is None and found["unverified"][1]["rel_error"] is None


def test_a_cell_that_cannot_be_measured_is_not_filled(monkeypatch):
    from sartor.backends import measure

    def fails(*_, **__):
        raise BackendError("planted")

    monkeypatch.setattr(lowering, "random_program", lambda name: small_cnn(width=8))
    monkeypatch.setattr(measure, "measure", fails)
    row = lowering.examine("small", "onnxruntime", "f32", 1)
    assert row["reason"] == "BackendError: planted" and not row["filled"] and row["verified"]
    assert row["rel_error"] < 1e-5 and row["lower_s"] > 0 and row["bytes"] > 0
    assert lowering.summarise([row])["reasons"] == {"BackendError: planted": 1}


def test_a_conversion_is_not_taken_from_a_cache(monkeypatch, tmp_path):
    def lower(*arguments, fresh=False):
        raise BackendError(f"planted; fresh: {fresh}")

    monkeypatch.setattr(isolation, "lower", lower)
    with pytest.raises(BackendError, match="fresh: True"):
        lowered_networks.lower(small_cnn(width=8), "tflite", "f32", tmp_path / "out", 1)


KERNELS = {
    "f32": [("conv", "Conv", 8e-3, "jit_avx512_FP32"), ("softmax", "Softmax", 2e-3, "ref_FP32")],
    "int8": [
        ("conv", "QLinearConv", 1e-3, "brgconv_avx512_I8"),
        ("softmax", "Softmax", 2e-3, "ref_FP32"),
        ("in", "QuantizeLinear", 1e-3, "jit_U8"),
        ("moved", "Transpose", 0.0, "jit_I8"),
    ],
}


@pytest.fixture(name="planted")
def planted_fixture(monkeypatch):
    """Artifacts without content, rounds with planted times, kernels with planted shares."""
    from sartor.backends import measure

    times = {"f32": 4e-3, "int8": 2e-3, "small f32": 2e-3, "small int8": 1e-3}
    equal = {"passed": True}

    def lower(program, target, precision, folder, threads):
        found = types.SimpleNamespace(
            passed=equal["passed"], max_rel_error=1e-3, summary=lambda: "planted error"
        )
        artifact = types.SimpleNamespace(target=target, precision=precision)
        return lowered_networks.Lowered(artifact, 1.0, found)

    def measured(target, artifacts, options, **_):
        rounds = [Round((0, 1, 2, 3), tuple(times.values()))] * 3
        latencies = [types.SimpleNamespace(median=t) for t in times.values()]
        return types.SimpleNamespace(rounds=rounds, latencies=latencies)

    def profile(target, artifact, options):
        return [KernelTime(name, op, (), s, 30, how) for name, op, s, how in KERNELS[artifact.precision]]

    monkeypatch.setattr(int8, "lower", lower)
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "profile", profile)
    return types.SimpleNamespace(times=times, equal=equal)


FORMS = dict.fromkeys(("unpruned/f32", "unpruned/int8", "pruned/f32", "pruned/int8"))


@pytest.mark.parametrize("target", int8.TARGETS)
def test_what_int8_does_not_gain_is_explained(planted, target):
    row = int8.measured("net", target, FORMS, 1.0, 1)
    assert row["unpruned_speedup"] == 2.0 == row["pruned_speedup"] and row["kept_speedup"] == 1.0
    assert "explanation" not in row and row["rel_error"]["pruned/f32"] == 1e-3
    planted.times["small int8"] = 1.5e-3  # of its speed-up, pruning leaves two thirds
    row = int8.measured("net", target, FORMS, 1.0, 1)
    assert row["kept_speedup"] == pytest.approx(2 / 3) and set(row["explanation"]) == {*FORMS, "summary"}
    found = row["explanation"]["pruned/int8"]
    assert found["share_fraction_by_type"] == {"Softmax": 0.5, "QLinearConv": 0.25, "QuantizeLinear": 0.25}
    assert found["left_in_float"] == [{"name": "softmax", "op_type": "Softmax", "share_fraction": 0.5}]
    assert row["explanation"]["pruned/f32"]["share_fraction_by_type"] == {"Conv": 0.8, "Softmax": 0.2}
    assert "left_in_float" not in row["explanation"]["pruned/f32"]
    planted.times |= {"int8": 5e-3, "small int8": 1e-3}  # slower than float32, and pruning helps
    row = int8.measured("net", target, FORMS, 1.0, 1)
    assert set(row["explanation"]) == {"unpruned/f32", "unpruned/int8", "summary"}
    assert row["explanation"]["summary"] == [
        "unpruned: by themselves its kernels take 0.40 of the time of float32; 50% of it is Softmax (20% in float32), "
        "50.0% is left in float"
    ]
    assert int8.summarise([row], claimed=True)["explained"] == [f"net on {target}"]


def test_an_artifact_that_is_not_equal_has_no_time(planted):
    planted.equal["passed"] = False
    row = int8.measured("net", "onnxruntime", FORMS, 1.0, 1)
    assert row["reason"] == "not equal: unpruned/f32: planted error" and "latency_s" not in row
    summary = int8.summarise([row], claimed=True)
    assert summary["unverified"] == ["net on onnxruntime"] and "least_speedup" not in summary


def test_a_precision_is_made_by_passes_on_random_calibration_data():
    program = small_cnn(width=8)
    with contextlib.redirect_stdout(io.StringIO()):
        quantized = lowered_networks.written(program, lowering.PRECISIONS["int8"])
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph)
    assert lowered_networks.written(program, lowering.PRECISIONS["f32"]) is program
