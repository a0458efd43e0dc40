"""Building the kit's models: ONNX graphs with random weights, in the precision that is asked for.

A model is written once, as a function of a `Draft`; the draft makes of it

* `f32` and `bf16`: float32 (in bfloat16 the runtime computes, not the model);
* `f16`: weights and activations float16, inputs and outputs float32;
* `int8`: QuantizeLinear/DequantizeLinear around every value that a quantized layer reads and around the
  outputs. Scales are not calibrated but chosen, each tensor's differently and so narrow that some values
  saturate: a runtime that drops or swaps them is far off, one that rounds differently is not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.errors import InternalError

if TYPE_CHECKING:
    import onnx

    from sartor.ir.program import Program

_OPSET = 21
_IR_VERSION = 10
_LOW, _HIGH = -1.9, 2.3  # of a quantized activation of variance 1: about 4 % of its values saturate


class Draft:
    """An ONNX graph under construction. Methods add a node and return the name of what it computes.

    Args:
        precision: one of `sartor.backends.protocol.PRECISIONS`.
        seed: of the weights.
    """

    def __init__(self, precision: str, seed: int):
        self.precision = precision
        self.dtype = np.dtype(np.float16 if precision == "f16" else np.float32)
        self._generator = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}
        self._inputs: list[tuple[str, str, tuple[int | str, ...]]] = []
        self._outputs: list[str] = []
        self._scales: dict[str, np.float32] = {}
        self._quantized: dict[str, str] = {}
        self._count = 0

    # ---- what a model consists of ----------------------------------------------------------
    def input(self, name: str, *shape: int | str, dtype: str = "float32") -> str:
        """A graph input; its first axis is the batch when it is the symbol `N`."""
        self._inputs.append((name, dtype, shape))
        if dtype == "float32" and self.precision == "f16":
            return self.node("Cast", name, to=_element_type(np.float16))
        return name

    def output(self, value: str, name: str) -> None:
        """Make `value` a graph output called `name`."""
        if self.precision == "int8":
            value = self.quantized(value)
        if self.precision == "f16":
            self.node("Cast", value, to=_element_type(np.float32), result=name)
        else:
            self.node("Identity", value, result=name)
        self._outputs.append(name)

    def weight(self, *shape: int, fan_in: int | None = None, at: float = 0.0) -> str:
        """Normal weights around `at`; their variance is 1 / fan-in, or 0.09 where there is no fan-in."""
        spread = 0.3 if fan_in is None else math.sqrt(1.0 / fan_in)
        return self.constant(self._generator.standard_normal(shape) * spread + at, "weight")

    def positive(self, *shape: int) -> str:
        """Uniform in [0.5, 1.5]: scales of norms and variances."""
        return self.constant(self._generator.uniform(0.5, 1.5, shape), "scale")

    def constant(self, values: Any, kind: str = "constant") -> str:
        """An initializer; floats get the element type of the model."""
        array = np.asarray(values)
        return self._store(array.astype(self.dtype) if array.dtype.kind == "f" else array, kind)

    def weight_free(self, array: np.ndarray) -> str:
        """An initializer with the element type that it has, whatever the precision of the model."""
        return self._store(array, "constant")

    def ints(self, *values: int) -> str:
        """A vector of int64: shapes, axes, bounds."""
        return self._store(np.array(values, np.int64), "ints")

    def node(self, op_type: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """A node with one result."""
        return self.nodes(op_type, *inputs, results=1, names=(result,) if result else (), **attributes)[0]

    def nodes(
        self, op_type: str, *inputs: str, results: int, names: Sequence[str] = (), **attributes: Any
    ) -> tuple[str, ...]:
        """A node with several results."""
        from onnx import helper

        self._count += 1
        name = f"{op_type.lower()}_{self._count}"
        made = tuple(names) or tuple(f"{name}_{i}" if results > 1 else f"{name}_out" for i in range(results))
        self._nodes.append(helper.make_node(op_type, list(inputs), list(made), name=name, **attributes))
        return made

    # ---- layers that int8 quantizes --------------------------------------------------------
    def conv(self, x: str, c_in: int, c_out: int, kernel: Sequence[int] = (3, 3), **attributes: Any) -> str:
        """Convolution with bias; `group` and padding as ONNX names them."""
        group = attributes.get("group", 1)
        fan_in = c_in // group * math.prod(kernel)
        return self._layer("Conv", x, (c_out, c_in // group, *kernel), fan_in, 0, True, attributes)

    def gemm(self, x: str, c_in: int, c_out: int) -> str:
        """Linear layer on `[N, C_in]` with bias; the weight is `[C_out, C_in]`."""
        return self._layer("Gemm", x, (c_out, c_in), c_in, 0, True, {"transB": 1})

    def linear(self, x: str, c_in: int, c_out: int, bias: bool = True) -> str:
        """Linear layer on `[..., C_in]`: MatMul with a weight `[C_in, C_out]`, and Add."""
        y = self._layer("MatMul", x, (c_in, c_out), c_in, 1, False, {})
        return self.node("Add", y, self.weight(c_out)) if bias else y

    def add(self, a: str, b: str) -> str:
        """Sum of two activations."""
        if self.precision == "int8":
            a, b = self.quantized(a), self.quantized(b)
        return self.node("Add", a, b)

    def same(self, op_type: str, x: str, **attributes: Any) -> str:
        """A pooling or movement node, which int8 runtimes run on integers."""
        return self.node(op_type, self.quantized(x) if self.precision == "int8" else x, **attributes)

    def quantized(self, value: str) -> str:
        """`value` through QuantizeLinear and DequantizeLinear, once however often it is read."""
        if value not in self._quantized:
            wider = 1.0 + 0.07 * (len(self._quantized) % 5)
            scale = np.float32((_HIGH - _LOW) * wider / 255)
            zero = np.int8(np.clip(round(-128 - _LOW * wider / float(scale)), -128, 127))
            parameters = self._store(scale, "scale"), self._store(zero, "zero")
            integers = self.node("QuantizeLinear", value, *parameters)
            self._quantized[value] = self.node("DequantizeLinear", integers, *parameters)
            self._scales[self._quantized[value]] = scale
        return self._quantized[value]

    def _layer(
        self,
        op_type: str,
        x: str,
        shape: tuple[int, ...],
        fan_in: int,
        axis: int,
        bias: bool,
        attributes: dict[str, Any],
    ) -> str:
        c_out = shape[axis]
        weights = (self._generator.standard_normal(shape) * math.sqrt(1.0 / fan_in)).astype(np.float32)
        biases = (self._generator.standard_normal(c_out) * 0.3).astype(np.float32)
        if self.precision != "int8":
            operands = [x, self.constant(weights, "weight")]
            operands += [self.constant(biases, "bias")] if bias else []
            return self.node(op_type, *operands, **attributes)
        x = self.quantized(x)
        # Channels of unequal size, or a runtime that mixes up their scales would hardly be off.
        sizes = np.exp(self._generator.uniform(np.log(0.4), np.log(2.0), c_out)).astype(np.float32)
        weights = weights * sizes.reshape([-1 if a == axis else 1 for a in range(weights.ndim)])
        biases = biases * sizes
        others = tuple(a for a in range(weights.ndim) if a != axis)
        scales = (np.abs(weights).max(axis=others) / 127).astype(np.float32)
        along = scales.reshape([-1 if a == axis else 1 for a in range(weights.ndim)])
        operands = [x, self._dequantized(np.round(weights / along).astype(np.int8), scales, axis, "weight")]
        if bias:
            of_bias = (scales * self._scales[x]).astype(np.float32)
            integers = np.round(biases / of_bias).astype(np.int32)
            operands.append(self._dequantized(integers, of_bias, 0, "bias"))
        return self.node(op_type, *operands, **attributes)

    def _dequantized(self, integers: np.ndarray, scales: np.ndarray, axis: int, kind: str) -> str:
        zeros = np.zeros(scales.shape, integers.dtype)
        stored = (
            self._store(integers, kind),
            self._store(scales, f"{kind}_scale"),
            self._store(zeros, f"{kind}_zero"),
        )
        return self.node("DequantizeLinear", *stored, axis=axis)

    def _store(self, array: Any, kind: str) -> str:
        name = f"{kind}_{len(self._weights)}"
        self._weights[name] = np.ascontiguousarray(array).reshape(np.shape(array))
        return name

    # ---- the result ------------------------------------------------------------------------
    def program(self) -> Program:
        """The canonical program, through the same loader as a user's file."""
        from sartor.ir.load import load

        with tempfile.TemporaryDirectory(prefix="sartor-kit-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(self.model().SerializeToString())
            return load(path)

    def model(self) -> onnx.ModelProto:
        """The model as it would come from a user's file."""
        import onnx
        from onnx import helper

        if not self._outputs:
            raise InternalError("A model of the conformance kit has no output.")
        infos = [helper.make_tensor_value_info(n, _element_type(t), list(s)) for n, t, s in self._inputs]
        results = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in self._outputs]
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in self._weights.items()]
        graph = helper.make_graph(self._nodes, "conformance", infos, results, tensors)
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def _element_type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


Build = Callable[[Draft], None]
