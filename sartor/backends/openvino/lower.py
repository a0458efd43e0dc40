"""Lowering to OpenVINO IR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.artifact import concrete_shapes, write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.openvino import legality, run
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.errors import BackendError

if TYPE_CHECKING:
    from sartor.ir.program import Program

XML = "model.xml"
BIN = "model.bin"


def legalize(program: Program) -> Program:
    """Inline every function; the result is the program itself when it has none."""
    if not program.model.functions:
        return program
    from onnx_ir.passes.common import InlinePass

    legal = program.clone()
    InlinePass()(legal.model)
    legal.invalidate()
    return legal


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.xml` and `model.bin` at the reference shapes, weights in f32.

    The computing precision is a property of the loaded model, not of the file: bf16 is chosen by
    `options.precision` at load.

    Raises:
        UsageError: precision, shapes or folder.
        BackendError: the program breaks a legality rule, or conversion fails.
    """
    openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
    legal = legalize(program)
    require_legal(legality.NAME, legality.check(legal, options))
    shapes = {**program.input_shapes, **options.shapes}

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        model = run.read_model(openvino.Core(), legal.to_bytes())
        specs = tuple(TensorSpec(v.name or "", "", _dims(v)) for v in legal.graph.inputs)
        concrete_shapes(specs, shapes)
        run.reshape(model, shapes)
        try:
            # The default compresses weights to f16, which would change the function.
            openvino.save_model(model, str(temporary / XML), compress_to_fp16=False)
        except Exception as error:
            raise BackendError(f"OpenVINO could not save the model: {error}") from error
        metadata = {
            "runtime": f"openvino {openvino.__version__.split('-')[0]}",
            "producers": {
                output.name: node.name for node in legal.nodes() for output in node.outputs if output.name
            },
        }
        return (XML, BIN), metadata

    return write_artifact(legal, folder, options, target=legality.NAME, write=write)


def _dims(value: Any) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else (dim.value or "") for dim in value.shape or ())
