"""Tiny programs built node by node, without capture or load, and the tolerance helper of the pass tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sartor.ir.program import (
    BATCH_SYMBOL,
    CANONICAL_IR_VERSION,
    CANONICAL_OPSET,
    DIALECT_DOMAIN,
    Batch,
    Program,
    Source,
)

Dims = Sequence["int | str"]


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: object):
    """A NodeProto; without `name` it is named after its first output."""
    domain = str(attributes.pop("domain", ""))
    return helper.make_node(
        op_type, list(inputs), list(outputs), name=name or f"node_{outputs[0]}", domain=domain, **attributes
    )


def program_from_nodes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Dims],
    outputs: Sequence[str],
    initializers: Mapping[str, np.ndarray] | None = None,
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    dtype: int = TensorProto.FLOAT,
    reference: Mapping[str, int] | None = None,
) -> Program:
    """A Program of `nodes`, checked by the ONNX checker and strict shape inference.

    Args:
        nodes: in execution order; see `node`.
        inputs: shape by graph input, all of element type `dtype`. A dimension may be a symbol such as `N`.
        outputs: names of graph outputs; their types and shapes are inferred.
        initializers: arrays by name.
        functions: dialect functions.
        dtype: element type of the inputs.
        reference: value of each symbol in the reference shapes; 1 where absent.
    """
    infos = [helper.make_tensor_value_info(k, dtype, list(v)) for k, v in inputs.items()]
    constants = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in (initializers or {}).items()
    ]
    graph = helper.make_graph(list(nodes), "main", infos, [], constants)
    opsets = [helper.make_opsetid("", CANONICAL_OPSET), helper.make_opsetid(DIALECT_DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=CANONICAL_IR_VERSION, functions=list(functions)
    )
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {info.name: info for info in [*inferred.graph.value_info, *infos]}
    model.graph.output.extend(known[name] for name in outputs)
    onnx.checker.check_model(model)
    symbols = dict(reference or {})
    shapes = {k: tuple(symbols.get(d, 1) if isinstance(d, str) else d for d in v) for k, v in inputs.items()}
    batched = tuple(k for k, v in inputs.items() if len(v) and v[0] == BATCH_SYMBOL)
    return Program(
        ir.from_proto(model),
        source=Source("onnx", "test.onnx", hashlib.sha256(model.SerializeToString()).hexdigest()),
        input_shapes=shapes,
        batch=Batch(symbolic=bool(batched), inputs=batched, reason="" if batched else "built so by the test"),
    )


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with every float32 tensor and type turned into float64, bodies included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)

    def convert(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))

    stack = [copy.graph]
    while stack:
        graph = stack.pop()
        for tensor in graph.initializer:
            convert(tensor)
        for info in [*graph.input, *graph.output]:
            if info.type.tensor_type.elem_type == TensorProto.FLOAT:
                info.type.tensor_type.elem_type = TensorProto.DOUBLE
        for item in graph.node:
            for attribute in item.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                if attribute.HasField("t"):
                    convert(attribute.t)
                if item.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.DOUBLE
    return copy


def run_reference(
    program: Program, inputs: Mapping[str, np.ndarray], *, float64: bool = True
) -> dict[str, np.ndarray]:
    """Outputs by name from the ONNX reference evaluator, in float64 unless told otherwise."""
    model = program.to_proto()
    feeds = dict(inputs)
    if float64:
        model = in_float64(model)
        feeds = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feeds.items()}
    names = [output.name for output in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(None, feeds), strict=True))


def random_inputs(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal float32 inputs at the reference shapes."""
    generator = np.random.default_rng(seed)
    return {
        k: generator.standard_normal(shape).astype(np.float32) for k, shape in program.input_shapes.items()
    }


def relative_error(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """max |a − b| / max |a| over all outputs; infinite where names, shapes or finiteness differ."""
    if list(a) != list(b):
        return float("inf")
    worst = 0.0
    for name, expected in a.items():
        actual = b[name]
        if expected.shape != actual.shape or not np.isfinite(expected).all() or not np.isfinite(actual).all():
            return float("inf")
        if expected.size:
            scale = float(np.abs(expected).max())
            difference = float(np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max())
            worst = max(worst, difference / scale if scale else (0.0 if difference == 0 else float("inf")))
    return worst


def assert_equivalent(
    before: Program,
    after: Program,
    *,
    tolerance: float = 1e-9,
    seed: int = 0,
    float64: bool = True,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Fail unless both programs compute the same outputs on random inputs."""
    feeds = inputs or random_inputs(before, seed)
    error = relative_error(
        run_reference(before, feeds, float64=float64), run_reference(after, feeds, float64=float64)
    )
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:.3g}"


def structure_of(program: Program) -> list[str]:
    """One line per node and initializer, for Before/Expected comparison without weights."""
    lines = [
        f"{name}: {value.const_value.dtype} {list(value.const_value.shape)}"
        for name, value in sorted(program.initializers.items())
        if value.const_value is not None
    ]
    for item in program.nodes():
        inputs = ", ".join(value.name if value is not None else "" for value in item.inputs)
        attributes = ", ".join(
            f"{k}={v.value!r}"
            for k, v in sorted(item.attributes.items())
            if v.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        )
        lines.append(
            f"{', '.join(o.name or '' for o in item.outputs)} = {item.op_type}({inputs})"
            + (f" {{{attributes}}}" if attributes else "")
        )
    return lines
