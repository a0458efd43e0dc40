"""Buffers of a flatbuffer: the tensors that an interpreter without a delegate allocates, in the order of its operators.

What the converter put in (a PAD in front of a convolution, a TRANSPOSE at the border) is there, which no rule about the
program's own nodes knows.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from sartor.backends import telemetry
from sartor.backends.tflite.convert import REQUIREMENT
from sartor.errors import ModelError
from sartor.ir.memory import BufferGraph, Step, peak

_ITEM_BITS = {
    **{"FLOAT32": 32, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT64": 64, "COMPLEX64": 64, "COMPLEX128": 128},
    **{"INT64": 64, "INT32": 32, "INT16": 16, "INT8": 8, "INT4": 4, "INT2": 2, "BOOL": 8},
    **{"UINT64": 64, "UINT32": 32, "UINT16": 16, "UINT8": 8, "UINT4": 4},
}
_BODIES = (
    "thenSubgraphIndex",
    "elseSubgraphIndex",
    "condSubgraphIndex",
    "bodySubgraphIndex",
    "initSubgraphIndex",
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a subgraph.

    Attributes:
        name: unique in its subgraph.
        dtype: name in the schema, such as `INT8`.
        shape: its lengths.
        bytes: its size.
        constant: it is stored in the file.
        variable: it keeps its contents from one inference to the next.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    constant: bool
    variable: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator of a subgraph; an optional input that is absent is None."""

    op_type: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any = dataclasses.field(repr=False, compare=False, default=None)

    @property
    def name(self) -> str:
        """Operator type and the tensor that it writes."""
        return f"{self.op_type} {self.outputs[0].name}" if self.outputs else self.op_type


Scratch = Callable[[Call], Sequence[int]]
"""Bytes of each buffer that a kernel needs while it runs."""


def builtin_scratch(call: Call) -> tuple[int, ...]:
    """What the kernels of LiteRT itself (without XNNPACK) ask for: the patches of a convolution as a matrix.

    A convolution of more than one place, or that skips places, writes `[N, H_out, W_out, K_h * K_w * C_in]` first.
    """
    if call.op_type != "CONV_2D" or call.inputs[0] is None or call.inputs[1] is None or call.options is None:
        return ()
    _, height, width, channels = call.inputs[1].shape
    steps = (
        call.options.strideH,
        call.options.strideW,
        call.options.dilationHFactor,
        call.options.dilationWFactor,
    )
    if (height, width) == (1, 1) and set(steps) == {1}:
        return ()
    places = math.prod(call.outputs[0].shape[:3])
    return (places * height * width * channels * _ITEM_BITS[call.inputs[0].dtype] // 8,)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A subgraph: its tensors, its operators in execution order, the subgraphs in them."""

    tensors: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def read(content: bytes) -> tuple[Flat, ...]:
    """The subgraphs of a file, the main one first.

    Raises:
        ModelError: it is no flatbuffer of this schema, or a tensor has no fixed size.
    """
    schema = telemetry.import_vendor("ai_edge_litert.schema_py_generated", REQUIREMENT)
    if content[4:8] != b"TFL3":
        raise ModelError(
            f"The file is no TensorFlow Lite model: bytes 4 to 8 are {content[4:8]!r}, not b'TFL3'."
        )
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    op_types = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    codes = [
        _text(code.customCode) or op_types[max(code.builtinCode, code.deprecatedBuiltinCode)]
        for code in model.operatorCodes
    ]
    return tuple(_flat(model, graph, kinds, codes) for graph in model.subgraphs)


def buffer_graph(
    content: bytes, scratch: Scratch = lambda call: (), inputs_held: bool = False
) -> BufferGraph:
    """Buffers of the main subgraph. Nothing is done in place, and bodies of control flow are scratch of their operator.

    Args:
        content: the file.
        scratch: what kernels need beside their tensors.
        inputs_held: inputs keep their place; otherwise it is free after the last operator that reads them.

    Raises:
        ModelError: as `read`.
    """
    return graph_of(read(content), 0, scratch, inputs_held)


def graph_of(subgraphs: Sequence[Flat], index: int, scratch: Scratch, inputs_held: bool) -> BufferGraph:
    """Buffers of one subgraph of `read`."""
    flat = subgraphs[index]
    sizes = {t.name: t.bytes for t in flat.tensors if not t.constant and not t.variable}
    steps = []
    for position, call in enumerate(flat.calls):
        needed = [*scratch(call), *_bodies(subgraphs, call, scratch)]
        names = [f"<scratch {i}> {position} {call.name}" for i in range(len(needed))]
        sizes |= dict(zip(names, needed, strict=True))
        given = [t for t in call.inputs if t is not None]
        steps.append(
            Step(
                name=call.name,
                reads=tuple(dict.fromkeys(t.name for t in given if t.name in sizes)),
                writes=tuple(t.name for t in call.outputs if t.name in sizes),
                scratch=tuple(names),
                constants=tuple(dict.fromkeys(t.name for t in given if t.constant)),
            )
        )
    return BufferGraph(
        steps=tuple(steps),
        sizes=sizes,
        inputs=tuple(t.name for t in flat.inputs if t.name in sizes),
        outputs=tuple(dict.fromkeys(t.name for t in flat.outputs if t.name in sizes)),
        inputs_held=inputs_held,
        constants={t.name: t.bytes for t in flat.tensors if t.constant},
    )


def _bodies(subgraphs: Sequence[Flat], call: Call, scratch: Scratch) -> list[int]:
    """The highest peak of the subgraphs that an operator runs, if any."""
    found = [getattr(call.options, name) for name in _BODIES if hasattr(call.options, name)]
    return [max(peak(graph_of(subgraphs, i, scratch, False)).bytes for i in found)] if found else []


def _flat(model: Any, graph: Any, kinds: dict[int, str], codes: list[str]) -> Flat:
    written = {int(i) for item in graph.operators for i in item.outputs}
    written |= {int(i) for i in graph.inputs}
    counted = collections.Counter(_text(tensor.name) for tensor in graph.tensors)
    tensors = []
    for index, tensor in enumerate(graph.tensors):
        name = _text(tensor.name)
        shape = tuple(int(d) for d in tensor.shape) if tensor.shape is not None else ()
        kind = kinds[tensor.type]
        stored = index not in written and not tensor.isVariable
        data = model.buffers[tensor.buffer].data
        if kind not in _ITEM_BITS and not stored:
            raise ModelError(
                f"Tensor '{name}' is of type {kind}, whose size is known only when the model runs."
            )
        bits = math.prod(shape) * _ITEM_BITS.get(kind, 0)
        size = len(data) if stored and data is not None else -(-bits // 8)
        unique = name if name and counted[name] == 1 else f"{name}#{index}"
        tensors.append(Tensor(unique, kind, shape, size, stored, bool(tensor.isVariable)))
    calls = tuple(
        Call(
            codes[item.opcodeIndex],
            tuple(tensors[int(i)] if i >= 0 else None for i in item.inputs),
            tuple(tensors[int(i)] for i in item.outputs),
            item.builtinOptions,
        )
        for item in graph.operators
    )
    border = [tuple(tensors[int(i)] for i in indices) for indices in (graph.inputs, graph.outputs)]
    return Flat(tuple(tensors), calls, border[0], border[1])


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
