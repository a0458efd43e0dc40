"""`Rewriter`: the one object through which passes change a graph, safely and observed.

Every operation keeps these invariants, so that a pass need not:

* names and types of graph inputs and outputs stay (a replaced output hands its name to its successor);
* names are unique over the main graph and all bodies, and nothing else is ever renamed;
* a node is removed only when nothing uses it, and the error lists what does;
* tensors are never written in place: clones of a program share them;
* new nodes carry the pass's name and their anchor's provenance, in memory only.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.errors import InternalError
from sartor.ir.bodies import with_inner_nodes
from sartor.ir.program import Program
from sartor.passes.initializers import InitializerRewriter
from sartor.passes.structure import UniqueNames

META_PASS = "sartor.pass"
"""Key of `node.meta` that names the pass which created the node; never serialised."""


class Rewriter(InitializerRewriter):
    """Changes one program in place and counts what it did.

    Attributes:
        program: the program being rewritten, owned by this rewriter.
        pass_name: stamped on new nodes.
        counts: number of changes by kind; passes add their own with `count`.
        refusals: `(node, reason)` of what `apply` found impossible only by trying; see `refuse`.
    """

    def __init__(self, program: Program, pass_name: str):
        self.program = program
        self.pass_name = pass_name
        self.counts: collections.Counter[str] = collections.Counter()
        self.refusals: list[tuple[str, str]] = []
        self._names = UniqueNames(program)
        self._nodes = {node.name or "": node for node in program.graph.all_nodes()}

    # ---- looking things up -----------------------------------------------------------------
    def node(self, name: str) -> ir.Node:
        """The node of the main graph or of a body with this name.

        Raises:
            InternalError: there is none; a plan that names it belongs to another program.
        """
        node = self._nodes.get(name)
        if node is None:
            raise InternalError(
                f"Pass '{self.pass_name}' looks for node '{name}', which the program does not have. "
                "Make the plan from the program it is applied to."
            )
        return node

    # ---- values ----------------------------------------------------------------------------
    def replace_value(self, old: ir.Value, new: ir.Value) -> None:
        """Let every use of `old` read `new` instead, bodies included.

        When `old` is a graph output, `new` takes over its name and type, and `old` gets a fresh name.
        Where `new` cannot be renamed (it is an input, an initializer or itself an output), an Identity
        carries the output's name instead.
        """
        if old is new:
            return
        if old.is_graph_output():
            self._replace_output(old, new)
        for user, index in list(old.uses()):
            if user is not new.producer():  # `new = Relu(old)` itself keeps reading `old`
                user.replace_input_with(index, new)
        self.counts["values_replaced"] += 1

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        graph = old.graph
        if graph is None:
            raise InternalError(f"Graph output '{old.name}' belongs to no graph; report this as a bug.")
        name, output_type, output_shape = old.name, old.type, old.shape
        fixed = new.producer() is None or new.is_graph_output() or new.graph is not graph
        old.name = self.unique_value_name(f"{name}_replaced")
        if fixed:
            anchor = new.producer() if new.graph is graph else old.producer()
            node = self._make("Identity", [new], {}, 1, None, "", "", anchor)
            if anchor is not None:
                graph.insert_after(anchor, node)
            elif len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
            carrier = node.outputs[0]
        else:
            carrier = new
        carrier.const_value = None  # a rename would reach into a tensor shared with the caller's program
        carrier.name, carrier.type, carrier.shape = name, output_type, output_shape
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = carrier

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let input `index` of `node` read `value` (None: absent), growing the input list if needed."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        elif node.inputs[index] is value:
            return
        node.replace_input_with(index, value)
        self.counts["inputs_changed"] += 1

    # ---- nodes -----------------------------------------------------------------------------
    def insert_before(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
        output_names: Sequence[str] | None = None,
        name: str = "",
        domain: str = "",
    ) -> ir.Node:
        """Create a node just before `anchor`, in the same graph.

        Args:
            anchor: an existing node; its provenance is inherited.
            op_type: operator name.
            inputs: values, None for an absent optional input.
            attributes: Python values, converted by type.
            outputs: number of outputs.
            output_names: hints for their names; made unique.
            name: hint for the node's name; made unique.
            domain: operator domain.

        Returns:
            The new node; its outputs are `node.outputs`.
        """
        node = self._make(op_type, inputs, attributes or {}, outputs, output_names, name, domain, anchor)
        self._graph_of(anchor).insert_before(anchor, node)
        return node

    def insert_after(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
        output_names: Sequence[str] | None = None,
        name: str = "",
        domain: str = "",
    ) -> ir.Node:
        """Create a node just after `anchor`; arguments as in `insert_before`."""
        node = self._make(op_type, inputs, attributes or {}, outputs, output_names, name, domain, anchor)
        self._graph_of(anchor).insert_after(anchor, node)
        return node

    def remove_node(self, node: ir.Node) -> None:
        """Remove one node that nothing uses any more.

        Raises:
            InternalError: an output is still used; the error lists every user.
        """
        self.remove_nodes([node])

    def remove_nodes(self, nodes: Iterable[ir.Node]) -> None:
        """Remove nodes that nothing outside the set uses; all of one graph, in any order.

        Raises:
            InternalError: an output is used outside the set; the error lists every user.
        """
        doomed = list(nodes)
        inside = set(doomed)
        for node in doomed:
            for output in node.outputs:
                users = [f"node '{user.name}'" for user, _ in output.uses() if user not in inside]
                if output.is_graph_output():
                    users.append("the graph's outputs")
                if users:
                    raise InternalError(
                        f"Pass '{self.pass_name}' removes node {self.program.where(node)} while its output "
                        f"'{output.name}' is still used by {', '.join(sorted(set(users)))}. "
                        "Replace these uses first."
                    )
        for node in doomed:
            self._graph_of(node).remove(node)
            for gone in with_inner_nodes(node):  # bodies hold uses of outer values, too
                for index in range(len(gone.inputs)):
                    gone.replace_input_with(index, None)
                self.program.provenance.pop(gone.name or "", None)
                self._nodes.pop(gone.name or "", None)
            self.counts["nodes_removed"] += 1

    def replace_by_constants(self, node: ir.Node, arrays: Sequence[np.ndarray | None]) -> list[ir.Value]:
        """Replace a node by initializers that keep the names of its outputs.

        Args:
            node: a node none of whose outputs is a graph output.
            arrays: one per output; None for an output that nothing uses.

        Raises:
            InternalError: an output is a graph output, or is used although its array is None.
        """
        graph = self._graph_of(node)
        constants: list[ir.Value] = []
        for output, array in zip(node.outputs, arrays, strict=True):
            if output.is_graph_output():
                raise InternalError(
                    f"Pass '{self.pass_name}' makes graph output '{output.name}' a constant; a graph output "
                    "must be computed by a node."
                )
            if array is None:
                continue
            constant = self._constant(output.name, array)
            for user, index in list(output.uses()):
                user.replace_input_with(index, constant)
            graph.initializers.add(constant)
            self.counts["initializers_added"] += 1
            constants.append(constant)
        self.remove_node(node)
        return constants

    def set_attribute(self, node: ir.Node, name: str, value: Any) -> None:
        """Set one attribute from a Python value; None removes it."""
        current = node.attributes.get(name)
        if value is None:
            if current is not None:
                node.attributes.pop(name)
                self.counts["attributes_changed"] += 1
            return
        attribute = ir.convenience.convert_attribute(name, value)
        if current is None or current != attribute:
            node.attributes[name] = attribute
            self.counts["attributes_changed"] += 1

    def private_initializer(self, node: ir.Node, index: int) -> ir.Value:
        """The initializer at input `index` of `node`, copied first if anything else reads it.

        Raises:
            InternalError: that input is not an initializer.
        """
        value = node.inputs[index]
        if value is None or not value.is_initializer() or value.const_value is None:
            raise InternalError(f"Input {index} of node {self.program.where(node)} is not an initializer.")
        if len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input():
            return value
        copy = ir.Value(name=self.unique_value_name(f"{value.name}_{node.name}"))
        self._store(copy, value.const_value)  # tensors are immutable, so that both can have it
        (value.graph if value.graph is not None else self.program.graph).initializers.add(copy)
        self.counts["initializers_added"] += 1
        self.set_input(node, index, copy)
        return copy

    def remove_function(self, key: tuple[str, str, str]) -> None:
        """Remove the function `(domain, name, overload)`, which nothing calls any more.

        Raises:
            InternalError: there is no such function, or a node still calls it.
        """
        functions = self.program.model.functions
        callers = [n for n in self._nodes.values() if n.op_identifier() == key]
        callers += [n for f in functions.values() for n in f.all_nodes() if n.op_identifier() == key]
        if key not in functions or callers:
            users = ", ".join(sorted(f"'{n.name}'" for n in callers)) or "no function table at all"
            raise InternalError(f"Pass '{self.pass_name}' removes function '{key[1]}' while used by {users}.")
        del functions[key]
        self.counts["functions_removed"] += 1

    # ---- names and counts ------------------------------------------------------------------
    def unique_value_name(self, hint: str) -> str:
        """`hint`, or `hint_1`, `hint_2`…, whichever is free; it is taken from then on."""
        return self._names.value(hint)

    def unique_node_name(self, hint: str) -> str:
        """As `unique_value_name`, for nodes."""
        return self._names.node(hint)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a named count of the pass's result, e.g. `batch_norms_folded`."""
        self.counts[what] += number

    def refuse(self, node: str, reason: str) -> None:
        """Record that `node` is left as it is, for a reason that only trying could tell."""
        self.refusals.append((node, reason))

    # ---- parts -----------------------------------------------------------------------------
    def _make(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: int,
        output_names: Sequence[str] | None,
        name: str,
        domain: str,
        anchor: ir.Node | None,
    ) -> ir.Node:
        node_name = self.unique_node_name(name or f"{self.pass_name}/{op_type}")
        node = ir.node(
            op_type,
            list(inputs),
            attributes=dict(attributes),
            domain=domain,
            num_outputs=len(output_names) if output_names else outputs,
            name=node_name,
        )
        for index, output in enumerate(node.outputs):
            hint = output_names[index] if output_names else node_name + (f"_{index}" if index else "")
            output.name = self.unique_value_name(hint)
        node.meta[META_PASS] = self.pass_name
        self._nodes[node_name] = node
        if anchor is not None and anchor.name in self.program.provenance:
            self.program.provenance[node_name] = self.program.provenance[anchor.name]
        self.counts["nodes_added"] += 1
        return node

    def _graph_of(self, node: ir.Node) -> ir.Graph:
        graph = node.graph
        if graph is None:
            raise InternalError(f"Node '{node.name}' ({node.op_type}) was already removed from its graph.")
        return graph
