"""Writing the artifact. This is where you would call your compiler.

Sartor runs it in a subprocess with limits on time and memory, so a crash of your compiler is an error message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions
from sartor_tape import legality, legalize, tape

if TYPE_CHECKING:
    from sartor.ir.program import Program

TAPE, WEIGHTS = "model.tape", "weights.bin"


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Legalize, check, and write the artifact.

    Raises:
        UsageError: precision or folder.
        BackendError: the program breaks a rule.
    """
    legal = legalize.legalize(program)
    require_legal(legality.NAME, legality.check(legal, options))

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        # Everything that is needed to run goes into this folder, main file first; `write_artifact` adds hashes
        # and the input contract, and moves the folder into place only when all of it is there.
        instructions, block = tape.assemble(legal.to_proto())
        (temporary / TAPE).write_text(tape.text(instructions), encoding="utf-8")
        (temporary / WEIGHTS).write_bytes(block)
        # Metadata is yours: versions and settings. One key has a meaning for Sartor: 'reproducible: False' says
        # that the bytes differ every time.
        return (TAPE, WEIGHTS), {"format": tape.FORMAT}

    return write_artifact(legal, folder, options, target=legality.NAME, write=write)
