"""Instruments: what happens between passes, kept apart from the passes themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import UsageError
from sartor.ir.files import write_all, write_atomic
from sartor.ir.program import Batch, Program, Source
from sartor.passes.base import Context, Pass, PassResult
from sartor.versions import versions

if TYPE_CHECKING:
    from sartor.passes.pipeline import PipelineResult

REPRODUCER_SCHEMA = "sartor.reproducer/1"


@dataclasses.dataclass(frozen=True)
class Step:
    """One execution of one pass within a pipeline.

    Attributes:
        index: from 1, rounds of a repeat counted separately.
        item: the pass.
        label: name and number of the execution of this pass, e.g. `prune-channels #1`.
        remaining: pipeline text from this pass on, itself included.
        context: what the pass may look at.
    """

    index: int
    item: Pass
    label: str
    remaining: str
    context: Context


class Instrument:
    """Base of all instruments; every callback does nothing unless overridden."""

    def before_pass(self, step: Step, program: Program) -> None:
        """Called before each pass with its input."""

    def after_pass(self, step: Step, before: Program, result: PassResult) -> None:
        """Called after each pass; may raise to stop the pipeline."""

    def on_failure(self, step: Step, before: Program, error: Exception) -> None:
        """Called when the pass or an instrument's `after_pass` raised; must not raise."""


class VerifyAfterEach(Instrument):
    """Verify the program after every pass that changed it, and that its signature stayed."""

    def after_pass(self, step: Step, before: Program, result: PassResult) -> None:
        """Raise VerificationError when the result is malformed or its signature differs."""
        if result.program is before:
            return
        from sartor.ir import verify

        verify.verify_program(result.program, verify.signature(before))


class Timing(Instrument):
    """Wall-clock seconds of every pass.

    Attributes:
        rows: `(label, seconds)` in execution order; failed passes are absent.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, float]] = []
        self._started_s = 0.0

    def before_pass(self, step: Step, program: Program) -> None:
        """Start the clock."""
        self._started_s = time.perf_counter()

    def after_pass(self, step: Step, before: Program, result: PassResult) -> None:
        """Stop the clock."""
        self.rows.append((step.label, time.perf_counter() - self._started_s))


class DumpOnChange(Instrument):
    """Write a text dump of the input and of the program after every pass that changed it.

    Files are `000-input.txt`, `001-prune-channels.txt`, …; the number is the step's index.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def before_pass(self, step: Step, program: Program) -> None:
        """Dump the pipeline's input before the first pass."""
        if step.index == 1:
            self._dump("000-input", program)

    def after_pass(self, step: Step, before: Program, result: PassResult) -> None:
        """Dump the result if it changed."""
        if result.modified:
            self._dump(f"{step.index:03d}-{step.item.name}", result.program)

    def _dump(self, name: str, program: Program) -> None:
        from sartor.ir.text import to_text

        write_atomic(self.folder / f"{name}.txt", to_text(program).encode())


class ReproducerOnFailure(Instrument):
    """On any failure, write the failing pass's input and the remaining pipeline, so that it can be replayed.

    A reproducer is a folder `reproducer-PASS-HASH` with `input.onnx`, `pipeline.txt` and `error.json`; it
    appears whole or not at all, and the same failure writes the same folder. `replay` runs it again.

    Attributes:
        written: folders written so far.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.written: list[Path] = []

    def on_failure(self, step: Step, before: Program, error: Exception) -> None:
        """Write the reproducer and add its path to the exception."""
        try:
            path = self._write(step, before, error)
        except Exception as problem:  # the original failure must reach the user in any case
            error.add_note(f"A reproducer could not be written: {type(problem).__name__}: {problem}.")
            return
        self.written.append(path)
        error.add_note(
            f"A reproducer was written to '{path}'; replay it with sartor.passes.instruments.replay."
        )

    def _write(self, step: Step, before: Program, error: Exception) -> Path:
        files = {
            "pipeline.txt": (step.remaining + "\n").encode(),
            "error.json": (
                json.dumps(_describe(step, before, error), indent=1, sort_keys=True) + "\n"
            ).encode(),
        }
        digest = hashlib.sha256(before.sha256().encode())
        for name in sorted(files):
            digest.update(hashlib.sha256(files[name]).digest())
        target = self.folder / f"reproducer-{step.item.name}-{digest.hexdigest()[:12]}"
        if target.is_dir():
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".reproducer-"))
        try:
            before.save(temporary / "input.onnx")
            write_all({temporary / name: data for name, data in files.items()})
            temporary.chmod(0o755)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target


def _describe(step: Step, before: Program, error: Exception) -> dict[str, Any]:
    return {
        "schema": REPRODUCER_SCHEMA,
        "pass": str(step.item),
        "step": step.label,
        "error": {
            "type": type(error).__name__,
            "message": str(error),
            "notes": list(getattr(error, "__notes__", ())),
            "frames": list(_frames(error)),
        },
        "program": {
            "source": dataclasses.asdict(before.source),
            "input_shapes": {k: list(v) for k, v in before.input_shapes.items()},
            "batch": dataclasses.asdict(before.batch),
            "applied": list(before.applied),
            "left": dict(before.tail.reasons) if before.tail is not None else {},
        },
        "context": {"seed": step.context.seed, "keep": list(step.context.keep)},
        "versions": versions(),
    }


def _frames(error: Exception) -> Iterator[str]:
    """`module:line in function` per frame: file paths of the author's machine stay out."""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        yield f"{frame.f_globals.get('__name__', '?')}:{traceback.tb_lineno} in {frame.f_code.co_name}"
        traceback = traceback.tb_next


def read_reproducer(folder: str | os.PathLike[str]) -> tuple[Program, str, Context]:
    """The program, remaining pipeline text and context (seed and keep only) of a reproducer.

    Raises:
        UsageError: the folder is not a complete reproducer.
    """
    from sartor.ir.batch import fix_signature
    from sartor.ir.onnx_file import Limits, read
    from sartor.ir.tail import detach

    root = Path(folder)
    try:
        document = json.loads((root / "error.json").read_text(encoding="utf-8"))
        if document["schema"] != REPRODUCER_SCHEMA:
            raise ValueError(f"schema '{document['schema']}'")
        model = read(root / "input.onnx", None, Limits()).model
        text = (root / "pipeline.txt").read_text(encoding="utf-8").strip()
        stored = document["program"]
        batch = stored["batch"]
        left = detach(model, stored["left"]) if stored.get("left") else None
        program = Program(
            model,
            source=Source(**stored["source"]),
            input_shapes={k: tuple(v) for k, v in stored["input_shapes"].items()},
            batch=Batch(batch["symbolic"], tuple(batch["inputs"]), batch["reason"]),
            applied=tuple(stored["applied"]),
            tail=left,
        )
        if left is not None:
            fix_signature(program)
        context = Context(seed=document["context"]["seed"], keep=tuple(document["context"]["keep"]))
    except Exception as error:
        raise UsageError(
            f"The folder '{root}' is not a complete reproducer of schema '{REPRODUCER_SCHEMA}': "
            f"{type(error).__name__}: {error}."
        ) from error
    return program, text, context


def replay(folder: str | os.PathLike[str], context: Context | None = None) -> PipelineResult:
    """Run a reproducer again; raises what failed before, unless it has been repaired.

    Args:
        folder: the folder that `ReproducerOnFailure` wrote.
        context: replaces the stored one; needed by passes that read data or the original, which are never stored.
    """
    from sartor.passes.pipeline import Pipeline

    program, text, stored = read_reproducer(folder)
    return Pipeline.parse(text).run(program, context if context is not None else stored)
