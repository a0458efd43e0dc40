"""Whether a flatbuffer carries exactly the quantization of its program: nothing else, and all of it.

The converter follows QuantizeLinear and DequantizeLinear, and could one day do more or less than that: unify the
scales of an operator's operands, widen a range, drop a pair and compute in float32. Then what was calibrated would
not be what runs. So lowering compares in both directions, and fails where they differ:

* a quantized tensor has the parameters of the value that it holds, which is the one that its operator's nodes wrote;
* every quantized value has such a tensor, and every quantized constant one that holds its integers in the order in
  which the operator reads them.

What may differ, and is looked for by name:

* A value that only a concatenation, a maximum over windows or another shape reads may be written in the scale of the
  result: the kernels want one scale, and rounding before is rounding afterwards.
* Of a value and another shape or part of it, with the same parameters, one need not have a tensor of its own.
* A layer that the runtime has no integer kernel for computes in float32 between a DEQUANTIZE and a QUANTIZE. Its
  constants are the same numbers in float32.
* A layer without a bias gets one of zeros, in the product of both scales.
* A number that the converter puts in (a reciprocal, a zero to compare with) is held exactly, whatever its scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sartor.backends.tflite.flatbuffer import Flatbuffer, Operator, Parameters, border_name
from sartor.errors import BackendError

if TYPE_CHECKING:
    from sartor.ir.program import Program

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
_SAME_INTEGERS = ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_ONE_SCALE = ("Concat", "MaxPool", *_SAME_INTEGERS)
_BIAS_TOLERANCE = 1e-6  # of the product of two scales, each rounded to float32
_FLOAT_TOLERANCE = 1e-6  # of the product of an integer and a scale


def require_same(program: Program, flatbuffer: Flatbuffer, operators: Sequence[Operator]) -> int:
    """Compare every quantized tensor with the program, and the other way round; returns how many tensors there are.

    Args:
        program: as it was converted.
        flatbuffer: of it.
        operators: of the flatbuffer in order, with all nodes that each computes.

    Raises:
        BackendError: a tensor has other parameters or integers than the program gives to its value, or a quantized
            value or constant of the program has no tensor.
    """
    own = _Own(program)
    found = flatbuffer.quantization(operators)
    seen: set[str] = set()
    count = 0
    for name, tensor in found.items():
        constant = tensor.numbers is not None
        if not tensor.scales and tensor.dtype == "INT8":
            raise BackendError(
                f"The flatbuffer's tensor '{name}' holds bytes and has no scale. Lower it in f32, and report this with "
                "the model."
            )
        if not tensor.scales:
            seen.update(entry.name for entry in own.constants_of(tensor) if entry.held_by(tensor))
            continue
        count += 1
        expected = own.constants_of(tensor) if constant else own.values_of(tensor)
        equal = [entry for entry in expected if _same(tensor, entry)]
        seen.update(entry.name for entry in equal)
        if not (
            equal or own.in_scale_of_result(tensor, expected) or own.is_converters_number(tensor, expected)
        ):
            given = ", ".join(f"{e.scales[0]:.9g} and {e.zero_points[0]}" for e in expected[:3]) or "none"
            raise BackendError(
                f"The flatbuffer's tensor '{name}' has scale {tensor.scales[0]:.9g} and zero point "
                f"{tensor.zero_points[0]}, or other integers, where the program has {given}. Lower it in f32, and "
                "report this with the model."
            )
    for entry in own.entries:
        if entry.name not in seen and not own.excused(entry, seen):
            raise BackendError(
                f"The program quantizes '{entry.name}' (scale {entry.scales[0]:.9g}, zero point "
                f"{entry.zero_points[0]}), and no tensor of the flatbuffer does: it would be computed otherwise than "
                "it was calibrated. Lower it in f32, and report this with the model."
            )
    return count


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What the program quantizes: an activation, or a constant with its integers.

    Attributes:
        name: of the value or of the stored constant.
        writers: the node that gives the value, and those before it of which it is another shape or a part; or the
            graph input that it is. Empty for a constant.
        readers: nodes that read it, and graph outputs that it is.
        scales: one, or one per channel.
        zero_points: as many.
        stored: the integers of a constant.
        axis: along which it has several scales.
        orders: of its axes, as an operator of the flatbuffer may keep it.
    """

    name: str
    writers: frozenset[str]
    readers: frozenset[str]
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    stored: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int8))
    axis: int = 0
    orders: tuple[tuple[int, ...], ...] = ()

    def held_by(self, tensor: Parameters) -> bool:
        """Whether a constant tensor holds the integers, or in float32 the numbers that they stand for."""
        if tensor.numbers is None or tensor.numbers.size != self.stored.size:
            return False
        if tensor.scales:
            return any(np.array_equal(tensor.numbers, flat) for flat in self._flat(self.stored))
        along = [-1 if i == self.axis and len(self.scales) > 1 else 1 for i in range(self.stored.ndim)]
        scales, zero_points = (np.array(p).reshape(along) for p in (self.scales, self.zero_points))
        numbers = (self.stored.astype(np.float64) - zero_points) * scales
        return any(np.allclose(tensor.numbers, flat, _FLOAT_TOLERANCE, 0.0) for flat in self._flat(numbers))

    def _flat(self, array: np.ndarray) -> Iterator[np.ndarray]:
        return (array.transpose(order).reshape(-1) for order in self.orders)


class _Own:
    """What the program says."""

    def __init__(self, program: Program):
        self.nodes = {node.name or "": node for node in program.nodes()}
        self.entries: list[_Entry] = []
        for node in self.nodes.values():
            stored = _array(node.inputs[0]) if node.op_type in _PAIR else None
            if node.op_type == "QuantizeLinear" or stored is not None:
                self.entries.append(_entry(node, stored))

    def values_of(self, tensor: Parameters) -> list[_Entry]:
        """Activations that a tensor may hold: what its nodes write for others, or else what its readers read."""
        values = [entry for entry in self.entries if entry.writers]
        near = [e for e in values if e.writers & tensor.writers and not e.readers <= tensor.writers]
        return near or [e for e in values if not tensor.writers and e.readers & tensor.readers]

    def in_scale_of_result(self, tensor: Parameters, expected: Sequence[_Entry]) -> bool:
        """Whether a value is in the scale of what its only readers make of it."""
        if tensor.numbers is not None or not expected:
            return False
        if not all(self._op_type(name) in _ONE_SCALE for name in tensor.readers):
            return False
        results = [e for e in self.entries if e.writers & tensor.readers]
        return any(_same(tensor, entry) for entry in results)

    def constants_of(self, tensor: Parameters) -> list[_Entry]:
        """Constants that the readers of a tensor read."""
        found = [e for e in self.entries if not e.writers and e.readers & tensor.readers]
        kinds = {"INT8": (np.int8,), "INT32": (np.int32,)}.get(tensor.dtype, (np.int8, np.int32))
        return [e for e in found if e.stored.dtype in kinds] or self._zero_biases(tensor)

    def _zero_biases(self, tensor: Parameters) -> list[_Entry]:
        made: list[_Entry] = []
        if tensor.dtype != "INT32" or tensor.numbers is None:
            return made
        zeros = np.zeros(tensor.numbers.size, np.int32)
        for name in tensor.readers:
            node = self.nodes.get(name)
            if node is None or node.op_type not in (*_WITH_BIAS, "MatMul"):
                continue
            sources = [value.producer() if value is not None else None for value in node.inputs[:2]]
            pairs = [_parameters(source) if source is not None else None for source in sources]
            if pairs[0] is not None and pairs[1] is not None:
                scales = tuple(pairs[0][0][0] * scale for scale in pairs[1][0])
                made.append(
                    _Entry("", frozenset(), frozenset(), scales, (0,) * len(scales), zeros, 0, ((0,),))
                )
        return made

    def is_converters_number(self, tensor: Parameters, expected: Sequence[_Entry]) -> bool:
        """One number, where the nodes that read it have no constant of that size in the program."""
        single = tensor.numbers is not None and tensor.numbers.size == 1
        return single and not any(e.stored.size == 1 for e in expected)

    def excused(self, entry: _Entry, seen: set[str]) -> bool:
        """Whether an activation needs no tensor: it is only concatenated, or has the integers of one that has."""
        if not entry.writers:
            return False
        if all(self._op_type(name) == "Concat" for name in entry.readers):
            return bool(entry.readers)
        if entry.readers and all(self._op_type(name) in _SAME_INTEGERS for name in entry.readers):
            after = [e for e in self.entries if e.writers & entry.readers]
            if after and all(e.name in seen and _equal(e, entry) for e in after):
                return True
        if not all(self._op_type(name) in _SAME_INTEGERS for name in entry.writers):
            return False
        before = [e for e in self.entries if e.writers and entry.writers & e.readers]
        return any(_equal(e, entry) and (e.name in seen or self.excused(e, seen)) for e in before)

    def _op_type(self, name: str) -> str:
        node = self.nodes.get(name)
        return node.op_type if node is not None else ""


def _entry(node: ir.Node, stored: np.ndarray | None) -> _Entry:
    """What a QuantizeLinear, or a DequantizeLinear of a constant, says."""
    scales, zero_points = _parameters(node) or ((0.0,), (0,))
    source = node.inputs[0]
    name = (source.name or "") if source is not None else ""
    readers = frozenset(_readers(node))
    if stored is None:
        return _Entry(name, frozenset(_writers(source)), readers, scales, zero_points)
    layers = [user for output in node.outputs for user, _ in output.uses()]
    orders = dict.fromkeys(order for layer in layers for order in _orders(layer, stored))
    axis = node.attributes.get_int("axis", 1) % max(stored.ndim, 1)
    return _Entry(name, frozenset(), readers, scales, zero_points, stored, axis, tuple(orders))


def _writers(value: ir.Value | None) -> Iterator[str]:
    """Nodes that give a value, as `_Entry` has them, behind what only changes precision."""
    node = value.producer() if value is not None else None
    while value is not None and node is not None and node.op_type in _PAIR:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if node is not None:
        yield node.name or ""
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type in _SAME_INTEGERS and not (before is not None and before.op_type in _PAIR):
            yield from _writers(node.inputs[0])
    elif value is not None:
        yield border_name("input", value.name or "")


def _readers(node: ir.Node) -> Iterator[str]:
    """Nodes that read what a node gives, behind what only changes precision, and names of graph outputs."""
    for output in node.outputs:
        if output.is_graph_output():
            yield border_name("output", output.name or "")
        for user, _ in output.uses():
            if user.op_type in _PAIR:
                yield from _readers(user)
            else:
                yield user.name or ""


def _parameters(node: ir.Node) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    """Scales and zero points of a QuantizeLinear or DequantizeLinear; None of another node."""
    scale = _array(node.inputs[1]) if node.op_type in _PAIR else None
    if scale is None:
        return None
    given = _array(node.inputs[2]) if len(node.inputs) > 2 else None
    zero = given if given is not None else np.zeros(scale.shape, np.int8)
    return tuple(map(float, scale.reshape(-1))), tuple(map(int, zero.reshape(-1)))


def _array(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _orders(layer: ir.Node, stored: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Orders of the axes in which an operator may keep a constant that a node reads."""
    plain = tuple(range(stored.ndim))
    if layer.op_type == "Conv" and stored.ndim > 1:
        yield from [(*plain[1:], 0)] if stored.shape[1] == 1 else []  # depthwise
        yield (0, *plain[2:], 1)
        if stored.ndim == 5:
            yield (*plain[2:], 1, 0)
    elif layer.op_type == "ConvTranspose" and stored.ndim > 1:
        yield (*plain[1:], 0)
    elif layer.op_type in ("Gemm", "MatMul"):
        transposed = layer.attributes.get_int("transB", 0) == 1
        if not transposed:
            yield (*plain[:-2], *reversed(plain[-2:]))
        if layer.op_type == "MatMul" or stored.ndim == 1 or transposed:
            yield plain
    else:
        yield plain
        yield (*plain[:1], *plain[2:], *plain[1:2])  # channel-last


def _equal(one: _Entry, other: _Entry) -> bool:
    return (one.scales, one.zero_points) == (other.scales, other.zero_points)


def _same(tensor: Parameters, entry: _Entry) -> bool:
    count = len(tensor.scales)
    if len(entry.scales) not in (1, count) or len(tensor.zero_points) != count:
        return False
    scales, zero_points = np.array(entry.scales), np.array(entry.zero_points)
    tolerance = _BIAS_TOLERANCE if tensor.dtype == "INT32" else 0.0
    close = np.abs(np.array(tensor.scales) - scales) <= tolerance * scales
    if not close.all() or (np.array(tensor.zero_points) != zero_points).any():
        return False
    return tensor.numbers is None or entry.held_by(tensor)
