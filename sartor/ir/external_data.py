"""External data of a model: read when needed, hashed as if it were in the model's own file.

A path has been checked before it comes here (`sartor.ir.onnx_file`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir import protos, serialise
from sartor.ir.deferred import CHUNK_BYTES, SMALLEST_BYTES, deferred

_HELD_FILES = 64  # descriptors are few; a model may have a file for every weight


class DataFile:
    """One file of external data.

    Held open, it stays readable when its path is replaced or removed. A change of its contents is an error.
    """

    def __init__(self, path: Path, *, hold: bool):
        self.path = path
        self._descriptor: int | None = None
        try:
            descriptor = self._open()
        except OSError as error:
            raise ModelError(f"External data file '{path.name}' cannot be read: {error.strerror}.") from error
        self._identity = _identity(descriptor)
        if hold:
            self._descriptor = descriptor
        else:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """A read-only view of a memory map, which lasts as long as the view."""
        count = math.prod(shape)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        with self._opened() as descriptor:
            mapped = mmap.mmap(
                descriptor, count * dtype.itemsize + skip, access=mmap.ACCESS_READ, offset=offset - skip
            )
        return np.frombuffer(mapped, dtype=dtype, count=count, offset=skip).reshape(tuple(shape))

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """The bytes of a part of the file."""
        with self._opened() as descriptor:
            while length:
                chunk = os.pread(descriptor, min(length, CHUNK_BYTES), offset)
                if not chunk:
                    raise ModelError(f"External data file '{self.path.name}' ended early; it was changed.")
                offset, length = offset + len(chunk), length - len(chunk)
                yield chunk

    def _open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = self._descriptor
        try:
            descriptor = self._open() if descriptor is None else descriptor
        except OSError as error:
            raise ModelError(
                f"External data file '{self.path.name}' cannot be read: {error.strerror}."
            ) from error
        try:
            if _identity(descriptor) != self._identity:
                raise ModelError(
                    f"External data file '{self.path.name}' was changed after the model was loaded. Load it again."
                )
            yield descriptor
        finally:
            if descriptor != self._descriptor:
                os.close(descriptor)


class ExternalData:
    """All files of external data of one model, by location."""

    def __init__(self, files: Mapping[str, Path]):
        hold = len(files) <= _HELD_FILES
        self._files = {location: DataFile(path, hold=hold) for location, path in files.items()}

    def sha256(self, proto: onnx.ModelProto) -> str:
        """SHA-256 of the model's bytes if all weights of its graph were in its own file."""
        shell = onnx.ModelProto()
        shell.CopyFrom(proto)
        shell.graph.ClearField("initializer")
        parts = [self._weights(tensor) for tensor in proto.graph.initializer]
        others = [
            tensor for tensor in protos.tensors(shell) if _is_external(tensor)
        ]  # of bodies and attributes

        def chunks() -> Iterator[bytes | memoryview]:
            yield from serialise.single_file(shell, parts)[1]
            for tensor in others:
                yield from self._weights(tensor).chunks()

        return serialise.sha256(chunks())

    def _weights(self, tensor: onnx.TensorProto) -> serialise.Weights:
        header = onnx.TensorProto()
        header.CopyFrom(tensor)
        header.ClearField("raw_data")
        if not _is_external(tensor):
            return serialise.Weights(header, len(tensor.raw_data), lambda: iter([tensor.raw_data]))
        for field in ("external_data", "data_location"):
            header.ClearField(field)
        entries = _entries(tensor)
        size = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
        file, offset = self._files[entries["location"]], int(entries.get("offset", 0))
        return serialise.Weights(header, size, lambda: file.chunks(offset, size))

    def attach(self, model: ir.Model) -> None:
        """Replace references to files by arrays, or for large tensors by tensors that read them when needed."""
        graphs = [model.graph, *model.graph.subgraphs()]
        graphs += [graph for function in model.functions.values() for graph in function.subgraphs()]
        for graph in graphs:
            for value in graph.initializers.values():
                value.const_value = self._attached(value.const_value)
        for node in _all_nodes(model):
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(
                    attribute.value, ir.ExternalTensor
                ):
                    node.attributes[name] = ir.AttrTensor(name, self._attached(attribute.value))
                elif attribute.type == ir.AttributeType.TENSORS:
                    tensors = [self._attached(t) for t in attribute.value]
                    node.attributes[name] = ir.AttrTensors(name, tensors)

    def _attached(self, tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        file = self._files[os.fspath(tensor.location)]
        shape, dtype = tuple(int(d) for d in tensor.shape), tensor.dtype
        offset = tensor.offset or 0
        if tensor.nbytes >= SMALLEST_BYTES and dtype.bitwidth >= 8:
            numpy_type = dtype.numpy()
            return deferred(tensor.name, shape, numpy_type, lambda: file.array(offset, shape, numpy_type))
        proto = onnx.TensorProto(name=tensor.name, data_type=dtype.value, dims=shape)
        proto.raw_data = b"".join(file.chunks(offset, tensor.nbytes))
        return ir.serde.deserialize_tensor(proto)


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
