"""Which nodes of the program a vendor's kernel computes, from the names that the vendor kept.

A fused kernel is named after one of its nodes, or after the value it writes; nodes that were folded
into weights (BatchNormalization into a convolution) lose their names. The operator type that the
vendor reports then says how far the kernel reaches back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_LONGEST_CHAIN = 8


class Origin:
    """Names, types and first-input edges of a program's main graph."""

    def __init__(self, graph: onnx.GraphProto):
        self._values = {output: node.name for node in graph.node for output in node.output if output}
        self._types = {node.name: node.op_type for node in graph.node}
        self._before = {
            node.name: self._values[node.input[0]]
            for node in graph.node
            if node.input and node.input[0] in self._values
        }

        # A proto without its weights has no initializers, so they are what no node makes and no input gives.
        given = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
        self._inputs = {
            node.name: [self._values.get(v, "") for v in node.input if v in given or v in self._values]
            for node in graph.node
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, for an artifact's metadata."""
        return {
            "values": self._values,
            "types": self._types,
            "before": self._before,
            "inputs": self._inputs,
        }

    @property
    def types(self) -> Mapping[str, str]:
        """Operator type per node, in execution order."""
        return self._types

    @property
    def inputs(self) -> Mapping[str, list[str]]:
        """Nodes that make a node's inputs, `""` for an input of the graph; initializers are left out."""
        return self._inputs

    def named(self, name: str) -> str | None:
        """The node that is called so, or that makes the value that is called so."""
        return name if name in self._types else self._values.get(name)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Origin:
        """Inverse of `to_dict`."""
        made = Origin.__new__(Origin)
        made._values, made._types, made._before = data["values"], data["types"], data["before"]
        made._inputs = data.get("inputs", {name: [before] for name, before in data["before"].items()})
        return made

    def nodes(self, names: Iterable[str], op_types: Iterable[str]) -> tuple[str, ...]:
        """Nodes behind a kernel, in execution order.

        Args:
            names: node or value names that the vendor gives for the kernel; unknown ones are skipped.
            op_types: ONNX types that the kernel's own type stands for.
        """
        known = [name if name in self._types else self._values.get(name) for name in names]
        found = list(dict.fromkeys(name for name in known if name))
        wanted = set(op_types)
        if not found or not wanted or any(self._types[name] in wanted for name in found):
            return tuple(found)
        chain: list[str] = []
        name = self._before.get(found[0])
        while name is not None and len(chain) < _LONGEST_CHAIN:
            chain.append(name)
            if self._types[name] in wanted:
                return (*reversed(chain), *found)
            name = self._before.get(name)
        return tuple(found)
