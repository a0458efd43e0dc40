"""What a program does not understand of its model: some nodes, and everything that follows them.

An operator of a foreign domain, a loop, or a shape that depends on data makes nodes that no analysis can
follow. They are detached when a file is loaded, and attached again, untouched, wherever bytes are written.
In between the program ends at the values that they read, which become graph outputs: what those outputs
keep, the tail keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError


class HasShapes(Protocol):
    """A program, as far as this module needs to know it."""

    def shapes(self) -> Any: ...  # noqa: D102


P = TypeVar("P", bound=HasShapes)


@dataclasses.dataclass(frozen=True)
class Tail:
    """Detached nodes, and where they belong.

    Attributes:
        nodes: in execution order.
        weights: initializers that these nodes read, by name.
        outputs: graph outputs that these nodes compute, by position among all outputs of the model.
        added: values that are outputs of the program only because these nodes read them.
        opset_imports: versions of foreign domains.
        reasons: why nodes are here, by name; the others follow one of these.
        readers: by value that enters, the node that reads it first.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: Mapping[str, ir.TensorProtocol]
    outputs: tuple[tuple[int, onnx.ValueInfoProto], ...]
    added: frozenset[str]
    opset_imports: Mapping[str, int]
    reasons: Mapping[str, str]
    readers: Mapping[str, str]

    def names(self) -> Iterator[str]:
        """Names of values that a program must not give to others."""
        yield from self.weights
        for node in self.nodes:
            yield from _made(node)

    def reason(self) -> str:
        """The first reason, for people."""
        name, reason = next(iter(self.reasons.items()))
        more = f" (and {len(self.nodes) - 1} more nodes)" if len(self.nodes) > 1 else ""
        return f"node '{name}'{more} is left as it is: {reason}"

    def attach(self, shell: onnx.ModelProto) -> None:
        """Append the nodes to a model without weights, and restore its outputs."""
        graph = shell.graph
        graph.node.extend(self.nodes)
        own = [v for v in graph.output if v.name not in self.added]
        for position, info in self.outputs:
            own.insert(position, info)
        del graph.output[:]
        graph.output.extend(own)
        for domain, version in sorted(self.opset_imports.items()):
            shell.opset_import.add(domain=domain, version=version)

    def output_values(self, graph: ir.Graph) -> list[ir.Value]:
        """The outputs of the whole model, given its understood part."""
        own = [v for v in graph.outputs if v.name not in self.added]
        for position, info in self.outputs:
            own.insert(position, ir.serde.deserialize_value_info_proto(info, None))
        return own


def understood(model: ir.Model, canonical: Callable[[ir.Model, Tail | None], P]) -> P:
    """What `canonical` makes of `model` without the nodes that stand in its way, and what follows those.

    What they are shows only as a model is made canonical: it is begun again from a copy until nothing is in the
    way.

    Args:
        model: unchanged; every node has a name of its own.
        canonical: makes a program of a copy and of what was detached from it, or raises a `ModelError` that
            names nodes.

    Raises:
        ModelError: of the first attempt, if it names no nodes, or nothing is left without them.
    """
    found: dict[str, str] = {}
    first: ModelError | None = None
    while True:
        core = model.clone()
        try:
            program = canonical(core, detach(core, found) if found else None)
            program.shapes()
        except ModelError as error:
            first = first or error
            more = {name: reason for name, reason in error.nodes.items() if name not in found}
            if not more:
                raise first from error.__cause__
            found |= more
        else:
            return program


def detach(model: ir.Model, reasons: Mapping[str, str]) -> Tail:
    """Remove nodes and what follows them from the main graph of `model`.

    Args:
        model: changed in place; every node has a name.
        reasons: why, by name of node of the main graph; others are ignored.

    Raises:
        ModelError: nothing would be left, or `reasons` names nothing.
    """
    graph = model.graph
    outermost = {inner.name: node.name for node in graph for inner in _with_bodies(node)}
    reasons = {outermost[name] or "": reason for name, reason in reasons.items() if name in outermost}
    lost: set[ir.Value] = set()
    nodes: list[ir.Node] = []
    for node in graph:
        reads = {v for v in _reads(node) if v is not None}
        if node.name in reasons or reads & lost:
            nodes.append(node)
            lost.update(node.outputs)
    inside = set(nodes)
    entering = list(dict.fromkeys(v for n in nodes for v in _reads(n) if v is not None and v not in lost))
    computed = [v for v in entering if v.producer() is not None]
    kept = [v for v in graph.outputs if v not in lost]
    if not nodes or not (computed or any(v.producer() is not None for v in kept)):
        name, reason = next(iter(reasons.items()), ("", "nothing of the model is understood"))
        raise ModelError(f"Nothing of the model is left without node '{name}': {reason}.")
    protos = {n.name: n for n in ir.to_proto(_without_weights(model)).graph.node}
    outputs = tuple((i, ir.serde.serialize_value(v)) for i, v in enumerate(graph.outputs) if v in lost)
    added = [v for v in computed if not v.is_graph_output()]
    weights = {
        v.name or "": v.const_value for v in entering if v.is_initializer() and v.const_value is not None
    }
    readers = {v.name or "": next(n.name or "" for n in nodes if v in set(_reads(n))) for v in entering}
    for value in [v for v in graph.outputs if v in lost]:
        graph.outputs.remove(value)
    graph.remove(reversed(nodes), safe=False)
    for node in inside:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    graph.outputs.extend(added)
    moved = {}
    for name in weights:
        # A weight that both parts read may be narrowed in the one; the tail has its own under another name.
        shared = bool(graph.initializers[name].uses()) or graph.initializers[name].is_graph_output()
        moved[name] = f"{name}.tail" if shared else name
        if not shared:
            graph.initializers.pop(name)
    return Tail(
        nodes=tuple(_renamed(protos[n.name], moved) for n in nodes),
        weights={moved[name]: tensor for name, tensor in weights.items()},
        outputs=outputs,
        added=frozenset(v.name or "" for v in added),
        opset_imports={d: v for d, v in model.opset_imports.items() if d not in ("", "ai.onnx", "sartor")},
        reasons={n.name or "": reasons[n.name or ""] for n in nodes if n.name in reasons},
        readers=readers,
    )


def bodies_of(node: ir.Node) -> tuple[ir.Graph, ...]:
    """The graphs in the attributes of a node (branches of If, body of Loop or Scan), not nested ones."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            bodies.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            bodies.extend(attribute.as_graphs())
    return tuple(bodies)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Values of the main graph that a node reads, in its bodies, too."""
    yield from (v for v in node.inputs if v is not None)
    for body in bodies_of(node):
        for inner in body:
            yield from (v for v in _reads(inner) if v.graph is node.graph)
        yield from (v for v in body.outputs if v.graph is node.graph)


def _with_bodies(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for body in bodies_of(node):
        yield from ir.traversal.RecursiveGraphIterator(body)


def _made(node: onnx.NodeProto) -> Iterator[str]:
    """Names of values that a node and its bodies define."""
    yield from (name for name in node.output if name)
    for attribute in node.attribute:
        for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            yield from (v.name for v in body.input)
            yield from (t.name for t in body.initializer)
            for inner in body.node:
                yield from _made(inner)


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """The node with the values that it reads under other names, in its bodies, too."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    stack = [result]
    while stack:
        current = stack.pop()
        for index, name in enumerate(current.input):
            current.input[index] = names.get(name, name)
        for attribute in current.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                stack.extend(body.node)
                for output in body.output:
                    output.name = names.get(output.name, output.name)
    return result


def _without_weights(model: ir.Model) -> ir.Model:
    light = model.clone()
    for value in light.graph.initializers.values():
        value.const_value = ir.Tensor(np.zeros(0, np.float32))
    return light
