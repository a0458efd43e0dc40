"""What a program does not understand of its model: some nodes, and everything that follows them.

An operator of a foreign domain, a loop, or a shape that depends on data makes nodes that no analysis can
follow. They are detached when a file is loaded, and attached again wherever bytes are written: as the loader
prepared them (at the canonical opset, functions inlined, names unique), and otherwise untouched.
In between the program ends at the values that they read, which become graph outputs: what those outputs
keep, the tail keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir import protos
from sartor.ir.bodies import read_values, with_inner_nodes


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
        readers: by value that enters, or weight, the node that reads it first.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: Mapping[str, ir.TensorProtocol]
    outputs: tuple[tuple[int, onnx.ValueInfoProto], ...]
    added: frozenset[str]
    opset_imports: Mapping[str, int]
    reasons: Mapping[str, str]
    readers: Mapping[str, str]

    @property
    def operators(self) -> frozenset[tuple[str, str, str]]:
        """`(domain, operator, overload)` of all nodes, those of bodies included."""
        return frozenset(
            (node.domain, node.op_type, node.overload)
            for outer in self.nodes
            for node in protos.with_inner_nodes(outer)
        )

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
    outermost = {inner.name: node.name for node in graph for inner in with_inner_nodes(node)}
    reasons = {outermost[name] or "": reason for name, reason in reasons.items() if name in outermost}
    from sartor.ir.cleanup import constants_to_initializers

    _, readers = _following(graph, reasons)
    makers = (value.producer() for value in readers)
    constants_to_initializers(graph, [n for n in makers if n is not None and n.op_type == "Constant"])
    nodes, readers = _following(graph, reasons)
    lost = {output for node in nodes for output in node.outputs}
    computed = [v for v in readers if v.producer() is not None]
    kept = [v for v in graph.outputs if v not in lost]
    if not nodes or not (computed or any(v.producer() is not None for v in kept)):
        name, reason = next(iter(reasons.items()), ("", "nothing of the model is understood"))
        raise ModelError(f"Nothing of the model is left without node '{name}': {reason}.")
    protos = {n.name: n for n in ir.to_proto(_without_weights(model)).graph.node}
    outputs = tuple((i, ir.serde.serialize_value(v)) for i, v in enumerate(graph.outputs) if v in lost)
    added = [v for v in computed if not v.is_graph_output()]
    weights = {
        v.name or "": v.const_value for v in readers if v.is_initializer() and v.const_value is not None
    }
    for value in [v for v in graph.outputs if v in lost]:
        graph.outputs.remove(value)
    for node in reversed(nodes):
        for inner in with_inner_nodes(node):
            for index, read in enumerate(inner.inputs):
                if read is not None and read.graph is graph:
                    inner.replace_input_with(index, None)
    graph.remove(reversed(nodes), safe=False)
    graph.outputs.extend(added)
    taken = {v.name for g in (graph, *graph.subgraphs()) for v in _values(g)}
    taken.update(name for proto in protos.values() for name in _made(proto))
    taken.update(weights)
    moved = {}
    for name in weights:
        # A weight that both parts read may be narrowed in the one; the tail has its own under another name.
        moved[name] = name
        if graph.initializers[name].uses() or graph.initializers[name].is_graph_output():
            moved[name] = next(n for i in itertools.count() if (n := f"{name}.tail{i or ''}") not in taken)
            taken.add(moved[name])
        else:
            graph.initializers.pop(name)
    foreign = {d: v for d, v in model.opset_imports.items() if d not in ("", "ai.onnx", "sartor")}
    for domain in foreign:
        del model.opset_imports[domain]
    return Tail(
        nodes=tuple(_renamed(protos[n.name], moved) for n in nodes),
        weights={moved[name]: tensor for name, tensor in weights.items()},
        outputs=outputs,
        added=frozenset(v.name or "" for v in added),
        opset_imports=foreign,
        reasons={n.name or "": reasons[n.name or ""] for n in nodes if n.name in reasons},
        readers={moved.get(v.name or "", v.name or ""): reader for v, reader in readers.items()},
    )


def _following(graph: ir.Graph, reasons: Mapping[str, str]) -> tuple[list[ir.Node], dict[ir.Value, str]]:
    """The nodes that have a reason and those that follow them; and who reads each value that enters."""
    lost: set[ir.Value] = set()
    nodes: list[ir.Node] = []
    readers: dict[ir.Value, str] = {}
    for node in graph:
        reads = read_values(node)
        if node.name in reasons or not lost.isdisjoint(reads):
            nodes.append(node)
            for value in reads:
                if value not in lost:
                    readers.setdefault(value, node.name or "")
            lost.update(node.outputs)
    return nodes, readers


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _made(node: onnx.NodeProto) -> Iterator[str]:
    """Names of values that a node and its bodies define."""
    for inner in protos.with_inner_nodes(node):
        yield from (name for name in inner.output if name)
        for body in protos.bodies(inner):
            yield from (v.name for v in body.input)
            yield from (t.name for t in body.initializer)


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """The node with the values that it reads under other names, in its bodies, too."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    for current in protos.with_inner_nodes(result):
        for index, name in enumerate(current.input):
            current.input[index] = names.get(name, name)
        for body in protos.bodies(current):
            for output in body.output:
                output.name = names.get(output.name, output.name)
    return result


def _without_weights(model: ir.Model) -> ir.Model:
    light = model.clone()
    for value in light.graph.initializers.values():
        value.const_value = ir.Tensor(np.zeros(0, np.float32))
    return light
