"""Operators that ONNX defines by a function: bodies of any opset, nested, with omitted operands and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_files import random, run, save, tensor, weights

from sartor.errors import ModelError, SartorError, UnsupportedOperatorError
from sartor.ir.canonicalize import CANONICAL_OPS
from sartor.ir.load import load
from sartor.ir.opset_functions import ALWAYS_EXPANDED
from sartor.ir.program import Program

node = helper.make_node


def same(path: Path, program: Program, inputs: dict[str, np.ndarray], *, tolerance: float = 1e-6) -> None:
    """ONNX's reference evaluator on the file, ONNX Runtime on the canonical program."""
    want = ReferenceEvaluator(str(path)).run(None, inputs)
    for expected, got in zip(want, run(program.to_bytes(), inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def attention(outputs: list[str], operands: list[str], name: str = "attend") -> object:
    return node("Attention", operands, outputs, name=name, q_num_heads=2, kv_num_heads=2)


def test_attention_with_omitted_operands_and_outputs(tmp_path: Path) -> None:
    """Past keys without a mask, and the raw scores without the present keys between them."""
    nodes = [attention(["y", "k2", "v2"], ["q", "k", "v", "", "pk", "pv"])]
    shapes: dict[str, list] = {
        "q": [1, 3, 8],
        "k": [1, 3, 8],
        "v": [1, 3, 8],
        "pk": [1, 2, 2, 4],
        "pv": [1, 2, 2, 4],
    }
    path = save(
        tmp_path / "m.onnx",
        nodes,
        shapes,
        {"y": None, "k2": None, "v2": None},
        opset=23,
        ir_version=11,
        check=False,
    )
    same(path, load(path), {n: random(*s, seed=i) for i, (n, s) in enumerate(shapes.items())})
    nodes = [attention(["y", "", "", "scores"], ["q", "k", "v"])]
    small = {n: shapes[n] for n in "qkv"}
    path = save(
        tmp_path / "s.onnx", nodes, small, {"y": None, "scores": None}, opset=23, ir_version=11, check=False
    )
    same(path, load(path), {n: random(*s, seed=i) for i, (n, s) in enumerate(small.items())})


def test_two_calls_keep_their_own_attributes(tmp_path: Path) -> None:
    nodes = [
        node("Swish", ["x"], ["a"], alpha=0.5),
        node("Swish", ["a"], ["b"], alpha=2.0),
        node("Swish", ["b"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [2, 5]}, {"y": [2, 5]}, opset=24, ir_version=11)
    program = load(path)
    same(path, program, {"x": random(2, 5)})
    assert len({n.name for n in program.nodes()}) == len(list(program.nodes()))


def test_a_body_that_calls_a_function(tmp_path: Path) -> None:
    """SoftmaxCrossEntropyLoss hands its reduction on to NegativeLogLikelihoodLoss, in a body of opset 13."""
    labels = np.array([1, 0, 3], dtype=np.int64)
    for reduction in ("none", "sum", "mean"):
        path = save(
            tmp_path / "m.onnx",
            [node("SoftmaxCrossEntropyLoss", ["x", "t"], ["y"], reduction=reduction)],
            {"x": [3, 5], "t": [3]},
            {"y": [3] if reduction == "none" else []},
            opset=17,
            types={"t": TensorProto.INT64},
        )
        same(path, load(path), {"x": random(3, 5), "t": labels})


def test_group_normalization_with_parameters_per_group(tmp_path: Path) -> None:
    """As it was before opset 21."""
    path = save(
        tmp_path / "m.onnx",
        [node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2, epsilon=1e-3)],
        {"x": [2, 6, 4, 4]},
        {"y": [2, 6, 4, 4]},
        [weights("s", 2), weights("b", 2, seed=1)],
        opset=18,
        check=False,  # ONNX has since deprecated this form
    )
    x = random(2, 6, 4, 4)
    groups = x.reshape(2, 2, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-3)
    s, b = (np.asarray(load(path).initializer_array(n)).reshape(1, 2, 1) for n in "sb")
    want = (normal * s + b).reshape(x.shape)
    np.testing.assert_allclose(run(load(path).to_bytes(), {"x": x})[0], want, rtol=1e-5, atol=1e-5)


def test_inside_a_local_function(tmp_path: Path) -> None:
    """Its types are known only where it is called."""
    body = [node("RMSNormalization", ["a", "s"], ["b"])]
    function = helper.make_function("local", "Norm", ["a", "s"], ["b"], body, [helper.make_opsetid("", 23)])
    path = save(
        tmp_path / "m.onnx",
        [node("Norm", ["x", "w"], ["t"], domain="local"), node("Relu", ["t"], ["y"])],
        {"x": [2, 5]},
        {"y": [2, 5]},
        [weights("w", 5)],
        opset=23,
        ir_version=11,
        functions=[function],
        domains=["local"],
    )
    same(path, load(path), {"x": random(2, 5)})


def test_space_to_depth_in_the_newer_order(tmp_path: Path) -> None:
    nodes = [node("SpaceToDepth", ["x"], ["y"], blocksize=2, mode="CRD")]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": [1, 3, 4, 6]}, {"y": [1, 12, 2, 3]}, opset=28, ir_version=14
    )
    program = load(path)
    x = random(1, 3, 4, 6)
    want = x.reshape(1, 3, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(1, 12, 2, 3)
    np.testing.assert_array_equal(run(program.to_bytes(), {"x": x})[0], want)
    assert "SpaceToDepth" not in {n.op_type for n in program.nodes()}
    plain = [node("SpaceToDepth", ["x"], ["y"], blocksize=2)]
    path = save(
        tmp_path / "d.onnx", plain, {"x": [1, 3, 4, 6]}, {"y": [1, 12, 2, 3]}, opset=28, ir_version=14
    )
    assert [n.op_type for n in load(path).nodes()] == ["SpaceToDepth"]


def test_older_forms(tmp_path: Path) -> None:
    """Operators that changed their meaning between opset 9 and 20."""
    rois = tensor("r", np.array([[0, 0, 4, 4], [1, 1, 5, 3]], np.float32))
    files = {
        "GridSample": (
            16, [node("GridSample", ["x", "g"], ["y"], mode="bicubic")], [weights("g", 1, 3, 3, 2)], "cubic"
        ),
        "RoiAlign": (
            10, [node("RoiAlign", ["x", "r", "i"], ["y"], output_height=2, output_width=2, sampling_ratio=2)],
            [rois, tensor("i", np.zeros(2, np.int64))], "output_half_pixel",
        ),
        "ScatterElements": (
            9, [node("Scatter", ["x", "j", "u"], ["y"], axis=1)],
            [tensor("j", np.array([[[[1]]]], np.int64)), weights("u", 1, 1, 1, 1)], None,
        ),
    }  # fmt: skip
    for op_type, (opset, nodes, arrays, setting) in files.items():
        path = save(
            tmp_path / "m.onnx", nodes, {"x": [1, 2, 6, 6]}, {"y": None}, arrays, opset=opset, check=False
        )
        program = load(path)
        (found,) = (n for n in program.nodes() if n.op_type == op_type)
        assert setting is None or setting in [a.value for a in found.attributes.values()]
        x = {"x": random(1, 2, 6, 6)}
        np.testing.assert_allclose(run(program.to_bytes(), x)[0], run(path, x)[0], rtol=1e-5, atol=1e-6)


def test_dft_with_its_axis_as_an_attribute(tmp_path: Path) -> None:
    for axis in (None, 2):
        nodes = [node("DFT", ["x"], ["y"], **({} if axis is None else {"axis": axis}))]
        path = save(tmp_path / "m.onnx", nodes, {"x": [1, 5, 6, 1]}, {"y": None}, opset=17, check=False)
        x = random(1, 5, 6, 1)
        want = np.fft.fft(x[..., 0], axis=1 if axis is None else axis)
        got = run(load(path).to_bytes(), {"x": x})[0]
        np.testing.assert_allclose(got, np.stack([want.real, want.imag], -1), rtol=1e-4, atol=1e-4)


def test_operators_as_old_as_onnx_that_never_changed(tmp_path: Path) -> None:
    nodes = [node("Not", ["x"], ["y"])]
    kinds = {"x": TensorProto.BOOL, "y": TensorProto.BOOL}
    path = save(tmp_path / "m.onnx", nodes, {"x": [2, 3]}, {"y": [2, 3]}, opset=1, ir_version=3, types=kinds)
    assert [n.op_type for n in load(path).nodes()] == ["Not"]
    path = save(
        tmp_path / "r.onnx", [node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]}, opset=1, ir_version=3
    )
    with pytest.raises(
        ModelError, match=r"opset 1; the oldest supported is 6, and operator 'Relu'.*has changed"
    ):
        load(path)


def test_an_operator_without_a_body_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("BitCast", ["x"], ["y"], to=TensorProto.INT32, name="bits")],
        {"x": [2]},
        {"y": [2]},
        opset=26,
        ir_version=13,
        types={"y": TensorProto.INT32},
    )
    with pytest.raises(
        UnsupportedOperatorError, match=r"'bits' uses operator 'BitCast', which opset 21 does not"
    ):
        load(path)


def test_what_is_always_expanded_is_not_in_the_table() -> None:
    assert not ALWAYS_EXPANDED & CANONICAL_OPS
    for name in ALWAYS_EXPANDED:
        assert ir.Node("", name, []).op_type == name


@pytest.mark.parametrize(
    "broken",
    [
        node("RMSNormalization", ["x"], ["y"]),
        node("RMSNormalization", ["x", "w", "w", "w"], ["y"]),
        node("Attention", ["x", "x", "x"], ["y"]),
        node("Attention", ["x", "w", "x"], ["y", "", "", "", "z"], q_num_heads=0),
        node("Swish", [], ["y"]),
        node("AffineGrid", ["x", "w"], ["y"]),
    ],
)
def test_malformed_calls_end_in_one_clear_error(tmp_path: Path, broken: object) -> None:
    path = save(
        tmp_path / "m.onnx",
        [broken],
        {"x": [2, 5]},
        {"y": None},
        [weights("w", 5)],
        opset=24,
        ir_version=11,
        check=False,
    )
    with pytest.raises(SartorError, match=r"\w+"):
        load(path)
