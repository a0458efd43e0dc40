"""Progress on stderr: a bar that redraws on a terminal, plain lines otherwise, silence in CI."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

_REDRAW_S = 0.1
_BAR = 24


class Progress:
    """Stages with an optional number of steps.

    Args:
        stream: where to write.
        mode: `bar`, `lines` or `silent`.
    """

    def __init__(self, stream: TextIO, mode: str):
        self._stream, self._mode = stream, mode
        self._stage, self._total, self._done = "", 0, 0
        self._started = self._drawn = time.monotonic()
        self._width = 0

    @classmethod
    def on_stderr(cls) -> Progress:
        """The mode that suits the surroundings: `CI` in the environment silences it."""
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            return cls(sys.stderr, "silent")
        return cls(sys.stderr, "bar" if sys.stderr.isatty() else "lines")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def __call__(self, text: str) -> None:
        """Announce `text` as the new stage; this is what library functions call."""
        self.stage(text)

    def stage(self, text: str, total: int = 0) -> None:
        """Begin a stage of `total` steps; 0 when the number is not known."""
        self._finish()
        self._stage, self._total, self._done = text, total, 0
        self._started = self._drawn = time.monotonic()
        if self._mode == "lines":
            self._stream.write(f"{text}\n")
            self._stream.flush()
        elif self._mode == "bar":
            self._draw()

    def advance(self, steps: int = 1) -> None:
        """Count steps of the current stage."""
        self._done += steps
        if self._mode == "bar" and time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        spent = f"{self._drawn - self._started:.0f} s"
        if self._total:
            filled = min(_BAR, _BAR * self._done // self._total)
            counted = f"[{'#' * filled}{'.' * (_BAR - filled)}] {self._done}/{self._total}"
        else:
            counted = str(self._done) if self._done else ""
        line = "  ".join(part for part in (self._stage, counted, spent) if part)
        self._stream.write("\r" + line.ljust(self._width))
        self._width = len(line)
        self._stream.flush()

    def _finish(self) -> None:
        if self._mode == "bar" and self._stage:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
        self._stage = ""
