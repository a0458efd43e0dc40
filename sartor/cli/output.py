"""Where a command's result goes: one JSON document or text on stdout, everything else on stderr.

Libraries and the native code below them write to file descriptor 1 when they feel like it. `Stdout` keeps
the real stdout for the result and points the descriptor at stderr while a command runs, so that `--json`
gives exactly one document whatever a dependency prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from typing import Any

from sartor.report.text import count, seconds, table

__all__ = ["ERROR_SCHEMA", "Result", "Stdout", "count", "error_document", "seconds", "table", "to_json"]

ERROR_SCHEMA = "sartor.error/1"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command hands back.

    Attributes:
        document: the JSON document of `--json`.
        text: what a person reads instead.
        exit_code: of the process.
        silent: another process writes what came out.
    """

    document: dict[str, Any]
    text: str = ""
    exit_code: int = 0
    silent: bool = False


class Stdout:
    """Context in which stdout is stderr, except for `write`."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._kept: int | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Stdout:
        sys.stdout.flush()
        try:
            descriptor = sys.stdout.fileno()
        except (OSError, ValueError, AttributeError):  # captured by a test: no descriptor behind it
            descriptor = -1
        if descriptor == 1:
            self._kept = os.dup(1)
            os.dup2(2, 1)
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._kept is not None:
            os.dup2(self._kept, 1)
            os.close(self._kept)
            self._kept = None

    def write(self, text: str) -> None:
        """Write to the real stdout; a reader that went away ends the command quietly."""
        if self._kept is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode()
        while data:
            data = data[os.write(self._kept, data) :]


def to_json(document: dict[str, Any]) -> str:
    """One line of strict JSON: a number that is not finite is a bug here, not an extension of the format."""
    return json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"


def error_document(message: str, exit_code: int) -> dict[str, Any]:
    """The document of `--json` when a command fails."""
    return {"schema": ERROR_SCHEMA, "error": message, "exit_code": exit_code}
