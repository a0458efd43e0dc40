"""The compiler: an ONNX graph becomes a tape, a list of instructions over named registers.

    {"kernel": "conv", "node": "conv_1", "reads": ["x", "weight_0", "bias_1"], "writes": "r0",
     "settings": {"group": 1, "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1]}}

`node` is the ONNX node that the instruction computes. Keep such a name through your own compiler if you can:
profiles, and errors that name the first layer that differs, depend on it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.errors import BackendError

if TYPE_CHECKING:
    import onnx

FORMAT = "tape/1"


def assemble(model: onnx.ModelProto) -> tuple[dict[str, Any], bytes]:
    """The tape of a model, and its weights in one block.

    Raises:
        BackendError: an operator or attribute that the tape has no instruction for.
    """
    from onnx import numpy_helper

    weights: dict[str, dict[str, Any]] = {}
    block = bytearray()
    for tensor in model.graph.initializer:
        array = np.ascontiguousarray(numpy_helper.to_array(tensor), dtype="<f4")
        weights[tensor.name] = {"offset": len(block), "shape": list(array.shape)}
        block += array.tobytes()
    instructions = [_instruction(node) for node in model.graph.node]
    outputs = [value.name for value in model.graph.output]
    tape = {"format": FORMAT, "instructions": instructions, "outputs": outputs, "weights": weights}
    return tape, bytes(block)


def text(tape: dict[str, Any]) -> str:
    """The tape as text; the same for the same program, so that artifacts can be compared and cached."""
    return json.dumps(tape, indent=1, sort_keys=True) + "\n"


def read_weights(tape: dict[str, Any], block: bytes) -> dict[str, np.ndarray]:
    """Weights by name, as views of the block."""
    everything = np.frombuffer(block, "<f4")
    found = {}
    for name, entry in tape["weights"].items():
        start, size = entry["offset"] // 4, int(np.prod(entry["shape"], dtype=np.int64))
        found[name] = everything[start : start + size].reshape(entry["shape"])
    return found


def _instruction(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    settings: dict[str, Any] = {}
    if node.op_type in ("Conv", "MaxPool"):
        settings = {
            "strides": list(attributes.get("strides", (1, 1))),
            "pads": list(attributes.get("pads", (0, 0, 0, 0))),  # top, left, bottom, right
            "dilations": list(attributes.get("dilations", (1, 1))),
        }
        if node.op_type == "Conv":
            settings["group"] = attributes.get("group", 1)
        else:
            settings["kernel"] = list(attributes["kernel_shape"])
    elif node.op_type == "Gemm":
        settings = {"transposed": bool(attributes.get("transB", 0))}
    elif node.op_type in ("Concat", "Flatten"):
        settings = {"axis": attributes.get("axis", 1)}
    elif node.op_type not in ("Add", "Clip", "GlobalAveragePool", "MatMul", "Relu", "Sub"):
        raise BackendError(
            f"Node '{node.name}' ({node.op_type}) has no instruction on target 'tape'. Legalize the model first."
        )
    return {
        "kernel": node.op_type.lower(),
        "node": node.name,
        "reads": list(node.input),
        "writes": node.output[0],
        "settings": settings,
    }
