"""Outputs of nodes that a program keeps without understanding them, compared with ONNX Runtime.

The twin has no such nodes. They alone, without graph optimisation, run here on what enters them: on the target's own
values, where a result must be the same, and on the reference's, where it is as far away as rounding makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from sartor.comparison import relative_error
from sartor.ir import protos, serialise
from sartor.ir.program import CANONICAL_IR_VERSION, CANONICAL_OPSET, Program

Arrays = Mapping[str, np.ndarray]


class TailReference:
    """The tail of a program in ONNX Runtime.

    Attributes:
        outputs: names of graph outputs that it makes.
        problem: why it does not run there; empty where it does.
    """

    def __init__(self, program: Program):
        assert program.tail is not None
        self.outputs = tuple(info.name for _, info in program.tail.outputs)
        self.problem = ""
        types = program.types()
        self._entering = {
            name: types[name].numpy() for name in program.tail.readers if name not in program.tail.weights
        }
        self._session: Any = None
        try:
            self._session = _session(_model(program, self._entering))
        except Exception as error:  # one class per status, and those of protobuf
            self.problem = f"ONNX Runtime does not take it alone: {str(error).strip().splitlines()[0][:200]}"

    def run(self, values: Arrays) -> dict[str, np.ndarray] | None:
        """Outputs by name of what enters and graph inputs, in any float type; None where they do not run."""
        if self._session is None:
            return None
        try:
            inputs = {name: np.asarray(values[name]).astype(kind) for name, kind in self._entering.items()}
            found = self._session.run(list(self.outputs), inputs)
        except Exception as error:  # as above
            self.problem = f"ONNX Runtime does not run it alone: {str(error).strip().splitlines()[0][:200]}"
            return None
        return dict(zip(self.outputs, (np.asarray(array) for array in found), strict=True))


def distance(reference: np.ndarray, found: np.ndarray | None) -> float:
    """Relative error of floats, the share that differs of everything else; infinite for other shapes."""
    if found is None or found.shape != reference.shape:
        return math.inf
    if reference.dtype.kind == "f":
        return relative_error({"": reference}, {"": found})
    return float((reference != found).mean()) if reference.size else 0.0


def _model(program: Program, entering: Mapping[str, np.dtype[Any]]) -> onnx.ModelProto:
    tail = program.tail
    assert tail is not None
    shapes, types = program.shapes(), program.types()
    model = onnx.ModelProto(ir_version=CANONICAL_IR_VERSION, graph=onnx.GraphProto(name="tail"))
    model.opset_import.add(domain="", version=CANONICAL_OPSET)
    for domain, version in tail.opset_imports.items():
        model.opset_import.add(domain=domain, version=version)
    model.graph.node.extend(tail.nodes)
    model.graph.output.extend(info for _, info in tail.outputs)
    for name in entering:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(name, int(types[name]), list(shapes[name]))
        )
    for name, tensor in tail.weights.items():
        weights = serialise.weights_of(name, tensor)
        entry = model.graph.initializer.add()
        entry.CopyFrom(weights.header)
        entry.raw_data = b"".join(weights.chunks())
    protos.strip(model)
    return model


def _session(model: onnx.ModelProto) -> Any:
    from sartor.backends.telemetry import import_vendor

    runtime = import_vendor("onnxruntime", "sartor")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
