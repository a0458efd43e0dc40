"""Quantization with a zero point, rewritten into one without: TensorRT takes symmetric quantization only.

With scale s, zero point z and the constant m = s·z, for signed 8-bit integers q:

    q = clamp(round(x / s) + z) = clamp(round((x + m) / s))        x ≈ s·(q − z) = s·q − m

so that the integers stay the ones that were calibrated, and m is added before QuantizeLinear and subtracted after
DequantizeLinear. Behind the subtraction a layer would no longer be computed in integers; where its weights are
constants W, m moves into the bias instead:

    Σ W·(s·q − m) + b = Σ W·s·q + (b − m·Σ W)

A padded convolution reads zeros that are z in integers, so x is padded before it is quantized. Both sides are equal
but for rounding: of m to float32, which can move an x that lies between two integers to the other one.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, equation 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def make_symmetric(graph: Any) -> None:
    """Rewrite every pair with a scalar scale and another zero point than 0 in place.

    Args:
        graph: an `onnx_graphsurgeon.Graph`; biases are constants in float.
    """
    for node in list(graph.nodes):
        pair = _Pair.of(graph, node) if node.op == "QuantizeLinear" and not node.domain else None
        if pair is not None:
            pair.rewrite()


class _Pair:
    """One QuantizeLinear, and every DequantizeLinear that reads it."""

    def __init__(self, graph: Any, quantize: Any, readers: Sequence[Any]):
        self._graph = graph
        self._quantize = quantize
        self._readers = readers
        self._x = quantize.inputs[0]
        self._scale = quantize.inputs[1]
        self._constant = type(quantize.inputs[1])
        self._variable = type(quantize.outputs[0])
        product = np.float64(self._scale.values) * np.float64(quantize.inputs[2].values)
        self.shift = np.asarray(product, self._scale.values.dtype).reshape(())
        self._padded: dict[tuple[int, ...], Any] = {}

    @staticmethod
    def of(graph: Any, quantize: Any) -> _Pair | None:
        """The pair of a QuantizeLinear; None where it is symmetric already, or stays for a legality rule."""
        output = quantize.outputs[0]
        readers = list(output.outputs)
        like = _parameters(quantize)
        if like is None or not like[1].any() or output in graph.outputs or not readers:
            return None
        for reader in readers:
            theirs = _parameters(reader) if reader.op == "DequantizeLinear" else None
            inside = any(reader is node for node in graph.nodes)
            if theirs is None or not inside or any((a != b).any() for a, b in zip(like, theirs, strict=True)):
                return None
        return _Pair(graph, quantize, readers)

    def rewrite(self) -> None:
        """Shift what is quantized, and take the shift out of what is read."""
        zero = self._constant(f"{self._quantize.inputs[2].name}/symmetric", np.zeros((), np.int8))
        shifted = self._shifted(self._quantize, self._x, self._quantize.name)
        self._quantize.inputs = [shifted, self._scale, zero]
        for dequantize in self._readers:
            dequantize.inputs = [dequantize.inputs[0], self._scale, zero]
            self._take_out(dequantize, zero)

    def _shifted(self, before: Any, x: Any, name: str) -> Any:
        """x + m, computed just before a node."""
        output = self._variable(f"{name}/shifted", x.dtype, x.shape)
        m = self._constant(f"{name}/shift", self.shift)
        self._insert(before, "Add", f"{name}/shift", [x, m], [output])
        return output

    def _take_out(self, dequantize: Any, zero: Any) -> None:
        """Every reader of s·q takes m out itself, where it can; the others read s·q − m."""
        old = dequantize.outputs[0]
        shifted = self._variable(f"{old.name}/shifted", old.dtype, old.shape)
        dequantize.outputs = [shifted]
        for reader in {id(node): node for node in old.outputs}.values():
            self._move_into(reader, old, shifted, zero)
        if old.outputs or old in self._graph.outputs:
            m = self._constant(f"{dequantize.name}/shift", self.shift)
            self._insert(dequantize, "Sub", f"{dequantize.name}/shift", [shifted, m], [old], after=True)
        elif not shifted.outputs:  # all of its readers are padded and have pairs of their own
            dequantize.outputs = []

    def _move_into(self, node: Any, old: Any, shifted: Any, zero: Any) -> None:
        """Let a layer read s·q, if m can move into its bias."""
        alone = node.inputs[0] is old and all(operand is not old for operand in list(node.inputs)[1:])
        if node.domain or not alone or not any(node is other for other in self._graph.nodes):
            return
        weights = _numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        if weights is None:
            return
        if node.op == "MatMul" and weights.ndim > 1:
            node.inputs[0] = shifted
            # Of a matrix one row, without an axis of its own: a vector times a matrix is a vector.
            self._add_after(node, -self.shift * weights.sum(-2, keepdims=weights.ndim > 2))
            return
        if node.op not in ("Conv", "Gemm"):
            return
        has_bias = len(node.inputs) > 2 and not node.inputs[2].is_empty()
        bias = _numbers(node.inputs[2]) if has_bias else np.zeros((), np.float64)
        if bias is None:
            return
        if node.op == "Conv":
            node.inputs[0] = self._for_convolution(node, shifted, zero)
            moved = bias - self.shift * weights.sum(tuple(range(1, weights.ndim)))
        else:
            node.inputs[0] = shifted
            along = weights.sum(1 if node.attrs.get("transB", 0) else 0)
            moved = node.attrs.get("beta", 1.0) * bias - node.attrs.get("alpha", 1.0) * self.shift * along
            node.attrs["beta"] = 1.0
        name = f"{node.name}/bias"
        node.inputs = [*list(node.inputs)[:2], self._constant(name, moved.astype(self.shift.dtype))]

    def _for_convolution(self, node: Any, shifted: Any, zero: Any) -> Any:
        """s·q, of x with its padding where there is any."""
        pads = tuple(int(pad) for pad in node.attrs.get("pads", ()))
        if not any(pads):
            return shifted
        node.attrs["pads"] = [0] * len(pads)
        if pads not in self._padded:
            name = f"{self._quantize.name}/pad{len(self._padded)}"
            half = len(pads) // 2
            both = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
            padded, quantized, dequantized = (
                self._variable(f"{name}/{what}") for what in ("padded", "quantized", "dequantized")
            )
            place = self._quantize
            operands = [self._x, self._constant(f"{name}/pads", both)]
            self._insert(place, "Pad", f"{name}/pad", operands, [padded], {"mode": "constant"})
            within = self._shifted(place, padded, name)
            parameters = [self._scale, zero]
            self._insert(place, "QuantizeLinear", f"{name}/q", [within, *parameters], [quantized])
            self._insert(place, "DequantizeLinear", f"{name}/dq", [quantized, *parameters], [dequantized])
            self._padded[pads] = dequantized
        return self._padded[pads]

    def _add_after(self, node: Any, addend: np.ndarray) -> None:
        output = node.outputs[0]
        product = self._variable(f"{output.name}/product", output.dtype, output.shape)
        node.outputs = [product]
        constant = self._constant(f"{node.name}/shift", addend.astype(self.shift.dtype))
        self._insert(node, "Add", f"{node.name}/shift", [product, constant], [output], after=True)

    def _insert(
        self,
        place: Any,
        op: str,
        name: str,
        inputs: list[Any],
        outputs: list[Any],
        attributes: dict[str, Any] | None = None,
        after: bool = False,
    ) -> None:
        made = type(place)(op=op, name=name, attrs=attributes or {}, inputs=inputs, outputs=outputs)
        index = next(i for i in itertools.count() if self._graph.nodes[i] is place)
        self._graph.nodes.insert(index + after, made)


def _parameters(node: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point, if they are constants, one for the whole tensor, and the type is int8."""
    if len(node.inputs) < 3 or not all(hasattr(operand, "values") for operand in node.inputs[1:3]):
        return None
    scale, zero = node.inputs[1].values, node.inputs[2].values
    return (scale, zero) if scale.size == zero.size == 1 and zero.dtype == np.int8 else None


def _numbers(operand: Any) -> np.ndarray | None:
    """A constant, or what DequantizeLinear makes of one with zero point 0, in float64; None if it is computed."""
    if hasattr(operand, "values"):
        return operand.values.astype(np.float64)
    source = operand.inputs[0] if operand.inputs else None
    if source is None or source.op != "DequantizeLinear" or not hasattr(source.inputs[0], "values"):
        return None
    return dequantized(source)


def constants(node: Any, positions: Sequence[int]) -> dict[int, Any] | None:
    """The operands at these positions that are there, by position; None if one is computed."""
    found = {}
    for position in positions:
        if position >= len(node.inputs) or node.inputs[position].is_empty():
            continue
        if not hasattr(node.inputs[position], "values"):
            return None
        found[position] = node.inputs[position]
    return found


def dequantized(node: Any) -> np.ndarray | None:
    """What a DequantizeLinear computes, in float64; None where an operand is computed."""
    operands = constants(node, (0, 1, 2))
    if operands is None:
        return None
    numbers, scale = operands[0].values, operands[1].values.astype(np.float64)
    zero = operands[2].values.astype(np.float64) if 2 in operands else np.zeros_like(scale)
    if scale.ndim:  # along `axis`, or one per block of it
        axis = node.attrs.get("axis", 1) % numbers.ndim
        if scale.ndim == 1:
            along = [1] * numbers.ndim
            along[axis] = -1
            scale, zero = scale.reshape(along), zero.reshape(along)
        else:
            scale, zero = (np.repeat(a, node.attrs["block_size"], axis) for a in (scale, zero))
    return (numbers.astype(np.float64) - zero) * scale
