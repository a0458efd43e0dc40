"""Sessions of the FX twin in float64."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.backends.reference import legality
from sartor.errors import BackendError, ModelError
from sartor.ir import onnx_file
from sartor.ir.program import Program, Source


class ReferenceSession(Session):
    """One twin; outputs have the element types of the program."""

    def __init__(self, runner: Any, inputs: tuple[TensorSpec, ...], options: TargetOptions):
        self._runner = runner
        self._threads = options.threads
        self._fixed = concrete_shapes(inputs, options.shapes)
        self._types = {v.name: v.dtype.numpy() for v in runner.program.graph.outputs if v.dtype is not None}
        self.inputs = inputs
        self.settings = {
            "device": "CPU",
            "compute_type": "float64",
            "threads": options.threads,
            "denormals": "kept",
            "input_shapes": {s.name: list(options.shapes.get(s.name, s.shape)) for s in inputs},
        }

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        return self.computed(self.prepare(inputs))

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Convert the inputs once, so that only the computation is timed."""
        import torch

        from sartor.ir.fx import to_tensor

        check_inputs(self.inputs, self._fixed, inputs)
        tensors = [to_tensor(inputs[name], torch.float64) for name in self._runner.info.inputs]

        def once() -> object:
            with computing(self._threads):
                return self._run(tensors)

        return once

    def computed(self, once: Callable[[], Any]) -> dict[str, np.ndarray]:
        """What one call of `once` computes, in the program's types. See `protocol.Session.computed`."""
        from sartor.ir.fx import to_array

        return {name: to_array(tensor).astype(self._types[name]) for name, tensor in once().items()}

    def _run(self, tensors: list[Any]) -> object:
        try:
            return self._runner(tensors)
        except ModelError as error:  # the inputs keep the contract, so that it is not the caller's mistake
            raise BackendError(str(error)) from error


@contextlib.contextmanager
def computing(threads: int) -> Iterator[None]:
    """Without gradients, on so many threads; the caller's own number is back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def load(artifact: Artifact, options: TargetOptions) -> ReferenceSession:
    """A session on an artifact.

    Raises:
        UsageError: precision or shapes.
        BackendError: the files were changed, or the twin cannot be built.
    """
    from sartor.ir.fx_run import Runner

    return session(artifact, options, Runner)


def session(artifact: Artifact, options: TargetOptions, runner: Callable[..., Any]) -> ReferenceSession:
    """As `load`, with `runner(program, dtype)` in place of the twin's own."""
    require_precision(legality.NAME, legality.PRECISIONS, options)
    verify_files(artifact)
    require_lowered_for(artifact, options)
    return _session(artifact.main_file, {**artifact.shapes}, artifact.inputs, options, runner)


def compile_model(model: bytes, options: TargetOptions) -> ReferenceSession:
    """A session on serialized ONNX. Raises as `load`."""
    from sartor.ir.fx_run import Runner

    require_precision(legality.NAME, legality.PRECISIONS, options)
    with tempfile.TemporaryDirectory(prefix="sartor-reference-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        return _session(path, dict(options.shapes), None, options, Runner)


def _session(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    inputs: tuple[TensorSpec, ...] | None,
    options: TargetOptions,
    runner: Callable[..., Any],
) -> ReferenceSession:
    import torch

    try:
        contents = onnx_file.read(path, None, onnx_file.Limits())
        source = Source("onnx", path.name, contents.sha256)
        program = Program(contents.model, source=source, input_shapes=shapes)
        specs = inputs if inputs is not None else tuple(_spec(v) for v in program.graph.inputs)
        made = runner(program, torch.float64)
    except ModelError as error:
        raise BackendError(f"The reference cannot run the model. {error}") from error
    return ReferenceSession(made, specs, options)


def _spec(value: Any) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise ModelError(f"Input '{value.name}' has no declared type or rank.")
    dims = tuple(dim if isinstance(dim, int) else (dim.value or "") for dim in value.shape)
    return TensorSpec(value.name or "", value.dtype.numpy().name, dims)
