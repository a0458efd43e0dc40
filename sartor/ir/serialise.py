"""The bytes of a model, one tensor at a time.

Protobuf writes fields in the order of their numbers and a message behind its length, so the bytes of a
model can be given out around its weights: equal to `SerializeToString(deterministic=True)`, without a
second copy of the weights, and beyond the 2 GiB at which a protobuf in memory ends.

Reference: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from sartor.ir.deferred import CHUNK_BYTES

SINGLE_FILE_BYTES = 2**31 - 1
"""Largest protobuf that readers accept; a larger model is saved with external data."""
_ALIGNMENT = 4096  # of external tensors, so that they can be memory-mapped
_EXTERNAL_BYTES = 1024  # smaller tensors stay in the model's own file, where readers look for shapes
_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


@dataclasses.dataclass(frozen=True)
class Weights:
    """One initializer: what it is, its size in bytes, and its bytes in order, little-endian.

    Attributes:
        header: element type, shape and name.
        size: bytes of the contents.
        chunks: makes the contents.
    """

    header: onnx.TensorProto
    size: int
    chunks: Callable[[], Iterator[bytes | memoryview]]


def weights_of(name: str, tensor: ir.TensorProtocol) -> Weights:
    """The weights of one initializer of a program."""
    header = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=[int(d) for d in tensor.shape])

    def chunks() -> Iterator[bytes | memoryview]:
        data = memoryview(tensor.tobytes())
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    return Weights(header, tensor.nbytes, chunks)


def single_file(
    shell: onnx.ModelProto, weights: Sequence[Weights]
) -> tuple[int, Iterator[bytes | memoryview]]:
    """Size and bytes of a model whose graph has these initializers.

    Args:
        shell: the model without the initializers of its main graph.
        weights: those initializers, in order.
    """
    headers = [w.header.SerializeToString(deterministic=True) for w in weights]
    raws = [_prefix(_RAW_DATA, w.size) for w in weights]
    lengths = [len(h) + len(r) + w.size for h, r, w in zip(headers, raws, weights, strict=True)]
    prefixes = [_prefix(_INITIALIZER, length) for length in lengths]
    before_graph, after_graph = _around(shell, _GRAPH)
    before, after = _around(shell.graph, _INITIALIZER)
    graph_bytes = len(before) + len(after) + sum(map(len, prefixes)) + sum(lengths)
    opening = before_graph + _prefix(_GRAPH, graph_bytes) + before

    def chunks() -> Iterator[bytes | memoryview]:
        yield opening
        for prefix, header, raw, tensor in zip(prefixes, headers, raws, weights, strict=True):
            yield prefix + header + raw
            yield from tensor.chunks()
        yield after + after_graph

    return len(opening) + graph_bytes - len(before) + len(after_graph), chunks()


def with_external_data(
    shell: onnx.ModelProto, weights: Sequence[Weights], location: str
) -> tuple[bytes, Iterator[bytes | memoryview]]:
    """The bytes of a model, and those of the file `location` beside it that holds its large weights."""
    proto = onnx.ModelProto()
    proto.CopyFrom(shell)
    outside: list[tuple[int, Weights]] = []
    end = 0
    for tensor in weights:
        entry = proto.graph.initializer.add()
        entry.CopyFrom(tensor.header)
        if tensor.size < _EXTERNAL_BYTES:
            entry.raw_data = b"".join(tensor.chunks())
            continue
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        entry.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", tensor.size)):
            entry.external_data.add(key=key, value=str(value))
        outside.append((offset - end, tensor))
        end = offset + tensor.size

    def chunks() -> Iterator[bytes | memoryview]:
        for gap, tensor in outside:
            yield bytes(gap)
            yield from tensor.chunks()

    return proto.SerializeToString(deterministic=True), chunks()


def sha256(chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of bytes given in parts."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def data_name(path: Path, digest: str) -> str:
    """Name of the external data of the model at `path`.

    It depends on the contents: a kill between the two renames leaves the old model with its old weights.
    """
    return f"{path.name}.{digest[:12]}.data"


def _around(message: Message, number: int) -> tuple[bytes, bytes]:
    """The fields of `message` before and after field `number`, serialised."""
    parts = []
    for before in (True, False):
        copy = type(message)()
        copy.CopyFrom(message)
        for field in message.DESCRIPTOR.fields:
            if field.number == number or (field.number < number) is not before:
                copy.ClearField(field.name)
        parts.append(copy.SerializeToString(deterministic=True))
    return parts[0], parts[1]


def _prefix(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    result.append(number)
    return bytes(result)
