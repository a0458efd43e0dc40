"""TensorRT. Artifact: one engine per compute capability, the ONNX file they were built from, a record of its layers.

Two flavours behind one name. `tensorrt_rtx` builds engines for named compute capabilities on a machine without a
GPU; the standard `tensorrt`, used where it is installed, builds for the GPU of the machine. Both are under their
vendor's proprietary licence, which is why they are an extra. See docs/adr/0009.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sartor.backends.folder import FolderBackend
from sartor.backends.protocol import Artifact, Capabilities, LegalityReport, Session, TargetOptions
from sartor.backends.tensorrt.settings import Settings

if TYPE_CHECKING:
    from sartor.backends.legality import Rules
    from sartor.ir.program import Program

__all__ = ["Settings", "TensorRTBackend"]


class TensorRTBackend(FolderBackend):
    """Backend `tensorrt`. An artifact has `model.smNN.engine` per compute capability, `model.onnx` and `layers.json`.

    Other settings are another target: make an instance of your own and register it under the entry-point group
    `sartor.backends`, `board = "their_package:board"` with `board = TensorRTBackend(Settings(...), name="board")`.

    Args:
        settings: compute capabilities, flavour, surgery, timing cache.
        name: under which the instance is registered.
    """

    package = __name__
    reserves_address_space = True

    def __init__(self, settings: Settings | None = None, name: str = "tensorrt"):
        self.settings = settings or Settings()
        self.name = name

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid, version, and why engines do not run on this machine."""
        from sartor.backends.tensorrt import legality

        return legality.capabilities(self.settings, self.name)

    def rules(self) -> Rules:
        """The table of rules of these settings."""
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
        """Write the engines, the ONNX file that they were built from, and the record of its layers."""
        from sartor.backends.tensorrt import lower

        return lower.lower(program, folder, options, self.settings, self.name)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model, built for this machine's GPU."""
        from sartor.backends.tensorrt import run

        return run.compile_model(model, options, self.settings)
