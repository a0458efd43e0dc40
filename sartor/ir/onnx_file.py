"""Read an ONNX protobuf from an untrusted file, with limits, and confine its external data."""

from __future__ import annotations

import collections
import dataclasses
import graphlib
import hashlib
import itertools
import math
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from sartor.errors import ModelError
from sartor.ir import protos
from sartor.ir.external_data import ExternalData


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds above which a file is refused instead of exhausting the machine.

    Attributes:
        file_bytes: of the protobuf (its format ends at 2 GiB).
        tensor_bytes: of all initializers together, external data included.
        nodes: of all graphs and functions together, before and after functions are inlined.
        calls: of one function, also by others.
        depth: of nested subgraphs.
        rank: of any tensor.
        activation_elements: of any one value at the reference shapes.
        generated_elements: of all constants together that nodes such as ConstantOfShape compute.
    """

    file_bytes: int = 2**31 - 1
    tensor_bytes: int = 2**36
    nodes: int = 200_000
    calls: int = 4_096
    depth: int = 16
    rank: int = 32
    generated_elements: int = 1 << 28
    activation_elements: int = 1 << 36


@dataclasses.dataclass(frozen=True)
class Contents:
    """A parsed file: the model, and the SHA-256 of its bytes with all weights in one file."""

    model: ir.Model
    sha256: str


def read(path: Path, external_root: Path | None, limits: Limits) -> Contents:
    """Parse and check `path`.

    Raises:
        ModelError: names the file, what is wrong, and what to do.
    """
    try:
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ModelError(f"The model file '{path}' {what}. Give an .onnx file or FILE.py:function.")
        if size > limits.file_bytes:
            raise ModelError(
                f"The model file '{path.name}' has {size} bytes; the limit is {limits.file_bytes}. Move its "
                "weights "
                "to external data."
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"The model file '{path}' cannot be read: {error}.") from error
    proto = _parse(path, data)
    digest = hashlib.sha256(data).hexdigest()
    del data
    _check_structure(proto, limits)
    _check_calls(proto, limits)
    folder = (external_root or path.resolve().parent).resolve()
    total = 0
    files: dict[str, Path] = {}
    for tensor in protos.tensors(proto):
        total += _check_tensor(tensor, folder, files, limits)
        if total > limits.tensor_bytes:
            raise ModelError(f"The weights exceed {limits.tensor_bytes} bytes; the file is refused.")
    stored = ExternalData(files)
    if files:
        digest = stored.sha256(proto)
    _check_references(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(
            f"'{path.name}' is not a valid ONNX model: {str(error).splitlines()[0][:300]}"
        ) from error
    if files:
        stored.attach(model)
    return Contents(model, digest)


def checker_complaint(path: Path) -> str:
    """What ONNX's own checker says against a file that we failed on; empty if it finds nothing."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ""


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"'{path.name}' is not an ONNX model, or is truncated ({len(data)} bytes do not parse as a "
            "protobuf). "
            "Export it again."
        ) from error
    except RecursionError as error:
        raise ModelError(f"'{path.name}' nests too deeply to be parsed.") from error
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        raise ModelError(f"'{path.name}' is not an ONNX model: it has no graph, IR version or operator set.")
    if not proto.graph.node:
        raise ModelError(f"'{path.name}' holds an empty graph.")
    return proto


def _check_structure(proto: onnx.ModelProto, limits: Limits) -> None:
    count = 0
    for graph, depth in itertools.chain.from_iterable(map(protos.graphs, (proto.graph, *proto.functions))):
        if depth > limits.depth:
            raise ModelError(f"Subgraphs nest deeper than {limits.depth} levels; the file is refused.")
        count += len(graph.node)
        if count > limits.nodes:
            raise ModelError(f"The model has more than {limits.nodes} nodes; the file is refused.")
        for node in graph.node:
            for text in (node.name, node.op_type, node.domain, *node.input, *node.output):
                if isinstance(text, bytes):  # protobuf hands out what is not UTF-8 as bytes
                    raise ModelError(f"The name {text!r} is not valid UTF-8; the file is damaged.")
        if isinstance(graph, onnx.GraphProto) and graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise ModelError(f"Initializer '{name}' is sparse; store it densely.")


def _check_calls(proto: onnx.ModelProto, limits: Limits) -> None:
    """Functions that call others several times grow exponentially when they are inlined."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    roots: dict[Any, Any] = {**functions, None: proto.graph}
    callees = {
        key: collections.Counter(
            called
            for graph, _ in protos.graphs(root)
            for node in graph.node
            if (called := (node.domain, node.op_type, node.overload)) in functions
        )
        for key, root in roots.items()
    }
    calls: collections.Counter[Any] = collections.Counter({None: 1})
    try:
        order = list(graphlib.TopologicalSorter(callees).static_order())
    except graphlib.CycleError:
        return  # the inliner names the cycle
    nodes = 0
    for key in reversed(order):  # callers first
        times = calls[key]
        nodes += times * sum(len(graph.node) for graph, _ in protos.graphs(roots[key]))
        if (key is not None and times > limits.calls) or nodes > limits.nodes:
            raise ModelError(
                f"Inlining its functions gives the model more than {limits.nodes} nodes, or one of them more than "
                f"{limits.calls} times; the file is refused."
            )
        for callee, count in callees[key].items():
            calls[callee] += times * count


def _check_tensor(tensor: onnx.TensorProto, folder: Path, files: dict[str, Path], limits: Limits) -> int:
    """Check one tensor's size against its declared shape; returns its bytes."""
    name = tensor.name or "(unnamed)"
    if len(tensor.dims) > limits.rank or any(d < 0 for d in tensor.dims):
        raise ModelError(f"Tensor '{name}' declares the impossible shape {list(tensor.dims)[:8]}.")
    elements = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        raise ModelError(f"Tensor '{name}' holds strings; only numbers are supported.")
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise ModelError(f"Tensor '{name}' has the unknown element type {tensor.data_type}.") from error
    expected = -(-elements * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, expected, folder, files)
        return expected
    if tensor.HasField("raw_data"):
        found: int = len(tensor.raw_data)
    else:
        typed = (
            tensor.float_data,
            tensor.int32_data,
            tensor.int64_data,
            tensor.double_data,
            tensor.uint64_data,
        )
        # complex values take two entries, packed 4-bit integers half of one
        found = expected if any(len(field) for field in typed) and _typed_count(tensor) == elements else -1
        found = 0 if elements == 0 else found
    if found != expected:
        raise ModelError(
            f"Tensor '{name}' of shape {list(tensor.dims)} needs {expected} bytes, but the file holds "
            f"{max(found, 0)}. The file is damaged or its external data is missing; export it again."
        )
    return expected


def _typed_count(tensor: onnx.TensorProto) -> int:
    kind = ir.DataType(tensor.data_type)
    if kind.bitwidth < 8:
        return math.prod(tensor.dims)  # several elements per entry: left to the deserialiser
    counts = (
        len(tensor.float_data) // (2 if kind == ir.DataType.COMPLEX64 else 1),
        len(tensor.int32_data),
        len(tensor.int64_data),
        len(tensor.double_data) // (2 if kind == ir.DataType.COMPLEX128 else 1),
        len(tensor.uint64_data),
    )
    return max(counts)


def _check_external(tensor: onnx.TensorProto, expected: int, folder: Path, files: dict[str, Path]) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    parts = location.replace("\\", "/").split("/")
    if not location or os.path.isabs(location) or ".." in parts or "\0" in location or ":" in parts[0]:
        raise ModelError(
            f"External data of tensor '{tensor.name}' lies at '{location}', outside the model's folder. Put "
            "it "
            "beside the model."
        )
    target = folder / location
    resolved = target.resolve()
    if not resolved.is_relative_to(folder):
        raise ModelError(
            f"External data of tensor '{tensor.name}' at '{location}' is a link that leaves the model's "
            "folder."
        )
    if not resolved.is_file():
        raise ModelError(f"External data file '{location}' of tensor '{tensor.name}' does not exist.")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        raise ModelError(f"External data of tensor '{tensor.name}' has no valid offset or length.") from error
    if offset < 0 or length != expected or offset + length > resolved.stat().st_size:
        raise ModelError(
            f"External data of tensor '{tensor.name}' needs {expected} bytes at offset {offset} of "
            f"'{location}', "
            f"which has {resolved.stat().st_size}. The file is truncated or belongs to another model."
        )
    files[location] = resolved


def _check_references(proto: onnx.ModelProto) -> None:
    """Every value that a node reads must be an input, an initializer or a node's output, made once."""
    made = {i.name for i in proto.graph.input} | {t.name for t in proto.graph.initializer}
    written: set[str] = set()
    for node in proto.graph.node:
        for output in node.output:
            if output and (output in written or output in made):
                raise ModelError(
                    f"Value '{output}' is computed twice (node '{node.name}'); each value has one source."
                )
            if output:
                written.add(output)
    _check_scope(proto.graph, made | written, top=True)
    for output in proto.graph.output:
        if output.name not in made | written:
            raise ModelError(f"Graph output '{output.name}' is not computed by any node.")


def _check_scope(graph: onnx.GraphProto, visible: set[str], top: bool = False) -> None:
    if not top:
        visible = visible | {i.name for i in graph.input} | {t.name for t in graph.initializer}
        visible |= {o for node in graph.node for o in node.output}
    for node in graph.node:
        missing = next((i for i in node.input if i and i not in visible), None)
        if missing is not None:
            raise ModelError(
                f"Node '{node.name}' ({node.op_type}) reads value '{missing}', which is neither an input, an "
                "initializer nor computed by a node. The file is incomplete; export it again."
            )
        for body in protos.bodies(node):
            _check_scope(body, visible)
