"""What the conversion needs rewritten: as for `tflite`, and Gelu, for which the portable kernels have nothing.

`Gelu(x) = x/2 · (1 + erf(x/√2))`. With `approximate` = tanh it is `x/2 · (1 + tanh(u)) = x · sigmoid(2u)` where
`u = √(2/π) · (x + 0.044715 x³)`; of the first spelling the converter would make a Gelu again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sartor.backends.tflite import legalize as tflite

if TYPE_CHECKING:
    from sartor.ir.program import Program

_CUBIC = 0.044715


def legalize(program: Program) -> Program:
    """An equal program for the conversion; the program itself where nothing is to be done."""
    program = tflite.legalize(program)
    if not any(_is_gelu(node) for node in program.nodes()):
        return program
    result = program.clone()
    types = program.types()
    for node in [node for node in result.nodes() if _is_gelu(node)]:
        _Spelled(result, node, types[node.outputs[0].name or ""]).write()
    result.invalidate()
    return result


def _is_gelu(node: ir.Node) -> bool:
    return node.op_type == "Gelu" and not node.domain


class _Spelled:
    """The nodes that take the place of one Gelu."""

    def __init__(self, program: Program, gelu: ir.Node, dtype: ir.DataType):
        self._program = program
        self._gelu = gelu
        self._dtype = dtype.numpy()
        self._count = 0

    def write(self) -> None:
        """Write them, and let the last one give the value of the Gelu."""
        x = self._gelu.inputs[0]
        if self._gelu.attributes.get_string("approximate", "none") == "tanh":
            cube = self._node("Mul", self._node("Mul", x, x), x)
            inner = self._node("Add", x, self._node("Mul", cube, self._number(_CUBIC)))
            curve = self._node("Sigmoid", self._node("Mul", inner, self._number(2 * math.sqrt(2 / math.pi))))
            y = self._node("Mul", x, curve)
        else:
            curve = self._node("Erf", self._node("Mul", x, self._number(math.sqrt(0.5))))
            half = self._node("Mul", x, self._number(0.5))
            y = self._node("Mul", half, self._node("Add", curve, self._number(1.0)))
        graph, old = self._program.graph, self._gelu.outputs[0]
        name = old.name
        for user, index in list(old.uses()):
            user.replace_input_with(index, y)
        for index, value in enumerate(graph.outputs):
            if value is old:
                y.shape, y.type = old.shape, old.type
                graph.outputs[index] = y
        graph.remove(self._gelu, safe=True)
        y.name = name

    def _node(self, op_type: str, *inputs: ir.Value | None) -> ir.Value:
        self._count += 1
        name = f"{self._gelu.name}/{self._count}"
        made = ir.node(op_type, list(inputs), num_outputs=1, name=name)
        made.outputs[0].name = name
        self._program.graph.insert_before(self._gelu, made)
        origin = self._program.provenance.get(self._gelu.name or "")
        if origin is not None:
            self._program.provenance[name] = origin
        return made.outputs[0]

    def _number(self, number: float) -> ir.Value:
        self._count += 1
        name = f"{self._gelu.name}/{self._count}"
        array = np.array(number, self._dtype)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(())
        )
        value.const_value = ir.Tensor(array, name=name)
        self._program.graph.initializers.add(value)
        return value
