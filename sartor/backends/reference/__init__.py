"""The FX twin in float64: what every other target is compared with. Needs no vendor. Artifact: one `.onnx` file."""

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


class ReferenceBackend:
    """Backend `reference`. See `protocol.Backend` for the methods."""

    name = "reference"

    def capabilities(self) -> Capabilities:
        """Precisions and version."""
        from sartor.backends.reference import legality

        return legality.capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Always 1: what it costs says nothing about any target."""
        from sartor.backends.reference import legality

        return legality.channel_grid(op_type, precision)

    def rules(self) -> Rules:
        """Tables of `legality.RULES`."""
        from sartor.backends.reference import legality

        return legality.RULES

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        from sartor.backends.reference import legality

        return legality.check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """The program itself."""
        from sartor.backends.reference import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.onnx`, symbolic batch kept."""
        from sartor.backends.reference import lower

        return lower.lower(program, folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A session; `options.shapes` fixes symbolic dimensions."""
        from sartor.backends.reference import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized model."""
        from sartor.backends.reference import run

        return run.compile_model(model, options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Time per node."""
        from sartor.backends.reference import measure

        return measure.profile(artifact, options, runs)
