"""Sample models from a spec and sizes alone, against what they must contain."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from cost_networks import Net, residual
from test_kernel_table import GROUPS, runs, variety

from sartor.cost_models.model_builder import ModelBuilder
from sartor.cost_models.samples import (
    kernels_of,
    moved_bytes,
    nearest_sizes,
    sample_model,
    shapes_at,
    weight_bytes,
)
from sartor.cost_models.signatures import key_of, signature_of, variable_names
from sartor.errors import InternalError
from sartor.ir.extents import Extent
from sartor.ir.kernels import Kernel
from sartor.ir.operands import Operand, channels_per_group
from sartor.ir.quantities import Quantity
from sartor.ir.workload import build_workload
from sartor.profiling.shapes import activations_product, moving


def grouped(kept_groups: bool, groups=4, inner=8, outer=6, op="Conv"):
    """A grouped convolution whose plan removes whole groups, or channels of every group."""

    def dim(full: int, varies: bool) -> Extent:
        return Extent(((float(full), ("g",)),)) if varies else Extent.constant(full)

    size = (dim(1, False), dim(groups * inner, True), dim(9, False), dim(9, False))
    out = (dim(1, False), dim(groups * outer, True), dim(9, False), dim(9, False))
    stored = dim(outer if op == "ConvTranspose" else inner, not kept_groups)
    w = (
        dim(groups * (inner if op == "ConvTranspose" else outer), True),
        stored,
        dim(3, False),
        dim(3, False),
    )
    inputs = (Operand("x", size, 4, "FLOAT"), Operand("w", w, 4, "FLOAT", stored=True))
    attributes = {"group": groups, "kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1]}
    zero, y = Quantity(), Operand("y", out, 4, "FLOAT")
    per_group = channels_per_group(op, inputs, y)
    return Kernel("k", op, "conv", ("k",), attributes, inputs, (y,), (), zero, zero, zero, **per_group)


def weights_of(blob: bytes) -> list[tuple[int, ...]]:
    return [tuple(w.dims) for w in onnx.load_from_string(blob).graph.initializer]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_a_plan_removes_whole_groups_or_narrows_them(op):
    for whole, expected in ((True, (2.0, 8.0, 6.0)), (False, (4.0, 4.0, 3.0))):
        signature = signature_of(grouped(whole, op=op))
        assert variable_names(signature.spec) == ("groups", "in_per_group", "out_per_group")
        assert [q.full for q in signature.variables] == [4.0, 8.0, 6.0]
        half = {"g": 0.5}
        assert tuple(float(q.evaluate(half)) for q in signature.variables) == expected
        g, i, o = (int(v) for v in expected)
        blob = sample_model(signature.spec, expected)
        first = (g * i, o, 3, 3) if op == "ConvTranspose" else (g * o, i, 3, 3)
        assert weights_of(blob) == [first, (g * o,)]
        (found,) = (a.i for a in onnx.load_from_string(blob).graph.node[0].attribute if a.name == "group")
        assert found == g
        runs(blob)


def test_grouped_and_dense_convolutions_of_equal_channels_are_different_kernels():
    """ResNeXt-50 (32 groups of 4) against WideResNet-50-2 (128 channels): 32 times the products."""
    found = {g: signature_of(grouped(False, g, 128 // g, 128 // g)) for g in (1, 32)}
    assert found[1].key != found[32].key
    sizes = {g: [q.full for q in s.variables] for g, s in found.items()}
    assert sizes == {1: [128.0, 128.0], 32: [32.0, 4.0, 4.0]}
    blobs = {g: sample_model(found[g].spec, sizes[g]) for g in found}
    assert [weights_of(blobs[g])[0] for g in (1, 32)] == [(128, 128, 3, 3), (128, 4, 3, 3)]


def test_weight_bytes_are_those_of_the_model():
    for kernel in build_workload(variety()).kernels:
        signature = signature_of(kernel)
        sizes = [q.full for q in signature.variables]
        graph = onnx.load_from_string(sample_model(signature.spec, sizes)).graph
        values = [e.get("value") is not None for e in signature.spec.get("inputs", ()) if e]
        if any(values) or signature.spec.get("epilogue"):
            continue
        stored = sum(onnx.numpy_helper.to_array(w).nbytes for w in graph.initializer)
        assert weight_bytes(signature.spec, sizes) == stored, kernel.name


def test_a_spec_alone_says_how_a_join_scales():
    net = Net((1, 3, 8, 8))
    a, b = net.conv("x", ("a", 24), 1, "ca"), net.conv("x", ("b", 8), 1, "cb")
    joined = net.nodes  # appended below
    joined.append(onnx.helper.make_node("Concat", [a, b], ["y"], name="join", axis=1))
    one = net.extents[a][0]
    channels = Extent(((24.0, ("a",)), (8.0, ("b",))))
    net.extents["y"] = (one, channels, *net.extents[a][2:])
    workload = build_workload(net.program(("y",)), net.extents)
    (kernel,) = (k for k in workload.kernels if k.op_type == "Concat")
    signature = signature_of(kernel)
    assert [e["dims"][1] for e in signature.spec["inputs"]] == ["3*", "*"]
    assert signature.spec["outputs"][0][1] == "4*"
    full = signature.variables[0].full
    assert nearest_sizes(signature.spec, [full]) == (full,)
    shapes = shapes_at(signature.spec, [full / 2 + 5])
    assert [dims[1] for dims, _ in shapes.inputs] == [12, 4] and shapes.outputs[0][0][1] == 16
    blob = sample_model(signature.spec, [full / 2])
    assert [i.type.tensor_type.shape.dim[1].dim_value for i in onnx.load_from_string(blob).graph.input] == [
        12,
        4,
    ]
    runs(blob)


def test_what_a_network_needs_is_merged_and_follows_the_plan():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents)
    needs, without = kernels_of(workload)
    assert without == () and sum(count for _, _, count in needs) == len(
        [k for k in workload.kernels if not k.instead_of]
    )
    assert len({(s.key, at) for s, at, _ in needs}) == len(needs)
    halved, _ = kernels_of(workload, {g: 0.5 for g in GROUPS})
    total = {True: 0.0, False: 0.0}
    for half, found in ((False, needs), (True, halved)):
        for signature, sizes, count in found:
            total[half] += weight_bytes(signature.spec, sizes) * count
    assert 0.2 < total[True] / total[False] < 0.6
    for signature, sizes, _ in halved:
        assert nearest_sizes(signature.spec, sizes) == sizes, signature.key


def test_an_epilogue_of_a_kernel_that_moves_data_is_in_its_sample():
    spec = {
        "op": "GlobalAveragePool",
        "attributes": {},
        "inputs": [{"slot": 0, "dims": [1, "*", 4, 4], "dtype": "FLOAT", "stored": False}],
        "outputs": [[1, "*", 1, 1]],
        "output_dtypes": ["FLOAT"],
        "output_count": 1,
        "epilogue": [["Add", {}], ["Relu", {}]],
    }
    assert moved_bytes(spec, 8) == 4 * 8 * (16 + 1 + 1)
    blob = sample_model(spec, [moved_bytes(spec, 8)])
    assert [n.op_type for n in onnx.load_from_string(blob).graph.node] == ["GlobalAveragePool", "Add", "Relu"]
    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    got = session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
    assert got[0].shape == (1, 8, 1, 1)
    assert key_of(spec) == key_of(dict(reversed(spec.items())))


def test_too_few_sizes_say_so():
    signature = signature_of(grouped(True))
    with pytest.raises(InternalError, match="'Conv' is given 2 sizes"):
        sample_model(signature.spec, [4, 4])


def test_random_weights_keep_the_variance_and_have_no_subnormals():
    signature = signature_of(grouped(False, groups=1, inner=256, outer=256))
    blob = sample_model(signature.spec, [256, 256])
    w = onnx.numpy_helper.to_array(onnx.load_from_string(blob).graph.initializer[0])
    assert float(np.var(w)) * 256 * 9 == pytest.approx(2.0, rel=0.05)
    assert float(np.abs(w).min()) > 1e-30 and math.isfinite(float(w.sum()))


def test_no_two_weights_of_a_model_are_equal():
    """Compilers make one of equal operators with equal weights on one value."""
    model = ModelBuilder()
    for number in range(3):
        model.weight(f"w{number}", (16, 16), 16)
    found = [onnx.numpy_helper.to_array(w) for w in model._weights]
    assert not (found[0] == found[1]).all() and not (found[1] == found[2]).all()
    assert (found[0] == found[1]).mean() > 0.99


def ops_of(blob: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_from_string(blob).graph.node]


def fused(op, dims, out, epilogue=(), prologue=(), outputs=1, **attributes):
    """The spec of a kernel that moves data and has something fused into it."""
    norm = [[dims[-1]]] * 2 if op == "LayerNormalization" else []
    spec = moving(op, [dims, *norm], [out] * outputs, attributes, stored=[1, 2] if norm else [])
    return {**spec, "epilogue": [[name, {}] for name in epilogue], "prologue": list(prologue)}


PRODUCT = {**activations_product(2, 5, 8, 7), "prologue": ["Transpose", "Scale"]}
ATTENTION = {
    **activations_product(2, 5, 8, 5),
    "epilogue": [[e, {}] for e in ("Mul", "Add", "Softmax", "MatMul", "Transpose")],
}
ROW, MAP = [1, 5, "*"], [1, "*", 4, 4]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (PRODUCT, ["Transpose", "Mul", "MatMul"]),
        (ATTENTION, ["MatMul", "Mul", "Add", "Softmax", "MatMul", "Transpose"]),
        (fused("Sigmoid", MAP, MAP, ["Silu"]), ["Sigmoid", "Mul"]),
        (fused("LayerNormalization", ROW, ROW, prologue=["Add"]), ["Add", "LayerNormalization"]),
        (fused("LayerNormalization", ROW, ROW, prologue=["Add"], outputs=2), ["Add", "LayerNormalization"]),
        (fused("Gather", [3, 4, "*"], [4, "*"], outputs=3, axis=0), ["Split"]),
        (fused("Exp", MAP, MAP, ["Mul", "Sqrt"]), ["Exp", "Mul", "Sqrt"]),
    ],
    ids=["transposed", "attention", "silu", "skip-norm", "skip-norm-2", "siblings", "chain"],
)
def test_what_a_runtime_fuses_is_in_the_sample(spec, expected):
    at = [moved_bytes(spec, 8)] if "inputs" in spec else []
    blob = sample_model(spec, at)
    assert ops_of(blob) == expected
    assert len(onnx.load_from_string(blob).graph.output) == (len(spec["outputs"]) if "inputs" in spec else 1)
    runs(blob)
    if "inputs" in spec:
        tensors = [*onnx.load_from_string(blob).graph.input, *onnx.load_from_string(blob).graph.output]
        moved = sum(4 * math.prod(d.dim_value for d in t.type.tensor_type.shape.dim) for t in tensors)
        moved += weight_bytes(spec, at)
        assert moved == at[0] and nearest_sizes(spec, at) == tuple(at)
