"""Small ONNX files written by hand or by the older exporter, for the tests of the loader and the passes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def tensor(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def weights(name: str, *shape: int, seed: int = 0) -> TensorProto:
    generator = np.random.default_rng([seed, *shape, len(name)])
    return tensor(
        name, (generator.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)
    )


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: dict[str, Sequence[int | str | None] | None],
    initializers: Sequence[TensorProto] = (),
    *,
    opset: int = 17,
    ir_version: int = 8,
    types: dict[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
    check: bool = True,
) -> Path:
    """Write a model; `check` runs ONNX's own checker, so that a bad test file is not blamed on the loader."""
    kinds = types or {}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), s) for n, s in outputs.items()],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))
    if check:
        onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def torchscript(
    path: Path,
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    opset: int = 17,
    dynamic: bool = True,
) -> Path:
    """Export with the tracing exporter: Constant nodes, Identity sharing, Shape/Gather/Concat chains."""
    axes = {"input": {0: "batch"}, "output": {0: "batch"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return path


def if_model(path: Path) -> Path:
    """`If` whose bodies read an initializer of the main graph; the condition is an input."""
    bodies = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(operator, ["x", "w"], [f"{name}_out"], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [1, 3])],
        )
        for name, operator in (("then", "Add"), ("else", "Mul"))
    }
    nodes = [
        helper.make_node("If", ["c"], ["r"], name="choose", **bodies),
        helper.make_node("Relu", ["r"], ["y"], name="act"),
    ]
    return save(
        path,
        nodes,
        {"x": [1, 3], "c": []},
        {"y": [1, 3]},
        [weights("w", 3), weights("dead", 2)],
        types={"c": TensorProto.BOOL},
    )


def run(model: bytes | Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of ONNX Runtime with its optimiser off."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
