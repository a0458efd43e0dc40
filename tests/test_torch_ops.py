"""Every operator of the canonical table against ONNX's own node test cases, and what those do not cover."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import onnx_ir as ir
import onnx_node_cases
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sartor.errors import UnsupportedOperatorError
from sartor.ir import opset
from sartor.ir.canonicalize import CANONICAL_OPS
from sartor.ir.fx import run_twin, to_fx
from sartor.ir.program import Program, Source
from sartor.ir.torch_ops import OPERATORS
from sartor.ir.torch_ops.resize import resize

REFUSED_TYPES = ("STRING", "FLOAT8", "FLOAT4", "INT4", "INT2", "float8", "float4", "int4", "int2")
"""Element types that torch does not have."""
REFUSED_CASES = {
    "test_training_dropout",  # random by definition
    "test_training_dropout_default",
    "test_training_dropout_default_mask",
    "test_training_dropout_mask",
}


def as_program(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> Program:
    return Program(
        ir.from_proto(model),
        source=Source("onnx", "case.onnx", ""),
        input_shapes={name: array.shape for name, array in inputs.items()},
    )


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    results = run_twin(as_program(model, inputs), inputs, dtype=None)
    return [results[value.name] for value in model.graph.output]


def run_case(case: onnx_node_cases.NodeCase) -> list[np.ndarray]:
    spec = OPERATORS[case.op_type]
    operands = case.model.graph.node[0].input
    constant = [n for i, n in enumerate(operands) if n and (i in spec.static or i in spec.scalars)]
    model = opset.raise_opset(ir.from_proto(onnx_node_cases.bake(case, constant)))
    return run(ir.to_proto(model), case.inputs)


@pytest.mark.parametrize("op_type", sorted(OPERATORS))
def test_onnx_node_cases(op_type: str) -> None:
    cases = onnx_node_cases.node_cases({op_type})
    if op_type == "GlobalLpPool":
        pytest.skip("ONNX has no node case; test_global_lp_pool compares with numpy")
    assert cases, f"no ONNX node case exercises {op_type}"
    passed = 0
    for case in cases:
        try:
            results = run_case(case)
        except UnsupportedOperatorError as error:
            expected = case.name in REFUSED_CASES or any(name in str(error) for name in REFUSED_TYPES)
            assert expected, f"{case.name} was refused: {error}"
            continue
        try:
            onnx_node_cases.compare(case, results)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
        passed += 1
    assert passed


def test_table_covers_the_canonical_operators() -> None:
    assert set(OPERATORS) >= CANONICAL_OPS


def test_attribute_defaults_are_onnx_defaults() -> None:
    """A wrong default is invisible in node cases that set every attribute."""
    for op_type, spec in OPERATORS.items():
        schema = onnx.defs.get_schema(op_type, 21)
        parameters = inspect.signature(spec.function).parameters if spec.attributes else {}
        for name, attribute in schema.attributes.items():
            if name not in parameters or not attribute.default_value.name or name in spec.types:
                continue  # element types arrive as torch's, and an undefined one does not arrive
            default = helper.get_attribute_value(attribute.default_value)
            default = default.decode() if isinstance(default, bytes) else default
            if isinstance(default, list):
                default = tuple(d.decode() if isinstance(d, bytes) else d for d in default)
            got = parameters[name].default
            same = got == pytest.approx(default, rel=1e-6) if isinstance(default, float) else got == default
            assert same, f"{op_type}.{name} defaults to {got}, ONNX says {default}"


def test_judge_sees_a_wrong_value() -> None:
    case = next(c for c in onnx_node_cases.node_cases({"Conv"}))
    onnx_node_cases.compare(case, case.outputs)
    with pytest.raises(AssertionError):
        onnx_node_cases.compare(case, [case.outputs[0] * 1.01])
    with pytest.raises(AssertionError):
        onnx_node_cases.compare(case, [case.outputs[0].astype(np.float64)])


def reference_case(
    node: onnx.NodeProto, inputs: dict[str, np.ndarray], *, atol: float = 1e-12, **constants: np.ndarray
) -> None:
    """Compare one node in float64 against ONNX's reference evaluator."""
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    kind = TensorProto.DOUBLE
    outputs = [helper.make_tensor_value_info(n, kind, None) for n in node.output]
    graph = helper.make_graph([node], "g", values, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    expected = ReferenceEvaluator(model).run(None, inputs)
    for got, want in zip(run(model, inputs), expected, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=atol)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_conv_with_unequal_pads(rank: int, group: int) -> None:
    pads = [1, 2, 0][:rank] + [2, 0, 1][:rank]
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["y"],
        group=group,
        pads=pads,
        strides=[2, 1, 1][:rank],
        dilations=[1, 2, 1][:rank],
    )
    x = normal(2, 4, *[7, 8, 5][:rank])
    reference_case(node, {"x": x}, w=normal(6, 4 // group, *[3, 2, 2][:rank], seed=1), b=normal(6, seed=2))


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [0, 1, 2, 1], "strides": [2, 2]},
        {"pads": [1, 1, 1, 1], "strides": [2, 2], "output_padding": [1, 0]},
        {"pads": [0, 0, 1, 0], "strides": [3, 2], "output_padding": [2, 1]},
    ],
)
def test_conv_transpose_against_explicit_sum(attributes: dict) -> None:
    """Scatter every input pixel by hand: the reference evaluator knows no groups here."""
    group = 2
    x, w, b = normal(2, 4, 4, 5), normal(4, 3, 3, 2, seed=1), normal(6, seed=2)
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=group, **attributes)
    strides, pads = attributes["strides"], attributes["pads"]
    extra = attributes.get("output_padding", [0, 0])
    size = [(x.shape[2 + a] - 1) * strides[a] + w.shape[2 + a] + extra[a] for a in range(2)]
    full = np.zeros((2, 6, *size))
    for c in range(4):
        for i in range(4):
            for j in range(5):
                outs = slice(c // 2 * 3, c // 2 * 3 + 3)
                rows = slice(i * strides[0], i * strides[0] + 3)
                columns = slice(j * strides[1], j * strides[1] + 2)
                full[:, outs, rows, columns] += x[:, c, i, j][:, None, None, None] * w[c][None]
    want = full[:, :, pads[0] : size[0] - pads[2], pads[1] : size[1] - pads[3]] + b.reshape(1, 6, 1, 1)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.DOUBLE, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
            [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(b, "b")],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    (got,) = run(model, {"x": x})
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (0.6, 1.7)])
def test_resize(mode: str, coordinates: str, scales: tuple[float, float]) -> None:
    node = helper.make_node(
        "Resize",
        ["x", "", "s"],
        ["y"],
        mode=mode,
        coordinate_transformation_mode=coordinates,
        nearest_mode="floor",
    )
    factors = np.array([1.0, 1.0, *scales], dtype=np.float32)
    # The reference computes cubic coefficients in float32; test_cubic_resize_is_torchs is the tight one.
    atol = 1e-5 if mode == "cubic" else 1e-12
    reference_case(node, {"x": normal(2, 3, 5, 6)}, atol=atol, s=factors)


@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners"])
def test_cubic_resize_is_torchs(coordinates: str) -> None:
    x = torch.from_numpy(normal(2, 3, 5, 6))
    got = resize(x, None, (1.0, 1.0, 2.0, 3.0), mode="cubic", coordinate_transformation_mode=coordinates)
    corners = coordinates == "align_corners"
    want = torch.nn.functional.interpolate(x, size=(10, 18), mode="bicubic", align_corners=corners)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lrn_window(size: int) -> None:
    """An even window reaches further up than down; torch's own does the opposite."""
    node = helper.make_node("LRN", ["x"], ["y"], size=size, alpha=0.7, beta=0.6, bias=1.1)
    reference_case(node, {"x": normal(5, 5, 3, 2)}, atol=1e-7)  # the reference is wrong unless N equals C


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(-1, -100, -1), (4, 0, -2), (100, 1, -3), (0, 2**62, 2), (-3, -1, 1), (3, 1, 1)],
)
def test_slice_bounds(start: int, end: int, step: int) -> None:
    node = helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["y"])
    constants = {"start": start, "end": end, "axis": -1, "step": step}
    arrays = {name: np.array([number], dtype=np.int64) for name, number in constants.items()}
    reference_case(node, {"x": normal(2, 6)}, **arrays)


def test_global_lp_pool() -> None:
    x = normal(2, 3, 4, 5)
    node = helper.make_node("GlobalLpPool", ["x"], ["y"], p=3)
    info = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in ("x", "y")]
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    want = (np.abs(x) ** 3).sum((2, 3), keepdims=True) ** (1 / 3)
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-12)


def test_softplus_is_exact_above_twenty() -> None:
    node = helper.make_node("Softplus", ["x"], ["y"])
    reference_case(node, {"x": np.array([-30.0, 0.0, 19.0, 20.5, 25.0])})


def test_unknown_operator_and_attribute_are_refused() -> None:
    case = next(c for c in onnx_node_cases.node_cases({"Det"}))
    with pytest.raises(UnsupportedOperatorError, match="operator 'Det' is not in the FX twin's table"):
        to_fx(as_program(case.model, case.inputs))
    case = next(c for c in onnx_node_cases.node_cases({"Relu"}))
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0))
    with pytest.raises(UnsupportedOperatorError, match="attribute 'alpha' is not understood"):
        to_fx(as_program(model, case.inputs))


def test_shape_that_depends_on_data_is_refused() -> None:
    case = next(c for c in onnx_node_cases.node_cases({"Reshape"}))
    with pytest.raises(UnsupportedOperatorError, match=r"value 'shape' is used as a shape.*depends on data"):
        to_fx(as_program(case.model, case.inputs))
