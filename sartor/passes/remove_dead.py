"""`remove-dead`: drop what no graph output depends on."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.ir.bodies import body_graphs
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Semantics
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove nodes, initializers and functions that no graph output depends on.

    Becomes: the same graph without nodes whose results reach no output, without initializers that no
    remaining node reads, and without functions that no remaining node calls.

    Bodies of control flow are followed: an initializer of the main graph that only an `If` branch reads
    is alive, and a dead node inside a branch keeps nothing alive. Graph inputs always stay.
    """

    name: ClassVar[str] = "remove-dead"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def plan(self, program: Program, context: Context) -> Any:
        """Names of dead nodes, initializers and functions; None when there are none."""
        live_nodes, live_values = _mark(program.graph)
        dead_nodes: list[str] = []
        dead_initializers: list[str] = []
        graphs = [program.graph]
        while graphs:
            graph = graphs.pop(0)
            for name, value in graph.initializers.items():
                if value not in live_values and not value.is_graph_input():
                    dead_initializers.append(name)
            for node in graph:
                if node in live_nodes:
                    graphs.extend(body_graphs(node))
                else:  # what is inside a dead node goes with it
                    dead_nodes.append(node.name or "")
        dead_functions = _dead_functions(program, live_nodes)
        if not (dead_nodes or dead_initializers or dead_functions):
            return None
        return {
            "nodes": dead_nodes,
            "initializers": sorted(dead_initializers),
            "functions": [list(key) for key in dead_functions],
        }

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Remove what the plan names; users go before what they use."""
        for name in reversed(plan["nodes"]):
            rewriter.remove_node(rewriter.node(name))
        doomed = set(plan["initializers"])
        for graph in (program.graph, *program.graph.subgraphs()):
            for name in sorted(doomed & set(graph.initializers)):
                rewriter.remove_initializer(graph.initializers[name])
        for domain, name, overload in plan["functions"]:
            rewriter.remove_function((domain, name, overload))


def _mark(graph: ir.Graph) -> tuple[set[ir.Node], set[ir.Value]]:
    """Nodes and values that the outputs of `graph` depend on, through bodies of control flow."""
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    pending: list[ir.Value | None] = list(graph.outputs)
    while pending:
        value = pending.pop()
        if value is None or value in values:
            continue
        values.add(value)
        node = value.producer()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        pending.extend(node.inputs)
        for body in body_graphs(node):
            pending.extend(body.outputs)
    return nodes, values


def _dead_functions(program: Program, live_nodes: set[ir.Node]) -> list[tuple[str, str, str]]:
    model = program.model
    alive: set[tuple[str, str, str]] = set()
    pending: list[Any] = [node.op_identifier() for node in live_nodes]
    if program.tail is not None:
        pending += program.tail.operators
    while pending:
        key = pending.pop()
        if key in model.functions and key not in alive:
            alive.add(key)
            pending += [node.op_identifier() for node in model.functions[key].all_nodes()]
    return sorted(key for key in model.functions if key not in alive)
