"""Structure of models: comparison (what a pass changed is observed here), bodies and names."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.program import Program

Structure = tuple[Any, ...]
Signature = tuple[tuple[str, str, str], ...]


class _Contents:
    """A tensor compared by identity first and by type, shape and bytes otherwise."""

    __slots__ = ("tensor",)
    __hash__ = None  # type: ignore[assignment]  # contents are compared, never looked up

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Contents):
            return NotImplemented
        mine, theirs = self.tensor, other.tensor
        if mine is theirs:  # clones share tensors, so an untouched weight costs nothing
            return True
        if mine is None or theirs is None:
            return False
        if mine.dtype != theirs.dtype or tuple(mine.shape) != tuple(theirs.shape):
            return False
        return same_bits(mine.numpy(), theirs.numpy())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal shape, element type and bits: unlike `==`, this tells 0 from -0 and finds NaN equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.hasobject:  # strings: the bytes would be those of pointers
        return bool(a.tolist() == b.tolist())
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    # What differs mostly does so at once; only equal arrays are read to their end.
    return np.array_equal(left[:4096], right[:4096]) and np.array_equal(left[4096:], right[4096:])


def structure_of(program: Program) -> Structure:
    """Everything of a program that reaches its file, in a form that compares with `==`.

    Tensors are referenced, not copied or hashed. Names of nodes and values count; metadata does not.
    """
    model = program.model
    functions = tuple(
        (key, tuple(v.name for v in f.inputs), tuple(v.name for v in f.outputs), tuple(map(_node, f)))
        for key, f in sorted(model.functions.items())
    )
    opsets = tuple(sorted(model.opset_imports.items()))
    return (model.ir_version, opsets, _graph(model.graph), functions)


def _graph(graph: ir.Graph) -> Structure:
    return (
        _typed(graph.inputs),
        _typed(graph.outputs),
        [(name, _Contents(value.const_value)) for name, value in sorted(graph.initializers.items())],
        [_node(node) for node in graph],
    )


def _node(node: ir.Node) -> Structure:
    return (
        node.name,
        node.domain,
        node.op_type,
        node.overload,
        tuple(value.name if value is not None else None for value in node.inputs),
        tuple(value.name for value in node.outputs),
        [(name, _attribute(attribute)) for name, attribute in sorted(node.attributes.items())],
    )


def _attribute(attribute: ir.Attr) -> Structure:
    value = attribute.value
    if attribute.is_ref():
        return ("ref", attribute.ref_attr_name)
    if attribute.type == ir.AttributeType.GRAPH:
        return ("graph", _graph(value))
    if attribute.type == ir.AttributeType.GRAPHS:
        return ("graphs", [_graph(graph) for graph in value])
    if attribute.type == ir.AttributeType.TENSOR:
        return ("tensor", _Contents(value))
    if attribute.type == ir.AttributeType.TENSORS:
        return ("tensors", [_Contents(tensor) for tensor in value])
    return (attribute.type.name, value if isinstance(value, Hashable) else tuple(value))


def _typed(values: Any) -> Signature:
    return tuple((value.name or "", str(value.type), str(value.shape)) for value in values)


def signature_of(program: Program) -> tuple[Signature, Signature]:
    """Names, types and declared shapes of graph inputs and outputs; no pass may change them."""
    return _typed(program.graph.inputs), _typed(program.graph.outputs)


class UniqueNames:
    """Gives out names that no value or node of a program has, in the main graph and in all bodies."""

    def __init__(self, program: Program):
        self._values: set[str] = set()
        self._nodes: set[str] = set()
        if program.tail is not None:
            self._values.update(program.tail.names())
            self._nodes.update(node.name for node in program.tail.nodes)
        for graph in (program.graph, *program.graph.subgraphs()):
            self._values.update(value.name for value in graph.inputs if value.name)
            self._values.update(graph.initializers)
            for node in graph:
                self._nodes.add(node.name or "")
                self._values.update(value.name for value in node.outputs if value.name)

    def value(self, hint: str) -> str:
        """`hint`, or `hint_1`, `hint_2`…, whichever is free; it is taken from then on."""
        return self._free(hint, self._values)

    def node(self, hint: str) -> str:
        """As `value`, for nodes."""
        return self._free(hint, self._nodes)

    @staticmethod
    def _free(hint: str, taken: set[str]) -> str:
        name, number = hint, 0
        while name in taken or not name:
            number += 1
            name = f"{hint}_{number}"
        taken.add(name)
        return name
