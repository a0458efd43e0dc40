"""Which parameters make a branch exactly 0: the last affine parameters before its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Set

import numpy as np
import onnx_ir as ir

from sartor.ir.program import Program

# f(0) = 0, elementwise or by moving, pooling, averaging elements; the first input carries the activation.
_KEEPS_ZERO = frozenset(
    {"Identity", "Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Softsign", "Tanh", "Erf", "Gelu"}
    | {"HardSwish", "Mish", "Neg", "Abs", "Sign", "Sin", "Tan", "Atan", "Asinh", "Sinh", "Floor", "Ceil"}
    | {"Round", "Sqrt", "ThresholdedRelu", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast"}
    | {"Slice", "Split", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "DepthToSpace"}
    | {"SpaceToDepth", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"}
    | {"ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "Trilu"}
)
# Normalisations: finite · scale + bias.
_NORMS = frozenset(
    {"BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"}
)
_PASSES_PARAMETER = frozenset(
    {"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Neg", "Expand"}
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter to zero.

    Attributes:
        initializer: its name.
        node: the node that reads it on the way to the branch.
        index: the input of that node.
    """

    initializer: str
    node: str
    index: int


_Found = tuple[Site, ...] | str  # sites, or why there are none


class ZeroSearch:
    """Walks back from the end of a branch to parameters that make it 0."""

    def __init__(self, program: Program, region: Set[ir.Node], free: Set[ir.Value]):
        self.program = program
        self.region = region
        self.free = free
        self._memory: dict[ir.Value, _Found] = {}

    def reason(self, branch: ir.Value) -> str:
        """Why no parameters make `branch` 0; empty if some do."""
        found = self._zero(branch)
        return found if isinstance(found, str) else ""

    def sites(self, branch: ir.Value) -> tuple[Site, ...]:
        """The parameters to zero, weight before bias; empty if there are none."""
        found = self._zero(branch)
        return () if isinstance(found, str) else tuple(dict.fromkeys(found))

    def _zero(self, value: ir.Value | None) -> _Found:
        """Sites that make an activation 0. Chains are followed in a loop; only products recurse."""
        biases: tuple[Site, ...] = ()
        while True:
            node = value.producer() if value is not None else None
            if value is None or node is None or node not in self.region:
                return "the branch has no affine layer that could make it 0"
            op, inputs = node.op_type, node.inputs
            if node.domain not in ("", "ai.onnx"):
                return self._blocked(node)
            if op in _KEEPS_ZERO or (op in ("Clip", "Pad", "Resize") and self._keeps_zero(node)):
                value = inputs[0]
            elif op in ("Add", "Sub"):
                constant = next((i for i in (1, 0) if inputs[i] in self.free), None)
                if constant is None:
                    return f"the branch ends with '{node.name}' ({op}) of two activations"
                bias = self._parameter(node, constant)
                if isinstance(bias, str):
                    return bias
                biases, value = (*bias, *biases), inputs[1 - constant]
            elif op in ("Conv", "ConvTranspose", "Gemm", *_NORMS):
                found = self._affine(node)
                return found if isinstance(found, str) else (*found, *biases)
            elif op == "Div" and inputs[0] not in self.free:
                value = inputs[0]
            elif op in ("Mul", "MatMul"):
                found = self._product(node, value)
                return found if isinstance(found, str) else (*found, *biases)
            else:
                return self._blocked(node)

    def _product(self, node: ir.Node, value: ir.Value) -> _Found:
        """One factor of a product must be 0: a parameter if there is one, else the first that can be."""
        known = self._memory.get(value)
        if known is not None:
            return known
        found: _Found = self._blocked(node)
        for index in (1, 0):
            factor = node.inputs[index]
            if factor not in self.free or (node.op_type == "Mul" and self._size(factor) == 1):
                continue  # the constant of an activation function is no parameter of the branch
            found = self._parameter(node, index)
            if not isinstance(found, str):
                break
        else:
            for index in (0, 1):
                factor = node.inputs[index]
                if factor in self.free:
                    continue
                attempt = self._zero(factor)
                found = attempt
                if not isinstance(attempt, str):
                    break
        self._memory[value] = found
        return found

    def _affine(self, node: ir.Node) -> _Found:
        """Weight (scale) and bias of a Conv, ConvTranspose, Gemm or normalisation."""
        training = node.attributes.get("training_mode")
        if training is not None and training.as_int():
            return f"'{node.name}' ({node.op_type}) is in training mode"
        weight = 1
        if node.op_type == "Gemm" and node.inputs[1] not in self.free:
            weight = 0
        found: tuple[Site, ...] = ()
        for index in (weight, 2):
            if index < len(node.inputs) and node.inputs[index] is not None:
                parameter = self._parameter(node, index)
                if isinstance(parameter, str):
                    return parameter
                found = (*found, *parameter)
        return found

    def _parameter(self, node: ir.Node, index: int) -> _Found:
        """The one float initializer behind an input, through operators that keep zeros."""
        while True:
            value = node.inputs[index]
            if value is None or value not in self.free:
                return f"input {index} of '{node.name}' ({node.op_type}) is computed from data"
            producer = value.producer()
            if producer is None:
                break
            if producer.op_type not in _PASSES_PARAMETER:
                return f"the weight of '{node.name}' ({node.op_type}) is computed by '{producer.name}'"
            others = sorted(str(user.name) for user, _ in value.uses() if user not in self.region)
            others = [name for name in others if name != node.name]
            if others or value.is_graph_output():
                reader = f"'{others[0]}'" if others else "the graph's outputs"
                return f"'{value.name}', the weight of '{node.name}', is also read by {reader}"
            node, index = producer, 0
        if value.const_value is None or value.const_value.dtype not in _FLOATS:
            return f"'{value.name}' of '{node.name}' ({node.op_type}) is no float parameter"
        return (Site(value.name or "", node.name or "", index),)

    def _keeps_zero(self, node: ir.Node) -> bool:
        """Whether these settings of Clip, Pad or Resize map 0 to 0."""
        inputs = list(node.inputs) + [None] * 3
        if node.op_type == "Clip":
            low, high = self._scalar(inputs[1], -np.inf), self._scalar(inputs[2], np.inf)
            return low is not None and high is not None and low <= 0 <= high
        mode = node.attributes.get("mode")
        if node.op_type == "Pad":
            constant = mode is None or mode.as_string() == "constant"
            return not constant or self._scalar(inputs[2], 0.0) == 0.0
        extrapolation = node.attributes.get("extrapolation_value")
        return extrapolation is None or extrapolation.as_float() == 0.0

    def _scalar(self, value: ir.Value | None, default: float) -> float | None:
        if value is None:
            return default
        if value not in self.free or value.const_value is None or value.const_value.size != 1:
            return None
        return float(value.const_value.numpy().reshape(-1)[0])

    def _size(self, value: ir.Value | None) -> int:
        shape = self.program.shapes().get(value.name or "") if value is not None else None
        return int(np.prod(shape)) if shape is not None else 0

    def _blocked(self, node: ir.Node) -> str:
        return f"the branch ends with '{node.name}' ({node.op_type}), which no parameters make 0"
