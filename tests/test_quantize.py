"""quantize: what the graph becomes, that the numbers are those of the scheme, refusals, and what calibration reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes, relative_error, run_reference, structure_of
from onnx import TensorProto, helper

from sartor import backends
from sartor.backends.onnxruntime.legalize import legalize
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError, UsageError
from sartor.ir.fx import run_twin
from sartor.ir.load import load
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.pipeline import Pipeline
from sartor.passes.quantize import Quantize
from sartor.quantization import integer_only
from sartor.quantization.calibration import find_ranges, pieces
from sartor.quantization.placement import place
from sartor.quantization.supply import layer_costs

QUANTIZED = ("QuantizeLinear", "DequantizeLinear")


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def data_of(program, count=32, seed=3, **replaced):
    inputs = {name: draw(count, *shape[1:], seed=seed) for name, shape in program.input_shapes.items()}
    return [({**inputs, **replaced}, None)]


def context_of(program, **fields):
    return Context(data={"calibration": data_of(program)}, **fields)


@pytest.fixture(scope="module")
def folded():
    return Pipeline.parse("fold-batch-norm").run(small_cnn(16)).program


@pytest.fixture(scope="module")
def quantized(folded):
    return Quantize().run(folded, context_of(folded))


# ---- form ----------------------------------------------------------------------------------------
def linear_program(weight, bias, *, bias_shape=None, **attributes):
    constants = {"w": weight, "b": bias if bias_shape is None else bias.reshape(bias_shape)}
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], "linear", **attributes), node("Relu", ["h"], ["y"], "relu")]
    return program_from_nodes(nodes, {"x": ("N", weight.shape[0])}, ["y"], constants)


SCHEME = {
    "schema": "sartor.quantization/1",
    "nodes": ["linear"],
    "kept": [],
    "activations": {"x": {"scale": 0.05, "zero_point": 7}, "y": {"scale": 0.1, "zero_point": -128}},
    "weights": {"w": {"scales": [0.01, 0.02], "zero_point": 0, "axis": 1, "symmetric": True}},
}


EXPECTED = [
    "b/quantized: INT32 [2]",
    "b/scale: FLOAT [2]",
    "b/zero_point: INT32 [2]",
    "w/quantized: INT8 [3, 2]",
    "w/scale: FLOAT [2]",
    "w/zero_point: INT8 [2]",
    "x/scale: FLOAT []",
    "x/zero_point: INT8 []",
    "y/scale: FLOAT []",
    "y/zero_point: INT8 []",
    "x/quantized = QuantizeLinear(x, x/scale, x/zero_point)",
    "x/dequantized = DequantizeLinear(x/quantized, x/scale, x/zero_point)",
    "b/dequantized = DequantizeLinear(b/quantized, b/scale, b/zero_point) {axis=0}",
    "w/dequantized = DequantizeLinear(w/quantized, w/scale, w/zero_point) {axis=1}",
    "h = Gemm(x/dequantized, w/dequantized, b/dequantized)",
    "y_replaced = Relu(h)",
    "y/quantized = QuantizeLinear(y_replaced, y/scale, y/zero_point)",
    "y = DequantizeLinear(y/quantized, y/scale, y/zero_point)",
]


def test_before_and_expected():
    before = linear_program(draw(3, 2), draw(2))
    after = Quantize().replay(before, SCHEME)
    assert structure_of(after.program) == EXPECTED
    verify_program(after.program)
    assert after.counts["biases_quantized"] == after.counts["weights_quantized"] == 1
    assert after.counts["activations_quantized"] == 2
    assert json.loads(json.dumps(after.plan)) == after.plan


def integers(program, x, *, bias=True):
    """The layer of `SCHEME` in integers, as a target computes it."""
    arrays = {name: program.initializer_array(name) for name in program.initializers}
    q = np.clip(np.rint(x.astype(np.float64) / arrays["x/scale"]) + 7, -128, 127)
    total = (q - 7) @ arrays["w/quantized"].astype(np.int64) + bias * arrays["b/quantized"]
    exact = total * (np.float64(arrays["x/scale"]) * arrays["w/scale"].astype(np.float64))
    y = np.clip(np.rint(np.maximum(exact, 0.0) / np.float64(arrays["y/scale"])) - 128, -128, 127)
    return (y + 128) * np.float64(arrays["y/scale"])


def test_the_twin_computes_what_integers_do():
    program = Quantize().replay(linear_program(draw(3, 2), draw(2, seed=1)), SCHEME).program
    x = draw(200, 3, seed=2, scale=3.0)
    expected = integers(program, x)
    assert (expected == 0).any() and np.unique(expected).size > 20
    found = run_twin(program, {"x": x})["y"]
    # an ulp of the bias's float32 scale may tip a tie
    assert (found != expected).mean() < 0.01 and np.abs(found - expected).max() <= 0.1001
    assert np.abs(found - integers(program, x, bias=False)).max() > 0.3


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_a_bias_has_the_scale_of_input_times_weight(shape):
    before = linear_program(draw(3, 2), draw(2, seed=1), bias_shape=shape)
    program = Quantize().replay(before, SCHEME).program
    scale = program.initializer_array("b/scale")
    np.testing.assert_array_equal(scale, np.float32(np.float64(np.float32(0.05)) * np.float32([0.01, 0.02])))
    stored = program.initializer_array("b/quantized")
    assert stored.dtype == np.int32 and stored.shape == shape
    np.testing.assert_allclose(stored * scale, before.initializer_array("b"), atol=5.1e-4)


def test_a_bias_that_has_no_such_form_stays():
    huge = linear_program(draw(3, 2), np.float32([1e9, 0]))
    result = Quantize().replay(huge, SCHEME)
    assert [r.node for r in result.refusals] == ["linear"] and "beyond 32 bits" in result.refusals[0].reason
    assert "b" in result.program.initializers
    single = linear_program(draw(3, 2), draw(1))
    assert "expected one number per channel" in Quantize().replay(single, SCHEME).refusals[0].reason


def test_the_scheme_is_that_of_the_quantizer(folded, quantized):
    plan = quantized.plan
    assert plan["nodes"] == ["conv0", "relu0", "conv1", "add1", "relu1", "pool", "flatten", "linear"]
    assert list(plan["activations"]) == ["x", "r0", "c1", "r1", "p", "f", "y"]
    for name, entry in plan["weights"].items():
        array = folded.initializer_array(name)
        axis = entry["axis"]
        assert axis == 0 and entry["zero_point"] == 0 and entry["symmetric"]
        largest = np.abs(array).max(axis=tuple(i for i in range(array.ndim) if i != axis))
        np.testing.assert_allclose(entry["scales"], largest / 127, rtol=1e-5)
    x = np.concatenate([batch["x"] for batch, _ in data_of(folded)])
    entry = plan["activations"]["x"]
    np.testing.assert_allclose(entry["scale"], (x.max() - x.min()) / 255, rtol=1e-5)
    assert entry["zero_point"] == round(-128 - x.min() / entry["scale"])
    assert plan["activations"]["r0"]["zero_point"] == -128


def test_everything_is_quantized_and_little_is_lost(folded, quantized):
    program = quantized.program
    verify_program(program)
    inputs = {"x": draw(8, 3, 16, 16, seed=9)}
    error = relative_error(run_twin(folded, inputs), run_twin(program, inputs))
    assert 1e-4 < error < 0.05
    assert relative_error(run_twin(program, inputs), run_reference(program, inputs, float64=True)) < 1e-9
    assert integer_only(program) == []
    assert not any(v.dtype.name == "FLOAT" and v.const_value.size > 16 for v in program.initializers.values())


def test_a_quantized_file_is_read_back_with_a_free_batch(quantized, tmp_path):
    again = load(quantized.program.save(tmp_path / "q.onnx"))
    assert again.batch.symbolic
    inputs = {"x": draw(5, 3, 16, 16)}
    assert relative_error(run_twin(quantized.program, inputs), run_twin(again, inputs)) == 0.0
    assert Quantize().run(again, Context()).refusals[0].reason == "it is quantized already"


def test_a_plan_is_replayed_to_the_byte(folded, quantized):
    stored = json.loads(json.dumps(quantized.plan))
    assert Quantize().replay(folded, stored).program.to_bytes() == quantized.program.to_bytes()


# ---- options -------------------------------------------------------------------------------------
def test_one_scale_for_a_whole_weight(folded):
    plan = Quantize(per_channel=False).run(folded, context_of(folded)).plan
    assert all(entry["axis"] is None and len(entry["scales"]) == 1 for entry in plan["weights"].values())
    verify_program(Quantize().replay(folded, plan).program)


def test_methods_of_calibration_differ(folded):
    outlier = data_of(folded, 512)
    outlier[0][0]["x"][0, 0, 0, 0] = 40.0
    context = Context(data={"calibration": outlier})
    scales = {
        method: Quantize(calibration=method, samples=512)
        .run(folded, context)
        .plan["activations"]["x"]["scale"]
        for method in ("minmax", "entropy", "percentile")
    }
    assert scales["minmax"] > 0.15 and scales["entropy"] < 0.8 * scales["minmax"]
    assert scales["percentile"] < 0.8 * scales["minmax"]


def test_only_so_many_samples_are_looked_at(folded):
    late = data_of(folded, 32)
    late[0][0]["x"][20] = 400.0
    context = Context(data={"calibration": late})
    first = Quantize(samples=20).run(folded, context).plan["activations"]["x"]["scale"]
    both = Quantize(samples=21).run(folded, context).plan["activations"]["x"]["scale"]
    assert first < 0.1 < 1.0 < both
    taken = [len(piece["x"]) for piece in pieces(late * 3, 70, folded)]
    assert sum(taken) == 70 and max(taken) <= 16


def test_a_first_input_without_an_axis_carries_no_samples():
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "linear"),
        node("Mul", ["h", "factor"], ["y"], "scale"),
    ]
    shapes = {"factor": (), "x": ("N", 4)}
    program = program_from_nodes(nodes, shapes, ["y"], {"w": draw(4, 3)})
    data = [({"factor": np.float32(2.0), "x": draw(40, 4)}, None)]
    result = Quantize().run(program, Context(data={"calibration": data}))
    assert {"linear", "scale"} <= set(result.plan["nodes"])
    taken = list(pieces(data, 20, program))
    assert [len(piece["x"]) for piece in taken] == [16, 4] and taken[1]["factor"] == 2.0
    assert layer_costs(program, Context(data={"calibration": data}), samples=20).samples == 20


def test_pipeline_text(folded):
    item = Pipeline.parse("quantize{bits=8,per-channel=false,calibration=entropy,max-drop=0.5}").passes[0]
    assert item == Quantize(per_channel=False, calibration="entropy", max_drop=0.5)
    with pytest.raises(UsageError, match="'bits' of 'quantize' must be one of 8, got '4'"):
        Pipeline.parse("quantize{bits=4}")


# ---- what is left in float ------------------------------------------------------------------------
def masked_attention(mask):
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "project"),
        node("Add", ["h", "mask"], ["m"], "mask"),
        node("Softmax", ["m"], ["s"], "softmax", axis=-1),
        node("MatMul", ["s", "v"], ["y"], "mix"),
    ]
    constants = {"w": draw(4, 6), "mask": np.float32([0, 0, 0, 0, mask, mask]), "v": draw(6, 5, seed=1)}
    return program_from_nodes(nodes, {"x": ("N", 3, 4)}, ["y"], constants, reference={"N": 2})


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("mask", [-1e9, -np.inf])
def test_a_mask_does_not_swallow_what_it_masks(mask, calibration):
    program = masked_attention(np.float32(mask))
    result = Quantize(calibration=calibration).run(program, context_of(program))
    left = {refusal.node: refusal.reason for refusal in result.refusals}
    assert {"mask", "softmax"} <= set(left) and "the range of 'm' is [" in left["softmax"]
    assert "project" not in left and "mix" not in left
    inputs = {"x": draw(4, 3, 4, seed=5)}
    limit = 0.2 if calibration == "entropy" else 0.05  # it cuts the largest of these few numbers off
    assert relative_error(run_twin(program, inputs), run_twin(result.program, inputs)) < limit
    reasons = {found.node: found.reason for found in integer_only(result.program)}
    assert set(reasons) >= {"mask", "softmax"} and "is not quantized" in reasons["softmax"]
    assert "Node 'softmax' (Softmax) computes in float" in str(
        next(f for f in integer_only(result.program) if f.node == "softmax")
    )


def test_values_that_are_all_masked_leave_nothing_to_calibrate():
    nodes = [node("MatMul", ["x", "w"], ["y"], "linear")]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y"], {"w": draw(4, 3)})
    context = Context(data={"calibration": [({"x": 1e8 * draw(8, 4)}, None)]})
    result = Quantize(calibration="entropy").run(program, context)
    assert not result.modified and [r.node for r in result.refusals] == ["linear"]


def test_values_without_a_range_stay_in_float(monkeypatch):
    def without_h(*arguments, **keywords):
        ranges = find_ranges(*arguments, **keywords)
        ranges.data.pop("h", None)
        return ranges

    monkeypatch.setattr("sartor.quantization.supply.find_ranges", without_h)
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("MatMul", ["h", "w"], ["i"], "second"),
        node("MatMul", ["i", "w"], ["y"], "third"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y"], {"w": draw(4, 4)})
    for calibration in ("minmax", "percentile"):
        result = Quantize(calibration=calibration).run(program, context_of(program))
        reason = "no range of 'h' was found"
        assert {(r.node, r.reason) for r in result.refusals} == {("first", reason), ("second", reason)}
        assert result.plan["nodes"] == ["third"]


def test_an_error_of_the_quantizer_names_the_node(monkeypatch, folded):
    from onnxruntime.quantization import qdq_quantizer

    def fail(self):
        raise RuntimeError("Unexpected quantize type for param c1.\nmore")

    monkeypatch.setattr(qdq_quantizer.QDQQuantizer, "quantize_model", fail)
    with pytest.raises(
        BackendError, match=r"could not quantize the program at node 'conv1' \(Conv\).*: Unexpected"
    ):
        Quantize().run(folded, context_of(folded))


def test_what_is_to_be_kept_stays(folded):
    result = Quantize().run(folded, context_of(folded, keep=("w1", "linear")))
    assert {(r.node, r.reason) for r in result.refusals} == {
        ("conv1", "'keep' names 'w1'"),
        ("linear", "'keep' names 'linear'"),
    }
    assert set(result.plan["weights"]) == {"w0"} and "w1" in result.program.initializers
    nodes = {n.name: n for n in result.program.nodes()}
    assert nodes["conv1"].inputs[0].name == "r0" and nodes["add1"].inputs[1].name == "r0/dequantized"
    assert {"conv1", "linear"} < {f.node for f in integer_only(result.program)}


def test_a_layer_that_scales_its_bias_stays():
    program = linear_program(draw(3, 2), draw(2), beta=0.5)
    result = Quantize().run(program, context_of(program))
    assert not result.modified and "it has beta = 0.5" in result.refusals[0].reason


def test_a_weight_of_two_layers_of_which_one_is_kept():
    nodes = [
        node("MatMul", ["x", "w"], ["a"], "first"),
        node("MatMul", ["a", "w"], ["y"], "second"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y"], {"w": draw(4, 4)})
    result = Quantize().run(program, context_of(program, keep=("second",)))
    second = next(n for n in result.program.nodes() if n.name == "second")
    assert second.inputs[1].name == "w" and "w/quantized" in result.program.initializers
    both = Quantize().run(program, context_of(program)).program
    assert "w" not in both.initializers and [n.op_type for n in both.nodes()].count("DequantizeLinear") == 4


def test_an_output_that_is_read_inside_and_an_input_that_is_read_twice():
    nodes = [
        node("MatMul", ["x", "w"], ["y"], "first"),
        node("Relu", ["y"], ["r"], "relu"),
        node("MatMul", ["r", "w"], ["h"], "second"),
        node("Add", ["h", "x"], ["z"], "add"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y", "z"], {"w": draw(4, 4)})
    after = Quantize().run(program, context_of(program)).program
    verify_program(after)
    inputs = {"x": draw(6, 4, seed=5)}
    assert relative_error(run_twin(program, inputs), run_twin(after, inputs)) < 0.05
    assert [n.inputs[0].name for n in after.nodes() if n.name == "relu"] == ["y"]


def test_a_stack_of_matrices_is_not_scaled_along_what_it_sums_over():
    nodes = [node("MatMul", ["x", "w"], ["y"], "mix")]
    program = program_from_nodes(nodes, {"x": ("N", 3, 4)}, ["y"], {"w": draw(3, 4, 5)})
    # x and w have no batch in common; the first axis of w is broadcast
    program.batch = type(program.batch)(False, ("x",), "built so")
    context = Context(data={"calibration": [({"x": draw(1, 3, 4)}, None)]})
    assert Quantize().run(program, context).plan["weights"]["w"]["axis"] == 2


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_targets_take_a_weight_on_the_left(target, tmp_path):
    weight = draw(5, 6)
    nodes = [node("MatMul", ["w", "x"], ["y"], "left")]
    program = program_from_nodes(nodes, {"x": ("N", 6, 4)}, ["y"], {"w": weight})
    result = Quantize().run(program, context_of(program))
    entry = result.plan["weights"]["w"]
    assert entry["axis"] is None and entry["symmetric"] and entry["zero_point"] == 0
    np.testing.assert_allclose(entry["scales"], [np.abs(weight).max() / 127], rtol=1e-5)
    inputs = {"x": draw(1, 6, 4, seed=7)}
    exact, rounded = run_twin(program, inputs)["y"], run_twin(result.program, inputs)["y"]
    assert np.abs(exact - rounded).max() < 1.5 * result.plan["activations"]["y"]["scale"]
    backend = backends.get(target)
    options = TargetOptions(precision="int8", shapes={"x": (1, 6, 4)})
    found = backend.load(backend.lower(result.program, tmp_path / "a", options), options).run(inputs)["y"]
    assert np.abs(found - rounded).max() <= 1.01 * result.plan["activations"]["y"]["scale"]


@pytest.mark.parametrize(
    ("inputs", "shape", "axis"),
    [
        (("x", "w"), (4,), None),
        (("w", "x"), (4,), None),
        (("w", "x"), (3, 5, 4), None),
        (("x", "w"), (4, 5), 1),
    ],
)
def test_a_weight_of_a_product_is_not_scaled_along_what_it_sums_over(inputs, shape, axis):
    nodes = [node("MatMul", inputs, ["y"], "product")]
    program = program_from_nodes(nodes, {"x": (3, 4, 4)}, ["y"], {"w": draw(*shape)})
    context = Context(data={"calibration": [({"x": draw(3, 4, 4)}, None)]})
    result = Quantize().run(program, context)
    assert result.plan["weights"]["w"]["axis"] == axis
    given = {"x": draw(3, 4, 4)}
    assert relative_error(run_twin(program, given), run_twin(result.program, given)) < 0.05


def test_a_weight_on_both_sides_has_one_scale():
    nodes = [node("MatMul", ["w", "x"], ["h"], "left"), node("MatMul", ["h", "w"], ["y"], "right")]
    program = program_from_nodes(nodes, {"x": ("N", 4, 4)}, ["y"], {"w": draw(4, 4)})
    result = Quantize().run(program, context_of(program))
    assert set(result.plan["nodes"]) == {"left", "right"} and result.plan["weights"]["w"]["axis"] is None


def test_the_bias_of_a_grouped_transposed_convolution():
    nodes = [node("ConvTranspose", ["x", "w", "b"], ["y"], "up", group=2, strides=[2, 2])]
    constants = {"w": draw(4, 3, 2, 2), "b": draw(6, seed=1)}
    program = program_from_nodes(nodes, {"x": ("N", 4, 5, 5)}, ["y"], constants)
    result = Quantize().run(program, context_of(program))
    scales = result.program.initializer_array("b/scale")
    assert scales.shape == (6,) and np.array_equal(scales[:3], scales[3:])
    inputs = {"x": draw(2, 4, 5, 5, seed=6)}
    assert relative_error(run_twin(program, inputs), run_twin(result.program, inputs)) < 0.05


def test_a_mean_before_a_reshape_is_quantized():
    nodes = [
        node("Conv", ["x", "w"], ["h"], "conv"),
        node("ReduceMean", ["h", "axes"], ["m"], "mean"),
        node("Reshape", ["m", "shape"], ["f"], "reshape"),
        node("Gemm", ["f", "v"], ["y"], "linear"),
    ]
    constants = {
        "w": draw(6, 3, 3, 3),
        "v": draw(6, 4, seed=1),
        "axes": np.int64([2, 3]),
        "shape": np.int64([0, 6]),
    }
    program = program_from_nodes(nodes, {"x": ("N", 3, 6, 6)}, ["y"], constants)
    result = Quantize().run(program, context_of(program))
    assert result.plan["activations"]["m"] == result.plan["activations"]["f"]
    assert integer_only(result.program) == []
    inputs = {"x": draw(3, 3, 6, 6, seed=4)}
    assert relative_error(run_twin(program, inputs), run_twin(result.program, inputs)) < 0.05


def test_layers_in_branches_are_left(folded):
    then = helper.make_graph(
        [helper.make_node("MatMul", ["h", "v"], ["t"], "inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, ["N", 4])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["e"], "same")],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["N", 4])],
    )
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "outer"),
        node("ReduceMax", ["h"], ["m"], "largest", keepdims=0),
        node("Greater", ["m", "zero"], ["c"], "positive"),
        node("If", ["c"], ["y"], "choice", then_branch=then, else_branch=other),
    ]
    constants = {"w": draw(4, 4), "v": draw(4, 4, seed=1), "zero": np.float32(0)}
    program = program_from_nodes(nodes, {"x": (2, 4)}, ["y"], constants)
    context = Context(data={"calibration": [({"x": draw(2, 4)}, None)]})
    result = Quantize().run(program, context)
    assert ("inner", "it lies in a body of If, where nothing is quantized") in {
        (r.node, r.reason) for r in result.refusals
    }
    inputs = {"x": draw(2, 4)}
    assert relative_error(run_twin(program, inputs), run_twin(result.program, inputs)) < 0.05


# ---- bad input -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"There is no calibration data: .*'x' \[1, 3, 16, 16\]"),
        ({"calibration": []}, "Split 'calibration' is empty; it must have at least one batch"),
        (
            {"calibration": [({"x": draw(4, 3, 8, 8)}, None)]},
            r"input 'x' has shape \[4, 3, 8, 8\], but the model takes \[N, 3, 16, 16\]",
        ),
        ({"calibration": [({"z": draw(4, 3, 16, 16)}, None)]}, r"inputs \['z'\], but the model's inputs are"),
        (
            {"calibration": [({"x": np.zeros((4, 3, 16, 16))}, None)]},
            "is float64, but the model takes float32",
        ),
        ({"calibration": [({"x": np.full((1, 3, 16, 16), np.nan, np.float32)}, None)]}, "contains NaN"),
    ],
)
def test_data_that_do_not_fit(folded, data, message):
    with pytest.raises(UsageError, match=message):
        Quantize().run(folded, Context(data=data))


def test_a_norm_is_folded_first():
    program = small_cnn(8)
    with pytest.raises(UsageError, match=r"BatchNormalization 'norm0' .*fold-batch-norm,quantize"):
        Quantize().run(program, context_of(program))


def test_float16_is_refused(folded):
    with pytest.raises(UsageError, match="takes float32 programs"):
        Pipeline.parse("cast,quantize").run(folded, context_of(folded))


def test_nothing_of_the_quantizer_is_printed_or_logged(folded, capfd):
    import logging

    handlers = list(logging.getLogger().handlers)
    Quantize(calibration="percentile").run(folded, context_of(folded))
    assert capfd.readouterr() == ("", "") and logging.getLogger().handlers == handlers


def test_a_program_that_fails_on_the_data():
    nodes = [node("Gather", ["table", "i"], ["g"], "look"), node("MatMul", ["g", "w"], ["y"], "linear")]
    program = program_from_nodes(
        nodes, {"i": ("N",)}, ["y"], {"table": draw(3, 4), "w": draw(4, 2)}, dtype=TensorProto.INT64
    )
    data = {"calibration": [({"i": np.array([7], np.int64)}, None)]}
    with pytest.raises(BackendError, match="could not calibrate the program"):
        Quantize().run(program, Context(data=data))


# ---- targets ---------------------------------------------------------------------------------------
INT8 = TargetOptions(precision="int8")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_targets_compute_it_in_integers(name, quantized, tmp_path):
    backend = backends.get(name)
    artifact = backend.lower(quantized.program, tmp_path / "artifact", INT8)
    options = TargetOptions(precision="int8", shapes={"x": (1, 3, 16, 16)})
    inputs = {"x": draw(1, 3, 16, 16, seed=9)}
    found = backend.load(artifact, options).run(inputs)
    step = quantized.plan["activations"]["y"]["scale"]
    assert np.abs(found["y"] - run_twin(quantized.program, inputs)["y"]).max() < 2.5 * step
    kernels = backend.profile(artifact, options, 2)
    convolutions = [k for k in kernels if "Conv" in k.op_type and "Convert" not in k.op_type]
    assert len(convolutions) == 2
    assert all("QLinear" in k.op_type or k.implementation.endswith("I8") for k in convolutions)


def test_what_onnx_runtime_gets_is_the_same_function(quantized):
    legal = legalize(quantized.program)
    assert not any(n.op_type in ("Relu", "Clip") for n in legal.nodes())
    assert all(v.dtype.name != "INT8" or "w" in n for n, v in legal.initializers.items())
    inputs = {"x": draw(8, 3, 16, 16, seed=9)}
    for dtype in ("float32", "float64"):
        before, after = (run_twin(p, inputs, dtype=dtype)["y"] for p in (quantized.program, legal))
        np.testing.assert_array_equal(before, after)
    assert legalize(small_cnn(8)).to_bytes() == small_cnn(8).to_bytes()


@pytest.mark.parametrize(
    ("function", "scale", "zero_point", "goes"),
    [
        (("Relu",), 0.1, -128, True),
        (("Relu",), 0.1, -127, False),
        (("Clip", 0.0, 6.0), 6 / 255, -128, True),
        (("Clip", 0.0, 6.0), 8 / 255, -128, False),
        (("Clip", -1.0, None), 0.1, -118, True),
        (("Clip", -1.0, None), 0.1, -100, False),
    ],
)
def test_an_activation_function_goes_where_saturation_does_the_same(function, scale, zero_point, goes):
    op_type, *bounds = function
    names = ["low" if b is bounds[0] else "high" for b in bounds if b is not None]
    constants = {n: np.float32(b) for n, b in zip(names, bounds, strict=False)} | {
        "s": np.float32(scale),
        "z": np.int8(zero_point),
    }
    nodes = [
        node(op_type, ["x", *names], ["r"], "function"),
        node("QuantizeLinear", ["r", "s", "z"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 64)}, ["y"], constants)
    legal = legalize(program)
    assert any(n.op_type == op_type for n in legal.nodes()) is not goes
    inputs = {"x": draw(50, 64, scale=6.0)}
    np.testing.assert_array_equal(run_twin(program, inputs)["y"], run_twin(legal, inputs)["y"])
    assert "high" not in legal.initializers or not goes


def test_pairs_without_a_zero_point_are_not_rewritten():
    nodes = [
        node("Relu", ["x"], ["r"], "relu"),
        node("QuantizeLinear", ["r", "s"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s"], ["y"], "dequantize"),
    ]
    program = program_from_nodes(nodes, {"x": (1, 4)}, ["y"], {"s": np.float32(0.1)})
    legal = legalize(program)
    inputs = {"x": draw(1, 4)}
    np.testing.assert_array_equal(run_twin(program, inputs)["y"], run_twin(legal, inputs)["y"])


def test_placement_leaves_out_what_it_is_told_to(folded):
    ranges = find_ranges(folded, pieces(data_of(folded), 32, folded), "minmax")
    assert place(folded, ranges, exclude=[n.name for n in folded.nodes()])["nodes"] == []
    assert "w1" not in place(folded, ranges, exclude=["conv1"])["weights"]
