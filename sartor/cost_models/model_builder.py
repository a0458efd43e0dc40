"""Small ONNX models under construction: those that kernels are timed with."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

OPSET, IR_VERSION = 21, 10
TWO_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu"})
_PATTERN = 1 << 16  # random numbers that weights repeat: drawing millions would take longer than timing them


@functools.cache
def _pattern() -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal(_PATTERN - 3).astype(np.float32)


class ModelBuilder:
    """A small ONNX model under construction; `value` is the output of the last node.

    Args:
        dtype: ONNX type name of inputs and weights that are given none.
    """

    def __init__(self, dtype: str = "FLOAT"):
        self._dtype = dtype
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._weights: list[Any] = []
        self._last: list[str] = []
        self._also: list[str] = []
        self.value = ""

    def input(self, name: str, dims: Sequence[int], dtype: str | None = None) -> str:
        """Declare a graph input."""
        from onnx import TensorProto, helper

        code = TensorProto.DataType.Value(dtype or self._dtype)
        self._inputs.append(helper.make_tensor_value_info(name, code, list(dims)))
        return name

    def weight(self, name: str, dims: Sequence[int], fan_in: int, dtype: str | None = None) -> str:
        """Random numbers that keep the variance; subnormal values would be slow, zeros could be skipped.

        No two weights of a model are equal: of equal operators on one value, compilers make one.
        """
        import numpy as np

        values = np.resize(_pattern(), tuple(dims)) * np.float32(math.sqrt(2.0 / max(fan_in, 1)))
        values.flat[0] *= 1.0 + len(self._weights) / 64
        return self._store(name, np.abs(values) if fan_in == 1 else values, dtype or self._dtype)

    def constant(self, name: str, value: Any, dtype: str, dims: Sequence[int] | None = None) -> str:
        """Store given numbers."""
        import numpy as np

        array = np.asarray(value)
        return self._store(name, array if dims is None else array.reshape(tuple(dims)), dtype)

    def _store(self, name: str, array: Any, dtype: str) -> str:
        from onnx import TensorProto, helper, numpy_helper

        kind = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype))
        self._weights.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def node(
        self, op_type: str, inputs: Sequence[str], attributes: Mapping[str, Any], outputs: int = 1
    ) -> str:
        """Append a node; returns its first output."""
        from onnx import helper

        names = [f"v{len(self._nodes)}_{i}" for i in range(outputs)]
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        self.value = names[0]
        self._last = names
        return self.value

    @property
    def outputs(self) -> tuple[str, ...]:
        """All outputs of the last node."""
        return tuple(self._last)

    def scale(self, value: str) -> str:
        """Multiply by one number."""
        return self.node("Mul", [value, self.constant(f"scale{len(self._nodes)}", 0.5, self._dtype)], {})

    def also(self, value: str) -> None:
        """Make a value an output beside those of the last node."""
        self._also.append(value)

    def fuse(self, op_type: str, attributes: Mapping[str, Any], shape: Sequence[int]) -> None:
        """Append one epilogue operation on `shape`; a second operand is an input of that shape."""
        source = self.value
        if op_type in TWO_OPERANDS:
            self.node(op_type, [source, self.input(f"other{len(self._nodes)}", shape)], attributes)
        elif op_type == "Clip":
            bounds = [
                self.constant(f"clip_{key}", attributes[key], self._dtype) if key in attributes else ""
                for key in ("min", "max")
            ]
            self.node("Clip", [source, *bounds], {})
        elif op_type == "Scale":
            self.scale(source)
        elif op_type in ("Silu", "HardSwish") and (op_type == "Silu" or attributes):
            self.node("Sigmoid" if op_type == "Silu" else "HardSigmoid", [source], attributes)
            self.node("Mul", [source, self.value], {})
        else:
            self.node(op_type, [source], attributes)

    def finish(self) -> bytes:
        """The serialized model, its shapes inferred."""
        from onnx import TensorProto, helper
        from onnx.shape_inference import infer_shapes

        names = [*self._last, *self._also]
        outputs = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in names]
        graph = helper.make_graph(self._nodes, "sample", self._inputs, outputs, self._weights)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        return infer_shapes(model, data_prop=True).SerializeToString(deterministic=True)
