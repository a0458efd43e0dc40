"""`Program`: one ONNX model in the canonical dialect, with what is known about it.

A Program wraps one `onnx_ir.Model`. All rewriting happens on that model's own graph; there is no
second graph class. Beside the model it carries

* `source`: what it was made from, by SHA-256, so that a plan can refuse another model;
* `input_shapes`: the *reference shapes*, concrete, at which everything is analysed and measured;
* `batch`: the symbolic batch axis, or the reason why the batch is fixed;
* `provenance`: module path, class and source line per node. It never enters a shipped file.

Values in `model` carry no trusted shapes: `Program.shapes()` infers them at the reference shapes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import InternalError, ModelError, UsageError
from sartor.ir import protos, serialise
from sartor.ir.branches import flattened
from sartor.ir.files import write_all
from sartor.ir.tail import Tail

CANONICAL_OPSET = 21
"""Opset of the canonical dialect; see docs/adr/0003."""
CANONICAL_IR_VERSION = 10
DIALECT_DOMAIN = "sartor"
"""Domain of the functions that carry dynamic structure; never inlined by load or canonicalize."""
BATCH_SYMBOL = "N"

T = TypeVar("T")
_INFER_KEEP_ELEMENTS = 4096  # larger initializers cannot be shapes; they are left out of inference


@dataclasses.dataclass(frozen=True)
class Source:
    """What a Program was made from.

    Attributes:
        kind: `onnx` or `module`.
        name: file name or `FILE.py:function`, without folders.
        sha256: of the file's bytes (and its external data), or of the canonical bytes for a module.
    """

    kind: str
    name: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """State of the batch axis.

    Attributes:
        symbolic: True when the program computes any batch size, sample by sample.
        inputs: graph inputs whose axis 0 is the batch axis.
        reason: why the batch is fixed, naming the node; empty when symbolic.
    """

    symbolic: bool
    inputs: tuple[str, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class NodeProvenance:
    """Where a node comes from in the author's code. Kept in memory and in a sidecar only.

    Attributes:
        module: dotted module path such as `layer2.0.conv1`.
        module_class: class name of that module.
        location: `file.py:line` of the author's innermost frame, or empty.
    """

    module: str = ""
    module_class: str = ""
    location: str = ""

    def __str__(self) -> str:
        parts = [self.module, f"({self.module_class})" if self.module_class else "", self.location]
        return " ".join(p for p in parts if p)


class Program:
    """A canonical model and what is known about it. See the module docstring."""

    def __init__(
        self,
        model: ir.Model,
        *,
        source: Source,
        input_shapes: Mapping[str, tuple[int, ...]],
        batch: Batch = Batch(symbolic=False, reason="not analysed"),
        provenance: Mapping[str, NodeProvenance] | None = None,
        applied: tuple[str, ...] = (),
        tail: Tail | None = None,
    ):
        self.model = model
        self.source = source
        self.input_shapes = {k: tuple(int(d) for d in v) for k, v in input_shapes.items()}
        self.batch = batch
        self.provenance = dict(provenance or {})
        self.applied = applied
        self.tail = tail
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._types: dict[str, ir.DataType] | None = None
        self._analyses: dict[Hashable, Any] = {}

    # ---- structure -------------------------------------------------------------------------
    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def initializers(self) -> Mapping[str, ir.Value]:
        """Initializers of the main graph by name."""
        return self.model.graph.initializers

    @property
    def outputs(self) -> list[ir.Value]:
        """Outputs of the model as it is written; those of `graph` are where the understood part ends."""
        return list(self.graph.outputs) if self.tail is None else self.tail.output_values(self.graph)

    def nodes(self) -> Iterator[ir.Node]:
        """Nodes of the main graph in execution order."""
        yield from self.model.graph

    def initializer_array(self, name: str) -> np.ndarray:
        """The contents of initializer `name`; those of a large one in external data are read at every call."""
        value = self.model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise InternalError(f"Initializer '{name}' does not exist or has no data.")
        return value.const_value.numpy()

    def initializer_shape(self, name: str) -> tuple[int, ...]:
        """The shape of initializer `name`, without reading its contents."""
        value = self.model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise InternalError(f"Initializer '{name}' does not exist or has no data.")
        return tuple(int(d) for d in value.const_value.shape)

    def where(self, node: ir.Node) -> str:
        """`'name' (OpType) at module, file:line` for messages."""
        return where(node, self.provenance)

    def clone(self) -> Program:
        """A structural copy that shares tensor data (tensors are immutable) and owns its graph."""
        copy = Program(
            self.model.clone(),
            source=self.source,
            input_shapes=self.input_shapes,
            batch=self.batch,
            provenance=self.provenance,
            applied=self.applied,
            tail=self.tail,
        )
        copy._shapes, copy._types, copy._analyses = self._shapes, self._types, dict(self._analyses)
        return copy

    def understood(self) -> Program:
        """The program without its tail, ending at the values that the tail reads; itself if it has none."""
        if self.tail is None:
            return self
        copy = self.clone()
        copy.tail = None
        return copy

    def invalidate(self) -> None:
        """Drop cached analyses; every change of `model` or `input_shapes` must be followed by this."""
        self._shapes = None
        self._types = None
        self._analyses = {}

    def analysis(self, key: Hashable, compute: Callable[[Program], T]) -> T:
        """The result of `compute(self)`, kept under `key` until the program changes; copies share it.

        It must name values and nodes, not hold them: a copy has its own.
        """
        if key not in self._analyses:
            self._analyses[key] = compute(self)
        result: T = self._analyses[key]
        return result

    # ---- shapes ----------------------------------------------------------------------------
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Concrete shape of every value at the reference shapes, those in branches of `If` included.

        Raises:
            ModelError: strict shape inference fails, or a shape depends on data; names the value.
        """
        if self._shapes is None:
            self._infer()
        assert self._shapes is not None
        return self._shapes

    def types(self) -> Mapping[str, ir.DataType]:
        """Element type of every value of the main graph."""
        if self._types is None:
            self._infer()
        assert self._types is not None
        return self._types

    def _infer(self) -> None:
        shapes, types = infer_shapes(flattened(self.model), self.input_shapes)
        error = unknown_shapes(self.nodes(), shapes, self.provenance)
        if error is not None:
            raise error
        self._shapes, self._types = shapes, types

    # ---- bytes -----------------------------------------------------------------------------
    def to_proto(self, *, weights: bool = True) -> onnx.ModelProto:
        """The model as an ONNX protobuf: canonical, without value_info, metadata or source lines.

        Args:
            weights: whether to include the initializers of the main graph.
        """
        shell, stored = self._parts()
        for tensor in stored if weights else ():
            entry = shell.graph.initializer.add()
            entry.CopyFrom(tensor.header)
            entry.raw_data = b"".join(tensor.chunks())
        return shell

    def to_bytes(self) -> bytes:
        """Deterministic serialisation: equal programs give equal bytes.

        Raises:
            UsageError: more than 2 GiB, which no reader of protobufs accepts.
        """
        size, chunks = serialise.single_file(*self._parts())
        if size > serialise.SINGLE_FILE_BYTES:
            raise UsageError(
                f"The model has {size} bytes, more than a protobuf holds ({serialise.SINGLE_FILE_BYTES}). "
                "Save it to a file: its weights go to external data."
            )
        return b"".join(chunks)

    def serialised_bytes(self) -> int:
        """Number of bytes of the model with its weights."""
        return serialise.single_file(*self._parts())[0]

    def sha256(self) -> str:
        """SHA-256 of the model with its weights, wherever `save` puts them: of `to_bytes()` if those exist."""
        return serialise.sha256(serialise.single_file(*self._parts())[1])

    def files(self, path: str | os.PathLike[str]) -> dict[Path, Iterable[bytes | memoryview]]:
        """What `save` writes, by path: one file, or beyond 2 GiB external data and the file that names it."""
        shell, weights = self._parts()
        size, chunks = serialise.single_file(shell, weights)
        target = Path(path)
        if size <= serialise.SINGLE_FILE_BYTES:
            return {target: chunks}
        beside = target.with_name(serialise.data_name(target, serialise.sha256(chunks)))
        model, data = serialise.with_external_data(shell, weights, beside.name)
        return {beside: data, target: [model]}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model atomically (temporary file in the same folder, then rename).

        A model of more than 2 GiB goes to two files, `path` and `NAME.SHA.data` beside it.
        """
        return write_all(self.files(path))[-1]

    def _parts(self) -> tuple[onnx.ModelProto, list[serialise.Weights]]:
        """The model without its weights, and these in the order of their names."""
        light = self.model.clone()
        weights = []
        for name, value in sorted(light.graph.initializers.items()):  # a pass may have added one
            if value.const_value is not None:
                weights.append(serialise.weights_of(name, value.const_value))
                value.const_value = ir.Tensor(np.zeros(0, np.float32))  # a stand-in, which costs nothing
        shell = ir.to_proto(light)
        shell.graph.ClearField("initializer")
        if self.tail is not None:
            self.tail.attach(shell)
            weights += [serialise.weights_of(k, v) for k, v in self.tail.weights.items()]
            weights.sort(key=lambda tensor: tensor.header.name)
        protos.strip(shell)
        return shell, weights


def infer_shapes(
    model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, ir.DataType]]:
    """Strict shape inference of the main graph at concrete input shapes.

    Large initializers are replaced by graph inputs of the same shape, so that the cost does not grow
    with the weights. Values whose shape stays unknown are absent from the result.

    Returns:
        Shapes and element types by value name (graph inputs and initializers included).

    Raises:
        ModelError: inference finds a contradiction.
    """
    light = model.clone()
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, ir.DataType] = {}
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        shapes[name] = tuple(int(d) for d in tensor.shape)
        types[name] = tensor.dtype
        if tensor.size > _INFER_KEEP_ELEMENTS:
            light.graph.initializers.pop(name)
            value.shape = ir.Shape(shapes[name])
            value.type = ir.TensorType(tensor.dtype)
            value.const_value = None
            light.graph.inputs.append(value)
    for graph_input in light.graph.inputs:
        if graph_input.name in input_shapes:
            graph_input.shape = ir.Shape(input_shapes[graph_input.name])
    for node in ir.traversal.RecursiveGraphIterator(light.graph):
        for output in node.outputs:
            output.shape = None
        if node.op_type == "GroupNormalization" and not node.domain:
            # ONNX infers nothing for it, although its output is shaped like its input.
            node.op_type = "Identity"
            node.resize_inputs(1)
            node.attributes.clear()
    for output in light.graph.outputs:  # a declared shape may name symbols that the inputs no longer have
        if not output.is_graph_input():
            output.shape = None
    proto = ir.to_proto(light)
    proto.ClearField("metadata_props")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"Shape inference failed: {' '.join(lines[:3])[:600]}") from error
    for info in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        tensor_type = info.type.tensor_type
        if not info.type.HasField("tensor_type"):
            continue
        types[info.name] = ir.DataType(tensor_type.elem_type)
        if not tensor_type.HasField("shape"):
            continue
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor_type.shape.dim]
        if all(d is not None for d in dims):
            shapes[info.name] = tuple(int(d) for d in dims)  # type: ignore[arg-type]
    return shapes, types


def unknown_shapes(
    nodes: Iterable[ir.Node], shapes: Mapping[str, object], provenance: Mapping[str, NodeProvenance]
) -> ModelError | None:
    """What to raise if a result of some node is not in `shapes`."""
    unknown = {n: o.name for n in nodes for o in n.outputs if o.name and o.name not in shapes}
    if not unknown:
        return None
    first, value = next(iter(unknown.items()))
    return ModelError(
        f"The shape of value '{value}' of node {where(first, provenance)} depends on data, or on a dimension that is "
        "not fixed. Give every input's shape with --shape NAME=1,3,224,224, or cut the model before this node.",
        {n.name or "": f"the shape of its result '{v}' depends on data" for n, v in unknown.items()},
    )


def where(node: ir.Node, provenance: Mapping[str, NodeProvenance]) -> str:
    """`'name' (OpType) at module, file:line` for messages."""
    origin = str(provenance.get(node.name or "", ""))
    return f"'{node.name}' ({node.op_type}){f' at {origin}' if origin else ''}"
