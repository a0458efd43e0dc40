"""Lowering to the reference: the canonical ONNX bytes are the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.backends.reference import legality
from sartor.ir.files import write_all

if TYPE_CHECKING:
    from sartor.ir.program import Program

FILE = "model.onnx"


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.onnx`: byte-identical to `program.to_bytes()`, beyond 2 GiB with external data beside it.

    Raises:
        UsageError: precision or folder.
        BackendError: the program breaks a legality rule.
    """
    require_legal(legality.NAME, legality.check(program, options))

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        beside = [path.name for path in write_all(program.files(temporary / FILE)) if path.name != FILE]
        return (FILE, *beside), {"runtime": f"sartor twin on {legality.capabilities().version}"}

    return write_artifact(program, folder, options, target=legality.NAME, write=write)
