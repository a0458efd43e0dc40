"""Lowering: the conversion of `tflite`, checked and measured by the allocator of microcontrollers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sartor.backends.protocol import Artifact, TargetOptions
from sartor.backends.tflite import lower as tflite
from sartor.backends.tflite_micro import arena, legality, legalize

if TYPE_CHECKING:
    from sartor.ir.program import Program

CLAMPS = {"RELU_0_TO_1": (0.0, 1.0), "RELU_N1_TO_1": (-1.0, 1.0)}
"""Activations without a kernel."""
FIXED_SCALES = {
    **tflite.FIXED_SCALES,
    **{"LOGISTIC": (1 / 256, -128), "TANH": (1 / 128, 0)},
    **dict.fromkeys(CLAMPS, (0.0, 0)),  # in float32 always: MAXIMUM and MINIMUM keep the scale
}
"""XNNPACK computes a sigmoid of any output scale; the portable kernels know one."""
SAME = {"SELECT": "SELECT_V2"}
"""SELECT_V2 has a kernel; it broadcasts, which SELECT of the converter's (operands of one shape) has no need of."""


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.tflite` at the reference shapes.

    Raises:
        UsageError: precision, shapes or folder; a package is not installed.
        BackendError: the program breaks a legality rule, conversion fails, or an operator has no kernel.
    """
    return tflite.write(program, folder, options, _recipe(), _measured)


def compile_model(model: bytes, options: TargetOptions) -> tflite.Lowered:
    """The flatbuffer of a serialized ONNX model. Raises as `lower`."""
    return _measured(tflite.convert_bytes(model, options, _recipe()))


def _recipe() -> tflite.Recipe:
    return tflite.Recipe(
        legality.NAME, legality.check, legalize.legalize, fixed_scales=FIXED_SCALES, same=SAME, clamps=CLAMPS
    )


def _measured(lowered: tflite.Lowered) -> tflite.Lowered:
    """With the planned arena in the metadata."""
    interpreter = arena.create(lowered.content)
    metadata = {
        **lowered.metadata,
        "runtime": f"tflite-micro {importlib.metadata.version('tflite-micro')}",
        "arena_bytes": arena.planned(interpreter),
    }
    return dataclasses.replace(lowered, metadata=metadata)
