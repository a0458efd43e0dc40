"""A workload's kernels are those that the runtimes execute, on small networks of four kinds."""

from __future__ import annotations

import numpy as np
import pytest
from fusion_networks import NETWORKS, Builder
from test_fusion_rules import sum_then

from sartor import backends
from sartor.backends.protocol import KernelTime, TargetOptions
from sartor.errors import UsageError
from sartor.ir.fusion_rules import GENERIC, FusionRules
from sartor.ir.workload import build_workload
from sartor.profiling.fusion_check import check_fusion, profile_fusion

CASES = [(target, name) for target in ("onnxruntime", "openvino") for name in NETWORKS]

OPTIONS = TargetOptions()


@pytest.mark.parametrize(("target", "name"), CASES)
def test_kernels_are_those_that_run(target, name, tmp_path):
    report = profile_fusion(target, NETWORKS[name](), tmp_path / "a")
    assert report.kernels > 5
    assert report.agreement >= 0.95, "\n".join(map(str, report.differences))


def test_a_width_outside_the_blocked_layout(tmp_path):
    """18 is no multiple of 4: some convolutions of the network leave ONNX Runtime's layout."""
    report = profile_fusion("onnxruntime", NETWORKS["residual"](width=18), tmp_path / "a")
    assert report.agreement == 1 and report.layout == report.inserted and report.layout["ReorderInput"]


@pytest.mark.parametrize("activation", ["Relu", "Clip", "LeakyRelu", "HardSwish"])
@pytest.mark.parametrize("channels", [16, 18])
def test_activations_behind_sums_in_both_layouts(activation, channels, tmp_path):
    report = profile_fusion("onnxruntime", sum_then(activation, channels), tmp_path / "a")
    assert report.agreement == 1, "\n".join(map(str, report.differences))
    assert report.layout == report.inserted


def grouped_hard_swish():
    """Four groups of half a block each: the convolution is in the plain layout, whose kernel has no HardSwish."""
    b = Builder((1, 32, 8, 8))
    b.op("HardSwish", b.conv("x", 32, 32, name="c", group=4), name="h")
    b.conv(b.value, 32, 32, name="d")
    return b.program()


def pooled(channels):
    b = Builder((1, channels, 8, 8))
    b.op("MaxPool", b.conv("x", channels, channels, name="c"), name="p", kernel_shape=[2, 2], strides=[2, 2])
    b.conv("p", channels, channels, name="d")
    return b.program()


def scaled_scores():
    b = Builder((2, 6, 8))
    b.op("MatMul", "x", b.op("Transpose", "x", name="t", perm=[0, 2, 1]), name="scores")
    b.op("Mul", "scores", b.constant("k", np.asarray(0.5, np.float32)), name="scaled")
    b.op("MatMul", b.op("Softmax", name="s", axis=-1), "x", name="mix")
    return b.program()


@pytest.mark.parametrize(
    ("program", "kernels", "copies"),
    [
        (grouped_hard_swish, 3, {"ReorderInput": 1, "ReorderOutput": 1}),
        (lambda: pooled(32), 3, {"ReorderInput": 1, "ReorderOutput": 1}),
        (lambda: pooled(24), 3, {"ReorderInput": 2, "ReorderOutput": 2}),
        (scaled_scores, 3, {}),
    ],
)
def test_what_the_layout_and_products_take_in(program, kernels, copies, tmp_path):
    report = profile_fusion("onnxruntime", program(), tmp_path / "a")
    assert report.agreement == 1 and report.kernels == kernels, "\n".join(map(str, report.differences))
    assert report.layout == report.inserted == copies


@pytest.mark.parametrize(("channels", "first", "copies"), [(3, "Conv", 1), (1, "Conv", 0), (3, "Relu", 1)])
def test_an_image_is_copied_for_the_first_convolution_and_a_map_behind_the_last(
    channels, first, copies, tmp_path
):
    b = Builder((1, channels, 16, 16))
    b.conv(b.op("Relu", "x", name="r") if first == "Relu" else "x", channels, 16, name="c")
    b.conv(b.value, 16, 16, name="d")
    program = b.program()
    report = profile_fusion("openvino", program, tmp_path / "a")
    assert report.agreement == 1 and report.layout == report.inserted == {"Reorder": copies + 1}
    backend = backends.get("openvino")
    executed = backend.profile(backend.lower(program, tmp_path / "b", OPTIONS), OPTIONS, 2)
    written = [k.written for k in executed if k.op_type == "Reorder"]
    assert written == [*copies * [(1, channels, 16, 16)], (1, 16, 16, 16)]


def test_elementwise_diamonds_between_image_and_convolution_are_walked_once():
    """Each doubles the ways from the input; fifty of them would never be done."""
    b = Builder((1, 3, 16, 16))
    value = "x"
    for number in range(50):
        value = b.op("Mul", value, b.op("Sigmoid", value, name=f"s{number}"), name=f"m{number}")
    b.conv(value, 3, 16, name="c")
    rules = FusionRules.of(backends.get("openvino").capabilities().fuses)
    assert len(build_workload(b.program(), rules=rules).layout.images) == 2


# LiteRT's names do not tell three products of one value apart, and it moves a scale into weights.
LITERT = {"residual": 0.95, "squeezed": 0.95, "dense": 0.95, "transformer": 0.6}


@pytest.mark.slow  # conversions
@pytest.mark.parametrize("name", LITERT)
def test_kernels_are_those_of_the_flatbuffer(name, tmp_path):
    try:
        backends.get("tflite").capabilities()
    except UsageError as error:
        pytest.skip(str(error))
    report = profile_fusion("tflite", NETWORKS[name](), tmp_path / "a")
    assert report.agreement >= LITERT[name], "\n".join(map(str, report.differences))
    assert report.inserted["TRANSPOSE"] >= (name != "transformer")
    assert name != "transformer" or report.in_parts >= 2  # it has no LayerNormalization


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_rules_of_nobody_in_particular_disagree(target, tmp_path):
    """The check can fail: the generic rules do not describe either runtime."""
    program = NETWORKS["squeezed" if target == "onnxruntime" else "dense"]()
    backend = backends.get(target)
    executed = backend.profile(backend.lower(program, tmp_path / "a", OPTIONS), OPTIONS, 2)
    report = check_fusion(program, build_workload(program), executed)
    assert report.agreement < 0.9 and report.differences
    own = FusionRules.of(backend.capabilities().fuses)
    assert check_fusion(program, build_workload(program, rules=own), executed).agreement > report.agreement


@pytest.mark.parametrize("name", ["residual", "squeezed", "dense"])
def test_changes_of_layout_are_expected(name, tmp_path):
    report = profile_fusion("onnxruntime", NETWORKS[name](), tmp_path / "a")
    assert report.layout == report.inserted
    assert (report.layout["ReorderInput"] > 0) == (name == "squeezed") and report.layout["ReorderOutput"] > 0


def kernel(op_type, *nodes):
    return KernelTime(op_type.lower(), op_type, nodes, 1e-6, 1)


def test_what_is_apart_joined_and_inserted_is_named():
    b = Builder((1, 8, 6, 6))
    b.op("Relu", b.norm(b.conv("x", 8, 8, name="c", bias=False), 8, "n"), name="r")
    b.op("Relu", b.conv("r", 8, 8, name="d"), name="s")
    b.op("Neg", name="last")
    program = b.program()
    executed = [
        kernel("Reorder"),
        kernel("Conv", "c", "n", "r"),
        kernel("Conv", "d"),
        kernel("Chain", "s", "last"),
        kernel("Pad"),
        kernel("Reorder"),
    ]
    report = check_fusion(program, build_workload(program, rules=GENERIC), executed)
    assert (report.kernels, report.agreed, report.inserted) == (3, 1, {"Reorder": 2, "Pad": 1})
    apart, joined = report.differences
    assert apart.kernel == "d" and apart.apart and joined.kernel == "last" and not joined.apart
    assert str(joined) == "Kernel 'last' is [last (Neg)]; executed is [s (Relu), last (Neg)]."
    assert report.to_dict()["agreement"] == pytest.approx(1 / 3) and report.to_dict()["apart"] == 1


def test_a_node_in_several_kernels():
    b = Builder((1, 8, 6, 6))
    b.op("HardSwish", b.conv("x", 8, 8, name="c"), name="h")
    program = b.program()
    workload = build_workload(program, rules=FusionRules.of({}))
    report = check_fusion(
        program, workload, [kernel("Conv", "c"), kernel("HardSigmoid", "h"), kernel("Mul", "h")]
    )
    assert report.agreement == 1 and report.in_parts == 1
    report = check_fusion(program, workload, [kernel("Conv", "c"), kernel("Act", "c", "h")])
    assert report.agreement == 1  # the convolution is one of its own


def test_a_kernel_that_is_not_executed_disagrees():
    b = Builder((1, 8, 6, 6))
    b.op("Neg", b.conv("x", 8, 8, name="c"), name="last")
    program = b.program()
    report = check_fusion(program, build_workload(program), [kernel("Conv", "c")])
    assert report.agreement == 0.5 and "executed is [nothing]" in str(report.differences[0])
