"""Bodies of control-flow nodes (If, Loop, Scan): their graphs, what is in them, and what they read from outside.

A reference to an attribute of a function has no graph, and counts as none.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def attribute_graphs(attribute: ir.Attr) -> list[ir.Graph]:
    """Graphs that an attribute holds; empty for other kinds of attributes."""
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def body_graphs(node: ir.Node) -> list[ir.Graph]:
    """Graphs held by the attributes of `node`, in attribute order, not nested ones; empty for ordinary nodes."""
    return [graph for attribute in node.attributes.values() for graph in attribute_graphs(attribute)]


def with_inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """The node, then every node in its bodies, at any depth."""
    yield node
    for body in body_graphs(node):
        for inner in body:
            yield from with_inner_nodes(inner)


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values of enclosing graphs that the bodies of `node` read, at any depth, without repetition."""
    found: dict[ir.Value, None] = {}
    for body in body_graphs(node):
        inner = [n for child in body for n in with_inner_nodes(child)]
        graphs = [body, *(graph for n in inner for graph in body_graphs(n))]
        local = {output for n in inner for output in n.outputs}
        for graph in graphs:
            local.update(graph.inputs)
            local.update(graph.initializers.values())
        reads = [v for n in inner for v in n.inputs if v is not None]
        reads += [v for graph in graphs for v in graph.outputs]
        found.update(dict.fromkeys(v for v in reads if v not in local))
    return list(found)


def read_values(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads from the graph that it stands in or an enclosing one, itself or in its bodies."""
    return [*(v for v in node.inputs if v is not None), *captured_values(node)]
