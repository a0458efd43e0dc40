"""TensorRT. Artifact: one engine per compute capability, the ONNX file they were built from, a record of its layers.

Two flavours behind one name. `tensorrt_rtx` builds engines for named compute capabilities on a machine without a
GPU; the standard `tensorrt`, used where it is installed, builds for the GPU of the machine. Both are under their
vendor's proprietary licence, which is why they are an extra. See docs/adr/0009.
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
from sartor.backends.tensorrt.settings import Settings

if TYPE_CHECKING:
    from sartor.backends.legality import Rules
    from sartor.ir.program import Program

__all__ = ["Settings", "TensorRTBackend"]


class TensorRTBackend:
    """Backend `tensorrt`. See `protocol.Backend` for the methods.

    Other settings are another target: make an instance of your own and register it under the entry-point group
    `sartor.backends`, `board = "their_package:board"` with `board = TensorRTBackend(Settings(...), name="board")`.

    Args:
        settings: compute capabilities, flavour, surgery, timing cache.
        name: under which the instance is registered.
    """

    def __init__(self, settings: Settings | None = None, name: str = "tensorrt"):
        self.settings = settings or Settings()
        self.name = name

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid, version, and why engines do not run on this machine."""
        from sartor.backends.tensorrt import legality

        return legality.capabilities(self.settings, self.name)

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count that costs time."""
        from sartor.backends.tensorrt import legality

        return legality.channel_grid(op_type, precision)

    def rules(self) -> Rules:
        """Tables of `legality.rules_for`."""
        from sartor.backends.tensorrt import legality

        return legality.rules_for(self.settings)

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program; no vendor package is imported."""
        from sartor.backends.tensorrt import legality

        return legality.check(self.legalize(program), options, self.settings)

    def legalize(self, program: Program) -> Program:
        """Dialect functions inlined, what the parser spells differently rewritten, then the user's surgery."""
        from sartor.backends.tensorrt import legalize

        return legalize.legalize(program, self.settings)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.smNN.engine` per compute capability, `model.onnx` and `layers.json`."""
        from sartor.backends.tensorrt import lower

        return lower.lower(program, folder, options, self.settings, self.name)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """An execution context of the engine for this machine's GPU."""
        from sartor.backends.tensorrt import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model, built for this machine's GPU."""
        from sartor.backends.tensorrt import run

        return run.compile_model(model, options, self.settings)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Layer times from TensorRT's profiler."""
        from sartor.backends.tensorrt import measure

        return measure.profile(artifact, options, runs)
