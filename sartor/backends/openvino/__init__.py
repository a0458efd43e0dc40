"""OpenVINO, CPU device. Artifact: OpenVINO IR (`.xml` and `.bin`) at the reference shapes."""

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


class OpenVinoBackend:
    """Backend `openvino`. See `protocol.Backend` for the methods."""

    name = "openvino"

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid and version."""
        from sartor.backends.openvino import legality

        return legality.capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count that costs time."""
        from sartor.backends.openvino import legality

        return legality.channel_grid(op_type, precision)

    def rules(self) -> Rules:
        """Tables of `legality.rules`."""
        from sartor.backends.openvino import legality

        return legality.rules()

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        from sartor.backends.openvino import legality

        return legality.check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """Functions of the `sartor` domain inlined: OpenVINO cannot convert them."""
        from sartor.backends.openvino import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.xml` and `model.bin`."""
        from sartor.backends.openvino import lower

        return lower.lower(program, folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A compiled model at `options.shapes`, or as symbolic as the contract without them."""
        from sartor.backends.openvino import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model."""
        from sartor.backends.openvino import run

        return run.compile_model(model, options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Kernel times from OpenVINO's performance counters."""
        from sartor.backends.openvino import measure

        return measure.profile(artifact, options, runs)
