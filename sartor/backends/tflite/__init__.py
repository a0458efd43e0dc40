"""TensorFlow Lite: the FX twin through litert-torch to a flatbuffer, run by LiteRT's interpreter with XNNPACK."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
    from sartor.backends.tflite.lower import Recipe
    from sartor.ir.program import Program


class TfliteBackend:
    """Backend `tflite`. See `protocol.Backend` for the methods."""

    name = "tflite"
    channel_last_io: ClassVar[bool] = False
    """Whether image inputs and outputs of the file are channel-last; sessions keep the program's layout."""

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid and version."""
        from sartor.backends.tflite import legality

        return legality.capabilities(self.name)

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count that costs time."""
        from sartor.backends.tflite import legality

        return legality.channel_grid(op_type, precision, attributes)

    def rules(self) -> Rules:
        """Tables of `legality.RULES`."""
        from sartor.backends.tflite import legality

        return legality.RULES

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        from sartor.backends.tflite import legality

        return legality.check(self.name, self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """Functions of the `sartor` domain inlined."""
        from sartor.backends.tflite import legalize

        return legalize.legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.tflite` at the reference shapes; an equal conversion is taken from the cache."""
        from sartor.backends.tflite import lower

        return lower.write(program, folder, options, self._recipe())

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """An interpreter on the artifact's flatbuffer."""
        from sartor.backends.tflite import run

        return run.load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model: loaded, converted and run in this process."""
        from sartor.backends.tflite import lower, run

        return run.from_content(lower.convert_bytes(model, options, self._recipe()), options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Kernel times from LiteRT's profiler."""
        from sartor.backends.tflite import measure

        return measure.profile(artifact, options, runs)

    def _recipe(self) -> Recipe:
        from sartor.backends.tflite import legality, lower

        check = functools.partial(legality.check, self.name)
        return lower.Recipe(self.name, check, channel_last=self.channel_last_io)


class ChannelLastTfliteBackend(TfliteBackend):
    """Backend `tflite-channel-last`: as `tflite`, with images channel-last at the border of the file."""

    name = "tflite-channel-last"
    channel_last_io = True
