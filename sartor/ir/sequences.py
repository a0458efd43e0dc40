"""Replace sequences of tensors, which exporters use for `split` and `chunk`, by plain operators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sartor.ir import folding
from sartor.ir.cleanup import array_of, bypass


def remove_sequences(graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rewrite sequences that are only indexed by constants.

    **Becomes** `SplitToSequence → SequenceAt(i)` to `Split`, `SequenceConstruct → SequenceAt(i)` to its i-th
    input, `SequenceConstruct → ConcatFromSequence` to `Concat`. Anything else stays, and is refused later.

    Returns:
        Number of nodes replaced.
    """
    count = 0
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "SplitToSequence":
            count += _split(graph, node, shapes)
        elif node.op_type == "SequenceConstruct":
            count += _construct(graph, node)
    return count


def _index(reader: ir.Node, length: int) -> int | None:
    position = array_of(reader, 1)
    if reader.op_type != "SequenceAt" or position is None:
        return None
    index = int(position.reshape(()))
    return index + length if index < 0 else index


def _split(graph: ir.Graph, node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get(node.inputs[0].name or "") if node.inputs[0] is not None else None
    if shape is None or node.outputs[0].is_graph_output():
        return 0
    axis = node.attributes.get_int("axis", 0) % len(shape)
    given = array_of(node, 1)
    single = len(node.inputs) < 2 or node.inputs[1] is None
    if given is None and not single:
        return 0
    if given is None:
        sizes = [1] * shape[axis]
    elif given.ndim == 0:
        step = int(given)
        sizes = [min(step, shape[axis] - start) for start in range(0, shape[axis], step)]
    else:
        sizes = [int(s) for s in given]
    readers = [reader for reader, _ in node.outputs[0].uses()]
    indices = [_index(reader, len(sizes)) for reader in readers]
    if any(i is None or not 0 <= i < len(sizes) for i in indices):
        return 0
    operand = folding.constant(graph, f"{node.name}.split", np.asarray(sizes, np.int64))
    split = ir.node(
        "Split", [node.inputs[0], operand], {"axis": axis}, num_outputs=len(sizes), name=node.name
    )
    split.metadata_props.update(node.metadata_props)
    for position, output in enumerate(split.outputs):
        output.name = f"{node.outputs[0].name}.{position}"
    graph.insert_before(node, split)
    squeeze = single and not node.attributes.get_int("keepdims", 1)
    axes = folding.constant(graph, f"{node.name}.axes", np.asarray([axis], np.int64)) if squeeze else None
    for reader, index in zip(readers, indices, strict=True):
        part = split.outputs[index or 0]
        if axes is not None:
            flat = ir.node("Squeeze", [part, axes], num_outputs=1, name=f"{reader.name}.squeeze")
            flat.outputs[0].name = f"{reader.outputs[0].name}.squeezed"
            graph.insert_before(reader, flat)
            part = flat.outputs[0]
        bypass(graph, reader, part)
    graph.remove(node, safe=True)
    return 1


def _construct(graph: ir.Graph, node: ir.Node) -> int:
    count = 0
    for reader, _ in list(node.outputs[0].uses()):
        index = _index(reader, len(node.inputs))
        if index is not None and 0 <= index < len(node.inputs):
            source = node.inputs[index]
            count += int(source is not None and bypass(graph, reader, source))
        elif reader.op_type == "ConcatFromSequence" and not reader.attributes.get_int("new_axis", 0):
            concat = ir.node(
                "Concat",
                list(node.inputs),
                {"axis": reader.attributes["axis"].as_int()},
                num_outputs=1,
                name=reader.name,
            )
            concat.outputs[0].name = f"{reader.outputs[0].name}.joined"
            graph.insert_before(reader, concat)
            count += int(bypass(graph, reader, concat.outputs[0]))
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        graph.remove(node, safe=True)
    return count
