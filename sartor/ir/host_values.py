"""Shape arithmetic of the FX twin as plain numbers, so that the traced module stays free of data dependence.

A shape operand is a tuple whose entries are Python numbers, or fx nodes that yield one (the length of an
axis). With it the batch idiom `Expand(v, Concat(Shape(x, start=0, end=1), c))` runs at any batch size.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.errors import UnsupportedOperatorError

Entry = Any
"""A Python number or a `torch.fx.Node` that yields one."""

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": python_operator.add,
    "Sub": python_operator.sub,
    "Mul": python_operator.mul,
    "Div": python_operator.floordiv,  # lengths are never negative, so this truncates as ONNX does
}


class HostValues:
    """Resolves values of the graph to tuples of numbers.

    Args:
        constant: the array of a constant value, or None.
        dimension: makes an fx node for the length of an axis of a value.
        rank: number of axes of a value.
        call: makes an fx node that applies a Python operator to two entries.
    """

    def __init__(
        self,
        constant: Callable[[ir.Value], np.ndarray | None],
        dimension: Callable[[ir.Value, int], Entry],
        rank: Callable[[ir.Value], int],
        call: Callable[[Callable[..., Any], Entry, Entry], Entry],
    ):
        self._constant = constant
        self._dimension = dimension
        self._rank = rank
        self._call = call

    def resolve(self, value: ir.Value) -> tuple[Entry, ...]:
        """The entries of a one-dimensional (or scalar) value.

        Raises:
            UnsupportedOperatorError: the value depends on data.
        """
        array = self._constant(value)
        if array is not None:
            return tuple(np.asarray(array).reshape(-1).tolist())
        node = value.producer()
        if node is None:
            raise _data_dependent(value)
        inputs = [i for i in node.inputs if i is not None]
        attributes = node.attributes
        if node.op_type == "Shape":
            return self._shape(node, inputs[0])
        if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"):
            return self.resolve(inputs[0])
        if node.op_type == "ConstantOfShape":
            count = int(self._numbers(inputs[0])[0])
            fill = attributes["value"].as_tensor().numpy() if "value" in attributes else np.zeros(1)
            return (fill.reshape(()).item(),) * count
        if node.op_type == "Concat":
            return tuple(entry for part in inputs for entry in self.resolve(part))
        if node.op_type == "Gather" and attributes.get_int("axis", 0) in (0, -1):
            entries = self.resolve(inputs[0])
            return tuple(entries[int(i)] for i in self._numbers(inputs[1]))
        if node.op_type == "Slice":
            bounds = [self._numbers(i) for i in inputs[1:]]
            step = int(bounds[3][0]) if len(bounds) > 3 else 1
            return self.resolve(inputs[0])[int(bounds[0][0]) : int(bounds[1][0]) : step]
        if node.op_type in _ARITHMETIC:
            return self._binary(_ARITHMETIC[node.op_type], self.resolve(inputs[0]), self.resolve(inputs[1]))
        raise _data_dependent(value)

    def _numbers(self, value: ir.Value) -> tuple[float, ...]:
        entries = self.resolve(value)
        if not all(_is_number(entry) for entry in entries):
            raise _data_dependent(value)
        return entries

    def _shape(self, node: ir.Node, value: ir.Value) -> tuple[Entry, ...]:
        producer = value.producer()
        if producer is not None and producer.op_type == "Shape":
            return (len(self.resolve(value)),)
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", None)
        if start < 0 or end is None or end < 0:
            axes = range(self._rank(value))[start:end]
        else:
            axes = range(start, end)
        return tuple(self._dimension(value, axis) for axis in axes)

    def _binary(
        self, function: Callable[[Any, Any], Any], a: tuple[Entry, ...], b: tuple[Entry, ...]
    ) -> tuple[Entry, ...]:
        length = max(len(a), len(b))
        pairs = zip(a * length if len(a) == 1 else a, b * length if len(b) == 1 else b, strict=True)
        return tuple(
            function(p, q) if _is_number(p) and _is_number(q) else self._call(function, p, q)
            for p, q in pairs
        )


def _is_number(entry: Entry) -> bool:
    return isinstance(entry, int | float)


def _data_dependent(value: ir.Value) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"value '{value.name}' is used as a shape, axis or count, and depends on data; expected a constant "
        "or the length of an axis. Fix the shapes of the model before export"
    )
