"""TensorFlow Lite Micro: the flatbuffer of `tflite` in the interpreter of microcontrollers, on this machine.

Its kernels are portable C, so their time here says little about a microcontroller. Its memory does not depend on the
machine: the arena that its allocator plans is the memory that the model needs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.protocol import (
    Artifact,
    Capabilities,
    KernelTime,
    LegalityReport,
    Session,
    TargetOptions,
)

if TYPE_CHECKING:
    from sartor.backends.legality import Rules
    from sartor.ir.program import Program


class TfliteMicroBackend:
    """Backend `tflite-micro`. See `protocol.Backend` for the methods."""

    name = "tflite-micro"

    def capabilities(self) -> Capabilities:
        """Precisions and version."""
        from sartor.backends.tflite_micro import legality

        return legality.capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Always 1: the reference kernels know no vectors."""
        return 1

    def rules(self) -> Rules:
        """Tables of `legality.RULES`."""
        from sartor.backends.tflite_micro import legality

        return legality.RULES

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        from sartor.backends.tflite_micro import legality

        return legality.check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """Functions of the `sartor` domain inlined."""
        from sartor.backends.tflite import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.tflite`, and the size of its arena in the metadata: `arena_bytes`."""
        from sartor.backends.tflite_micro import lower

        return lower.lower(program, folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """An interpreter whose arena has the planned size."""
        from sartor.backends.tflite_micro import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model: loaded, converted and run in this process."""
        from sartor.backends.tflite_micro import lower, run

        return run.from_content(lower.compile_model(model, options), options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """One entry for the whole model: the interpreter tells no times of operators."""
        from sartor.backends.tflite_micro import measure

        return measure.profile(artifact, options, runs)
