"""Lowering to ONNX Runtime: the ONNX bytes of the legalized program are the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.onnxruntime import legality, legalize
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.ir.files import write_all

if TYPE_CHECKING:
    from sartor.ir.program import Program

FILE = "model.onnx"


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.onnx`: `legalize(program).to_bytes()`, beyond 2 GiB with external data beside it.

    A program in which nothing is quantized is legal as it is, and its bytes are its own.

    Raises:
        UsageError: precision or folder.
        BackendError: the program breaks a legality rule.
    """
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    legal = legalize.legalize(program)
    require_legal(legality.NAME, legality.check(legal, options))

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        beside = [path.name for path in write_all(legal.files(temporary / FILE)) if path.name != FILE]
        return (FILE, *beside), {"runtime": f"onnxruntime {runtime.__version__}"}

    return write_artifact(legal, folder, options, target=legality.NAME, write=write)
