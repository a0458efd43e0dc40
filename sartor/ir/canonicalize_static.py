"""What static shapes and constants decide: branches of `If`, masks of Dropout, empty tensors, generators.

Everything here is exact, and part of `sartor.ir.canonicalize`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir import cleanup, folding
from sartor.ir.cleanup import array_of, bypass
from sartor.ir.folding import GENERATORS, names
from sartor.ir.normalise import free_name
from sartor.ir.program import CANONICAL_OPSET

_WEIGHTED = names(
    """BatchNormalization Conv ConvTranspose Einsum GRU Gemm GroupNormalization InstanceNormalization LSTM
    LayerNormalization MatMul PRelu RNN"""
)
_AFFINE = names("Add Mul")
_SHAPING = names("Identity Reshape Squeeze Transpose Unsqueeze")
_NARROW = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}

Shapes = Mapping[str, tuple[int, ...]]


def materialise(graph: ir.Graph, limit: int) -> set[str]:
    """Turn float ConstantOfShape nodes that serve as weights into initializers; returns their names.

    A file may store weights this way to stay small. They are parameters like any other: what reads them
    is not folded, so that training or randomising them means what it says.

    Raises:
        UnsupportedOperatorError: they are larger than a file may ask for.
    """
    found: set[str] = set()
    total = 0
    for node in list(graph):
        if node.op_type != "ConstantOfShape" or node.domain not in ("", "ai.onnx"):
            continue
        output, shape = node.outputs[0], array_of(node, 0)
        fill = (
            node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, "f4")
        )
        if shape is None or fill.dtype.kind != "f" or output.is_graph_output() or not _is_weight(output):
            continue
        if shape.ndim != 1 or np.any(shape < 0):
            continue  # inference says what is wrong with it
        total += math.prod(int(d) for d in shape)
        if total > limit:
            raise _too_large(node, total, limit)
        array = np.full(tuple(int(d) for d in shape), fill.reshape(()), dtype=fill.dtype)
        found.add(folding.replace_by_constant(graph, node, array).name or "")
    return found


def prepare(graph: ir.Graph) -> None:
    """Write out what ONNX's own shape inference needs and does not supply.

    * Range reads scalars, as it must: ONNX's body of AffineGrid gives it vectors of one element.
    * MeanVarianceNormalization has its axes, which inference looks up without a default.
    """
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "MeanVarianceNormalization" and "axes" not in node.attributes:
            node.attributes.add(ir.AttrInt64s("axes", [0, 2, 3]))
        if node.op_type != "Range":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and (value.const_value is None or len(value.const_value.shape) > 0):
                flat = ir.node("Squeeze", [value], num_outputs=1, name=f"{node.name}.scalar_{index}")
                flat.outputs[0].name = f"{node.outputs[0].name}.scalar_{index}"
                graph.insert_before(node, flat)
                node.replace_input_with(index, flat.outputs[0])


def _is_weight(value: ir.Value) -> bool:
    for node, index in value.uses():
        if node.op_type in _WEIGHTED and (index > 0 or node.op_type in ("Einsum", "MatMul")):
            return True
        if node.op_type in _AFFINE and not _is_constant(node.inputs[1 - index]):
            return True
        if node.op_type in _SHAPING and index == 0 and _is_weight(node.outputs[0]):
            return True
    return False


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    producer = value.producer()
    return producer is not None and producer.op_type in GENERATORS


def _too_large(node: ir.Node, elements: int, limit: int) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"Node '{node.name}' ({node.op_type}) generates a constant, which makes {elements} generated elements; the "
        f"limit is {limit}. Store weights as initializers, or fix smaller input shapes."
    )


def check_generators(graph: ir.Graph, shapes: Shapes, limit: int) -> None:
    """Refuse what should have become a constant and is too large for one.

    Raises:
        UnsupportedOperatorError: names the node, its size and the limit.
    """
    for node in graph:
        if node.op_type in GENERATORS and node.domain == "":
            shape = shapes.get(node.outputs[0].name or "")
            if shape is not None and not node.outputs[0].is_graph_output():
                raise _too_large(node, math.prod(shape), limit)


def rewrite(graph: ir.Graph, shapes: Shapes, protected: Set[str], folded: set[str]) -> int:
    """One sweep over the main graph; returns how many nodes changed."""
    count = 0
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "If":
            count += _take_branch(graph, node, folded)
        elif node.op_type == "Dropout":
            count += _dropout_mask(graph, node, shapes, folded)
        elif node.op_type == "Compress":
            count += _compress(graph, node, shapes, folded)
        elif node.op_type == "MaxUnpool":
            count += _unpool_then_pad(graph, node, shapes, folded)
        elif node.op_type == "Concat":
            count += _drop_empty_parts(node, shapes)
        elif node.op_type == "Split":
            count += _split_constant(graph, node, shapes, protected, folded) or _drop_empty_results(
                graph, node, shapes, folded
            )
    return count


# ---- If ---------------------------------------------------------------------------------------
def _take_branch(graph: ir.Graph, node: ir.Node, folded: set[str]) -> int:
    """**Becomes** the nodes of the branch that a constant condition chooses."""
    condition = array_of(node, 0)
    if condition is None or condition.size != 1:
        return 0
    chosen = node.attributes.get("then_branch" if bool(condition.reshape(())) else "else_branch")
    if chosen is None or len(chosen.as_graph().outputs) != len(node.outputs):
        raise ModelError(
            f"Node '{node.name}' (If) needs two branches with {len(node.outputs)} outputs each; export the model again."
        )
    body = chosen.as_graph()
    for name, value in list(body.initializers.items()):
        body.initializers.pop(name)
        value.name = free_name(graph, name)
        graph.register_initializer(value)
    results = list(body.outputs)
    body.outputs.clear()
    taken = list(body)
    body.remove(taken)
    graph.insert_before(node, taken)
    for output, result in zip(node.outputs, results, strict=True):
        _become(graph, node, output, result)
    graph.remove(node, safe=True)
    folded.update(v.name for v in cleanup.constants_to_initializers(graph) if v.name)
    return 1


def _become(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the readers of `old` read `new`, which keeps its own name; a graph output becomes an Identity."""
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    identity = ir.node("Identity", [new], num_outputs=1, name=f"{node.name}.{old.name}")
    graph.insert_before(node, identity)
    _succeed(graph, old, identity.outputs[0])


def _succeed(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let the fresh value `new` be all that `old` was: its name, its readers, a graph output."""
    name, new.type, new.shape = old.name, old.type, old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    old.name = None
    new.name = name
    old.replace_all_uses_with(new)


# ---- Dropout, Compress ------------------------------------------------------------------------
def _dropout_mask(graph: ir.Graph, node: ir.Node, shapes: Shapes, folded: set[str]) -> int:
    """**Becomes** a mask of ones where the mask of an inactive Dropout is read."""
    ratio = array_of(node, 1)
    if ratio is not None and not np.any(ratio) and len(node.inputs) > 2:
        node.resize_inputs(2)  # training mode that drops nothing
    source = node.inputs[0]
    shape = shapes.get(source.name or "") if source is not None else None
    if (
        len(node.outputs) < 2
        or shape is None
        or not (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    ):
        return 0
    training = array_of(node, 2)
    if len(node.inputs) > 2 and node.inputs[2] is not None and (training is None or bool(np.any(training))):
        return 0  # refused by the clean-up, which knows the reason
    mask = folding.constant(graph, free_name(graph, f"{node.name}.mask"), np.ones(shape, dtype=bool))
    folded.add(mask.name or "")
    _become(graph, node, node.outputs[1], mask)
    node.resize_outputs(1)
    return 1


def _compress(graph: ir.Graph, node: ir.Node, shapes: Shapes, folded: set[str]) -> int:
    """**Becomes** Gather at the positions of a constant condition; of the flattened tensor without an axis."""
    condition, source = array_of(node, 1), node.inputs[0]
    if condition is None or source is None or shapes.get(source.name or "") is None:
        return 0
    positions = folding.constant(
        graph, free_name(graph, f"{node.name}.indices"), np.flatnonzero(condition).astype(np.int64)
    )
    folded.add(positions.name or "")
    axis = node.attributes.get_int("axis", None)
    if axis is None:
        target = folding.constant(graph, free_name(graph, f"{node.name}.flat"), np.asarray([-1], np.int64))
        folded.add(target.name or "")
        flat = ir.node("Reshape", [source, target], num_outputs=1, name=f"{node.name}.flatten")
        flat.outputs[0].name = f"{node.outputs[0].name}.flat"
        graph.insert_before(node, flat)
        source = flat.outputs[0]
    picked = ir.node(
        "Gather", [source, positions], {"axis": axis or 0}, num_outputs=1, name=f"{node.name}.gather"
    )
    picked.metadata_props.update(node.metadata_props)
    graph.insert_before(node, picked)
    picked.outputs[0].name = f"{node.outputs[0].name}.picked"
    bypass(graph, node, picked.outputs[0])
    return 1


def _unpool_then_pad(graph: ir.Graph, node: ir.Node, shapes: Shapes, folded: set[str]) -> int:
    """**Becomes** MaxUnpool to its smallest shape and a Pad: ONNX infers no shape with `output_shape`."""
    wanted, source = array_of(node, 2), node.inputs[0]
    data = shapes.get(source.name or "") if source is not None else None
    kernel = node.attributes.get_ints("kernel_shape", ())
    rank = len(kernel)
    if wanted is None or data is None or not wanted.size == len(data) == rank + 2:
        return 0
    strides = node.attributes.get_ints("strides", [1] * rank)
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    sizes = [(data[2 + i] - 1) * strides[i] - pads[i] - pads[rank + i] + kernel[i] for i in range(rank)]
    extra = [0] * (len(data) + 2) + [int(wanted[2 + i]) - sizes[i] for i in range(rank)]
    node.resize_inputs(2)
    if not any(extra):
        return 1
    operand = folding.constant(graph, free_name(graph, f"{node.name}.extra"), np.asarray(extra, np.int64))
    folded.add(operand.name or "")
    padded = ir.node("Pad", [None, operand], num_outputs=1, name=f"{node.name}.pad")
    graph.insert_after(node, padded)
    _succeed(graph, node.outputs[0], padded.outputs[0])
    node.outputs[0].name = f"{padded.outputs[0].name}.unpadded"
    node.outputs[0].shape = None
    padded.replace_input_with(0, node.outputs[0])
    return 1


def widen(graph: ir.Graph, types: Mapping[str, ir.DataType]) -> int:
    """**Becomes** Cast to float32, the operator, Cast back, where a newer opset allowed a 16-bit float."""
    count = 0
    for node in list(graph):
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, CANONICAL_OPSET, ""):
            continue
        dtype = _too_narrow(node, types)
        if dtype is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and types.get(value.name or "") == dtype:
                up = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, num_outputs=1)
                up.name = f"{node.name}.wide_{index}"
                up.outputs[0].name = f"{node.name}.wide_{index}"
                graph.insert_before(node, up)
                node.replace_input_with(index, up.outputs[0])
        for output in list(node.outputs):
            if output.name and types.get(output.name) == dtype:
                down = ir.node("Cast", [None], {"to": int(dtype)}, num_outputs=1, name=f"{node.name}.narrow")
                graph.insert_after(node, down)
                _succeed(graph, output, down.outputs[0])
                output.name, output.type = f"{down.outputs[0].name}.wide", None
                down.replace_input_with(0, output)
        count += 1
    return count


def _too_narrow(node: ir.Node, types: Mapping[str, ir.DataType]) -> ir.DataType | None:
    """The 16-bit float among the inputs that the operator does not allow; None if there is none."""
    schema = onnx.defs.get_schema(node.op_type, CANONICAL_OPSET, "")
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for index, value in enumerate(node.inputs):
        dtype = types.get(value.name or "") if value is not None else None
        if dtype not in _NARROW:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if _NARROW[dtype] not in allowed.get(formal.type_str, [formal.type_str]):
            return dtype
    return None


# ---- empty tensors ----------------------------------------------------------------------------
def _is_empty(value: ir.Value | None, shapes: Shapes) -> bool:
    return value is not None and 0 in shapes.get(value.name or "", ())


def _drop_empty_parts(node: ir.Node, shapes: Shapes) -> int:
    """Concat without operands that contribute nothing."""
    kept = [value for value in node.inputs if not _is_empty(value, shapes)]
    if not kept or len(kept) == len(node.inputs):
        return 0
    for index, value in enumerate(kept):
        node.replace_input_with(index, value)
    node.resize_inputs(len(kept))
    return 1


def _split_constant(
    graph: ir.Graph, node: ir.Node, shapes: Shapes, protected: Set[str], folded: set[str]
) -> int:
    """**Becomes** one constant per part, where a constant is split (parameters are not)."""
    source, array = node.inputs[0], array_of(node, 0)
    lengths = [shapes.get(o.name or "") for o in node.outputs]
    if source is None or array is None or source.name in protected or any(s is None for s in lengths):
        return 0
    axis, start = node.attributes.get_int("axis", 0), 0
    for output, shape in zip(node.outputs, lengths, strict=True):
        stop = start + (shape or ())[axis]
        part = np.take(array, range(start, stop), axis)
        value = folding.constant(graph, free_name(graph, f"{output.name}.part"), part)
        folded.add(value.name or "")
        _become(graph, node, output, value)
        start = stop
    graph.remove(node, safe=True)
    return 1


def _drop_empty_results(graph: ir.Graph, node: ir.Node, shapes: Shapes, folded: set[str]) -> int:
    """Split without results that are empty and unread."""
    lengths = [shapes.get(o.name or "") for o in node.outputs]
    unread = [_is_empty(o, shapes) and not o.uses() and not o.is_graph_output() for o in node.outputs]
    if not any(unread) or any(shape is None for shape in lengths):
        return 0
    axis = node.attributes.get_int("axis", 0)
    kept = [i for i, gone in enumerate(unread) if not gone]
    if not kept:
        return 0
    source = node.inputs[0]
    if len(kept) == 1:
        assert source is not None
        output = node.outputs[kept[0]]
        whole = ir.node("Identity", [source], num_outputs=1, name=f"{node.name}.whole")
        graph.insert_before(node, whole)
        _succeed(graph, output, whole.outputs[0])
        graph.remove(node, safe=True)
        return 1
    sizes = np.asarray([(lengths[i] or ())[axis] for i in kept], np.int64)
    operand = folding.constant(graph, free_name(graph, f"{node.name}.lengths"), sizes)
    folded.add(operand.name or "")
    split = ir.node("Split", [source, operand], {"axis": axis}, num_outputs=len(kept), name=node.name)
    split.metadata_props.update(node.metadata_props)
    graph.insert_before(node, split)
    for position, index in enumerate(kept):
        _succeed(graph, node.outputs[index], split.outputs[position])
    graph.remove(node, safe=True)
    return 1


__all__ = ["GENERATORS", "check_generators", "materialise", "prepare", "rewrite", "widen"]
