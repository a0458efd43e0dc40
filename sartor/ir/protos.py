"""Walks over ONNX protobufs: bodies of nodes, everything that is in them, and what of it is not written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import onnx
from google.protobuf.message import Message

G = TypeVar("G", onnx.GraphProto, onnx.FunctionProto)


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


def graphs(root: G) -> Iterator[tuple[G | onnx.GraphProto, int]]:
    """A graph or function, then the graphs inside it, with their depth from 1 on."""
    stack: list[tuple[G | onnx.GraphProto, int]] = [(root, 1)]
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


def strip(proto: onnx.ModelProto) -> None:
    """Remove everything that is neither function nor weights: value_info, metadata, doc strings."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    for graph, _ in graphs(proto.graph):
        graph.ClearField("value_info")
        graph.ClearField("metadata_props")
        graph.ClearField("doc_string")
        for tensor in graph.initializer:
            tensor.ClearField("doc_string")
            tensor.ClearField("metadata_props")
        for info in [*graph.input, *graph.output]:
            info.ClearField("metadata_props")
            info.ClearField("doc_string")
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
    for function in proto.functions:
        function.ClearField("metadata_props")
        function.ClearField("doc_string")
        function.ClearField("value_info")
        for node in function.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
