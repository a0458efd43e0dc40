"""Engines on this machine's GPU. Written without one, and untested but for a stand-in driver and runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends.artifact import check_inputs, concrete_shapes, verify_files
from sartor.backends.protocol import Artifact, Session, TargetOptions, TensorSpec, require_precision
from sartor.backends.tensorrt import builder, cuda, legality
from sartor.backends.tensorrt.settings import FLAVOURS, Settings
from sartor.errors import BackendError, UsageError


class TensorRTSession(Session):
    """One execution context of one engine, with a stream and its memory on the GPU."""

    def __init__(self, vendor: builder.Vendor, engine: bytes, gpu: cuda.Gpu, precision: str):
        trt = vendor.module
        self.device = cuda.Device(gpu)
        with self.device.current():
            runtime = trt.Runtime(vendor.logger)
            self.engine = runtime.deserialize_cuda_engine(engine)
            if self.engine is None:
                raise vendor.failed(f"load the engine on '{gpu.name}' ({gpu.compute_capability})")
            self.context = self.engine.create_execution_context()
        if self.context is None:
            raise vendor.failed("create an execution context; see whether the GPU has enough memory left")
        self.vendor = vendor
        self._runtime = runtime  # the engine does not keep it
        specs: dict[bool, list[TensorSpec]] = {True: [], False: []}
        self._address: dict[str, int] = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self.engine.get_tensor_dtype(name)))
            shape = tuple(int(d) for d in self.engine.get_tensor_shape(name))
            specs[self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT].append(
                TensorSpec(name, dtype.name, shape)
            )
            self._address[name] = self.device.allocate(int(np.prod(shape)) * dtype.itemsize)
            if not self.context.set_tensor_address(name, self._address[name]):
                raise vendor.failed(f"bind '{name}'")
        self.inputs = tuple(specs[True])
        self._outputs = tuple(specs[False])
        self.settings: Mapping[str, Any] = {
            "device": gpu.name,
            "compute_capability": gpu.compute_capability,
            "runtime": vendor.version,
            "precision": precision,
            "tf32": False,
            "streams": 1,
            "timed": "inference on data that is on the GPU, until the stream is done; no copies",
        }

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. See `protocol.Session.run`."""
        return self.computed(self.prepare(inputs))

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Copy the inputs to the GPU once, so that only inference is timed."""
        self._write(inputs)
        return self._once

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes. See `protocol.Session.computed`."""
        once()
        results = {}
        for spec in self._outputs:
            results[spec.name] = np.empty([int(d) for d in spec.shape], spec.dtype)
            self.device.read(self._address[spec.name], results[spec.name])
        return results

    def _write(self, inputs: Mapping[str, np.ndarray]) -> None:
        check_inputs(self.inputs, {}, inputs)
        for name, array in inputs.items():
            self.device.write(self._address[name], np.ascontiguousarray(array))

    def _once(self) -> None:
        with self.device.current():
            started = self.context.execute_async_v3(self.device.stream)
        if not started:
            raise self.vendor.failed("run the engine")
        self.device.wait()

    def __del__(self) -> None:
        # The context before the engine, the engine before the runtime: the vendor asks for it.
        self.context = self.engine = self._runtime = None
        device = getattr(self, "device", None)
        if device is not None:
            device.close()


def load(artifact: Artifact, options: TargetOptions) -> TensorRTSession:
    """A session on the engine of an artifact that fits a GPU of this machine.

    Raises:
        UsageError: precision or shapes; the vendor's package is not installed.
        BackendError: the files were changed; there is no GPU, or none of a compute capability with an engine;
            TensorRT refuses the engine.
    """
    require_precision(legality.NAME, legality.PRECISIONS, options)
    if options.precision != artifact.precision:
        raise UsageError(
            f"The artifact was lowered for precision '{artifact.precision}', not '{options.precision}'; its engines "
            f"compute in nothing else. Ask for '{artifact.precision}', or lower the model again."
        )
    verify_files(artifact)
    concrete_shapes(artifact.inputs, options.shapes)
    engines = {entry["compute_capability"]: entry["file"] for entry in artifact.metadata["engines"]}
    gpu = cuda.fitting(tuple(engines))
    vendor = builder.Vendor(FLAVOURS[artifact.metadata["flavour"]])
    if vendor.version != artifact.metadata["runtime"]:
        raise BackendError(
            f"The engines are of '{artifact.metadata['runtime']}', and '{vendor.version}' is installed; an engine "
            "runs on the version that built it. Install that version, or lower the model again."
        )
    engine = (artifact.folder / engines[gpu.compute_capability]).read_bytes()
    return TensorRTSession(vendor, engine, gpu, artifact.precision)


def compile_model(model: bytes, options: TargetOptions, settings: Settings) -> TensorRTSession:
    """A session on serialized ONNX of fixed shapes, built for this machine's GPU. Raises as `load`."""
    require_precision(legality.NAME, legality.PRECISIONS, options)
    flavour = settings.chosen()
    gpu = cuda.fitting(flavour.compute_capabilities)
    vendor = builder.Vendor(flavour)
    with tempfile.TemporaryDirectory(prefix="sartor-tensorrt-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(_at(model, options))
        engine, _ = builder.Parsed(vendor, path).build(
            gpu.compute_capability if flavour.ahead_of_time else None
        )
    return TensorRTSession(vendor, engine, gpu, options.precision)


def _at(model: bytes, options: TargetOptions) -> bytes:
    """The model with the shapes of its inputs written down."""
    import onnx

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:
        raise BackendError(f"The model bytes are not ONNX: {error}") from error
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = options.shapes.get(value.name, ())
        for dim, size in zip(dims, shape, strict=False):
            dim.dim_value = size
        if value.name not in weights and any(not dim.HasField("dim_value") for dim in dims):
            raise UsageError(
                f"Input '{value.name}' has no fixed shape, and TensorRT engines are built for one. Give it with "
                f"--shape {value.name}=1,3,224,224."
            )
    serialized: bytes = proto.SerializeToString()
    return serialized
