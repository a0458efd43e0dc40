"""What `benchmarks/memory.py` makes of what it finds; the measurements themselves are not tested."""

from __future__ import annotations

import os

import memory as program
import numpy as np
import onnx
import pytest
from backend_programs import small_cnn
from onnx import TensorProto, helper

from sartor.ir.liveness import peak_activation
from sartor.ir.load import load


def row(runtime, predicted, measured, **more):
    return {
        "model": "m",
        "runtime": runtime,
        "predicted": predicted,
        "measured": measured,
        "resolved": True,
    } | (program._error({"predicted": predicted, "measured": measured}) | more)


def test_the_summary_has_the_worst_error_of_what_can_be_resolved():
    rows = [
        row("tflite-micro head", 98, 100),
        row("tflite-micro head", 103, 100),
        row("onnxruntime", 300, 100, resolved=False, executed=400),
        row("onnxruntime", 101, 100, executed=99),
        {"model": "m", "runtime": "xnnpack, weights too", "predicted": 1, "measured": 2},
        {"model": "m", "runtime": "litert arena", "predicted": 1, "measured": None, "resolved": True},
    ]
    found = program.summary_of(rows)
    assert found == pytest.approx(
        {"tflite_micro_head_worst": 0.03, "onnxruntime_worst": 0.01, "onnxruntime_executed_worst": 0.01}
    )


def test_executed_nodes_are_replayed_with_the_sizes_of_the_profile(tmp_path):
    """A convolution with a sum inside it writes over the addend; what is stored is no activation."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="second"),
        helper.make_node("FusedConv", ["b", "w", "", "a"], ["y"], name="third", domain="com.microsoft"),
    ]
    value = helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.zeros((8, 8, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 8, 16, 16])],
        [value("y", TensorProto.FLOAT, [1, 8, 16, 16])],
        [weight],
    )
    path = str(tmp_path / "m.onnx")
    onnx.save(helper.make_model(graph), path)
    shape = [{"float": [1, 8, 16, 16]}]
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "args": {"output_type_shape": shape}}
        for name in ("first", "second", "third")
    ]
    assert program._executed(path, events) == 2 * 8 * 16 * 16 * 4


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory cannot be followed here"
)
def test_onnx_runtime_allocates_what_is_predicted(tmp_path):
    """At 64 MB, where the system's counting of pages does not matter; the plain rules would be far off."""
    network = small_cnn()
    found = program._row_of_onnxruntime("small", network, network.save(tmp_path / "model.onnx"))
    assert found["resolved"] and "reason" not in found
    assert abs(found["error"]) < 0.03
    assert abs(found["executed"] / found["measured"] - 1) < 0.03
    plain = peak_activation(load(tmp_path / "model.onnx", shapes={"x": (found["batch"], 3, 16, 16)}))
    assert plain.bytes > 1.3 * found["measured"]
