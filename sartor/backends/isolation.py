"""Lowering in a subprocess: a vendor's compiler that crashes, hangs or eats the memory costs an error message."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sartor import backends
from sartor.backends import process
from sartor.backends.artifact import open_artifact, replacing
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions

if TYPE_CHECKING:
    from sartor.ir.program import Program

TIME_LIMIT_S = 1800.0
"""Long enough for the slowest compiler on a large model; a hang still ends."""


def lower(
    backend_name: str,
    program: Program,
    folder: Path,
    options: TargetOptions,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    memory_limit_bytes: int | None = None,
) -> Artifact:
    """Check legality here, then lower in a fresh subprocess with limits.

    Args:
        backend_name: registered backend.
        program: canonical.
        folder: created, or replaced when it holds an earlier artifact; all of it, or nothing.
        options: as for `Backend.lower`.
        time_limit_s: after it the subprocess is ended.
        memory_limit_bytes: limit of its address space; default: see `process.default_memory_limit`.

    Raises:
        UsageError: precision, shapes or folder; the vendor's package is not installed.
        BackendError: the program breaks a legality rule (no vendor tool has been called then), conversion
            fails, or the subprocess crashed or did not finish; its last log lines are notes.
    """
    from sartor.ir import transport

    backend = backends.get(backend_name)
    require_legal(backend_name, backend.legality(program, options))
    folder = Path(folder)
    with replacing(folder) as temporary, tempfile.TemporaryDirectory(prefix="sartor-lower-") as sent:
        transport.write(program, Path(sent))
        written = temporary / "artifact"
        process.call(
            {
                "command": "lower",
                "backend": backend_name,
                "options": options.to_dict(),
                "program": sent,
                "folder": str(written.resolve()),
            },
            threads=options.threads,
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        artifact = open_artifact(written)
        for path in written.iterdir():
            path.rename(temporary / path.name)
        written.rmdir()
    return dataclasses.replace(artifact, folder=folder)
