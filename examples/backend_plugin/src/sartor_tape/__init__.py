"""The backend `tape`. Sartor constructs the class without arguments and keeps no state in it.

Vendor imports belong into functions: Sartor lists its targets without loading a single one of them. Here
numpy is the vendor package, and each method imports the file that does the work.
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


class TapeBackend:
    """Backend `tape`. See `sartor.backends.protocol.Backend` for what each method promises."""

    name = "tape"

    def capabilities(self) -> Capabilities:
        """Version, precisions, limits: what `sartor targets` shows."""
        from sartor_tape import legality

        return legality.capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """numpy takes any width. A device with 32 lanes answers 32: pruning then cuts in steps of 32."""
        return 1

    def rules(self) -> Rules:
        """The table of rules; `legality` applies it, and support tables are generated from it."""
        from sartor_tape import legality

        return legality.RULES

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to what the compiler would see: the legalized program."""
        from sartor_tape import legality

        return legality.check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """BatchNormalization folded into the convolution before it."""
        from sartor_tape import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.tape` and `weights.bin`."""
        from sartor_tape import lower

        return lower.lower(self.legalize(program), folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A session on an artifact."""
        from sartor_tape import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model; thousands of small ones are timed for the cost model."""
        from sartor_tape import run

        return run.compile_model(model, options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Time per instruction."""
        from sartor_tape import measure

        return measure.profile(artifact, options, runs)
