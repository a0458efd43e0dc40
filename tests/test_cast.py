"""cast: float16 inside, float32 outside; what does not fit stays, and the reason says which number it was."""

from __future__ import annotations

import re

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes, relative_error, structure_of
from onnx import TensorProto, helper

from sartor import backends
from sartor.backends.precision import precision_of
from sartor.backends.protocol import TargetOptions
from sartor.errors import UsageError
from sartor.ir.fx import run_twin
from sartor.ir.fx_magnitudes import largest_magnitudes
from sartor.ir.load import load
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.cast import Cast
from sartor.passes.pipeline import Pipeline
from sartor.passes.quantize import Quantize

HALF, SINGLE = int(TensorProto.FLOAT16), int(TensorProto.FLOAT)


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def reasons(result):
    return {refusal.node: refusal.reason for refusal in result.refusals}


def types_of(program):
    return {name: kind.name for name, kind in program.types().items()}


def test_before_and_expected():
    nodes = [node("MatMul", ["x", "w"], ["h"], "linear"), node("Relu", ["h"], ["y"], "relu")]
    program = program_from_nodes(nodes, {"x": ("N", 3)}, ["y"], {"w": draw(3, 2)})
    result = Cast().run(program)
    assert structure_of(result.program) == [
        "w: FLOAT16 [3, 2]",
        f"x/float16 = Cast(x) {{to={HALF}}}",
        "h = MatMul(x/float16, w)",
        "y_replaced = Relu(h)",
        f"y = Cast(y_replaced) {{to={SINGLE}}}",
    ]
    verify_program(result.program)
    assert result.counts["nodes_cast"] == 2 and result.counts["initializers_cast"] == 1
    assert Cast().replay(program, result.plan).program.to_bytes() == result.program.to_bytes()


@pytest.fixture(scope="module")
def cast():
    return Cast().run(small_cnn(16))


def test_the_function_stays_up_to_float16(cast):
    program, inputs = small_cnn(16), {"x": draw(4, 3, 16, 16)}
    exact = run_twin(program, inputs)
    assert not cast.refusals and precision_of(cast.program) == "f16" and precision_of(program) == "f32"
    assert set(cast.program.initializers) == set(program.initializers)
    for dtype in (None, "float64"):
        error = relative_error(exact, run_twin(cast.program, inputs, dtype=dtype))
        assert 1e-6 < error < 5e-3
    kinds = types_of(cast.program)
    assert kinds["x"] == kinds["y"] == "FLOAT" and kinds["c0"] == kinds["r1"] == "FLOAT16"


def test_a_cast_file_is_read_back(cast, tmp_path):
    again = load(cast.program.save(tmp_path / "half.onnx"))
    assert again.batch.symbolic and precision_of(again) == "f16"
    inputs = {"x": draw(3, 3, 16, 16)}
    assert relative_error(run_twin(cast.program, inputs), run_twin(again, inputs)) < 1e-9


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_targets_run_it(name, cast, tmp_path):
    backend, options = backends.get(name), TargetOptions(precision="f16")
    artifact = backend.lower(cast.program, tmp_path / "half", options)
    inputs = {"x": draw(1, 3, 16, 16)}
    session = backend.load(artifact, options)
    assert relative_error(run_twin(cast.program, inputs), session.run(inputs)) < 5e-3
    single = backend.lower(small_cnn(16), tmp_path / "single", TargetOptions())
    size = [
        sum((a.folder / f).stat().st_size for f in a.files if not f.endswith(".xml"))
        for a in (artifact, single)
    ]
    assert size[0] < 0.7 * size[1]
    if name == "openvino":
        assert session.settings["precision_hint"] in ("f32", "f16") and session.settings["precision"] == "f16"


# ---- what does not fit ------------------------------------------------------------------------------
def chain(*between, constants=None, width=4, inputs=None):
    """x → MatMul → `between` → MatMul → y."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        *between,
        node("MatMul", ["z", "v"], ["y"], "last"),
    ]
    weights = {"w": draw(4, 4), "v": draw(width, 3, seed=1), **(constants or {})}
    return program_from_nodes(nodes, inputs or {"x": ("N", 4)}, ["y"], weights)


def test_what_overflows_stays():
    program = chain(
        node("Mul", ["h", "big"], ["g"], "grow"),
        node("Tanh", ["g"], ["z"], "bound"),
        constants={"big": np.float32(6e4)},
    )
    result = Cast().run(program)
    assert set(reasons(result)) == {"grow", "bound"}
    assert "'g' reaches" in reasons(result)["grow"] and "65504" in reasons(result)["bound"]
    kinds = types_of(result.program)
    assert kinds["h"] == kinds["y_replaced"] == "FLOAT16" and kinds["g"] == kinds["z"] == "FLOAT"
    inputs = {"x": draw(5, 4)}
    half = run_twin(result.program, inputs, dtype=None)
    assert relative_error(run_twin(program, inputs), half) < 5e-3


def test_calibration_data_decide():
    program = chain(node("Exp", ["h"], ["z"], "exp"))
    assert not Cast().run(program).refusals
    data = {"calibration": [({"x": draw(4, 4, scale=20.0)}, None)]}
    assert set(reasons(Cast().run(program, Context(data=data)))) == {"exp", "last"}


@pytest.mark.parametrize(
    ("constant", "message"),
    [(1e-12, r"constant 'c' reaches 1e-12, which float16 rounds to 0"), (-1e9, r"constant 'c' holds 1e\+09")],
)
def test_constants_that_do_not_fit(constant, message):
    program = chain(node("Max", ["h", "c"], ["z"], "limit"), constants={"c": np.float32(constant)})
    assert set(reasons(Cast().run(program))) == {"limit"}
    assert re.search(message, reasons(Cast().run(program))["limit"])


def test_squares_that_do_not_fit():
    norm = node("LayerNormalization", ["g", "s", "b"], ["z"], "norm", axis=-1)
    program = chain(
        node("Mul", ["h", "c"], ["g"], "grow"),
        norm,
        constants={"c": np.float32(2e3), "s": draw(4, seed=2), "b": draw(4, seed=3)},
    )
    found = reasons(Cast().run(program))
    assert set(found) == {"norm"} and "it squares 'g', which reaches" in found["norm"]


@pytest.mark.parametrize(
    ("pool", "scale", "reason"),
    [
        (node("LRN", ["g"], ["z"], "norm", size=3), 400.0, "squares 'g'"),
        (node("LpPool", ["g"], ["z"], "norm", kernel_shape=[2, 2], p=3), 60.0, "takes power 3 of 'g'"),
        (node("LpPool", ["g"], ["z"], "norm", kernel_shape=[4, 4], p=2), 100.0, "squares 'z'"),
        (node("GlobalLpPool", ["g"], ["z"], "norm", p=2), 100.0, "squares 'z'"),
        (node("LpPool", ["g"], ["z"], "norm", kernel_shape=[4, 4], p=1), 400.0, ""),
    ],
)
def test_powers_that_are_added_up(pool, scale, reason):
    nodes = [node("Mul", ["x", "c"], ["g"], "grow"), pool, node("Relu", ["z"], ["y"], "last")]
    program = program_from_nodes(nodes, {"x": ("N", 4, 4, 4)}, ["y"], {"c": np.float32(scale)})
    data = {"calibration": [({"x": np.sign(draw(4, 4, 4, 4)).clip(0.5)}, None)]}
    found = reasons(Cast().run(program, Context(data=data)))
    assert set(found) == ({"norm"} if reason else set()) and reason in found.get("norm", "")


@pytest.mark.parametrize(("reached", "fits"), [(32000.0, True), (33000.0, False)])
def test_a_margin_is_kept(reached, fits):
    program = chain(node("Relu", ["h"], ["z"], "relu"), constants={"w": np.eye(4, dtype="f4")})
    data = {"calibration": [({"x": np.full((2, 4), reached, np.float32)}, None)]}
    found = reasons(Cast().run(program, Context(data=data)))
    assert ("relu" not in found) is fits


def test_all_samples_up_to_a_number_are_looked_at():
    program = chain(node("Exp", ["h"], ["z"], "exp"), constants={"w": np.eye(4, dtype="f4")})
    early, late = np.ones((40, 4), np.float32), np.ones((24, 4), np.float32)
    late[-1] = 20.0
    context = Context(data={"calibration": [({"x": early}, None), ({"x": late}, None)]})
    assert set(reasons(Cast().run(program, context))) == {"exp", "last"}
    assert set(reasons(Cast(samples=64).run(program, context))) == {"exp", "last"}
    assert not reasons(Cast(samples=63).run(program, context))


def test_a_batch_of_fixed_length_is_looked_at_whole():
    program = chain(
        node("Exp", ["h"], ["z"], "exp"), constants={"w": np.eye(4, dtype="f4")}, inputs={"x": (40, 4)}
    )
    x = np.ones((40, 4), np.float32)
    x[-1] = 20.0
    context = Context(data={"calibration": [({"x": x}, None)]})
    assert set(reasons(Cast(samples=1).run(program, context))) == {"exp", "last"}


def test_a_weight_that_would_become_zero_stays():
    program = chain(node("Relu", ["h"], ["z"], "relu"), constants={"w": 1e-9 * draw(4, 4)})
    result = Cast().run(program)
    assert set(reasons(result)) == {"first"} and "'w' reaches" in reasons(result)["first"]
    assert result.program.initializers["w"].dtype.name == "FLOAT"
    part = 1e-9 * draw(4, 4)
    part[0, 0] = 1.0
    assert not Cast().run(chain(node("Relu", ["h"], ["z"], "relu"), constants={"w": part})).refusals


def test_operands_that_are_float32_whatever_the_others_are():
    nodes = [
        node("Conv", ["x", "w"], ["h"], "conv"),
        node("Resize", ["h", "", "scales"], ["r"], "resize", mode="nearest"),
        node("Conv", ["r", "v"], ["y"], "last"),
    ]
    constants = {"w": draw(4, 3, 1, 1), "v": draw(2, 4, 1, 1), "scales": np.float32([1, 1, 2, 2])}
    program = program_from_nodes(nodes, {"x": ("N", 3, 4, 4)}, ["y"], constants)
    result = Cast().run(program)
    verify_program(result.program)
    assert not result.refusals and result.program.initializers["scales"].dtype.name == "FLOAT"
    assert types_of(result.program)["r"] == "FLOAT16"


def test_keep_and_shared_weights():
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y", "h"], {"w": draw(4, 4)})
    result = Cast().run(program, Context(keep=("first",)))
    verify_program(result.program)
    assert reasons(result) == {"first": "'keep' names 'first'"}
    kinds = {name: value.dtype.name for name, value in result.program.initializers.items()}
    assert kinds == {"w": "FLOAT", "w/float16": "FLOAT16"}
    inputs = {"x": draw(6, 4)}
    found = run_twin(result.program, inputs, dtype=None)
    exact = run_twin(program, inputs)
    assert relative_error({"h": exact["h"]}, {"h": found["h"]}) < 1e-6
    assert relative_error(exact, found) < 5e-3


def test_an_output_that_is_read_inside():
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("Relu", ["h"], ["y"], "relu"),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["h", "y"], {"w": draw(4, 4)})
    after = Cast().run(program).program
    verify_program(after)
    relu = next(n for n in after.nodes() if n.name == "relu")
    assert relu.inputs[0].name == "h_replaced" and types_of(after)["h_replaced"] == "FLOAT16"


def test_branches_are_left_and_get_what_they_read():
    def branch(name, op_type):
        made = [helper.make_node(op_type, ["h"], [f"{name}.o"], f"{name}.node")]
        return helper.make_graph(
            made, name, [], [helper.make_tensor_value_info(f"{name}.o", TensorProto.FLOAT, [2, 4])]
        )

    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("ReduceMax", ["h"], ["m"], "largest", keepdims=0),
        node("Greater", ["m", "zero"], ["c"], "positive"),
        node("If", ["c"], ["z"], "choice", then_branch=branch("a", "Tanh"), else_branch=branch("b", "Neg")),
        node("MatMul", ["z", "w"], ["y"], "last"),
    ]
    constants = {"w": draw(4, 4), "zero": np.float32(0)}
    program = program_from_nodes(nodes, {"x": (2, 4)}, ["y"], constants)
    result = Cast().run(program)
    verify_program(result.program)
    assert reasons(result) == {"choice": "its branches are left as they are"}
    inputs = {"x": draw(2, 4)}
    assert relative_error(run_twin(program, inputs), run_twin(result.program, inputs, dtype=None)) < 5e-3


def test_a_cast_to_float_becomes_one_to_float16():
    nodes = [
        node("Cast", ["i"], ["f"], "to_float", to=SINGLE),
        node("MatMul", ["f", "w"], ["y"], "linear"),
    ]
    program = program_from_nodes(nodes, {"i": ("N", 4)}, ["y"], {"w": draw(4, 2)}, dtype=TensorProto.INT64)
    after = Cast().run(program).program
    verify_program(after)
    assert [n.op_type for n in after.nodes()] == ["Cast", "MatMul", "Cast"]
    assert types_of(after)["f"] == "FLOAT16"


def test_a_quantized_program_is_refused():
    program = Pipeline.parse("fold-batch-norm").run(small_cnn(8)).program
    data = {"calibration": [({"x": draw(4, 3, 16, 16)}, None)]}
    quantized = Quantize().run(program, Context(data=data)).program
    with pytest.raises(UsageError, match="is quantized"):
        Cast().run(quantized)


def test_magnitudes_count_what_is_no_number_as_too_large():
    nodes = [node("Log", ["x"], ["l"], "log"), node("Tanh", ["x"], ["y"], "tanh")]
    program = program_from_nodes(nodes, {"x": ("N", 3)}, ["l", "y"])
    found = largest_magnitudes(
        program, [{"x": np.float32([[1.0, 2.0, 3.0]])}, {"x": np.float32([[-1.0, 2.0, 1.0]])}]
    )
    assert found["log"] == np.inf and found["tanh"] == pytest.approx(np.tanh(3.0))
    assert set(reasons(Cast().run(program))) == {"log"}
