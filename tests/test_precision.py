"""Before a program is written in a precision: what no form of it makes legal is refused; integers alone on demand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes

from sartor.backends.legality import NodeRule, Rules, check_rules
from sartor.backends.precision import agreeing_precision, precision_of
from sartor.backends.protocol import TargetOptions
from sartor.cli import main
from sartor.errors import BackendError, UsageError
from sartor.passes.base import Context
from sartor.passes.cast import Cast
from sartor.passes.cast import everywhere as cast_everywhere
from sartor.passes.quantize import Quantize
from sartor.precision import require_legal
from sartor.quantization import integer_only
from sartor.quantization.placement import everywhere


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images(*middle, outputs=("y",)):
    """conv → `middle` (a to b) → conv."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], "first"),
        *middle,
        node("Conv", ["b", "v"], ["y"], "last"),
    ]
    constants = {"w": draw(4, 3, 3, 3), "v": draw(5, 4, 1, 1)}
    return program_from_nodes(nodes, {"x": ("N", 3, 8, 8)}, outputs, constants)


HARDMAX = (node("Hardmax", ["a"], ["b"], "odd", axis=1),)
INDICES = (node("MaxPool", ["a"], ["b", "i"], "odd", kernel_shape=[2, 2]),)


@pytest.fixture
def nothing_is_measured(monkeypatch):
    """Calibration, quantizer and twin end the test."""

    def fail(*arguments, **keywords):
        raise AssertionError("vendor work before legality")

    monkeypatch.setattr("sartor.quantization.supply.find_ranges", fail)
    monkeypatch.setattr("sartor.quantization.supply.place", fail)
    monkeypatch.setattr("sartor.ir.fx_magnitudes.largest_magnitudes", fail)
    monkeypatch.setattr("sartor.backends.process.call", fail)


@pytest.fixture
def files(tmp_path):
    x = draw(20, 3, 8, 8)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path


def lower(files, program, *arguments):
    program.save(files / "model.onnx")
    common = ("lower", files / "model.onnx", "--data", files / "data.npz", "-o", files / "out")
    return main([str(a) for a in (*common, *arguments)])


@pytest.mark.parametrize("precision", ["int8", "f16", "f32"])
@pytest.mark.parametrize(("middle", "outputs"), [(HARDMAX, ("y",)), (INDICES, ("y", "i"))])
def test_an_operator_that_a_target_lacks_is_refused_first(
    precision, middle, outputs, files, capsys, nothing_is_measured
):
    program = images(*middle, outputs=outputs)
    assert lower(files, program, "--target", "tflite", "--precision", precision) == 2
    err = capsys.readouterr().err
    assert "Backend 'tflite' cannot run this program. Node 'odd'" in err and not (files / "out").exists()


@pytest.mark.parametrize("precision", ["int8", "f16"])
def test_a_missing_package_is_said_first(precision, files, capsys, monkeypatch, nothing_is_measured):
    from sartor.backends.openvino import legality

    def missing():
        raise UsageError("'openvino' is not installed; pip install 'sartor[openvino]'.")

    monkeypatch.setattr(legality, "capabilities", missing)
    assert (
        lower(files, images(*(node("Relu", ["a"], ["b"]),)), "--target", "openvino", "--precision", precision)
        == 2
    )
    assert "pip install 'sartor[openvino]'" in capsys.readouterr().err


def test_a_fit_is_refused_first(tmp_path, nothing_is_measured):
    from sartor.budget import parse_budget
    from sartor.data import load_data
    from sartor.fit import FitOptions, fit

    np.savez(tmp_path / "data.npz", x=draw(20, 3, 8, 8))
    program = images(*HARDMAX)
    data = load_data(str(tmp_path / "data.npz"), ["x"], program=program)
    options = FitOptions("tflite", parse_budget("latency=0.5x"), precision="int8")
    with pytest.raises(BackendError, match="Node 'odd'"):
        fit(program, options, data, tmp_path / "out")


# ---- what only one form breaks ----------------------------------------------------------------------
def target_with(monkeypatch, *rules, precisions=("int8", "f16")):
    table = Rules(model=(agreeing_precision(),), nodes=rules)
    backend = SimpleNamespace(
        capabilities=lambda: SimpleNamespace(precisions=precisions),
        legality=lambda program, options: check_rules(program, options, table),
    )
    monkeypatch.setattr("sartor.backends.get", lambda name: backend)


def reads_integers(program, item):
    made = item.inputs[0].producer() if item.inputs else None
    ok = item.op_type != "Conv" or (made is not None and made.op_type == "DequantizeLinear")
    return ok, item.op_type


def reads_float16(program, item):
    kind = program.types()[item.inputs[0].name].name
    return item.op_type != "Conv" or kind == "FLOAT16", kind


def no_relu(program, item):
    return item.op_type != "Relu", item.op_type


INTEGERS = NodeRule("integers", "Convolutions read integers.", reads_integers)
HALVES = NodeRule("halves", "Convolutions read float16.", reads_float16)
NO_RELU = NodeRule("no-relu", "There is no Relu.", no_relu)


@pytest.mark.parametrize(("rule", "precision"), [(INTEGERS, "int8"), (HALVES, "f16")])
def test_what_the_precision_mends_is_not_refused(rule, precision, monkeypatch):
    target_with(monkeypatch, rule)
    require_legal("any", small_cnn(8), TargetOptions(precision=precision))
    with pytest.raises(BackendError, match=f"'conv0'.*{rule.text}"):
        require_legal("any", small_cnn(8), TargetOptions(precision="f32"))


@pytest.mark.parametrize(("rule", "precision"), [(INTEGERS, "f16"), (HALVES, "int8"), (NO_RELU, "int8")])
def test_what_it_does_not_mend_is(rule, precision, monkeypatch):
    target_with(monkeypatch, rule)
    with pytest.raises(BackendError, match=rule.text):
        require_legal("any", small_cnn(8), TargetOptions(precision=precision))


def test_a_norm_that_will_be_folded_is_not_asked_about(monkeypatch):
    rule = NodeRule(
        "no-norm", "There is no norm.", lambda p, n: (n.op_type != "BatchNormalization", n.op_type)
    )
    target_with(monkeypatch, rule)
    require_legal("any", small_cnn(8), TargetOptions(precision="int8"))
    with pytest.raises(BackendError, match="There is no norm"):
        require_legal("any", small_cnn(8), TargetOptions(precision="f16"))


def test_a_program_in_another_precision_is_refused(monkeypatch):
    target_with(monkeypatch)
    half = Cast().replay(small_cnn(8), cast_everywhere(small_cnn(8))).program
    assert precision_of(half) == "f16"
    with pytest.raises(BackendError, match="use --precision f16"):
        require_legal("any", half, TargetOptions(precision="int8"))


def test_the_form_for_rules_has_everything_in_integers():
    from sartor.passes.fold_batch_norm import FoldBatchNorm

    folded = FoldBatchNorm().run(small_cnn(8)).program
    assert integer_only(Quantize().replay(folded, everywhere(folded)).program) == []


# ---- integers alone ---------------------------------------------------------------------------------
def test_integers_alone_on_demand(files, capsys):
    common = ("--target", "onnxruntime", "--precision", "int8", "--integer-only", "--no-verify")
    odd = images(node("Tanh", ["a"], ["t"], "odd"), node("Sin", ["t"], ["b"], "odder"))
    assert lower(files, odd, *common) == 2
    err = capsys.readouterr().err
    assert "--integer-only: " in err and "nodes compute in float" in err and not (files / "out").exists()
    assert "Node 'odd' (Tanh)" in err and "Node 'odder' (Sin)" in err
    assert lower(files, images(node("Relu", ["a"], ["b"], "relu")), *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["computes_in_float"] == []


def test_what_computes_in_float_is_in_the_document(files, capsys):
    program = images(node("Tanh", ["a"], ["t"], "odd"), node("Sin", ["t"], ["b"], "odder"))
    common = ("--target", "onnxruntime", "--precision", "int8", "--no-verify")
    assert lower(files, program, *common, "--json") == 0
    found = {f["node"]: f for f in json.loads(capsys.readouterr().out)["computes_in_float"]}
    assert found["odd"]["op_type"] == "Tanh" and "is not quantized" in found["odd"]["reason"]
    assert "'odd' (Tanh)" in found["odd"]["where"]
    assert lower(files, program, *common) == 0
    assert f"nodes that compute in float: {len(found)}" in capsys.readouterr().out


def test_integers_alone_are_of_int8(files, capsys):
    assert lower(files, small_cnn(8), "--target", "onnxruntime", "--integer-only") == 2
    assert "--integer-only asks for integers, and --precision is 'f32'" in capsys.readouterr().err


def test_operators_on_integers_compute_in_integers():
    constants = {
        "w": np.int8(draw(3, 2) * 10),
        **{name: np.float32(0.1) for name in ("xs", "ws", "ys")},
        **{name: np.int8(0) for name in ("xz", "wz", "yz")},
    }
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"], "quantize"),
        node("QLinearMatMul", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["p"], "product"),
        node("DequantizeLinear", ["p", "ys", "yz"], ["y"], "dequantize"),
    ]
    assert integer_only(program_from_nodes(nodes, {"x": ("N", 3)}, ["y"], constants)) == []


def test_data_do_not_matter_for_the_form_for_rules():
    program = small_cnn(8)
    before = program.to_bytes()
    plan = cast_everywhere(program)
    assert set(plan["nodes"]) == set(Cast().run(program, Context()).plan["nodes"])
    assert program.to_bytes() == before
