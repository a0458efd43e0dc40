"""Sessions of the interpreter of microcontrollers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sartor.backends.artifact import concrete_shapes, verify_files
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.backends.tflite.run import Border
from sartor.backends.tflite_micro import arena, legality


class TfliteMicroSession(Session):
    """One interpreter with an arena of its own."""

    def __init__(self, interpreter: Any, border: Border, metadata: Mapping[str, Any], threads: int):
        self.inputs = border.inputs
        self.settings = {
            "kernels": "portable reference",
            "threads": 1,
            "threads_asked_for": threads,
            "arena_bytes": metadata["arena_bytes"]["total"],
            "input_shapes": {spec.name: list(spec.shape) for spec in border.inputs},
        }
        self._interpreter = interpreter
        self._border = border
        self._order: Mapping[str, Any] = metadata["order"]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        return self.computed(self.prepare(inputs))

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The inputs' share of the arena is used again by later values, so each run begins with writing them."""
        given = self._border.given(inputs)
        order = [given[name] for name in self._order["inputs"]]
        interpreter = self._interpreter

        def once() -> object:
            for index, array in enumerate(order):
                interpreter.set_input(array, index)
            return interpreter.invoke()

        def checked() -> object:
            try:
                return once()
            except Exception as error:
                raise arena.failed("run the model", error) from error

        return checked

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes. See `protocol.Session.computed`."""
        once()
        outputs = self._order["outputs"]
        return {
            name: self._border.taken(name, self._interpreter.get_output(i)) for i, name in enumerate(outputs)
        }


def load(artifact: Artifact, options: TargetOptions) -> TfliteMicroSession:
    """A session on an artifact.

    Raises:
        UsageError: precision or shapes; tflite-micro is not installed.
        BackendError: the files were changed, or the interpreter refuses the model.
    """
    verify_files(artifact)
    require_precision(legality.NAME, legality.PRECISIONS, options)
    require_lowered_for(artifact, options)
    return _session(artifact.main_file.read_bytes(), artifact.inputs, artifact.metadata, options)


def compile_model(model: bytes, options: TargetOptions) -> TfliteMicroSession:
    """A session on a serialized ONNX model: loaded, converted and run in this process.

    Raises:
        UsageError: precision or shapes; a package is not installed.
        BackendError: the program breaks a legality rule, conversion fails, or an operator has no kernel.
    """
    from sartor.backends.tflite_micro import lower

    lowered = lower.compile_model(model, options)
    return _session(lowered.content, lowered.inputs, lowered.metadata, options)


def _session(
    content: bytes, inputs: tuple[TensorSpec, ...], metadata: Mapping[str, Any], options: TargetOptions
) -> TfliteMicroSession:
    concrete_shapes(inputs, options.shapes)
    # Recording allocations takes some memory itself, hence the larger arena.
    interpreter = arena.create(content, 2 * metadata["arena_bytes"]["total"] + (1 << 16))
    return TfliteMicroSession(interpreter, Border(inputs, metadata), metadata, options.threads)
