"""The interpreter of microcontrollers, and the arena that its allocator plans.

Both report to standard error, from C: it is caught while they are at work.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

from sartor.backends import telemetry
from sartor.backends.tflite_micro.legality import MODULE, REQUIREMENT
from sartor.errors import BackendError

_SMALLEST_BYTES = 1 << 16
_LARGEST_BYTES = 1 << 31
_PLANNED = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")
_STDERR = threading.Lock()  # one file descriptor for the whole process


def create(content: bytes, arena_bytes: int | None = None) -> Any:
    """An interpreter of a flatbuffer.

    Args:
        content: the file.
        arena_bytes: its memory; default: doubled from `_SMALLEST_BYTES` until the model fits.

    Raises:
        UsageError: tflite-micro is not installed.
        BackendError: an operator has no kernel, or the arena is too small; the allocator's own words are a note.
    """
    runtime = telemetry.import_vendor(MODULE, REQUIREMENT)
    size = arena_bytes or _SMALLEST_BYTES
    while True:
        with _caught() as log:
            try:
                return runtime.Interpreter.from_bytes(content, arena_size=size)
            except Exception as error:
                said, failure = _said(log), error
        small = arena_bytes is None and size < _LARGEST_BYTES
        if not (small and re.search(r"(?i)arena|allocat|resize buffer|memory", said)):
            raise failed("load the model", failure, said) from failure
        size *= 2


def planned(interpreter: Any) -> dict[str, int]:
    """Bytes of the arena: `head` (activations and scratch), `tail` (what persists) and `total`.

    Raises:
        BackendError: the allocator reports in another way.
    """
    with _caught() as log:
        interpreter.print_allocations()
        said = _said(log)
    found = {part: int(size) for part, size in _PLANNED.findall(said)}
    if set(found) != {"total", "head", "tail"}:
        raise failed("tell the size of its arena", RuntimeError("no such line"), said)
    return found


def failed(what: str, error: BaseException, said: str = "") -> BackendError:
    """The interpreter's error in one sentence, with what it printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = " ".join(lines[:3]) or f"{type(error).__name__}: {error}"
    failure = BackendError(f"TensorFlow Lite Micro could not {what}: {reason[:500]}")
    failure.add_note(said[-4000:] or str(error))
    return failure


@contextlib.contextmanager
def _caught() -> Iterator[IO[bytes]]:
    """Standard error of the process, C included, into a file."""
    with _STDERR, tempfile.TemporaryFile() as log:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")
