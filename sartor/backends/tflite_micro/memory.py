"""The arena that TensorFlow Lite Micro will plan, predicted from the flatbuffer without its interpreter.

The *head* holds tensors and scratch: the greedy planner by size over tensors that live from the operator that writes
them to the last one that reads them, inputs not held, nothing in place. That is exact. The *tail* holds what persists,
most of it structures of the interpreter on a 64-bit machine: those were measured, operator by operator, as what each
adds to the tail of a model that is cut behind it (tflite-micro 0.dev20261023182759, x86-64). On a microcontroller of
32 bits the structures are smaller; activations are not.

Reference: David et al., "TensorFlow Lite Micro: embedded machine learning for TinyML systems", MLSys 2021, section 4.4.
"""

from __future__ import annotations

import math
from typing import Any

from sartor.backends.tflite.buffers import Call, Flat, Tensor, buffer_graph, read
from sartor.ir.memory import greedy_by_size

_ALIGNMENT = 16
_BASE = 520
_PER_TENSOR, _PER_OPERATOR, _PER_BORDER = 24, 64, 64
_PER_CHANNEL = 8  # a multiplier and a shift, also where nothing is quantized
_PER_TRANSPOSED = 40  # a tensor of its own, beside its contents
_OPERATOR = {
    **{"CONV_2D": 108, "DEPTHWISE_CONV_2D": 104, "TRANSPOSE_CONV": 115, "FULLY_CONNECTED": 112},
    **{"BATCH_MATMUL": 80, "SOFTMAX": 90, "CONCATENATION": 85, "MAX_POOL_2D": 76, "AVERAGE_POOL_2D": 64},
    **{"ADD": 74, "SUB": 72, "MUL": 57, "MEAN": 74, "SUM": 64, "REDUCE_MAX": 64, "PAD": 64, "PADV2": 64},
    **{"QUANTIZE": 64, "DEQUANTIZE": 3, "RESHAPE": 36, "HARD_SWISH": 32, "LEAKY_RELU": 48, "ABS": 32},
    **{"LOGISTIC": 16, "TANH": 16, "GREATER_EQUAL": 32, "SELECT_V2": 16, "GATHER_ND": 16},
    **dict.fromkeys(("EXP", "LOG", "SQRT", "FLOOR", "MAXIMUM", "MINIMUM", "SLICE", "TRANSPOSE"), 0),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), 0),
}
"""Bytes of an operator's own data and options in the tail."""
_UNKNOWN_OPERATOR = 64
_REQUANTIZE = 32  # from int8 to int8


def scratch(call: Call) -> tuple[int, ...]:
    """Bytes of the buffers that a portable kernel asks for while it runs: accumulators of 32 bits in int8."""
    if not call.outputs:
        return ()
    result = call.outputs[0]
    if call.op_type in ("MEAN", "SUM", "TRANSPOSE_CONV") and result.dtype == "INT8":
        return (4 * math.prod(result.shape),)
    if call.op_type in ("REDUCE_MAX", "REDUCE_MIN"):
        data, axes = call.inputs[0], call.inputs[1]
        return (4 * len(data.shape) if data else 0, 4 * math.prod(axes.shape) if axes else 0)
    return ()


def arena_bytes(content: bytes) -> dict[str, int]:
    """Bytes of the arena: `head`, `tail` and `total`, as `Artifact.metadata["arena_bytes"]` has them measured.

    Raises:
        ModelError: it is no flatbuffer, or a tensor has no fixed size.
    """
    head = greedy_by_size(buffer_graph(content, scratch), _ALIGNMENT).bytes
    tail = sum(map(_tail, read(content))) + _BASE
    tail = -(-tail // _ALIGNMENT) * _ALIGNMENT
    return {"total": head + tail, "head": head, "tail": tail}


def _tail(flat: Flat) -> int:
    """What one subgraph adds."""
    fixed = _PER_TENSOR * len(flat.tensors) + _PER_BORDER * (len(flat.inputs) + len(flat.outputs))
    variables = sum(-(-t.bytes // _ALIGNMENT) * _ALIGNMENT for t in flat.tensors if t.variable)
    return fixed + variables + sum(_PER_OPERATOR + _persistent(call) for call in flat.calls)


def _persistent(call: Call) -> int:
    size = _OPERATOR.get(call.op_type, _UNKNOWN_OPERATOR)
    result = call.outputs[0] if call.outputs else None
    if result is None:
        return size
    per_channel = call.op_type in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
    if per_channel or (call.op_type == "FULLY_CONNECTED" and result.dtype == "INT8"):
        return size + _PER_CHANNEL * result.shape[-1]
    if call.op_type == "QUANTIZE" and call.inputs[0] is not None and call.inputs[0].dtype == "INT8":
        return _REQUANTIZE
    if call.op_type == "BATCH_MATMUL":
        return size + _transposed(call.options, call.inputs)
    return size


def _transposed(options: Any, inputs: tuple[Tensor | None, ...]) -> int:
    """The kernel wants its right operand transposed and its left one not, and keeps a copy of what is otherwise."""
    turned = [t for t, is_so in zip(inputs, (options.adjX, not options.adjY), strict=False) if t and is_so]
    return sum(_PER_TRANSPOSED + t.bytes for t in turned)
