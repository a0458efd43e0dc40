"""Compiled models of OpenVINO's CPU device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.backends import telemetry
from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.openvino import legality
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.errors import BackendError

_KEPT_SHAPES = 4

Shapes = Mapping[str, tuple[Any, ...]]


class OpenVinoSession(Session):
    """One infer request of one compiled model; of a quantized one with free sizes, one for each set of shapes.

    With a free batch, OpenVINO 2026.4.1 computes quantized transformers otherwise than at a fixed one (ViT-Tiny: a
    relative error of 0.37 where it is 0.06), so these are compiled for the shapes that come, the last few kept.

    Args:
        compile_at: compiles the model at these shapes, in which a string is a free size.
        shapes: that it is compiled at first.
        inputs: input contract.
        outputs: names, in the order of the model.
        fixed: sizes of symbols that the session is specialised for.
        precision: for the record.
        each_shape: compile anew for other shapes.
    """

    def __init__(
        self,
        compile_at: Callable[[Shapes], Any],
        shapes: Shapes,
        inputs: tuple[TensorSpec, ...],
        outputs: Callable[[Any], Sequence[str]],
        fixed: Mapping[str, int],
        precision: str,
        each_shape: bool,
    ):
        self.compiled = compile_at(shapes)
        self.inputs = inputs
        self.settings = {"precision": precision, **_record(self.compiled)}
        if each_shape:
            self.settings["compiled"] = "for each shape of its inputs"
        self._fixed = fixed
        self._compile_at = compile_at if each_shape else None
        self._prepared = self.compiled.create_infer_request()
        self._models = {_key(shapes): (self.compiled, self._prepared)}
        self._outputs = [(name, index) for index, name in enumerate(outputs(self.compiled))]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        check_inputs(self.inputs, self._fixed, inputs)
        _, request = self._model(inputs)
        try:
            request.infer(dict(inputs))
        except Exception as error:
            raise _failed("run the model", error) from error
        return self._taken(request)

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Set the input tensors once, so that only inference is timed."""
        openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
        check_inputs(self.inputs, self._fixed, inputs)
        compiled, _ = self._model(inputs)
        request = self._prepared = compiled.create_infer_request()
        # Copies: a tensor on shared memory wants it contiguous and writable.
        held = {name: np.array(array, order="C") for name, array in inputs.items()}
        for name, array in held.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def once(_keep_alive: object = held) -> object:
            # Synchronous: waiting for an asynchronous call costs 50 microseconds and as much noise.
            return request.infer(share_outputs=True)

        return once

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes. See `protocol.Session.computed`."""
        once()
        return self._taken(self._prepared)

    def _model(self, inputs: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """The compiled model for these inputs and its request."""
        if self._compile_at is None:
            (only,) = self._models.values()
            return only
        shapes = {name: array.shape for name, array in inputs.items()}
        found = self._models.pop(_key(shapes), None)
        if found is None:
            compiled = self._compile_at(shapes)
            found = (compiled, compiled.create_infer_request())
        self._models[_key(shapes)] = found  # the last to be used is the last to go
        if len(self._models) > _KEPT_SHAPES:
            del self._models[next(iter(self._models))]
        return found

    def _taken(self, request: Any) -> dict[str, np.ndarray]:
        """Outputs of a request by name. Copied: the tensors are overwritten by its next call."""
        return {name: request.get_output_tensor(i).data.copy() for name, i in self._outputs}


def load(artifact: Artifact, options: TargetOptions, **extra: Any) -> OpenVinoSession:
    """A session on an artifact; `extra` adds device properties.

    Raises:
        UsageError: precision or shapes.
        BackendError: the files were changed, or OpenVINO refuses the model.
    """
    verify_files(artifact)
    require_lowered_for(artifact, options)
    names = [spec.name for spec in artifact.outputs]
    return _session(
        str(artifact.main_file), artifact.inputs, artifact.shapes, lambda _: names, options, extra
    )


def compile_model(model: bytes, options: TargetOptions) -> OpenVinoSession:
    """A session on serialized ONNX. Raises as `load`."""
    return _session(model, None, {}, lambda compiled: _output_names(compiled, model), options, {})


def read_model(core: Any, model: str | bytes) -> Any:
    """An `openvino.Model`, with the vendor's errors translated."""
    try:
        return core.read_model(model)
    except Exception as error:
        raise _failed("read the model", error) from error


def reshape(model: Any, shapes: Mapping[str, tuple[Any, ...]]) -> None:
    """Fix input shapes; a symbol (a string) becomes a dynamic dimension."""
    openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
    wanted = {
        name: openvino.PartialShape([dim if isinstance(dim, int) else -1 for dim in shape])
        for name, shape in shapes.items()
    }
    try:
        model.reshape(wanted)
    except Exception as error:
        raise _failed("reshape the model", error) from error


def _session(
    source: str | bytes,
    inputs: tuple[TensorSpec, ...] | None,
    reference: Shapes,
    outputs: Callable[[Any], Sequence[str]],
    options: TargetOptions,
    extra: Mapping[str, Any],
) -> OpenVinoSession:
    openvino = telemetry.import_vendor("openvino", legality.REQUIREMENT)
    require_precision(legality.NAME, legality.supported_precisions(), options)
    core = openvino.Core()
    model = read_model(core, source)
    specs = inputs if inputs is not None else _specs(model)
    fixed = concrete_shapes(specs, options.shapes)
    shapes = {spec.name: options.shapes.get(spec.name, spec.shape) for spec in specs}
    free = any(isinstance(dim, str) for shape in shapes.values() for dim in shape)
    each_shape = options.precision == "int8" and free
    if each_shape:
        shapes = {
            name: reference.get(name, tuple(1 if isinstance(dim, str) else dim for dim in shape))
            for name, shape in shapes.items()
        }
    properties = {
        "INFERENCE_PRECISION_HINT": legality.computed_in(options.precision),
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads would share one core with whatever else runs there.
        "ENABLE_CPU_PINNING": False,
        "CPU_DENORMALS_OPTIMIZATION": options.flush_denormals,
        **extra,
    }

    def compile_at(wanted: Shapes) -> Any:
        if any(
            model.input(name).partial_shape != openvino.PartialShape(_dynamic(shape))
            for name, shape in wanted.items()
        ):
            reshape(model, wanted)
        try:
            return core.compile_model(model, "CPU", properties)
        except Exception as error:
            raise _failed("compile the model", error) from error

    return OpenVinoSession(compile_at, shapes, specs, outputs, fixed, options.precision, each_shape)


def _output_names(compiled: Any, source: str | bytes) -> list[str]:
    """Names of a model that was given as ONNX; what only passes a value on leaves both names on one port."""
    if isinstance(source, bytes) and any(len(port.get_names()) > 1 for port in compiled.outputs):
        import onnx

        return [value.name for value in onnx.load_from_string(source).graph.output]
    return [port.get_any_name() for port in compiled.outputs]


def _key(shapes: Shapes) -> tuple[Any, ...]:
    return tuple(tuple(shapes[name]) for name in sorted(shapes))


def _dynamic(shape: tuple[Any, ...]) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in shape]


def _record(compiled: Any) -> dict[str, Any]:
    def read(key: str) -> str:
        return str(compiled.get_property(key))

    return {
        "device": "CPU",
        "precision_hint": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        "streams": read("NUM_STREAMS"),
        "pinning": read("ENABLE_CPU_PINNING"),
        "denormals": "flushed to zero" if compiled.get_property("CPU_DENORMALS_OPTIMIZATION") else "kept",
    }


def _specs(model: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for index, port in enumerate(model.inputs):
        dims = tuple(
            dim.get_length() if dim.is_static else f"?{index}_{axis}"
            for axis, dim in enumerate(port.partial_shape)
        )
        specs.append(TensorSpec(port.get_any_name(), np.dtype(port.element_type.to_dtype()).name, dims))
    return tuple(specs)


def _failed(what: str, error: Exception) -> BackendError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    failure = BackendError(f"OpenVINO could not {what}: {' '.join(lines[:3])[:500]}")
    failure.add_note(str(error)[:4000])
    return failure
