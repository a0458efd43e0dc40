"""Quantization in uint8 becomes int8, and back, bit for bit, for the targets that have only one of them."""

from __future__ import annotations

import numpy as np
import pytest
from builders import node, program_from_nodes, run_reference
from onnx import TensorProto

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.backends.signed import activations_to_uint8, to_int8

INT8 = TargetOptions(precision="int8")
ASYMMETRIC = {"s": np.float32(0.037), "z": np.uint8(97)}


def pair(zero="z", name="", readers=1):
    """QuantizeLinear of `x` and its DequantizeLinear."""
    parameters = ["s", *([zero] if zero else [])]
    made = [node("QuantizeLinear", ["x", *parameters], ["q"], "quantize")]
    made += [
        node("DequantizeLinear", ["q", *parameters], [f"d{i or name}"], f"dequantize{i}")
        for i in range(readers)
    ]
    return made


def linear(weight_zero, dtype):
    """A quantized linear layer, as the static quantizer of ONNX Runtime writes it."""
    generator = np.random.default_rng(1)
    limits = np.iinfo(dtype)
    constants = {
        **ASYMMETRIC,
        "w": generator.integers(limits.min + 1, limits.max, (6, 5)).astype(dtype),
        "ws": generator.uniform(0.01, 0.02, 5).astype(np.float32),
        "wz": np.full(5, weight_zero, dtype),
    }
    nodes = [
        *pair(),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "weight", axis=1),
        node("Gemm", ["d", "wd"], ["h"], "layer"),
        node("QuantizeLinear", ["h", "s", "z"], ["hq"], "after"),
        node("DequantizeLinear", ["hq", "s", "z"], ["y"], "last"),
    ]
    return program_from_nodes(nodes, {"x": (1, 6)}, ["y"], constants)


def integers(program):
    """Element types that are quantized to or from, by node."""
    types = program.types()
    return {
        n.name: types[(n.outputs[0] if n.op_type == "QuantizeLinear" else n.inputs[0]).name].name
        for n in program.nodes()
        if n.op_type.endswith("tizeLinear")
    }


def same(program, changed):
    """The reference gives equal bits, where numbers saturate and lie between two integers, too."""
    shape = program.input_shapes["x"]
    x = np.random.default_rng(2).standard_normal(shape) * 4
    x.flat[0] = 0.037 * 2.5
    feeds = {"x": x.astype(np.float32)}
    before, after = (run_reference(p, feeds, float64=False) for p in (program, changed))
    return all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("weight_zero", "dtype"), [(0, np.int8), (128, np.uint8)], ids=["int8 weights", "uint8 weights"]
)
def test_a_layer_becomes_int8_bit_for_bit(weight_zero, dtype):
    program = linear(weight_zero, dtype)
    changed = to_int8(program)
    assert set(integers(changed).values()) == {"INT8"} and "UINT8" in integers(program).values()
    assert same(program, changed)
    assert not any(a.any() for n in changed.nodes() if n.name == "weight" for a in [stored(changed, n, 2)])
    assert {v.const_value.dtype.name for v in changed.initializers.values()} == {"FLOAT", "INT8"}
    wrong = to_int8(program)  # the comparison can fail
    value = next(v for n, v in wrong.initializers.items() if n.startswith("z"))
    value.const_value.numpy()[...] += 1
    assert not same(program, wrong)


def stored(program, item, index):
    return program.initializer_array(item.inputs[index].name)


def test_without_a_zero_point_the_type_is_uint8():
    nodes = [*pair(zero=""), node("Neg", ["d"], ["y"])]
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"], {"s": np.float32(0.037)})
    changed = to_int8(program)
    assert integers(program) == {"quantize": "UINT8", "dequantize0": "UINT8"}
    assert integers(changed) == {"quantize": "INT8", "dequantize0": "INT8"}
    assert [stored(changed, n, 2).item() for n in list(changed.nodes())[:2]] == [-128, -128]
    assert same(program, changed)


def test_every_reader_goes_along():
    nodes = [*pair(readers=2), node("Add", ["d", "d1"], ["y"])]
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"], ASYMMETRIC)
    changed = to_int8(program)
    assert set(integers(changed).values()) == {"INT8"} and same(program, changed)


def test_integers_that_something_else_reads_stay():
    cast = node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    program = program_from_nodes([*pair(), cast], {"x": (2, 3)}, ["y", "d"], ASYMMETRIC)
    assert to_int8(program) is program


def test_integers_that_leave_the_model_stay_and_what_is_inside_changes():
    program = program_from_nodes(pair(), {"x": (2, 3)}, ["d", "q"], ASYMMETRIC)
    changed = to_int8(program)
    assert integers(changed) == {"quantize": "UINT8", "quantize/inside": "INT8", "dequantize0": "INT8"}
    assert same(program, changed)


def test_activations_become_uint8_and_weights_stay():
    program = to_int8(linear(0, np.int8))
    changed = activations_to_uint8(program)
    assert set(integers(program).values()) == {"INT8"}
    kinds = integers(changed)
    assert kinds.pop("weight") == "INT8" and set(kinds.values()) == {"UINT8"}
    assert same(program, changed) and activations_to_uint8(changed) is changed


def test_what_meets_in_a_concat_is_right_on_openvino(tmp_path):
    """In int8, OpenVINO 2026.4.1 cuts these activations to whole numbers: an error of 0.8 of 7."""
    generator = np.random.default_rng(3)
    constants = {
        "s": np.float32(0.05),
        "z": np.int8(-7),
        "w": generator.integers(-127, 128, (8, 16, 3, 3)).astype(np.int8),
        "ws": generator.uniform(0.002, 0.004, 8).astype(np.float32),
        "wz": np.zeros(8, np.int8),
    }
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["x", "r"], ["c"], axis=1),
        node("QuantizeLinear", ["c", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Conv", ["d", "wd"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    program = program_from_nodes(nodes, {"x": (1, 8, 6, 6)}, ["y"], constants)
    x = (generator.standard_normal((1, 8, 6, 6)) * 2).astype(np.float32)
    artifact = backends.get("openvino").lower(program, tmp_path / "out", INT8)
    found = backends.get("openvino").load(artifact, INT8).run({"x": x})["y"]
    np.testing.assert_allclose(found, run_reference(program, {"x": x})["y"], rtol=0, atol=1e-4)


def test_int8_is_left_alone():
    program = program_from_nodes(pair(), {"x": (2, 3)}, ["d"], {**ASYMMETRIC, "z": np.int8(3)})
    assert to_int8(program) is program


@pytest.mark.parametrize("name", ["tflite", "tflite-channel-last", "tflite-micro", "tensorrt"])
def test_targets_of_int8_take_uint8(name):
    backend = backends.get(name)
    for program in (linear(0, np.int8), linear(128, np.uint8)):
        assert backend.legality(program, INT8).ok, backend.legality(program, INT8).violations
        types = integers(backend.legalize(program)).values()
        assert set(types) == {"INT8"}
    refused = program_from_nodes(pair(), {"x": (1, 3)}, ["d", "q"], ASYMMETRIC)
    assert not backend.legality(refused, INT8).ok
