"""TensorFlow Lite: the FX twin through litert-torch to a flatbuffer, run by LiteRT's interpreter with XNNPACK."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sartor.backends.folder import FolderBackend
from sartor.backends.protocol import Artifact, Capabilities, LegalityReport, Session, TargetOptions

if TYPE_CHECKING:
    from sartor.backends.tflite.lower import Recipe
    from sartor.ir.program import Program


class TfliteBackend(FolderBackend):
    """Backend `tflite`. Artifacts are of the reference shapes; an equal conversion is taken from the cache."""

    name = "tflite"
    package = __name__
    channel_last_io: ClassVar[bool] = False
    """Whether image inputs and outputs of the file are channel-last; sessions keep the program's layout."""

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid and version."""
        from sartor.backends.tflite import legality

        return legality.capabilities(self.name)

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        return self._recipe().check(self.legalize(program), options)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write `model.tflite`."""
        from sartor.backends.tflite import lower

        return lower.write(program, folder, options, self._recipe())

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model: loaded, converted and run in this process."""
        from sartor.backends.tflite import lower, run

        return run.from_content(lower.convert_bytes(model, options, self._recipe()), options)

    def _recipe(self) -> Recipe:
        from sartor.backends.tflite import legality, lower

        check = functools.partial(legality.check, self.name)
        return lower.Recipe(self.name, check, channel_last=self.channel_last_io)


class ChannelLastTfliteBackend(TfliteBackend):
    """Backend `tflite-channel-last`: as `tflite`, with images channel-last at the border of the file."""

    name = "tflite-channel-last"
    channel_last_io = True
