"""Walks over ONNX protobufs: bodies of nodes, and everything that is in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from google.protobuf.message import Message


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Graphs held by the attributes of `node`, in attribute order, not nested ones; empty for ordinary nodes."""
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def with_inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The node, then every node in its bodies, at any depth."""
    yield node
    for body in bodies(node):
        for inner in body.node:
            yield from with_inner_nodes(inner)


def graphs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, int]]:
    """The graph, then those inside it, with their depth from 1 on."""
    stack = [(graph, 1)]
    while stack:
        current, depth = stack.pop()
        yield current, depth
        stack.extend((body, depth + 1) for node in current.node for body in bodies(node))


def tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor inside a message, in the order of its fields."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from tensors(item)
