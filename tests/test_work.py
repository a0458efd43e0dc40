"""Work computed from a signature is the work of the kernel that it was made from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cost_networks import make_program, mobilenet_v2, residual, resnet50
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.cost_models.signatures import signature_of
from sartor.cost_models.work import item_bytes, work, work_of_spec
from sartor.errors import InternalError
from sartor.ir.workload import build_workload


def of(kernel, fractions=None):
    signature = signature_of(kernel)
    return work(signature, [np.asarray(v.evaluate(fractions or {})) for v in signature.variables])


def one(op, shapes, weights, dtype=np.float32, epilogue=(), **attrs):
    """The only kernel of a network of one node, with what is fused behind it."""
    arrays = {n: np.zeros(s, dtype) for n, s in weights.items()}
    nodes = [helper.make_node(op, [*shapes, *weights], ["y"], name="n", **attrs)]
    value = "y"
    for index, step in enumerate(epilogue):
        nodes.append(helper.make_node(step, [value], [f"z{index}"], name=f"e{index}"))
        value = f"z{index}"
    code = {"Cast": attrs.get("to"), "Equal": TensorProto.BOOL}.get(op, TensorProto.FLOAT)
    (kernel,) = build_workload(make_program(nodes, shapes, [value], arrays, {value: code})).kernels
    return kernel


def assert_exact(kernel, fractions=None):
    mine = of(kernel, fractions)
    assert mine.macs == pytest.approx(kernel.macs.evaluate(fractions or {}), rel=1e-12)
    total = kernel.bytes_read.evaluate(fractions or {}) + kernel.bytes_written.evaluate(fractions or {})
    assert mine.moved == pytest.approx(total, rel=1e-12)
    assert mine.written == pytest.approx(kernel.bytes_written.evaluate(fractions or {}), rel=1e-12)
    stored = sum(o.bytes.evaluate(fractions or {}) for o in kernel.inputs if o is not None and o.stored)
    assert mine.weight_bytes == pytest.approx(stored, rel=1e-12)


convolutions = st.tuples(
    st.sampled_from(["Conv", "ConvTranspose"]),
    st.sampled_from([(1, 1), (3, 3), (5, 2)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([(1, 6, 10), (2, 4, 4), (4, 3, 5), (8, 1, 1), (8, 1, 2), (6, 2, 1)]),
)


@settings(max_examples=40, deadline=None)
@given(convolutions)
def test_convolutions_of_every_grouping(case):
    op, window, batch, stride, (group, inner, outer) = case
    c_in, c_out = group * inner, group * outer
    shape = (c_out, inner, *window) if op == "Conv" else (c_in, outer, *window)
    attrs = {"group": group, "strides": [stride] * 2}
    assert_exact(one(op, {"x": (batch, c_in, 9, 11)}, {"w": shape, "b": (c_out,)}, **attrs))


@pytest.mark.parametrize(
    ("op", "shapes", "weights", "attrs"),
    [
        ("Conv", {"x": (1, 4, 20)}, {"w": (6, 4, 3), "b": (6,)}, {"dilations": [2]}),
        ("Conv", {"x": (1, 4, 6, 7, 8)}, {"w": (6, 4, 3, 3, 3), "b": (6,)}, {}),
        ("Gemm", {"x": (5, 7)}, {"w": (7, 11), "b": (11,)}, {}),
        ("Gemm", {"x": (7, 5)}, {"w": (11, 7), "b": (11,)}, {"transA": 1, "transB": 1}),
        ("MatMul", {"a": (2, 3, 5, 7), "b": (2, 3, 7, 4)}, {}, {}),
        ("MatMul", {"a": (6, 5, 7), "b": (1, 7, 4)}, {}, {}),
        ("MaxPool", {"x": (1, 3, 8, 8)}, {}, {"kernel_shape": [2, 2]}),
        ("Relu", {"x": (5, 7)}, {}, {}),
        ("Add", {"x": (5, 7)}, {"w": (7,)}, {}),
        ("Equal", {"x": (9, 90), "z": (9, 90)}, {}, {}),
        ("Cast", {"x": (9, 90)}, {}, {"to": TensorProto.FLOAT16}),
        ("Transpose", {"x": (9, 90)}, {}, {"perm": [1, 0]}),
    ],
)
def test_other_operators(op, shapes, weights, attrs):
    assert_exact(one(op, shapes, weights, **attrs))


def test_recurrent_layers_by_hand():
    kernel = one(
        "GRU",
        {"x": (6, 2, 5)},
        {"w": (2, 9, 5), "r": (2, 9, 3), "b": (2, 18)},
        hidden_size=3,
        direction="bidirectional",
    )
    mine = of(kernel)
    assert float(mine.macs) == kernel.macs.full == 6 * 2 * 2 * 9 * 8
    assert float(mine.weight_bytes) == 4 * (2 * 9 * 8 + 2 * 18)
    assert float(mine.written) == kernel.bytes_written.full == 4 * 6 * 2 * 2 * 3


def test_a_residual_is_read_and_half_precision_halves_the_bytes():
    net = residual()
    kernels = {k.nodes[0]: k for k in build_workload(net.program(("logits",)), net.extents).kernels}
    plain, added = of(kernels["n_b1.c2"]), of(kernels["n_b0.c2"])
    assert float(added.read) == 4 * 2 * 16 * 16 * (16 + 16)
    assert float(plain.read) == 4 * 2 * 8 * 8 * 24
    half = {"w": (6, 4, 3, 3), "b": (6,)}
    wide = of(one("Conv", {"x": (1, 4, 8, 8)}, half))
    assert float(wide.moved) == 4 * (4 * 64 + 6 * 36 + 6 * 36 + 6)
    assert item_bytes("FLOAT16") * 2 == item_bytes("INT8") * 4 == item_bytes("FLOAT") == 4


@pytest.mark.parametrize("make", [residual, mobilenet_v2, resnet50])
def test_every_kernel_of_whole_networks(make):
    """Bytes differ by what a signature leaves out: four vectors of a BatchNormalization, a bias, bounds."""
    net = make()
    kernels = build_workload(net.program(("logits",)), net.extents).kernels
    for kernel in kernels:
        mine = of(kernel)
        assert float(mine.macs) == kernel.macs.full, kernel.name
        total = kernel.bytes_read.full + kernel.bytes_written.full
        channels = kernel.outputs[0].dims[1].full
        assert abs(float(mine.moved) - total) <= 4 * 5 * channels + 8, kernel.name
        assert float(mine.written) == pytest.approx(kernel.bytes_written.full), kernel.name
    assert len(kernels) > 8


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, n) for n in (16, 24, 40, 16, 24, 24)]), min_size=1, max_size=4))
def test_populations_are_the_plans_one_by_one(widths):
    net = residual()
    full = dict(zip("abe", (16, 24, 40), strict=True)) | {"m0": 16, "m1": 24, "m2": 24}
    plans = {g: np.array([w[i] / n for w in widths]) for i, (g, n) in enumerate(full.items())}
    for kernel in build_workload(net.program(("logits",)), net.extents).kernels:
        together = of(kernel, plans)
        assert np.allclose(together.macs, kernel.macs.evaluate(plans), rtol=1e-9)
        assert np.allclose(together.written, kernel.bytes_written.evaluate(plans), rtol=1e-6), kernel.name
        for index in range(len(widths)):
            alone = of(kernel, {g: values[index] for g, values in plans.items()})
            for field in ("macs", "weight_bytes", "read", "written", "columns", "channels"):
                value = np.broadcast_to(getattr(together, field), (len(widths),))[index]
                assert value == pytest.approx(float(getattr(alone, field))), (kernel.name, field)


def test_parts_of_a_kernel_that_moves_data_under_a_plan():
    """Concat of two widths, and a product of powers: x [u, u, 7] beside a fixed vector."""
    spec = {"op": "Concat", "epilogue": [], "output_dtypes": ["FLOAT"], "outputs": [[1, "5*", 9]]}
    entries = [
        {"slot": i, "dims": [1, d, 9], "dtype": "FLOAT", "stored": False} for i, d in ((0, "2*"), (1, "3*"))
    ]
    found = work_of_spec({**spec, "inputs": entries}, [np.array([4.0 * 2 * 5 * 9 * u for u in (1, 4)])])
    assert found.read == pytest.approx([180, 720]) and found.written == pytest.approx([180, 720])
    square = {"slot": 0, "dims": ["*", "*", 7], "dtype": "FLOAT", "stored": False}
    vector = {"slot": 1, "dims": ["*"], "dtype": "FLOAT", "stored": True}
    spec = {"op": "Mul", "inputs": [square, vector], "outputs": [["*", "*", 7]], "output_dtypes": ["FLOAT"]}
    units = np.array([1.0, 3.0, 40.0])
    found = work_of_spec(spec, [4 * (14 * units**2 + units)])
    assert found.weight_bytes == pytest.approx(4 * units) and found.read == pytest.approx(28 * units**2)


def test_groups_are_never_taken_for_a_dense_convolution():
    """ResNeXt-50 and Wide ResNet-50-2 have the same widths; nn-Meter predicts one time for both."""
    dense = of(one("Conv", {"x": (1, 128, 56, 56)}, {"w": (128, 128, 3, 3), "b": (128,)}, pads=[1] * 4))
    grouped = of(
        one("Conv", {"x": (1, 128, 56, 56)}, {"w": (128, 4, 3, 3), "b": (128,)}, group=32, pads=[1] * 4)
    )
    assert float(dense.macs) == 32 * float(grouped.macs) == 56 * 56 * 128 * 128 * 9
    assert math.isclose(float(dense.weight_bytes) - 512, 32 * (float(grouped.weight_bytes) - 512))
    assert float(grouped.groups) == 32 and float(grouped.columns) == float(grouped.channels) == 4


def test_wrong_number_of_sizes_is_named():
    signature = signature_of(one("Conv", {"x": (1, 4, 8, 8)}, {"w": (6, 4, 3, 3)}))
    with pytest.raises(InternalError, match=r"'Conv' does not have 3 variables"):
        work(signature, [1, 2, 3])
