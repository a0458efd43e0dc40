"""Rewrites for TensorRT's parser: equal in the reference, taken by the parser, and refused where they do not hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error, run_reference
from onnx import TensorProto

from sartor.backends.protocol import TargetOptions
from sartor.backends.tensorrt import Settings, TensorRTBackend, builder, settings
from sartor.errors import BackendError, UsageError

BACKEND = TensorRTBackend(Settings(compute_capabilities=("8.6",), flavour="tensorrt_rtx"))


def parsed(program, folder):
    """The parser's record of the legalized program; raises if it refuses."""
    pytest.importorskip("tensorrt_rtx")
    BACKEND.legalize(program).save(folder / "model.onnx")
    return builder.Parsed(builder.Vendor(settings.RTX), folder / "model.onnx").record


def attributes(program, op_type):
    found = next(n for n in BACKEND.legalize(program).graph.all_nodes() if n.op_type == op_type)
    return {name: attribute.value for name, attribute in found.attributes.items()}


def test_what_needs_nothing_is_left_alone():
    program = small_cnn(8)
    assert BACKEND.legalize(program) is program


# ---- int64 -----------------------------------------------------------------------------------------
def test_indices_are_narrowed_where_onnx_allows_it(tmp_path):
    weights = {
        "i": np.array([2, 0]),
        "s": np.array([1]),
        "e": np.array([2**63 - 1]),
        "a": np.array([1]),
        "t": np.array([1]),
        "shape": np.array([-1, 2]),
    }
    nodes = [
        node("Gather", ["x", "i"], ["g"], axis=0),
        node("Slice", ["g", "s", "e", "a", "t"], ["c"]),
        node("Reshape", ["c", "shape"], ["y"]),
    ]
    program = program_from_nodes(nodes, {"x": (3, 5)}, ["y"], weights)
    legal = BACKEND.legalize(program)
    types = {n: v.const_value.dtype.name for n, v in legal.initializers.items() if v.const_value is not None}
    assert types == {**dict.fromkeys("iseat", "INT32"), "shape": "INT64"}
    assert legal.initializer_array("e").tolist() == [2**31 - 1]
    feeds = random_inputs(program)
    assert relative_error(run_reference(program, feeds), run_reference(legal, feeds)) == 0
    assert BACKEND.legality(program, TargetOptions()).ok and not parsed(program, tmp_path).rejected
    assert program.initializer_array("i").dtype == np.int64  # the program itself is as it was


def test_a_scalar_index_stays_a_scalar():
    nodes = [node("Gather", ["x", "i"], ["g"], axis=1), node("Flatten", ["g"], ["y"])]
    program = program_from_nodes(nodes, {"x": (2, 3, 4)}, ["y"], {"i": np.array(-1)})
    program.initializers["i"].const_value = ir.Tensor(np.array(-1), name="i")  # the builder made it [1]
    program.initializers["i"].shape = ir.Shape(())
    program.invalidate()
    legal = BACKEND.legalize(program)
    assert legal.initializer_shape("i") == () and legal.initializer_array("i").dtype == np.int32


def test_a_constant_with_another_reader_keeps_its_type():
    nodes = [
        node("Gather", ["x", "i"], ["g"], axis=0),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["f", "axis"], ["u"]),
        node("Mul", ["g", "u"], ["y"]),
    ]
    weights = {"i": np.array([2, 1]), "axis": np.array([1])}
    program = program_from_nodes(nodes, {"x": (3, 2)}, ["y"], weights)
    legal = BACKEND.legalize(program)
    assert legal.initializer_array("i").dtype == np.int64 and len(legal.initializers) == 3
    feeds = random_inputs(program)
    assert relative_error(run_reference(program, feeds), run_reference(legal, feeds)) == 0


# ---- Resize ----------------------------------------------------------------------------------------
def resize(scales=None, sizes=None, roi=None, shape=(1, 2, 4, 6), **options):
    weights = {"roi": np.asarray(roi, np.float32)} if roi is not None else {}
    operands = ["x", "roi" if roi is not None else ""]
    if scales is not None:
        operands, weights = [*operands, "s"], {**weights, "s": np.asarray(scales, np.float32)}
    else:
        operands, weights = [*operands, "", "z"], {**weights, "z": np.asarray(sizes)}
    return program_from_nodes(
        [node("Resize", operands, ["y"], "here", **options)], {"x": shape}, ["y"], weights
    )


WHOLE = [0, 0, 0, 0, 1, 1, 1, 1]
SYMMETRIC = {"coordinate_transformation_mode": "half_pixel_symmetric", "mode": "linear"}
CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
FIT = {"keep_aspect_ratio_policy": "not_larger", "mode": "linear", "axes": [2, 3]}


@pytest.mark.parametrize(
    ("arguments", "becomes"),
    [
        (dict(scales=[1, 1, 2, 1.5], **SYMMETRIC), {"coordinate_transformation_mode": "half_pixel"}),
        (dict(sizes=[1, 2, 7, 7], **SYMMETRIC), {"coordinate_transformation_mode": "half_pixel"}),
        (dict(scales=[1, 1, 2, 1.5], roi=WHOLE, **CROP), {"coordinate_transformation_mode": "align_corners"}),
        (dict(sizes=[8, 8], **FIT), {"keep_aspect_ratio_policy": "stretch"}),
        (dict(sizes=[8, 9], **{**FIT, "keep_aspect_ratio_policy": "not_smaller"}), {"axes": (2, 3)}),
        (dict(scales=[1, 1, 2, 1.5], mode="linear", antialias=1), {"antialias": 0}),
    ],
)
def test_resize_is_rewritten_where_it_is_the_same(arguments, becomes, tmp_path):
    program = resize(**arguments)
    legal, found = BACKEND.legalize(program), attributes(program, "Resize")
    assert becomes.items() <= {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}.items()
    feeds = random_inputs(program)
    before, after = (run_reference(p, feeds) for p in (program, legal))
    assert before["y"].shape == after["y"].shape
    assert relative_error(before, after) < 1e-6
    assert BACKEND.legality(program, TargetOptions()).ok and not parsed(program, tmp_path).rejected


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (dict(scales=[1, 1, 1.3, 1], **SYMMETRIC), "resize-coordinates"),  # 5.2 rows become 5
        (dict(scales=[1, 1, 2, 2], roi=[0, 0, 0.2, 0, 1, 1, 1, 1], **CROP), "resize-coordinates"),
        (
            dict(sizes=[1, 2, 1, 6], roi=WHOLE, **CROP),
            "resize-coordinates",
        ),  # one row: its centre, not its corner
        (dict(scales=[1, 1, 0.5, 2], mode="linear", antialias=1), "resize-antialias"),
        # 13/6 times 4 rows are 8.67: 9 by the policy, 8 by the scale.
        (dict(sizes=[7, 13], **{**FIT, "keep_aspect_ratio_policy": "not_smaller"}), "resize-policy"),
    ],
)
def test_resize_is_refused_where_it_is_not_the_same(arguments, rule):
    broken = BACKEND.legality(resize(**arguments), TargetOptions()).violations
    assert [(f.node, f.rule) for f in broken] == [("here", rule)]


# ---- quantization ----------------------------------------------------------------------------------
def quantized(zero, build, shape=(1, 4, 7, 7), scale=0.043):
    """`x` behind a pair with this zero point, read by what `build` adds; outputs `y`."""
    generator = np.random.default_rng(0)
    weights = {"s": np.float32(scale), "z": np.array(zero, np.int8)}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
    ]
    build(nodes, weights, generator)
    return program_from_nodes(nodes, {"x": shape}, ["y"], weights)


def constant_of(nodes, weights, generator, name, shape, axis, dtype=np.int8):
    limit = 127 if dtype == np.int8 else 2000
    weights[name] = generator.integers(-limit, limit + 1, shape).astype(dtype)
    weights[f"{name}_s"] = generator.uniform(0.001, 0.02, shape[axis]).astype(np.float32)
    weights[f"{name}_z"] = np.zeros(shape[axis], dtype)
    nodes.append(
        node("DequantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_d"], f"dq_{name}", axis=axis)
    )


def convolution(bias=True, pads=(1, 0, 2, 1), group=1):
    def build(nodes, weights, generator):
        constant_of(nodes, weights, generator, "w", (6, 4 // group, 3, 3), 0)
        if bias:
            constant_of(nodes, weights, generator, "b", (6,), 0, np.int32)
        operands = ["d", "w_d", *(["b_d"] if bias else [])]
        nodes.append(node("Conv", operands, ["y"], "layer", pads=pads, group=group))

    return build


def product(op_type, trans=0, bias=True):
    def build(nodes, weights, generator):
        shape = (5, 7) if trans else (7, 5)
        constant_of(nodes, weights, generator, "w", shape, 0 if trans else 1)
        if op_type == "MatMul":
            nodes.append(node("MatMul", ["d", "w_d"], ["y"], "layer"))
            return
        weights["c"] = generator.standard_normal(5).astype(np.float32)
        operands = ["d", "w_d", *(["c"] if bias else [])]
        nodes.append(node("Gemm", operands, ["y"], "layer", transB=trans, alpha=0.7, beta=0.4))

    return build


def transposed(nodes, weights, generator):
    constant_of(nodes, weights, generator, "w", (4, 5, 3, 3), 1)
    nodes.append(node("ConvTranspose", ["d", "w_d"], ["y"], "layer"))


def elementwise(nodes, weights, generator):
    nodes.append(node("Mul", ["d", "d"], ["y"], "layer"))


def several(nodes, weights, generator):
    """Two convolutions with the same padding, one without, and a pool."""
    for index, pads in enumerate(((1, 1, 1, 1), (1, 1, 1, 1), (0, 0, 0, 0))):
        constant_of(nodes, weights, generator, f"w{index}", (3, 4, 3, 3), 0)
        nodes.append(node("Conv", ["d", f"w{index}_d"], [f"c{index}"], f"conv{index}", pads=pads))
    nodes.append(node("MaxPool", ["d"], ["m"], kernel_shape=[7, 7]))
    nodes.append(node("ReduceMean", ["c2", "axes"], ["r"], keepdims=1))
    weights["axes"] = np.array([1, 2, 3])
    nodes.append(node("ReduceMean", ["m", "axes"], ["n"], keepdims=1))
    nodes.append(node("Sum", ["c0", "c1", "r", "n"], ["y"]))


def asymmetric_constant(nodes, weights, generator):
    weights.update(k=np.arange(-3, 4, dtype=np.int8), ks=np.float32(0.1), kz=np.array(5, np.int8))
    nodes.append(node("DequantizeLinear", ["k", "ks", "kz"], ["kd"], "dq_k"))
    nodes.append(node("Add", ["d", "kd"], ["y"]))


CASES = {
    "padded convolution": (convolution(), "layer"),
    "convolution without a bias": (convolution(bias=False), "layer"),
    "without padding": (convolution(pads=(0, 0, 0, 0)), "layer"),
    "grouped": (convolution(group=2), "layer"),
    "gemm": (product("Gemm"), "layer"),
    "gemm transposed": (product("Gemm", trans=1), "layer"),
    "gemm without a bias": (product("Gemm", bias=False), "layer"),
    "matmul": (product("MatMul"), "layer"),
    "transposed convolution": (transposed, ""),
    "elementwise": (elementwise, ""),
    "several readers": (several, "conv0"),
    "constant with a zero point": (asymmetric_constant, ""),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zero", [-128, 37])
def test_quantization_becomes_symmetric(name, zero, tmp_path):
    build, layer = CASES[name]
    program = quantized(zero, build, (3, 7) if "gemm" in name or name == "matmul" else (1, 4, 7, 7))
    legal = BACKEND.legalize(program)
    zeros = [legal.initializer_array(n.inputs[2].name) for n in legal.nodes() if "uantizeLinear" in n.op_type]
    assert zeros and not any(array.any() for array in zeros)
    feeds = random_inputs(program)
    assert relative_error(run_reference(program, feeds), run_reference(legal, feeds)) < 1e-6
    # The tolerance can fail: another scale is seen.
    other = quantized(zero, build, program.input_shapes["x"], scale=0.044)
    assert relative_error(run_reference(other, feeds), run_reference(legal, feeds)) > 1e-4
    if layer:  # it still reads integers
        found = next(n for n in legal.nodes() if n.name == layer)
        assert [v.producer().op_type for v in found.inputs[:2]] == ["DequantizeLinear"] * 2
    assert not parsed(program, tmp_path).rejected
    assert BACKEND.legality(program, TargetOptions(precision="int8")).ok


def test_a_vector_times_a_matrix_stays_a_vector(tmp_path):
    program = quantized(37, product("MatMul"), (7,))
    legal = BACKEND.legalize(program)
    assert legal.shapes()["y"] == program.shapes()["y"] == (5,)
    feeds = random_inputs(program)
    before, after = (run_reference(p, feeds) for p in (program, legal))
    assert after["y"].shape == (5,) and relative_error(before, after) < 1e-6
    assert not parsed(program, tmp_path).rejected


def test_a_pair_with_several_scales_is_refused():
    weights = {"s": np.full(3, 0.1, np.float32), "z": np.array([0, 1, 0], np.int8)}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize", axis=1),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize", axis=1),
    ]
    program = program_from_nodes(nodes, {"x": (1, 3)}, ["y"], weights)
    broken = BACKEND.legality(program, TargetOptions(precision="int8")).violations
    assert [(f.node, f.rule, f.observed) for f in broken] == [
        ("quantize", "zero-point", "zero point 1"),
        ("dequantize", "zero-point", "zero point 1"),
    ]


# ---- other spellings -------------------------------------------------------------------------------
def test_rnn_has_one_activation_per_direction(tmp_path):
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((1, 4, 3)).astype(np.float32),
        "r": generator.standard_normal((1, 4, 4)).astype(np.float32),
    }
    nodes = [node("RNN", ["x", "w", "r"], ["y"], hidden_size=4, activations=["Tanh", "Tanh"])]
    program = program_from_nodes(nodes, {"x": (2, 1, 3)}, ["y"], weights)
    assert list(attributes(program, "RNN")["activations"]) == ["Tanh"]
    assert not parsed(program, tmp_path).rejected


def test_outputs_that_nobody_reads_are_dropped(tmp_path):
    weights = {"s": np.ones(5, np.float32)}

    def normed(outputs):
        nodes = [node("LayerNormalization", ["x", "s"], ["y", "mean", "deviation"], "norm")]
        return program_from_nodes(nodes, {"x": (2, 5)}, outputs, weights)

    assert not parsed(normed(["y"]), tmp_path).rejected
    broken = BACKEND.legality(normed(["y", "mean"]), TargetOptions()).violations
    assert [(f.node, f.rule, f.observed) for f in broken] == [("norm", "single-output", "2 outputs")]


# ---- surgery of the user's -------------------------------------------------------------------------
def shifted():
    nodes = [
        node("Cast", ["x"], ["i"], to=TensorProto.UINT8),
        node("BitShift", ["i", "one"], ["b"], "shift", direction="LEFT"),
        node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    return program_from_nodes(nodes, {"x": (2, 3)}, ["y"], {"one": np.ones(3, np.uint8)})


def double_instead(graph):
    """BitShift by one, computed in float."""
    import onnx_graphsurgeon as gs

    found = next(n for n in graph.nodes if n.op == "BitShift")
    assert found.outputs[0].shape == [2, 3]  # shapes are there
    two = gs.Constant("two", np.float32([2]))
    graph.nodes.append(gs.Node("Mul", "double", inputs=[graph.inputs[0], two], outputs=list(graph.outputs)))
    graph.nodes[-2].outputs.clear()


def into_a_plugin(graph):
    """BitShift as a plugin."""
    found = next(n for n in graph.nodes if n.op == "BitShift")
    found.op, found.domain, found.attrs = "ShiftLeft_TRT", "trt.plugins", {"plugin_version": "1"}


def with_surgery(*hooks):
    chosen = Settings(compute_capabilities=("8.6",), flavour="tensorrt_rtx", surgery=hooks)
    return TensorRTBackend(chosen)


def test_surgery_makes_an_illegal_program_legal(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    program = shifted()
    broken = {f.rule for f in BACKEND.legality(program, TargetOptions()).violations}
    assert broken == {"unsupported-operator", "element-type"}
    artifact = with_surgery(double_instead).lower(program, tmp_path / "out", TargetOptions())
    assert artifact.metadata["surgery"] == ["double_instead"]
    assert [n.op_type for n in program.nodes()] == ["Cast", "BitShift", "Cast"]


def test_a_plugin_is_legal_in_a_domain_of_its_own_and_the_parser_looks_for_it(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    backend = with_surgery(into_a_plugin)
    findings = backend.legality(shifted(), TargetOptions()).violations
    assert {f.rule for f in findings} == {"element-type"}  # of the casts around it, not of the plugin

    def as_float(graph):
        for cast in [n for n in graph.nodes if n.op == "Cast"]:
            cast.attrs["to"] = TensorProto.FLOAT
        graph.nodes[1].inputs.pop()
        graph.nodes[1].outputs[0].dtype = np.float32
        into_a_plugin(graph)

    backend = with_surgery(as_float)
    assert backend.legality(shifted(), TargetOptions()).ok
    with pytest.raises(BackendError, match=r"Node 'shift' .ShiftLeft_TRT.: .*Plugin not found"):
        backend.lower(shifted(), tmp_path / "out", TargetOptions())
    assert not list(tmp_path.iterdir())


def test_surgery_of_installed_packages_is_applied_and_recorded(tmp_path, monkeypatch):
    info = tmp_path / "board-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: board\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sartor.tensorrt_surgery]\nboard = board_surgery:change\n")
    (tmp_path / "board_surgery.py").write_text("def change(graph):\n    graph.nodes[0].name = 'renamed'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings.SURGERY.refresh()
    try:
        legal = with_surgery(double_instead).legalize(shifted())
        assert with_surgery(double_instead).settings.hooks()[0][0] == "board"
        with pytest.raises(UsageError, match="no function"):
            with_surgery("text").settings.hooks()
    finally:
        monkeypatch.undo()
        settings.SURGERY.refresh()
    assert [n.op_type for n in legal.nodes()] == ["Mul"]


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (lambda graph: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda graph: "graph", "returned 'str'; expected an onnx_graphsurgeon.Graph or None"),
    ],
)
def test_surgery_that_fails_is_named(hook, text):
    with pytest.raises(BackendError, match=f"TensorRT surgery '<lambda>' {text}"):
        with_surgery(hook).legalize(shifted())


def test_a_missing_graphsurgeon_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[tensorrt\]'"):
        with_surgery(double_instead).legalize(shifted())
