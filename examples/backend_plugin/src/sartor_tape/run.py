"""The runtime: loading and running. This is where you would open your device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.errors import BackendError
from sartor_tape import legality, lower, tape
from sartor_tape.kernels import execute


class TapeSession(Session):
    """A tape with its weights in memory. `prepare`, which says what is timed, is inherited: a plain run.

    Override it, and `computed`, where a run copies to a device and back, and bind the memory there instead.
    """

    def __init__(
        self,
        instructions: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        inputs: tuple[TensorSpec, ...],
        fixed: Mapping[str, int],
    ):
        self._tape, self._weights, self._fixed = instructions, weights, fixed
        self.inputs = inputs
        # Every option that was set, for the record of a measurement.
        self.settings = {"threads": "as numpy's BLAS is set", "fixed": dict(fixed)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. They belong to the caller: never hand out a buffer that the next run overwrites."""
        check_inputs(self.inputs, self._fixed, inputs)
        # numpy reads any strides. A device that is given an address wants `np.ascontiguousarray(array)` first.
        registers = {**self._weights, **inputs}
        for instruction in self._tape["instructions"]:
            execute(instruction, registers)
        return {name: registers[name] for name in self._tape["outputs"]}


def load(artifact: Artifact, options: TargetOptions) -> TapeSession:
    """A session on an artifact.

    Raises:
        UsageError: a precision that there is not, or shapes that the model cannot have.
        BackendError: a file is missing or was changed.
    """
    require_precision(legality.NAME, legality.PRECISIONS, options)
    verify_files(artifact)  # hashes: nothing that was tampered with reaches the device
    fixed = concrete_shapes(artifact.inputs, options.shapes)
    instructions = json.loads((artifact.folder / lower.TAPE).read_text(encoding="utf-8"))
    weights = tape.read_weights(instructions, (artifact.folder / lower.WEIGHTS).read_bytes())
    return TapeSession(instructions, weights, artifact.inputs, fixed)


def compile_model(model: bytes, options: TargetOptions) -> TapeSession:
    """A session on a serialized ONNX model, without an artifact. Raises as `load`."""
    import onnx

    require_precision(legality.NAME, legality.PRECISIONS, options)
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:
        raise BackendError(f"The model bytes are not ONNX: {error}") from error
    instructions, block = tape.assemble(proto)
    inputs = _contract(proto)
    fixed = concrete_shapes(inputs, options.shapes)
    return TapeSession(instructions, tape.read_weights(instructions, block), inputs, fixed)


def _contract(proto: Any) -> tuple[TensorSpec, ...]:
    """Inputs of an ONNX model; symbolic dimensions are strings."""
    from onnx import helper

    weights = {tensor.name for tensor in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            specs.append(TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape))
    return tuple(specs)
