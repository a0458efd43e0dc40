"""Whether a flatbuffer carries exactly the scales and zero points of its program.

The converter follows QuantizeLinear and DequantizeLinear, and could one day do more than that: unify the scales of
an operator's operands, or widen a range. Then what was calibrated would not be what runs, so lowering compares every
quantized tensor, and fails if one differs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from sartor.backends.tflite.flatbuffer import Flatbuffer, Parameters
from sartor.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
_BIAS_TOLERANCE = 1e-6  # of the product of two scales, each rounded to float32


def require_same(program: Program, flatbuffer: Flatbuffer) -> int:
    """Compare every quantized tensor with the program; returns how many there are.

    Activations and weights: equal scales and zero points. Biases: the same integers, and scales that differ by the
    rounding of one product.

    Raises:
        BackendError: a tensor has parameters that the program gives to no value around it.
    """
    own = _Own(program)
    found = flatbuffer.quantization()
    for name, parameters in found.items():
        if parameters.integers is not None and parameters.integers.size == 1:
            continue  # of the converter: a reciprocal, a zero to compare with; one number is held exactly
        expected = own.biases(parameters) if parameters.dtype == "INT32" else own.values(parameters)
        if any(_same(parameters, candidate) for candidate in expected):
            continue
        given = ", ".join(f"{c.scales[0]:.9g} and {c.zero_points[0]}" for c in expected[:3]) or "none"
        raise BackendError(
            f"The flatbuffer's tensor '{name}' has scale {parameters.scales[0]:.9g} and zero point "
            f"{parameters.zero_points[0]}, or other integers, where the program has {given}. Lower it in f32, and "
            "report this with the model."
        )
    return len(found)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """What a QuantizeLinear or DequantizeLinear says, with the integers of a constant."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    integers: np.ndarray | None = None


class _Own:
    """What the program says, by node."""

    def __init__(self, program: Program):
        self._nodes = {node.name or "": node for node in program.nodes()}
        self._all = [pair for node in self._nodes.values() if (pair := _pair(node)) is not None]

    def values(self, parameters: Parameters) -> list[_Pair]:
        """Of the values that the nodes read or write which a tensor is named after or read by."""
        names = dict.fromkeys([*parameters.nodes, *parameters.readers])
        return [pair for name in names for pair in self._around(name)] or self._all

    def biases(self, parameters: Parameters) -> list[_Pair]:
        """Of the bias of the layer that reads a tensor; zeros where the layer has none."""
        found = []
        for name in parameters.readers:
            node = self._nodes[name]
            if node.op_type not in _WITH_BIAS:
                continue
            sources = [value.producer() if value is not None else None for value in node.inputs]
            pairs = [_pair(source) if source is not None else None for source in sources]
            if len(pairs) > 2 and pairs[2] is not None:
                found.append(pairs[2])
            elif pairs[0] is not None and pairs[1] is not None:
                scales = tuple(pairs[0].scales[0] * scale for scale in pairs[1].scales)
                found.append(_Pair(scales, (0,) * len(scales)))
        return found

    def _around(self, name: str) -> list[_Pair]:
        node = self._nodes[name]
        readers = [use.node for output in node.outputs for use in output.uses()]
        writers = [value.producer() for value in node.inputs if value is not None]
        near = [node, *readers, *(writer for writer in writers if writer is not None)]
        return [pair for item in near if (pair := _pair(item)) is not None]


def _pair(node: ir.Node) -> _Pair | None:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    stored, scale, *rest = [value.const_value if value is not None else None for value in node.inputs]
    if scale is None:
        return None
    scales = scale.numpy().reshape(-1)
    zero_point = (
        rest[0].numpy().reshape(-1) if rest and rest[0] is not None else np.zeros(scales.size, np.int8)
    )
    integers = stored.numpy() if stored is not None and node.op_type == "DequantizeLinear" else None
    return _Pair(tuple(map(float, scales)), tuple(map(int, zero_point)), integers)


def _same(parameters: Parameters, pair: _Pair) -> bool:
    count = len(parameters.scales)
    if len(pair.scales) not in (1, count) or len(parameters.zero_points) != count:
        return False
    scales, zero_points = np.array(pair.scales), np.array(pair.zero_points)
    tolerance = _BIAS_TOLERANCE if parameters.dtype == "INT32" else 0.0
    close = np.abs(np.array(parameters.scales) - scales) <= tolerance * scales
    if not close.all() or (np.array(parameters.zero_points) != zero_points).any():
        return False
    if parameters.integers is None or pair.integers is None:
        return True
    # Layouts differ; the multiset of a weight's integers does not.
    return np.array_equal(np.sort(parameters.integers, axis=None), np.sort(pair.integers, axis=None))
