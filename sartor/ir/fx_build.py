"""Builds the FX twin: one walk over the main graph, one fx node per operator."""

from __future__ import annotations

import dataclasses
import operator as python_operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from sartor.errors import InternalError, UnsupportedOperatorError, UsageError
from sartor.ir import torch_ops
from sartor.ir.deferred import is_large
from sartor.ir.fx_tensors import TORCH_TYPES, UNSIGNED, constant_array, to_tensor
from sartor.ir.host_values import HostValues
from sartor.ir.program import DIALECT_DOMAIN, Program, infer_shapes
from sartor.ir.twin_names import RESERVED, identifiers, state_keys

_STATISTICS = (3, 4)  # inputs of BatchNormalization that hold running mean and variance
INFO = "sartor"
"""Key of `gm.meta` under which the `TwinInfo` lies."""


@dataclasses.dataclass(frozen=True)
class TwinInfo:
    """What a twin knows about its program; kept in `gm.meta`.

    Attributes:
        inputs: graph input names, in the order of `forward`'s arguments.
        outputs: graph output names followed by tap names, in the order of the returned tuple.
        names: initializer name by state_dict key.
        dtype: element type that replaced every float type, or None when types are as stored.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    names: Mapping[str, str]
    dtype: torch.dtype | None


class Builder:
    """Walks the graph once and emits one fx node per operator."""

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype | None,
        model: ir.Model | None = None,
        *,
        streamed: bool = False,
    ):
        self.program = program
        self.dtype = dtype
        self.streamed = streamed  # large weights are tensors without contents, for `sartor.ir.fx_run`
        self.model = model or program.model
        if self.model.functions:
            self.model = self.model.clone()
            own = torch_ops.dialect.DIALECT_OPERATORS
            ir.passes.common.InlinePass(criteria=lambda function: function.name not in own)(self.model)
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[ir.Value, fx.Node] = {}
        self.constants: dict[ir.Value, np.ndarray | None] = {}
        self.host = HostValues(self.constant, self._dimension, self._rank, self._call_number)
        self.keys: dict[str, str] = {}  # state_dict key by initializer name, of those in use
        self.all_keys: dict[str, str] = {}
        self.inferred: tuple[dict[str, tuple[int, ...]], dict[str, ir.DataType]] | None = None
        self.unsigned = _has_unsigned(self.model)
        self.count = 0

    def build(self, taps: tuple[str, ...]) -> fx.GraphModule:
        """Emit everything and wrap it in a module in eval mode."""
        graph = self.model.graph
        reserved = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | set(nn.Module().__dict__)
        self.all_keys = state_keys(graph.initializers, reserved)
        names = [value.name or "" for value in graph.inputs]
        for value, identifier in zip(graph.inputs, identifiers(names), strict=True):
            self._element_type(value.dtype, f"graph input '{value.name}'")
            self.values[value] = self.graph.placeholder(identifier)
        self.walk(graph)
        results = [self.tensor(value) for value in graph.outputs]
        results += [self.tensor(self._find(name)) for name in taps]
        self.graph.output(tuple(results))
        gm = fx.GraphModule(self.root, self.graph, class_name="Twin")
        gm.graph.eliminate_dead_code()
        gm = fx.GraphModule(gm, gm.graph, class_name="Twin")  # leaves out tensors that nothing reads
        state = gm.state_dict()
        gm.meta[INFO] = TwinInfo(
            inputs=tuple(names),
            outputs=tuple([*(value.name or "" for value in graph.outputs), *taps]),
            names={key: name for name, key in self.keys.items() if key in state},
            dtype=self.dtype,
        )
        return gm.eval()

    def walk(self, graph: ir.Graph) -> None:
        """Emit every node of a graph.

        Raises:
            UnsupportedOperatorError: names the node and its source.
        """
        for node in graph:
            try:
                self._emit(node)
            except UnsupportedOperatorError as error:
                raise UnsupportedOperatorError(f"Node {self.program.where(node)}: {error}") from error

    def _find(self, name: str) -> ir.Value:
        graph = self.model.graph
        computed = [output for node in graph for output in node.outputs]
        for value in [*graph.inputs, *graph.initializers.values(), *computed]:
            if value.name == name and name:
                return value
        raise UsageError(f"No value '{name}' exists in the program; taps name values of its main graph.")

    # ---- operands --------------------------------------------------------------------------
    def constant(self, value: ir.Value) -> np.ndarray | None:
        """The array of an initializer or Constant output; None for everything computed."""
        if value not in self.constants:
            array = None
            node = value.producer()
            if value.is_initializer() and value.const_value is not None and value not in self.values:
                array = value.const_value.numpy()
            elif node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                array = constant_array(node)
            self.constants[value] = array
        return self.constants[value]

    def tensor(self, value: ir.Value) -> fx.Node:
        """The fx node that yields `value`; constants become parameters and buffers on first use."""
        if value not in self.values:
            tensor = self._contents(value)
            key = self.key_of(value)
            if value.is_initializer() and tensor.is_floating_point() and _is_weight(value):
                tensor = nn.Parameter(tensor)
            install(self.root, key, tensor)
            # The prefix keeps generated variables off names such as `torch`, which the code also reads.
            self.values[value] = self.graph.create_node("get_attr", key, name=f"p_{key}")
        return self.values[value]

    def _contents(self, value: ir.Value) -> torch.Tensor:
        stored = value.const_value
        if self.streamed and value.is_initializer() and stored is not None and is_large(stored):
            kind = self._element_type(stored.dtype, f"initializer '{value.name}'")
            return torch.empty([int(d) for d in stored.shape], dtype=kind, device="meta")
        array = self.constant(value)
        if array is None:
            raise InternalError(f"Value '{value.name}' is used before it is computed; report this.")
        return to_tensor(array, self.dtype)

    def key_of(self, value: ir.Value) -> str:
        """Where the tensor of a constant value lives in the module."""
        if value.is_initializer():
            return self.keys.setdefault(value.name or "", self.all_keys[value.name or ""])
        return f"{RESERVED}.constant_{self.next_number()}"

    def _dimension(self, value: ir.Value, axis: int) -> fx.Node:
        return self.graph.call_function(torch_ops.dimension, (self.tensor(value), axis))

    def _rank(self, value: ir.Value) -> int:
        if value.is_initializer() and value.const_value is not None:
            return len(value.const_value.shape)
        array = self.constant(value)
        if array is not None:
            return array.ndim
        return len(self._inferred()[0][value.name or ""])

    def _inferred(self) -> tuple[dict[str, tuple[int, ...]], dict[str, ir.DataType]]:
        """Shapes and types of the inlined model: function bodies have values of their own."""
        if self.inferred is None:
            self.inferred = infer_shapes(self.model, self.program.input_shapes)
        return self.inferred

    def _call_number(self, function: Callable[..., Any], a: Any, b: Any) -> fx.Node:
        return self.graph.call_function(function, (a, b))

    def next_number(self) -> int:
        """A number for a name of the twin's own."""
        self.count += 1
        return self.count - 1

    def _element_type(self, dtype: ir.DataType | None, what: str) -> torch.dtype:
        if dtype is None or dtype not in TORCH_TYPES:
            raise UnsupportedOperatorError(f"{what} has element type '{dtype}', without arithmetic in torch.")
        found = TORCH_TYPES[dtype]
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    # ---- nodes -----------------------------------------------------------------------------
    def _emit(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            return
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            self._branches(node)
            return
        if node.domain == DIALECT_DOMAIN and node.op_type in torch_ops.dialect.DIALECT_OPERATORS:
            function = torch_ops.dialect.DIALECT_OPERATORS[node.op_type]
            operands = tuple(self.tensor(value) for value in node.inputs if value is not None)
            self._set_outputs(node, self.graph.call_function(function, operands), 0)
            return
        spec = torch_ops.OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if spec is None:
            domain = f" of domain '{node.domain}'" if node.domain else ""
            raise UnsupportedOperatorError(
                f"operator '{node.op_type}'{domain} is not in the FX twin's table; replace it, or cut "
                "the model before it."
            )
        used = max((i + 1 for i, output in enumerate(node.outputs) if output.name), default=1)
        if node.op_type == "BatchNormalization" and not node.attributes.get_int("training_mode", 0):
            self.values[node.outputs[0]] = self._batch_norm(node)
            return
        attributes = self._attributes(node, spec)
        if spec.several:
            attributes["outputs"] = used
        operands = tuple(self._operand(node, spec, i, value) for i, value in enumerate(node.inputs))
        if spec.op_type == "Range" and node.inputs[0] is not None:
            start = self.constant(node.inputs[0])
            if start is not None:
                attributes["dtype"] = self._element_type(ir.DataType.from_numpy(start.dtype), "Range")
        if self.unsigned and not spec.unsigned:
            operands = tuple(self._as_signed(node, i, operand) for i, operand in enumerate(operands))
        result = self.graph.call_function(spec.function, operands, attributes)
        result.meta["onnx_node"] = node.name
        self._set_outputs(node, result, used if spec.several else 0)

    def _set_outputs(self, node: ir.Node, result: fx.Node, count: int) -> None:
        """Assign the result to the outputs; it is a tuple of `count` tensors, or one tensor for 0."""
        for i, output in enumerate(node.outputs[: max(count, 1)]):
            if not output.name:
                continue
            value = self.graph.call_function(python_operator.getitem, (result, i)) if count else result
            dtype = self._inferred()[1].get(output.name) if self.unsigned else None
            if dtype in UNSIGNED:
                value = self.graph.call_function(torch_ops.to_unsigned, (value, TORCH_TYPES[dtype]))
            self.values[output] = value

    def _as_signed(self, node: ir.Node, index: int, operand: Any) -> Any:
        """Operands of 16 to 64 unsigned bits as int64, since torch can store but not compute with them."""
        value = node.inputs[index]
        known = self._inferred()[1]
        if not isinstance(operand, fx.Node) or value is None or known.get(value.name or "") not in UNSIGNED:
            return operand
        exact = node.op_type not in torch_ops.MODULAR
        return self.graph.call_function(torch_ops.to_signed, (operand, exact))

    def _branches(self, node: ir.Node) -> None:
        from sartor.ir.fx_bodies import branches

        module, captured = branches(self, node)
        key = f"{RESERVED}.branches_{self.next_number()}"
        install(self.root, key, module)
        condition = node.inputs[0]
        assert condition is not None
        operands = tuple(self.tensor(value) for value in (condition, *captured))
        result = self.graph.create_node("call_module", key, operands)
        result.meta["onnx_node"] = node.name
        self._set_outputs(node, result, len(node.outputs))

    def _operand(self, node: ir.Node, spec: torch_ops.Operator, index: int, value: ir.Value | None) -> Any:
        if value is None or not value.name:
            return None
        if index in spec.static:
            return self.host.resolve(value)
        if index in spec.scalars:
            stored = value.const_value if value.is_initializer() else None
            array = None if stored is not None and stored.size != 1 else self.constant(value)
            if array is not None and array.size == 1:
                return array.reshape(()).item()
        return self.tensor(value)

    def _batch_norm(self, node: ir.Node) -> fx.Node:
        attributes = self._attributes(node, torch_ops.OPERATORS["BatchNormalization"])
        module = torch_ops.BatchNorm(attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9))
        key = f"{RESERVED}.norm_{self.next_number()}"
        install(self.root, key, module)
        operands = tuple(self.tensor(value) for value in node.inputs if value is not None)
        result = self.graph.create_node("call_module", key, operands)
        result.meta["onnx_node"] = node.name
        return result

    def _attributes(self, node: ir.Node, spec: torch_ops.Operator) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            value = attribute.value
            if spec.op_type == "ConstantOfShape" and name == "value":
                tensor = attribute.as_tensor()
                result["value"] = tensor.numpy().reshape(()).item()
                result["dtype"] = self._element_type(tensor.dtype, "attribute 'value'")
                continue
            if name not in spec.attributes:
                raise UnsupportedOperatorError(
                    f"attribute '{name}' is not understood; the FX twin knows {sorted(spec.attributes)}."
                )
            if name in spec.types and attribute.as_int() == 0:
                continue  # "undefined": another operand decides
            if name in spec.types:
                value = self._element_type(ir.DataType(attribute.as_int()), f"attribute '{name}'")
            elif attribute.type == ir.AttributeType.TENSOR:
                raise UnsupportedOperatorError(f"attribute '{name}' is a tensor; expected a number or text.")
            elif isinstance(value, list | tuple):
                value = tuple(value)
            result[name] = value
        if spec.op_type == "ConstantOfShape" and "dtype" not in result:
            result["dtype"] = self._element_type(ir.DataType.FLOAT, "ConstantOfShape")
        return result


def _has_unsigned(model: ir.Model) -> bool:
    """Whether any value may have 16 to 64 unsigned bits."""
    graph = model.graph
    if any(value.dtype in UNSIGNED for value in [*graph.inputs, *graph.initializers.values()]):
        return True
    return any(
        (
            attribute.type == ir.AttributeType.INT
            and name in ("to", "output_dtype")
            and attribute.value in UNSIGNED
        )
        or (attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in UNSIGNED)
        for node in graph.all_nodes()
        for name, attribute in node.attributes.items()
    )


def _is_weight(value: ir.Value) -> bool:
    """False for running statistics, and for single numbers that are part of the author's formula."""
    uses = list(value.uses())
    if any(use.node.op_type == "BatchNormalization" and use.idx in _STATISTICS for use in uses):
        return False
    single = value.const_value is not None and value.const_value.size == 1
    operators = [torch_ops.OPERATORS.get(use.node.op_type) for use in uses]
    return not (single and all(spec is not None and spec.arithmetic for spec in operators))


def install(root: nn.Module, key: str, item: torch.Tensor | nn.Module) -> None:
    """Put a tensor or module at a dotted path, creating the modules on the way."""
    *path, name = key.split(".")
    for segment in path:
        if segment not in root._modules:
            root.add_module(segment, nn.Module())
        child = root._modules[segment]
        assert child is not None
        root = child
    if isinstance(item, nn.Parameter):
        root.register_parameter(name, item)
    elif isinstance(item, nn.Module):
        root.add_module(name, item)
    else:
        root.register_buffer(name, item)
