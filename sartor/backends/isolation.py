"""Lowering and running in a subprocess: a vendor's crash, hang or hunger for memory costs an error message."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sartor import backends
from sartor.backends import manifest, process
from sartor.backends.arrays import load_arrays, require_arrays, save_arrays
from sartor.backends.artifact import mismatch, replacing
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

    from sartor.ir.program import Program

TIME_LIMIT_S = 1800.0
"""Long enough for the slowest compiler on a large model; a hang still ends."""
RUN_LIMIT_S = 600.0
"""Of one inference, loading included."""


def lower(
    backend_name: str,
    program: Program,
    folder: Path,
    options: TargetOptions,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    memory_limit_bytes: int | None = None,
    fresh: bool = False,
    check: Callable[[Artifact], None] = lambda _: None,
) -> Artifact:
    """Check legality here, then lower in a fresh subprocess with limits.

    Args:
        backend_name: registered backend.
        program: canonical.
        folder: created, or replaced when it holds an earlier artifact; all of it, or nothing.
        options: as for `Backend.lower`.
        time_limit_s: after it the subprocess is ended.
        memory_limit_bytes: limit of its address space; default: see `process.default_memory_limit`.
        fresh: convert again what a cache of conversions holds, as a timing must: `SARTOR_CACHE` is `off` there.
        check: called with the artifact before it takes its place; where it raises, nothing is written.

    Raises:
        UsageError: precision, shapes or folder; the vendor's package is not installed.
        BackendError: the program breaks a legality rule (no vendor tool has been called then), conversion
            fails, the subprocess crashed or did not finish (its last log lines are notes), or what it left is no
            artifact of this backend.
    """
    from sartor.ir import transport

    backend = backends.get(backend_name)
    require_legal(backend_name, backend.legality(program, options))
    folder = Path(folder)
    with replacing(folder) as written, tempfile.TemporaryDirectory(prefix="sartor-lower-") as sent:
        transport.write(program, Path(sent))
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
            variables={"SARTOR_CACHE": "off"} if fresh else {},
        )
        artifact = _written(written, backend_name)
        check(artifact)
    return dataclasses.replace(artifact, folder=folder)


def _written(folder: Path, backend_name: str) -> Artifact:
    """What the backend wrote, which may be anything."""
    try:
        artifact = manifest.read(folder)
        wrong = mismatch(artifact)
        if artifact.target != backend_name:
            wrong = f"its target is '{artifact.target}'."
    except ValueError as error:
        wrong = f"{error}."
    if wrong:
        raise BackendError(
            f"The backend '{backend_name}' reported success, and what it wrote is no artifact of its own: {wrong} "
            f"That is a defect of the backend; run 'sartor conformance {backend_name}'."
        )
    return artifact


class Session:
    """A loaded artifact in a subprocess of its own, for results; `sartor.backends.measure` is for times.

    Args:
        artifact: lowered by the backend that it names.
        options: as for `Backend.load`.
        time_limit_s: of one inference; the first one loads, too.
        memory_limit_bytes: limit of the subprocess's address space; default: see `process.default_memory_limit`.
    """

    def __init__(
        self,
        artifact: Artifact,
        options: TargetOptions,
        *,
        time_limit_s: float = RUN_LIMIT_S,
        memory_limit_bytes: int | None = None,
    ):
        self.artifact, self.options, self._time_limit_s = artifact, options, time_limit_s
        self._worker = process.Worker(threads=options.threads, memory_limit_bytes=memory_limit_bytes)
        self._folder = tempfile.TemporaryDirectory(prefix="sartor-run-")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subprocess."""
        self._worker.close()
        self._folder.cleanup()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            UsageError: an input is missing, unknown, no numpy array, or of the wrong type or shape.
            BackendError: the runtime failed, crashed or did not finish; its last log lines are notes.
        """
        require_arrays(inputs)
        given, made = Path(self._folder.name) / "inputs.npz", Path(self._folder.name) / "outputs.npz"
        save_arrays(given, inputs)
        self._worker.ask(
            {
                "command": "run",
                "backend": self.artifact.target,
                "options": self.options.to_dict(),
                "artifact": self.artifact.to_dict(),
                "folder": str(self.artifact.folder.resolve()),
                "inputs": str(given),
                "outputs": str(made),
            },
            time_limit_s=self._time_limit_s,
        )
        return load_arrays(made)
