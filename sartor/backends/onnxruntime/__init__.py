"""ONNX Runtime, CPU provider: the embedded default target. Artifact: one `.onnx` file."""

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


class OnnxRuntimeBackend:
    """Backend `onnxruntime`. See `protocol.Backend` for the methods."""

    name = "onnxruntime"

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid and version."""
        from sartor.backends.onnxruntime import legality

        return legality.capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count that costs time."""
        from sartor.backends.onnxruntime import legality

        return legality.channel_grid(op_type, precision)

    def rules(self) -> Rules:
        """Tables of `legality.rules`."""
        from sartor.backends.onnxruntime import legality

        return legality.rules()

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        from sartor.backends.onnxruntime import legality

        return legality.check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """Activation functions that a following QuantizeLinear does as well are removed."""
        from sartor.backends.onnxruntime import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.onnx`, symbolic batch kept."""
        from sartor.backends.onnxruntime import lower

        return lower.lower(program, folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A session; `options.shapes` fixes symbolic dimensions by free-dimension overrides."""
        from sartor.backends.onnxruntime import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized model."""
        from sartor.backends.onnxruntime import run

        return run.compile_model(model, options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Kernel times from ONNX Runtime's own profiler."""
        from sartor.backends.onnxruntime import measure

        return measure.profile(artifact, options, runs)
