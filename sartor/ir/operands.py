"""Operands of kernels: tensors whose sizes are functions of a plan, and what contractions do with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sartor.errors import InternalError
from sartor.ir.bodies import body_graphs
from sartor.ir.extents import Extent, quotient
from sartor.ir.fusion import json_attributes
from sartor.ir.fusion_rules import CONTRACTIONS
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity, largest
from sartor.ir.subgraphs import body_shapes

RECURRENT = frozenset({"RNN", "LSTM", "GRU"})
_KEEP_VALUE_ELEMENTS = 64  # constants that decide what a node does (bounds, axes, scales), not weights


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor that a kernel reads or writes.

    Attributes:
        dims: one extent per axis.
        item_bytes: bytes per element (0.5 for 4-bit types).
        dtype: ONNX type name, e.g. `FLOAT`.
        stored: True for an initializer.
        value: contents of a small constant as nested lists, else None.
        turned: what a Transpose makes. Some runtimes leave it in the order that it had, and others pay for that.
    """

    name: str
    dims: tuple[Extent, ...]
    item_bytes: float
    dtype: str
    stored: bool = False
    value: Any = None
    turned: bool = False

    @property
    def bytes(self) -> Quantity:
        """Size in bytes."""
        return Quantity.product(self.item_bytes, self.dims)

    def at(self, size: int, batch: int) -> Operand:
        """The same with the input's size and the batch fixed."""
        return dataclasses.replace(self, dims=tuple(e.at(size, batch) for e in self.dims))


class Tensors:
    """Operands of a program's values, from the reference shapes and the analysed extents."""

    def __init__(
        self,
        program: Program,
        extents: Mapping[str, tuple[Extent, ...]] | None,
        folded: frozenset[str] = frozenset(),
    ):
        """Of one program; `folded` names values that are computed once, when the model is loaded."""
        self._program, self._folded = program, folded
        self._shapes, self._types = program.shapes(), program.types()
        self._extents = extents or {}
        self._cache: dict[str, Operand] = {}
        self._inner: dict[str, tuple[tuple[int, ...], ir.DataType]] | None = None

    def __getitem__(self, value: ir.Value) -> Operand:
        name = value.name or ""
        if name not in self._cache:
            self._cache[name] = self._make(value, name)
        return self._cache[name]

    def _make(self, value: ir.Value, name: str) -> Operand:
        shape = self._shapes.get(name)
        if shape is None:
            raise InternalError(
                f"Value '{name}' has no inferred shape; only main-graph values can be priced."
            )
        dims = self._extents.get(name)
        if dims is None:
            dims = tuple(Extent.constant(d) for d in shape)
        elif len(dims) != len(shape) or any(abs(e.full - d) > 1e-6 for e, d in zip(dims, shape, strict=True)):
            raise InternalError(
                f"Extents of value '{name}' are {[e.full for e in dims]} before pruning, "
                f"but its shape is {list(shape)}; the channel analysis does not belong to this program."
            )
        dtype = self._types.get(name, ir.DataType.FLOAT)
        stored = name in self._program.initializers
        constant = None
        decides = not dtype.is_floating_point() or not shape or (len(shape) == 1 and shape[0] <= 8)
        fixed = math.prod(shape) <= _KEEP_VALUE_ELEMENTS and not any(e.varies for e in dims)
        if stored and decides and fixed:
            constant = self._program.initializer_array(name).tolist()
        producer = value.producer()
        return Operand(
            name,
            tuple(dims),
            dtype.itemsize,
            dtype.name,
            stored or name in self._folded,
            constant,
            producer is not None and producer.op_type == "Transpose",
        )

    def body_macs(self, node: ir.Node) -> Quantity:
        """MACs inside the bodies of a control-flow node: an If's dearest branch, a Loop's body once."""
        return largest([sum(map(self._inner_macs, body), Quantity()) for body in body_graphs(node)])

    def _inner_macs(self, node: ir.Node) -> Quantity:
        if body_graphs(node):
            return self.body_macs(node)
        if node.op_type not in CONTRACTIONS | RECURRENT:
            return Quantity()
        inputs = [None if v is None else self.inner(v) for v in node.inputs]
        return macs(node.op_type, json_attributes(node), inputs, self.inner(node.outputs[0]))

    def inner(self, value: ir.Value) -> Operand:
        """A value that may belong to a body."""
        name = value.name or ""
        if name in self._shapes:
            return self[value]
        if self._inner is None:
            self._inner = body_shapes(self._program)
        shape, dtype = self._inner[name]
        dims = self._extents.get(name) or tuple(Extent.constant(d) for d in shape)
        return Operand(name, dims, dtype.itemsize, dtype.name)


def channels_per_group(op_type: str, inputs: Sequence[Operand | None], output: Operand) -> dict[str, Extent]:
    """`groups`, `in_per_group` and `out_per_group` of a convolution as functions of a plan.

    The weight says how many channels one group has; how many groups there are follows from the channels: a plan may
    narrow every group or remove whole ones.
    """
    x, w = dims_of(inputs[0]), dims_of(inputs[1])
    if op_type == "Conv":
        groups = quotient(x[1], w[1])
        return {"groups": groups, "in_per_group": w[1], "out_per_group": quotient(output.dims[1], groups)}
    groups = quotient(output.dims[1], w[1])
    return {"groups": groups, "in_per_group": quotient(x[1], groups), "out_per_group": w[1]}


def macs(
    op_type: str, attributes: Mapping[str, Any], inputs: Sequence[Operand | None], output: Operand
) -> Quantity:
    """Multiply-accumulates of one node; zero for everything that is not a contraction.

    Biases, activations and poolings are not counted. ConvTranspose counts every product, also those
    that its pads crop away.
    """
    if op_type == "Conv":
        return Quantity.product(1, (*output.dims, *dims_of(inputs[1])[1:]))
    if op_type == "ConvTranspose":
        return Quantity.product(1, (*dims_of(inputs[0]), *dims_of(inputs[1])[1:]))
    if op_type == "Gemm":
        return Quantity.product(1, (*output.dims, dims_of(inputs[0])[0 if attributes.get("transA") else 1]))
    if op_type == "MatMul":
        return Quantity.product(1, (*output.dims, dims_of(inputs[0])[-1]))
    if op_type in RECURRENT:
        sequence = dims_of(inputs[0])  # [T, N, I], or [N, T, I] with layout 1: the product is the same
        steps = (sequence[0], sequence[1])
        return Quantity.product(1, steps + dims_of(inputs[1])) + Quantity.product(
            1, steps + dims_of(inputs[2])
        )
    return Quantity()


def dims_of(operand: Operand | None) -> tuple[Extent, ...]:
    """Lengths of an operand that has to be there.

    Raises:
        InternalError: it is not.
    """
    if operand is None:
        raise InternalError("A contraction lacks a required input; verify the program first.")
    return operand.dims


def convolution_attributes(
    attributes: Mapping[str, Any], inputs: Sequence[Operand | None], output: Operand
) -> dict[str, Any]:
    """All defaults of a convolution filled in and `auto_pad` resolved, so that equal ones compare equal."""
    kernel = [round(e.full) for e in dims_of(inputs[1])[2:]]
    rank = len(kernel)
    filled: dict[str, Any] = {
        "strides": [1] * rank,
        "dilations": [1] * rank,
        "pads": [0] * (2 * rank),
        "group": 1,
        **attributes,
        "kernel_shape": kernel,
    }
    mode = filled.pop("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") and "output_padding" not in filled:
        source, target = dims_of(inputs[0])[2:], output.dims[2:]
        strides, dilations = filled["strides"], filled["dilations"]
        totals = [
            max(0, (round(t.full) - 1) * s + d * (k - 1) + 1 - round(i.full))
            for t, s, d, k, i in zip(target, strides, dilations, kernel, source, strict=True)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        filled["pads"] = small + large if mode == "SAME_UPPER" else large + small
    return filled
