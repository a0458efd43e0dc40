"""Fold shape arithmetic and constants at static shapes; nodes that read a parameter stay.

Evaluation is numpy through ONNX's own reference operators, one node at a time. Nothing that could be
large, random or stateful is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sartor.errors import ModelError
from sartor.ir.program import CANONICAL_OPSET


def names(text: str) -> frozenset[str]:
    """The words of `text`, as a set."""
    return frozenset(text.split())


MAX_FOLDED_ELEMENTS = 1 << 28
"""Of all folded constants together: a file of a few bytes could otherwise ask for any amount of memory."""
_UNBOUNDED = 1 << 62
NEVER_FOLDED = names(
    """Bernoulli DequantizeLinear DynamicQuantizeLinear If Loop Multinomial QuantizeLinear
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Scan"""
)
GENERATORS = names("ConstantOfShape EyeLike Range Size")
"""Operators whose result is constant at static shapes; a canonical program has them in bodies of `If` only."""
_WEIGHTLESS = GENERATORS | names("MelWeightMatrix")  # float operands are bounds: no weight is folded away
_GROWING = names("ConstantOfShape Expand OneHot Pad Range Resize Tile")


def fold(
    graph: ir.Graph,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, ir.DataType],
    protected: Set[str],
    folded: set[str],
    skip: Set[ir.Node] = frozenset(),
    *,
    limit: int = MAX_FOLDED_ELEMENTS,
) -> int:
    """Replace nodes of constant result by initializers, in one sweep in execution order.

    Args:
        graph: main graph, topologically sorted, without Constant nodes.
        shapes: static shapes by value name, where known.
        types: element types by value name.
        protected: names of parameters; a node that reads one is kept.
        folded: names of initializers that came from constants; extended by this call.
        skip: nodes that stay as they are.
        limit: of the elements of all folded constants together.

    Returns:
        Number of nodes replaced.
    """
    count = 0
    budget = limit - sum(
        value.const_value.size
        for name in folded
        if (value := graph.initializers.get(name)) is not None and value.const_value is not None
    )
    for node in list(graph):
        if node in skip or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in NEVER_FOLDED or len(node.outputs) != 1:
            continue
        if node.op_type == "Identity" and node.outputs[0].is_graph_output():
            continue  # a constant graph output keeps its name by it
        array = _evaluate_shape(node, shapes, types, budget)
        if array is None:
            inputs = [i for i in node.inputs if i is not None]
            kept = frozenset() if node.op_type in _WEIGHTLESS else protected
            if not inputs or any(
                i.const_value is None or not i.is_initializer() or i.name in kept for i in inputs
            ):
                continue
            if _result_size(node, shapes) > budget:
                continue
            array = evaluate(node)
        if array is None:
            continue
        value = replace_by_constant(graph, node, array)
        folded.add(value.name or "")
        budget -= array.size
        count += 1
    return count


def replace_by_constant(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> ir.Value:
    """Put an initializer of the same name in place of the only output of `node`.

    A graph output keeps its name, as the Identity of an initializer: some runtimes want no initializer there.
    """
    output = node.outputs[0]
    name = output.name or ""
    if output.is_graph_output():
        value = constant(graph, f"{name}.value", array)
        identity = ir.node("Identity", [value], num_outputs=1, name=node.name)
        graph.insert_before(node, identity)
        result = identity.outputs[0]
        result.type, result.shape = output.type, output.shape
        for index, candidate in enumerate(graph.outputs):
            if candidate is output:
                graph.outputs[index] = result
        output.name, result.name = None, name
        output.replace_all_uses_with(result)
        graph.remove(node, safe=True)
        return value
    output.name = f"{name}.folded"
    value = constant(graph, name, array)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return value


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register an initializer called `name` (which must be free) holding `array`."""
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)  # ascontiguousarray would make scalars 1-D
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _evaluate_shape(
    node: ir.Node, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, ir.DataType], budget: int
) -> np.ndarray | None:
    """The result of an operator that looks at the shape of its input only."""
    if node.op_type not in ("EyeLike", "Shape", "Size") or node.inputs[0] is None:
        return None
    shape = shapes.get(node.inputs[0].name or "")
    if shape is None:
        return None
    if node.op_type == "EyeLike":
        dtype = types.get(node.outputs[0].name or "")
        if dtype is None or len(shape) != 2 or math.prod(shape) > budget:
            return None
        return np.eye(shape[0], shape[1], k=node.attributes.get_int("k", 0)).astype(dtype.numpy())
    if node.op_type == "Size":
        return np.asarray(math.prod(shape), dtype=np.int64)
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(shape))
    return np.asarray(shape[start:end], dtype=np.int64)


def _result_size(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get(node.outputs[0].name or "")
    if shape is not None:
        return math.prod(shape)
    if node.op_type in _GROWING:
        return _UNBOUNDED if not _small_operands(node) else _grown(node)
    return max(
        (i.const_value.size for i in node.inputs if i is not None and i.const_value is not None), default=0
    )


def _small_operands(node: ir.Node) -> bool:
    return all(i is None or (i.const_value is not None and i.const_value.size <= 4096) for i in node.inputs)


def _grown(node: ir.Node) -> int:
    arrays = [None if i is None or i.const_value is None else i.const_value.numpy() for i in node.inputs]
    if node.op_type == "ConstantOfShape" and arrays[0] is not None:
        return math.prod(int(d) for d in arrays[0])
    if node.op_type == "Range" and all(a is not None for a in arrays[:3]):
        start, limit, delta = (float(np.asarray(a).reshape(())) for a in arrays[:3])
        return int(abs((limit - start) / delta)) + 1 if delta else _UNBOUNDED
    if node.op_type == "Expand" and arrays[0] is not None and arrays[1] is not None:
        return arrays[0].size * math.prod(max(int(d), 1) for d in arrays[1])
    return _UNBOUNDED


def evaluate(node: ir.Node) -> np.ndarray | None:
    """What a node with one output and nothing but constant inputs gives; None where ONNX has no reference for it.

    Raises:
        ModelError: its inputs do not fit.
    """
    arrays = {
        i.name: i.const_value.numpy() for i in node.inputs if i is not None and i.const_value is not None
    }
    proto = ir.to_proto(node)
    proto.ClearField("metadata_props")
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [
            onnx.helper.make_tensor_value_info(
                str(i.name), int(i.const_value.dtype), list(i.const_value.shape)
            )
            for i in dict.fromkeys(i for i in node.inputs if i is not None)
            if i.const_value is not None
        ],
        [onnx.helper.make_empty_tensor_value_info(str(node.outputs[0].name))],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", CANONICAL_OPSET)], ir_version=10
    )
    try:
        with np.errstate(all="ignore"):
            result = ReferenceEvaluator(model).run(None, arrays)[0]
    except NotImplementedError:
        return None
    except Exception as error:
        raise ModelError(
            f"Constant node '{node.name}' ({node.op_type}) cannot be evaluated: {error}. Its inputs do not "
            "fit."
        ) from error
    return np.asarray(result)
