"""Where a command's result goes: one JSON document or text on stdout, everything else on stderr.

Libraries and the native code below them write to file descriptor 1 when they feel like it. `Stdout` keeps
the real stdout for the result and points the descriptor at stderr while a command runs, so that `--json`
gives exactly one document whatever a dependency prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ERROR_SCHEMA = "sartor.error/1"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command hands back.

    Attributes:
        document: the JSON document of `--json`.
        text: what a person reads instead.
        exit_code: of the process.
    """

    document: dict[str, Any]
    text: str = ""
    exit_code: int = 0


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
    """Strict JSON text: a number that is not finite is a bug here, not an extension of the format."""
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def error_document(message: str, exit_code: int) -> dict[str, Any]:
    """The document of `--json` when a command fails."""
    return {"schema": ERROR_SCHEMA, "error": message, "exit_code": exit_code}


def table(rows: Iterable[Sequence[str]], header: Sequence[str], align: str = "") -> str:
    """Columns padded to equal width; `align` has one of `<` and `>` per column, default left."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    align = align or "<" * len(header)
    text = []
    for number, line in enumerate(lines):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("  ".join("-" * width for width in widths))
    return "\n".join(text)


def seconds(value: float) -> str:
    """A duration with three significant digits, e.g. `1.81 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def count(value: float, unit: str = "") -> str:
    """A count with a decimal prefix, e.g. `4.09 G` or `12.3 MB`."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()
