"""Quantized values are compared one by one on a target's own values, and so is what follows the last of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes

import sartor
from sartor import lowered, oracle
from sartor.backends import isolation
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError
from sartor.passes.base import Context


def quantize(program, spec="fold-batch-norm,quantize", keep=()):
    draw = np.random.default_rng(3).standard_normal
    shape = program.input_shapes["x"]
    calibration = [({"x": draw(shape).astype(np.float32)}, None) for _ in range(4)]
    context = Context(data={"calibration": calibration}, keep=keep)
    return sartor.Pipeline.parse(spec).run(program, context).program


@pytest.fixture(scope="module")
def quantized():
    return quantize(small_cnn(8))


INT8 = TargetOptions(precision="int8")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_quantized_values_are_compared_step_by_step(quantized, target, tmp_path):
    artifact = isolation.lower(target, quantized, tmp_path / "a", INT8)
    result = lowered.verify(quantized, artifact, INT8)
    assert result.passed and result.quantized_steps <= 1 and "within" in result.summary()


def test_a_quantized_value_that_is_off_is_named(quantized, tmp_path, monkeypatch):
    """A runtime with another zero point for one value: three steps of 255, which the outputs hardly show."""
    name = next(
        n.inputs[2].name for n in quantized.nodes() if n.op_type == "QuantizeLinear" and "add1" not in n.name
    )

    def change(program):
        wrong = program.clone()
        for n in list(wrong.nodes()):  # of the QuantizeLinear alone: not a mere change of scale
            if n.op_type == "QuantizeLinear" and n.inputs[2].name == name:
                array = wrong.initializer_array(name) + 3
                value = ir.Value(name="off", const_value=ir.tensor(array.astype(np.int8), name="off"))
                wrong.graph.register_initializer(value)
                n.replace_input_with(2, value)
        wrong.invalidate()
        return wrong

    original = isolation.lower
    artifact = original("onnxruntime", change(quantized), tmp_path / "a", INT8)
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, change(p), f, o))
    result = lowered.verify(quantized, artifact, INT8)
    assert not result.passed and result.quantized_steps >= 3
    assert "QuantizeLinear" in result.first_divergent_node


# ---- what follows the last quantized value ---------------------------------------------------
@pytest.fixture(scope="module")
def kept():
    """The last layer stays in float."""
    return quantize(small_cnn(8), keep=("linear",))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_layer_that_is_kept_in_float_is_as_exact_as_floats_are(kept, target, tmp_path):
    result = lowered.verify(kept, isolation.lower(target, kept, tmp_path / "a", INT8), INT8)
    assert result.passed and result.quantized_steps <= 1


@pytest.mark.parametrize("factor", [1.3, 1.001])
def test_an_error_behind_the_last_quantized_value_is_named(kept, factor, tmp_path, monkeypatch):
    """Rounding moves these outputs by per cent, but not on the target's own quantized values."""

    def change(program):
        wrong = program.clone()
        array = wrong.initializer_array("w2") * np.float32(factor)
        wrong.initializers["w2"].const_value = ir.tensor(array, name="w2")
        return wrong

    original = isolation.lower
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, change(p), f, o))
    artifact = isolation.lower("onnxruntime", kept, tmp_path / "a", INT8)
    result = lowered.verify(kept, artifact, INT8)
    assert not result.passed and result.tolerance == oracle.LOWERED_TOLERANCE["f32"]
    assert result.first_divergent_node.startswith("'linear' (Gemm)")
    assert "on the target's own quantized values" in result.note


class Constants:
    """What `verify` reads of data: images of one number each."""

    def __init__(self, *numbers):
        self.calibration = [({"x": np.full((1, 3, 16, 16), n, np.float32)}, None) for n in numbers]


def test_every_sample_is_compared(quantized, tmp_path, monkeypatch):
    """A value that is cut off above what the first sample reaches."""

    def change(program):
        wrong = program.clone()
        maker = next(n for n in wrong.graph if n.name == "x/QuantizeLinear")
        most = ir.Value(name="most", const_value=ir.tensor(np.array(0.5, np.float32), name="most"))
        wrong.graph.register_initializer(most)
        cut = ir.node("Min", [maker.inputs[0], most], num_outputs=1, name="cut")
        cut.outputs[0].name = "cut"
        wrong.graph.insert_before(maker, cut)
        maker.replace_input_with(0, cut.outputs[0])
        wrong.invalidate()
        return wrong

    original = isolation.lower
    artifact = original("onnxruntime", change(quantized), tmp_path / "a", INT8)
    monkeypatch.setattr(isolation, "lower", lambda t, p, f, o: original(t, change(p), f, o))
    result = lowered.verify(quantized, artifact, INT8, data=Constants(0.1, 2.0, 0.1))
    assert not result.passed and result.quantized_steps > 2
    assert result.first_divergent_node.startswith("'x/QuantizeLinear'")


# ---- targets that do not take every value as an output ---------------------------------------
def refusing(monkeypatch, most):
    original = isolation.lower

    def lower(target, program, folder, options):
        if len(program.graph.outputs) > most:
            raise BackendError(f"The target takes {most} outputs.")
        return original(target, program, folder, options)

    monkeypatch.setattr(isolation, "lower", lower)


def test_half_of_the_values_are_compared_where_all_are_too_many(quantized, tmp_path, monkeypatch):
    count = sum(n.op_type == "QuantizeLinear" for n in quantized.nodes())
    artifact = isolation.lower("onnxruntime", quantized, tmp_path / "a", INT8)
    refusing(monkeypatch, most=count)
    result = lowered.verify(quantized, artifact, INT8)
    assert result.passed and result.quantized_steps is not None
    assert f"of {count} quantized values were compared; with all as outputs: The target takes" in result.note
    assert result.note in result.summary()


def test_values_that_could_not_be_compared_are_said(quantized, tmp_path, monkeypatch):
    artifact = isolation.lower("onnxruntime", quantized, tmp_path / "a", INT8)
    refusing(monkeypatch, most=1)
    result = lowered.verify(quantized, artifact, INT8)
    assert result.passed and result.quantized_steps is None
    assert "quantized values were not compared; with them as outputs: The target takes" in result.summary()


def brighter(program, steps):
    """The same with another bias at the end: as far off as rounding might be."""
    changed = program.clone()
    value = changed.initializers["b2/quantized"]
    value.const_value = ir.tensor(value.const_value.numpy() + np.int32(1000 * steps), name=value.name)
    return changed


@pytest.mark.parametrize(
    ("shipped", "elsewhere", "passed"), [(3, 0, False), (3, 3, True), (3, 1, True), (9, 1, False)]
)
def test_without_its_values_a_target_is_held_to_what_rounding_costs_another_one(
    quantized, shipped, elsewhere, passed, tmp_path, monkeypatch
):
    artifact = isolation.lower("openvino", brighter(quantized, shipped), tmp_path / "a", INT8)
    refusing(monkeypatch, most=1)
    original = isolation.lower

    def lower(target, program, folder, options):
        return original(
            target, brighter(program, elsewhere) if target == "onnxruntime" else program, folder, options
        )

    monkeypatch.setattr(isolation, "lower", lower)
    result = lowered.verify(quantized, artifact, INT8, samples=2)
    assert result.passed == passed and result.max_rel_error > 0.05
    assert "held to what rounding costs on 'onnxruntime'" in result.note


# ---- Softmax ---------------------------------------------------------------------------------
def test_what_a_softmax_hides_is_compared_before_its_quantization(tmp_path):
    """Softmax, QuantizeLinear, DequantizeLinear: the scale of probabilities would hide the numbers before."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"w": draw((10, 8)).astype(np.float32), "b": draw(10).astype(np.float32)}
    program = program_from_nodes(
        [
            node("Gemm", ["x", "w", "b"], ["logits"], "linear", transB=1),
            node("Softmax", ["logits"], ["y"], "softmax", axis=1),
        ],
        {"x": (1, 8)},
        ["y"],
        weights,
    )
    program = quantize(program, "quantize")
    kinds = [n.op_type for n in program.nodes()]
    assert kinds[-2:] == ["QuantizeLinear", "DequantizeLinear"]
    (output,) = oracle.before_softmax(program).graph.outputs
    assert output.name.startswith("logits") and output.dtype.name == "FLOAT"
    artifact = isolation.lower("onnxruntime", program, tmp_path / "a", INT8)
    result = lowered.verify(program, artifact, INT8)
    assert result.passed and set(result.compared) == {program.graph.outputs[0].name, output.name}
