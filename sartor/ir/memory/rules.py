"""What runtimes do about memory: what they fuse, rename, and write in place."""

from __future__ import annotations

import dataclasses

from sartor.ir.fusion import ACTIVATIONS, GENERIC, FusionRules

ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
"""Operators whose result is their first input under another shape."""
METADATA = frozenset({"Shape", "Size"})
"""Operators that read no data."""
ELEMENTWISE = ACTIVATIONS | frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Min",
        "Max",
        "Sum",
        "Mean",
        "Mod",
        "Where",
        "PRelu",
        "BatchNormalization",
    }
    | {"Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Log", "Erf", "Sign", "Floor", "Ceil", "Round", "Not"}
    | {"And", "Or", "Xor", "Sin", "Cos"}
)
"""Operators each of whose numbers depends on the numbers at the same place."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a runtime does about memory.

    Attributes:
        fusion: kernels run as one step, and values inside them do not exist; None: every node is a step.
        aliases: operators that only rename (`ALIASES`) share the buffer of what they read.
        in_place: elementwise operators write over an input of the same shape that nothing reads later; a
            convolution with a residual addition inside it writes over the addend.
        depthwise: a depthwise convolution writes over its input, with one channel beside it.
        quantized: values between QuantizeLinear and DequantizeLinear exist in integers only.
        inputs_held: inputs of the program belong to the caller.
        layout: what changes to or from ONNX Runtime's blocked layout is copied (`sartor.ir.fusion_layout`).
        padded: a convolution or pooling whose pads are not those that TensorFlow computes (none, or "SAME") reads a
            padded copy of its input; transposed convolutions and means in 8 bits have accumulators of 32 bits.
    """

    fusion: FusionRules | None = GENERIC
    aliases: bool = True
    in_place: bool = True
    depthwise: bool = False
    quantized: bool = True
    inputs_held: bool = True
    layout: bool = False
    padded: bool = False


PLAIN = Rules(fusion=None, aliases=False, in_place=False, quantized=False)
"""Every node allocates all that it writes: the definition of `sartor.ir.liveness`."""
DEFAULT = Rules()
"""What runtimes have in common, roughly; of no one in particular."""
MICROCONTROLLER = Rules(aliases=False, in_place=False, inputs_held=False, padded=True)
"""TensorFlow Lite Micro: nothing in place, and the input's place is free after its last reader.

An approximation for planning, before anything is converted; `sartor.backends.tflite_micro.memory` is exact.
"""
