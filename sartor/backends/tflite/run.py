"""Sessions of LiteRT's interpreter, with XNNPACK."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends import telemetry
from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.backends.tflite import legality
from sartor.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sartor.backends.tflite.lower import Lowered


class Border:
    """What stands between the program's tensors and the file's: layout, 64-bit integers in 32 bits, float16 in 32."""

    def __init__(self, inputs: tuple[TensorSpec, ...], metadata: Mapping[str, Any]):
        self.inputs = inputs
        self._turned_inputs = set(metadata["channel_last"]["inputs"])
        self._turned_outputs = set(metadata["channel_last"]["outputs"])
        self._output_types: Mapping[str, str] = metadata["outputs"]

    def given(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays as the file takes them.

        Raises:
            UsageError: names, types or shapes are wrong, or an integer does not fit 32 bits.
        """
        check_inputs(self.inputs, {}, inputs)
        return {name: self._given(name, inputs[name]) for name in inputs}

    def _given(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.int64:
            narrow = array.astype(np.int32)
            if not np.array_equal(narrow, array):
                raise UsageError(
                    f"Input '{name}' holds {int(array.flat[np.argmax(narrow != array)])}; the flatbuffer's integers "
                    "have 32 bits. Pass numbers between -2147483648 and 2147483647."
                )
            array = narrow
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        turned = np.moveaxis(array, 1, -1) if name in self._turned_inputs else array
        return np.asarray(turned, order="C")

    def taken(self, name: str, array: np.ndarray) -> np.ndarray:
        """A copy of an output, as the program declares it."""
        turned = np.moveaxis(array, -1, 1) if name in self._turned_outputs else array
        return np.array(turned, dtype=self._output_types[name], order="C", copy=True)


class TfliteSession(Session):
    """One interpreter."""

    def __init__(self, interpreter: Any, border: Border, settings: Mapping[str, Any]):
        self.inputs = border.inputs
        self.settings = settings
        self._interpreter = interpreter
        self._border = border
        signature = interpreter.get_signature_list()
        runner = interpreter.get_signature_runner(next(iter(signature)))
        self._input_index = {name: d["index"] for name, d in runner.get_input_details().items()}
        self._output_index = {name: d["index"] for name, d in runner.get_output_details().items()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        self._set(inputs)
        return self.computed(self._invoke)

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Copy the inputs into the interpreter once; it keeps them, and only inference is timed."""
        self._set(inputs)
        invoke: Callable[[], object] = self._interpreter.invoke
        return invoke

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes. See `protocol.Session.computed`."""
        once()
        # `get_tensor` copies: the next call overwrites the tensor itself.
        return {
            n: self._border.taken(n, self._interpreter.get_tensor(i)) for n, i in self._output_index.items()
        }

    def _set(self, inputs: Mapping[str, np.ndarray]) -> None:
        for name, array in self._border.given(inputs).items():
            self._interpreter.set_tensor(self._input_index[name], array)

    def _invoke(self) -> None:
        try:
            self._interpreter.invoke()
        except Exception as error:
            raise failed("run the model", error) from error


def load(artifact: Artifact, options: TargetOptions) -> TfliteSession:
    """A session on an artifact.

    Raises:
        UsageError: precision or shapes; ai-edge-litert is not installed.
        BackendError: the files were changed, or LiteRT refuses the model.
    """
    verify_files(artifact)
    require_precision(artifact.target, legality.PRECISIONS, options)
    require_lowered_for(artifact, options)
    return _session(artifact.main_file, artifact.inputs, artifact.metadata, options)


def from_content(lowered: Lowered, options: TargetOptions) -> TfliteSession:
    """A session on a conversion that is no file. Raises as `load`."""
    return _session(lowered.content, lowered.inputs, lowered.metadata, options)


def _session(
    source: Path | bytes, inputs: tuple[TensorSpec, ...], metadata: Mapping[str, Any], options: TargetOptions
) -> TfliteSession:
    concrete_shapes(inputs, options.shapes)
    module = telemetry.import_vendor("ai_edge_litert.interpreter", legality.REQUIREMENT)
    given = {"model_content": source} if isinstance(source, bytes) else {"model_path": str(source)}
    try:
        interpreter = module.Interpreter(**given, num_threads=options.threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise failed("load the model", error) from error
    settings = {
        "delegate": "XNNPACK",
        "threads": options.threads,
        "precision": options.precision,
        "denormals": "flushed to zero by XNNPACK",
        "input_shapes": {spec.name: list(spec.shape) for spec in inputs},
    }
    return TfliteSession(interpreter, Border(inputs, metadata), settings)


def failed(what: str, error: Exception) -> BackendError:
    """LiteRT's error in one sentence, the whole of it as a note."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    failure = BackendError(f"LiteRT could not {what}: {' '.join(lines[:3])[:500]}")
    failure.add_note(str(error)[:4000])
    return failure
