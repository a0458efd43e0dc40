"""Sessions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends import telemetry
from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.onnxruntime import legality
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.errors import BackendError


class OnnxRuntimeSession(Session):
    """One `onnxruntime.InferenceSession` on the CPU provider."""

    def __init__(self, session: Any, inputs: tuple[TensorSpec, ...], fixed: Mapping[str, int], settings: Any):
        self._session = session
        self._binding: Any = None
        self._fixed = fixed
        self._outputs = [output.name for output in session.get_outputs()]
        self.inputs = inputs
        shapes = {value.name: value.shape for value in session.get_inputs()}
        self.settings = {**settings, "input_shapes": shapes}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        check_inputs(self.inputs, self._fixed, inputs)
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise _failed("run the model", error) from error
        return dict(zip(self._outputs, results, strict=True))

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Bind inputs and outputs once, so that only inference is timed."""
        check_inputs(self.inputs, self._fixed, inputs)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.asarray(array, order="C"))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._binding = binding
        session = self._session
        return lambda: session.run_with_iobinding(binding)

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes. See `protocol.Session.computed`."""
        once()
        return dict(zip(self._outputs, self._binding.copy_outputs_to_cpu(), strict=True))


def load(artifact: Artifact, options: TargetOptions) -> OnnxRuntimeSession:
    """A session on an artifact.

    Raises:
        UsageError: precision or shapes.
        BackendError: the files were changed, or ONNX Runtime refuses the model.
    """
    verify_files(artifact)
    require_lowered_for(artifact, options)
    options_of_session, fixed, settings = session_options(artifact.inputs, options)
    session = create(str(artifact.main_file), options_of_session)
    return OnnxRuntimeSession(session, artifact.inputs, fixed, settings)


def compile_model(model: bytes, options: TargetOptions) -> OnnxRuntimeSession:
    """A session on serialized ONNX. Raises as `load`."""
    inputs = _input_specs(model)
    options_of_session, fixed, settings = session_options(inputs, options)
    return OnnxRuntimeSession(create(model, options_of_session), inputs, fixed, settings)


def session_options(
    inputs: tuple[TensorSpec, ...], options: TargetOptions
) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """Session options with everything explicit, the sizes they fix, and their record."""
    require_precision(legality.NAME, legality.PRECISIONS, options)
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    fixed = concrete_shapes(inputs, options.shapes)
    made = runtime.SessionOptions()
    made.intra_op_num_threads = options.threads
    made.inter_op_num_threads = 1
    made.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    made.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    made.log_severity_level = 3  # warnings about harmless layouts would fill the log of a crash
    made.add_session_config_entry("session.set_denormal_as_zero", str(int(options.flush_denormals)))
    for symbol, size in fixed.items():
        made.add_free_dimension_override_by_name(symbol, size)
    settings = {
        "provider": "CPUExecutionProvider",
        "intra_op_threads": made.intra_op_num_threads,
        "inter_op_threads": 1,
        "execution_mode": "sequential",
        "graph_optimization_level": "all",
        "denormals": "flushed to zero" if options.flush_denormals else "kept",
    }
    return made, fixed, settings


def create(model: str | bytes, session_options_made: Any) -> Any:
    """An `InferenceSession`, with the vendor's errors translated."""
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    try:
        return runtime.InferenceSession(model, session_options_made, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = f"load '{Path(model).name}'" if isinstance(model, str) else "load the model"
        raise _failed(what, error) from error


def _failed(what: str, error: Exception) -> BackendError:
    failure = BackendError(f"ONNX Runtime could not {what}: {str(error).strip().splitlines()[0][:500]}")
    failure.add_note(str(error)[:4000])
    return failure


def _input_specs(model: bytes) -> tuple[TensorSpec, ...]:
    import onnx

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:
        raise BackendError(f"The model bytes are not ONNX: {error}") from error
    weights = {tensor.name for tensor in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        specs.append(TensorSpec(value.name, dtype, dims))
    return tuple(specs)
