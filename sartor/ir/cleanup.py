"""Structural clean-up behind `canonicalize`: names, dead code, operators that do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from sartor.errors import ModelError
from sartor.ir.branches import forget_lost_uses
from sartor.ir.folding import names

Shapes = Mapping[str, tuple[int, ...]]
Types = Mapping[str, ir.DataType]

_SAME_SHAPE_IS_IDENTITY = names("Expand Flatten Reshape Squeeze Tile Unsqueeze")
_ONE_INPUT_IS_IDENTITY = names("Concat Max Mean Min Sum")
_EMPTY_REDUCTION_IS_IDENTITY = names("ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum")


class _Names:
    """Names for what the file left unnamed; deterministic, because they derive from their neighbours."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or f"{node.op_type}_{node.outputs[0].name if node.outputs else ''}"

    def generate_value_name(self, value: ir.Value) -> str:
        producer = value.producer()
        return value.name or (f"{producer.name or producer.op_type}.{value.index()}" if producer else "value")


def fix_names(model: ir.Model) -> None:
    """Give every node and value a unique, non-empty name; inputs, outputs and initializers keep theirs."""
    NameFixPass(name_generator=_Names())(model)


def drop_metadata(model: ir.Model) -> None:
    """Forget exporter metadata and doc strings: they carry source lines and machine paths."""
    model.doc_string = None
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.domain, model.model_version = None, None, None, None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None


def constants_to_initializers(graph: ir.Graph, nodes: Iterable[ir.Node] | None = None) -> list[ir.Value]:
    """Turn Constant nodes of the main graph into initializers of the same name.

    Args:
        graph: changed in place.
        nodes: which; all by default.

    Raises:
        ModelError: a sparse or string constant.
    """
    created: list[ir.Value] = []
    for node in list(graph if nodes is None else nodes):
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        output = node.outputs[0]
        tensor = _constant_tensor(node)
        name = output.name or f"constant.{len(created)}"
        if output.is_graph_output():  # an initializer cannot be a graph output of its own name everywhere
            value = _initializer(graph, f"{name}.value", tensor)
            graph.insert_before(node, identity := ir.node("Identity", [value], num_outputs=1))
            _take_over_output(graph, output, identity.outputs[0])
        else:
            output.name = None
            value = _initializer(graph, name, tensor)
            output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        created.append(value)
    return created


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol:
    for key, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if key in node.attributes:
            return ir.Tensor(np.asarray(node.attributes[key].value, dtype=dtype))
    attribute = node.attributes.get("value")
    if attribute is None or attribute.type != ir.AttributeType.TENSOR:
        raise ModelError(
            f"Constant node '{node.name}' holds {sorted(node.attributes)}; only dense numeric tensors are "
            "supported. Replace it by a dense tensor."
        )
    return attribute.as_tensor()


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _take_over_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph output that `old` was, with its name, type and shape."""
    name, new.type, new.shape = old.name, old.type or new.type, old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    old.name = None
    new.name = name
    old.replace_all_uses_with(new)


def sort(graph: ir.Graph) -> None:
    """Put nodes into execution order, as they stood where possible.

    Raises:
        ModelError: the graph contains a cycle.
    """
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError("The graph contains a cycle; a model must be a directed acyclic graph.") from error


def sort_initializers(graph: ir.Graph) -> None:
    """Order initializers by name: equal programs serialise equally, whatever order they were made in."""
    ordered = sorted(graph.initializers.items())
    if [name for name, _ in ordered] == list(graph.initializers):
        return
    graph.initializers.clear()
    for _, value in ordered:
        graph.register_initializer(value)


def remove_dead(model_graph: ir.Graph) -> int:
    """Remove nodes and initializers that nothing reads, bodies of `If` included among the readers."""
    result = RemoveUnusedNodesPass()(ir.Model(model_graph, ir_version=10))
    while forget_lost_uses(model_graph):  # of an `If` that is gone
        RemoveUnusedNodesPass()(ir.Model(model_graph, ir_version=10))
    return int(result.modified)


def bypass(graph: ir.Graph, node: ir.Node, source: ir.Value) -> bool:
    """Replace the first output of `node` by `source`; graph outputs keep their names.

    Returns:
        False if nothing changed (an Identity that a graph output needs).
    """
    output = node.outputs[0]
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or source.is_graph_output() or producer.graph is not graph:
            if node.op_type == "Identity":
                return False
            identity = ir.node("Identity", [source], num_outputs=1, name=node.name)
            graph.insert_before(node, identity)
            _take_over_output(graph, output, identity.outputs[0])
        else:
            _take_over_output(graph, output, source)
    else:
        output.replace_all_uses_with(source)
    graph.remove(node, safe=True)
    return True


def simplify(graph: ir.Graph, shapes: Shapes, types: Types, protected: Set[str], folded: Set[str]) -> int:
    """Remove operators that do nothing at these shapes; returns how many changed."""
    count = 0
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "CastLike":
            count += _cast_like(graph, node, types)
        elif node.op_type in ("Conv", "ConvTranspose"):
            count += _drop_zero_bias(node, protected, folded)
        elif node.op_type == "Gather":
            count += _gather_everything(graph, node, shapes)
        elif (source := _identity_source(node, shapes, types)) is not None:
            count += bypass(graph, node, source)
    return count


def _gather_everything(graph: ir.Graph, node: ir.Node, shapes: Shapes) -> int:
    """Gathering all elements of a flat tensor in their order is a Reshape: so as_strided leaves torch."""
    flat, indices = (
        shapes.get(node.inputs[0].name or "") if node.inputs[0] is not None else None,
        array_of(node, 1),
    )
    if indices is None or flat != (indices.size,) or indices.ndim == 1:
        return 0
    if not np.array_equal(indices.ravel() % indices.size, np.arange(indices.size)):
        return 0
    target = ir.Tensor(np.array(indices.shape, dtype=np.int64))
    shape = _initializer(graph, f"{node.name}.shape", target)
    return replace(graph, node, ir.node("Reshape", [node.inputs[0], shape], name=node.name, num_outputs=1))


def _identity_source(node: ir.Node, shapes: Shapes, types: Types) -> ir.Value | None:
    """The value that `node` merely repeats, or None."""
    if not node.inputs or node.inputs[0] is None or any(o.uses() for o in node.outputs[1:]):
        return None
    source, kind = node.inputs[0], node.op_type
    same_shape = shapes.get(source.name or "") is not None and shapes.get(source.name or "") == shapes.get(
        node.outputs[0].name or ""
    )
    if kind == "Identity":
        return source
    if kind == "Dropout":
        return source if not _true(node, 2) else None
    if kind == "Cast":
        return source if types.get(source.name or "") == node.attributes["to"].as_int() else None
    if kind in _SAME_SHAPE_IS_IDENTITY:
        return source if same_shape else None
    if kind in _ONE_INPUT_IS_IDENTITY:
        return source if len(node.inputs) == 1 else None
    if kind == "Transpose":
        rank = len(shapes.get(source.name or "", ()))
        permutation = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
        return source if list(permutation) == list(range(rank)) and rank else None
    if kind == "Pad":
        pads = array_of(node, 1)
        return source if pads is not None and not np.any(pads) else None
    if kind == "Slice":
        steps = array_of(node, 4)
        forward = (
            len(node.inputs) < 5 or node.inputs[4] is None or (steps is not None and bool((steps > 0).all()))
        )
        return source if same_shape and forward else None
    if kind == "Clip":
        return source if all(i is None for i in node.inputs[1:]) else None
    if kind in _EMPTY_REDUCTION_IS_IDENTITY and node.attributes.get_int("noop_with_empty_axes", 0):
        axes = array_of(node, 1)
        no_axes = len(node.inputs) < 2 or node.inputs[1] is None or (axes is not None and axes.size == 0)
        return source if no_axes else None
    return None


def array_of(node: ir.Node, index: int) -> np.ndarray | None:
    """The constant contents of input `index`, or None if it is absent or computed."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    value = node.inputs[index]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _true(node: ir.Node, index: int) -> bool:
    if index >= len(node.inputs) or node.inputs[index] is None:
        return False
    array = array_of(node, index)
    if array is None or bool(np.any(array)):
        raise ModelError(
            f"Node '{node.name}' (Dropout) runs in training mode; export the model in inference mode."
        )
    return False


def _cast_like(graph: ir.Graph, node: ir.Node, types: Types) -> int:
    like = node.inputs[1]
    dtype = types.get(like.name or "") if like is not None else None
    if dtype is None:
        return 0
    cast = ir.node("Cast", [node.inputs[0]], {"to": int(dtype)}, name=node.name, num_outputs=1)
    return replace(graph, node, cast)


def replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> int:
    """Put `new` in the place of `node`; its output keeps the name."""
    new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    old = node.outputs[0]
    if old.is_graph_output():
        _take_over_output(graph, old, new.outputs[0])
    else:
        name, old.name = old.name, None
        new.outputs[0].name = name
        old.replace_all_uses_with(new.outputs[0])
    graph.remove(node, safe=True)
    return 1


def cast_to(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A new value of the same graph: `value` in another element type."""
    maker = value.producer()
    assert maker is not None and maker.graph is not None
    name = f"{value.name}/as_{dtype.name.lower()}"
    node = ir.node("Cast", [value], {"to": int(dtype)}, num_outputs=1, name=f"{name}/Cast")
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    maker.graph.append(node)
    return node.outputs[0]


def _drop_zero_bias(node: ir.Node, protected: Set[str], folded: Set[str]) -> int:
    """Exporters spell "no bias" as an expanded zero; a real parameter stays even when it is zero."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return 0
    bias = node.inputs[2]
    if bias.name in protected or bias.name not in folded or bias.const_value is None:
        return 0
    if np.any(bias.const_value.numpy()):
        return 0
    node.resize_inputs(2)
    return 1
