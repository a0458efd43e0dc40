"""Lowering to OpenVINO IR."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.artifact import concrete_shapes, write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.openvino import legality, legalize, run
from sartor.backends.origin import Origin
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.errors import BackendError
from sartor.ir.serialise import SINGLE_FILE_BYTES

if TYPE_CHECKING:
    from sartor.ir.program import Program

XML = "model.xml"
BIN = "model.bin"
_COUNTED = re.compile(r"[A-Za-z]\w*_\d+")


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.xml` and `model.bin` at the reference shapes, weights in f32.

    The computing precision is a property of the loaded model, not of the file: bf16 is chosen by
    `options.precision` at load.

    Raises:
        UsageError: precision, shapes or folder.
        BackendError: the program breaks a legality rule, or conversion fails.
    """
    openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
    legal = legalize.legalize(program)
    require_legal(legality.NAME, legality.check(legal, options))
    shapes = {**program.input_shapes, **options.shapes}

    proto = legal.to_proto(weights=False)

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        model = _read(legal)
        specs = tuple(TensorSpec(v.name or "", "", _dims(v)) for v in legal.graph.inputs)
        concrete_shapes(specs, shapes)
        run.reshape(model, shapes)
        _name_deterministically(model, {node.name for node in proto.graph.node})
        try:
            # The default compresses weights to f16, which would change the function.
            openvino.save_model(model, str(temporary / XML), compress_to_fp16=False)
        except Exception as error:
            raise BackendError(f"OpenVINO could not save the model: {error}") from error
        metadata = {
            "runtime": f"openvino {openvino.__version__.split('-')[0]}",
            "origin": Origin(proto.graph).to_dict(),
        }
        return (XML, BIN), metadata

    return write_artifact(legal, folder, options, target=legality.NAME, write=write)


def _read(program: Program) -> Any:
    """The runtime's model of a program; its reader takes 2 GiB from memory, and more from files."""
    openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
    if program.serialised_bytes() <= SINGLE_FILE_BYTES:
        return run.read_model(openvino.Core(), program.to_bytes())
    with tempfile.TemporaryDirectory(prefix="sartor-openvino-") as folder:
        return run.read_model(openvino.Core(), str(program.save(Path(folder) / "model.onnx")))


def _name_deterministically(model: Any, kept: set[str]) -> None:
    """Replace names that come from a process-wide counter, so that equal programs give equal files."""
    kept = kept | {output for op in model.get_ops() for port in op.outputs() for output in port.get_names()}
    for index, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if _COUNTED.fullmatch(name) and name not in kept:
            op.set_friendly_name(f"{op.get_type_name()}.{index}")


def _dims(value: Any) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else (dim.value or "") for dim in value.shape or ())
