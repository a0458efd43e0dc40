"""What the converter's flatbuffer lacks: our names, float inputs and outputs, and float16 weights.

Tensors of a quantized signature are int8 at the border; QUANTIZE and DEQUANTIZE go in there, so that the
file takes and gives what the program does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.backends import telemetry
from sartor.backends.tflite.convert import REQUIREMENT

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # force_align of Buffer.data in the schema; generated Python code does not keep it
_FEWEST_HALVED = 64  # elements; a DEQUANTIZE for less costs more than it saves
_MOVES = ("TRANSPOSE", "RESHAPE", "PAD", "PADV2", "QUANTIZE", "DEQUANTIZE")
"""Operators that the converter puts in for others: they compute a node only when nothing else does."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of the flatbuffer.

    Attributes:
        op_type: name in the schema, such as `CONV_2D`.
        nodes: nodes of the program that it computes, as far as names tell.
        outputs: names of the tensors that it writes.
    """

    op_type: str
    nodes: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Quantization of one tensor.

    Attributes:
        scales: one, or one per channel.
        zero_points: as many.
        dtype: `INT8` or `INT32`.
        writers: nodes that its operator computes, or the input that it is. Operators that compute no node pass on what
            they read.
        readers: nodes of the operators that read it, and outputs that it is.
        numbers: what a weight or a bias holds, flat.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    dtype: str
    writers: frozenset[str]
    readers: frozenset[str]
    numbers: np.ndarray | None


class Flatbuffer:
    """A model as objects, with what is done to it.

    Args:
        content: of the converter.
        nodes_of: nodes that the converter's name of a tensor tells of.
    """

    def __init__(self, content: bytes, nodes_of: Callable[[str], tuple[str, ...]] = lambda name: ()):
        self.schema: Any = telemetry.import_vendor("ai_edge_litert.schema_py_generated", REQUIREMENT)
        self.model = self.schema.ModelT.InitFromPackedBuf(content, 0)
        self.graph = self.model.subgraphs[0]
        self.signature = self.model.signatureDefs[0]
        self._op_types = {v: k for k, v in vars(self.schema.BuiltinOperator).items() if isinstance(v, int)}
        self._types = {v: k for k, v in vars(self.schema.TensorType).items() if isinstance(v, int)}
        self._told = [nodes_of(_text(tensor.name)) for tensor in self.graph.tensors]
        self._chains: dict[int, Sequence[str]] = {}
        self._names: dict[int, str] = {}

    # ---- reading ---------------------------------------------------------------------------
    def operators(self) -> list[Operator]:
        """Operators of the main subgraph in execution order, with the nodes that each computes."""
        claimed: set[str] = set()
        found = []
        for item in self.graph.operators:
            op_type = self.op_type(item)
            told = dict.fromkeys(node for index in item.outputs for node in self._told[index])
            first, *others = [*told] or [""]
            # Shared functions carry the name of their first user: what an earlier operator computes is not ours.
            nodes = [first, *(node for node in others if node not in claimed)] if first else []
            for index in item.outputs:
                chain = self._chains.get(int(index), ())
                nodes.extend(itertools.takewhile(lambda node: node not in claimed, chain))
            if op_type not in _MOVES:
                claimed.update(nodes)
            names = tuple(_text(self.graph.tensors[index].name) for index in item.outputs)
            found.append(Operator(op_type, tuple(nodes), names))
        computed = {n for operator in found if operator.op_type not in _MOVES for n in operator.nodes}
        return [
            dataclasses.replace(o, nodes=tuple(n for n in o.nodes if n not in computed))
            if o.op_type in _MOVES
            else o
            for o in found
        ]

    def op_type(self, item: Any) -> str:
        """Schema name of an operator's type."""
        code = self.model.operatorCodes[item.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        return _text(code.customCode) if code.customCode else self._op_types[builtin]

    def transposes(self) -> dict[str, int]:
        """How many TRANSPOSE operators there are, and how many of them stand between an input or output and the rest.

        Those at the border are what channel-last inputs and outputs save.
        """
        counts = {"total": 0, "at_inputs": 0, "at_outputs": 0}
        casts = ("QUANTIZE", "DEQUANTIZE")
        inputs, outputs = set(map(int, self.graph.inputs)), set(map(int, self.graph.outputs))
        for item in self.graph.operators:
            if self.op_type(item) in casts and int(item.inputs[0]) in inputs:
                inputs.add(int(item.outputs[0]))
        for item in reversed(self.graph.operators):
            if self.op_type(item) in casts and int(item.outputs[0]) in outputs:
                outputs.add(int(item.inputs[0]))
        for item in self.graph.operators:
            if self.op_type(item) == "TRANSPOSE":
                counts["total"] += 1
                counts["at_inputs"] += int(item.inputs[0]) in inputs
                counts["at_outputs"] += int(item.outputs[0]) in outputs
        return counts

    def order(self) -> dict[str, list[str]]:
        """Names of inputs and outputs in the order of the subgraph's own lists."""
        found = {}
        for kind, entries in (("inputs", self.signature.inputs), ("outputs", self.signature.outputs)):
            names: dict[int, list[str]] = {}  # two outputs may be one tensor
            for entry in entries:
                names.setdefault(int(entry.tensorIndex), []).append(_text(entry.name))
            found[kind] = [names[int(index)].pop(0) for index in getattr(self.graph, kind)]
        return found

    def quantization(self, operators: Sequence[Operator]) -> dict[str, Parameters]:
        """What is quantized, by tensor name, and constants in float32, which have no scales.

        Args:
            operators: those of the subgraph in order, with the nodes that each computes.
        """
        nodes = [frozenset(operator.nodes) for operator in operators]
        writers: dict[int, frozenset[str]] = {
            int(e.tensorIndex): frozenset([border_name("input", _text(e.name))])
            for e in self.signature.inputs
        }
        for item, computed in zip(self.graph.operators, nodes, strict=True):
            passed_on = frozenset[str]().union(*(writers.get(int(i), ()) for i in item.inputs[:1]))
            writers.update((int(index), computed or passed_on) for index in item.outputs)
        readers: dict[int, set[str]] = {}
        for entry in self.signature.outputs:
            readers.setdefault(int(entry.tensorIndex), set()).add(border_name("output", _text(entry.name)))
        for item, computed in zip(reversed(self.graph.operators), reversed(nodes), strict=True):
            names = computed.union(*(() if computed else (readers.get(int(i), ()) for i in item.outputs)))
            for index in item.inputs:
                readers.setdefault(int(index), set()).update(names)
        found = {}
        for index, tensor in enumerate(self.graph.tensors):
            parameters = tensor.quantization
            quantized = parameters is not None and parameters.scale is not None
            data = self.model.buffers[tensor.buffer].data
            kind = self._types[tensor.type]
            if not quantized and (data is None or kind != "FLOAT32") and kind != "INT8":
                continue
            found[_text(tensor.name)] = Parameters(
                tuple(float(s) for s in parameters.scale) if quantized else (),
                tuple(int(z) for z in parameters.zeroPoint) if quantized else (),
                kind,
                writers.get(index, frozenset()),
                frozenset(readers.get(index, ())),
                np.frombuffer(bytes(data), kind.lower()) if data is not None else None,
            )
        return found

    # ---- writing ---------------------------------------------------------------------------
    def tell_outputs(self, chains: Mapping[str, Sequence[str]]) -> None:
        """Say which nodes lie before each output: the converter names those tensors after the output alone.

        Args:
            chains: nodes by output name, the one that gives it first; the operator that writes it computes those
                that no earlier operator does.
        """
        for entry in self.signature.outputs:
            if not self._told[entry.tensorIndex]:
                self._chains[int(entry.tensorIndex)] = chains[entry.name]

    def name_tensors(self) -> None:
        """Name tensors after the nodes that wrote them, and constants after the nodes that they belong to."""
        taken: dict[str, int] = {}
        written = {int(index) for item in self.graph.operators for index in item.outputs}
        border = {e.tensorIndex: e.name for e in [*self.signature.inputs, *self.signature.outputs]}
        for index, nodes in enumerate(self._told):
            kind = "value" if index in written else "constant"
            name = self._names.get(index, f"{nodes[0] if nodes else 'converter'}/{kind}")
            name = border.get(index, name)
            count = taken.get(name, 0)
            taken[name] = count + 1
            self.graph.tensors[index].name = f"{name}:{count}" if count and index not in border else name

    def name_signature(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Give the signature the program's names, in place of the converter's numbered ones."""
        for entries, names in ((self.signature.inputs, inputs), (self.signature.outputs, outputs)):
            entries.sort(key=lambda entry: int(_text(entry.name).rpartition("_")[2]))
            for entry, name in zip(entries, names, strict=True):
                entry.name = name

    def float_border(self, float_inputs: Iterable[str], float_outputs: Iterable[str]) -> None:
        """QUANTIZE and DEQUANTIZE where a float input or output of the program is int8 in the signature."""
        float_inputs, float_outputs = set(float_inputs), set(float_outputs)
        int8 = self.schema.TensorType.INT8
        for entry in self.signature.inputs:
            old = entry.tensorIndex
            if entry.name in float_inputs and self.graph.tensors[old].type == int8:
                new = self._float_copy(old)
                self._names[old] = f"{entry.name}/int8"
                self.graph.operators.insert(0, self._operator("QUANTIZE", [new], old))
                self.graph.inputs = [new if index == old else index for index in self.graph.inputs]
                entry.tensorIndex = new
        for entry in self.signature.outputs:
            old = entry.tensorIndex
            if entry.name in float_outputs and self.graph.tensors[old].type == int8:
                new = self._float_copy(old)
                self._names[old] = f"{entry.name}/int8"
                self.graph.operators.append(self._operator("DEQUANTIZE", [old], new))
                self.graph.outputs = [new if index == old else index for index in self.graph.outputs]
                entry.tensorIndex = new

    def float_where_fixed(self, fixed: Mapping[str, tuple[float, int]]) -> int:
        """Compute operators in float32 whose int8 kernels take one output scale only; returns how many.

        The values before and after keep the program's scales: DEQUANTIZE and QUANTIZE stand around the operator.

        Args:
            fixed: scale and zero point that the kernel of an operator type demands.
        """
        made, changed = [], 0
        for item in self.graph.operators:
            needed = fixed.get(self.op_type(item))
            output = self.graph.tensors[item.outputs[0]]
            parameters = output.quantization
            if needed is None or output.type != self.schema.TensorType.INT8 or _is(parameters, needed):
                made.append(item)
                continue
            changed += 1
            source, result = int(item.inputs[0]), int(item.outputs[0])
            wide_source, wide_result = self._float_copy(source), self._float_copy(result)
            item.inputs = np.array([wide_source, *item.inputs[1:]], np.int32)
            item.outputs = np.array([wide_result], np.int32)
            before = self._operator("DEQUANTIZE", [source], wide_source)
            made += [before, item, self._operator("QUANTIZE", [wide_result], result)]
        self.graph.operators = made
        return changed

    def respell(self, same: Mapping[str, str], clamps: Mapping[str, tuple[float, float]]) -> None:
        """Write operators as others that compute the same, for a runtime that has no kernels for them.

        Args:
            same: operator types that are a special case of another.
            clamps: bounds of activations that become MAXIMUM and MINIMUM; those of int8 have to be float by now.
        """
        made = []
        for item in self.graph.operators:
            op_type = self.op_type(item)
            if op_type in same:
                item = self._operator(
                    same[op_type], [int(index) for index in item.inputs], int(item.outputs[0])
                )
            elif op_type in clamps:
                result = int(item.outputs[0])
                low, high = (self._constant(bound, result) for bound in clamps[op_type])
                above = self._float_copy(result)
                made.append(self._operator("MAXIMUM", [int(item.inputs[0]), low], above))
                item = self._operator("MINIMUM", [above, high], result)
            made.append(item)
        self.graph.operators = made

    def halve_weights(self) -> int:
        """Store float32 constants in float16, behind a DEQUANTIZE each; returns how many.

        Those of the program are float16 numbers already. What the converter folds (a normalization into a
        convolution) is rounded; a constant that float16 does not hold stays.
        """
        types = self.schema.TensorType
        halved = 0
        for index in range(len(self.graph.tensors)):
            tensor = self.graph.tensors[index]
            data = self.model.buffers[tensor.buffer].data
            if tensor.type != types.FLOAT32 or data is None or len(data) < 4 * _FEWEST_HALVED:
                continue
            wide = np.frombuffer(bytes(data), np.float32)
            with np.errstate(over="ignore"):
                narrow = wide.astype(np.float16)
            if not np.isfinite(narrow).all():
                continue
            stored = self._float_copy(index)
            copy = self.graph.tensors[stored]
            copy.type, copy.buffer = types.FLOAT16, len(self.model.buffers)
            self.model.buffers.append(self.schema.BufferT(narrow.view(np.uint8)))
            old, tensor.buffer = tensor.buffer, 0
            if not any(other.buffer == old for other in self.graph.tensors):
                self.model.buffers[old].data = None
            self.graph.operators.insert(halved, self._operator("DEQUANTIZE", [stored], index))
            halved += 1
        return halved

    def to_bytes(self) -> bytes:
        """The file."""
        import flatbuffers

        self.model.buffers = [_aligned(self.schema, buffer) for buffer in self.model.buffers]
        size = sum(len(b.data) for b in self.model.buffers if b.data is not None)
        builder = flatbuffers.Builder(size + (1 << 16))
        builder.Finish(self.model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _float_copy(self, index: int) -> int:
        """A further tensor of that shape in float32, without contents."""
        old = self.graph.tensors[index]
        new = self.schema.TensorT()
        new.shape, new.shapeSignature, new.type = (
            old.shape,
            old.shapeSignature,
            self.schema.TensorType.FLOAT32,
        )
        new.hasRank, new.buffer, new.name = old.hasRank, 0, old.name
        self.graph.tensors.append(new)
        self._told.append(self._told[index])
        return len(self.graph.tensors) - 1

    def _constant(self, number: float, like: int) -> int:
        """A float32 scalar that belongs to the nodes of tensor `like`."""
        index = self._float_copy(like)
        made = self.graph.tensors[index]
        made.shape, made.shapeSignature, made.hasRank = np.array([], np.int32), None, True
        made.buffer = len(self.model.buffers)
        self.model.buffers.append(self.schema.BufferT(np.array([number], np.float32).view(np.uint8)))
        return index

    def _operator(self, op_type: str, sources: Sequence[int], result: int) -> Any:
        item = self.schema.OperatorT()
        item.opcodeIndex = self._opcode(op_type)
        item.inputs, item.outputs = np.array(sources, np.int32), np.array([result], np.int32)
        return item

    def _opcode(self, op_type: str) -> int:
        builtin = getattr(self.schema.BuiltinOperator, op_type)
        version = 3 if op_type == "DEQUANTIZE" else 1  # 3: of float16
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin and not code.customCode:
                code.version = max(code.version, version)
                return index
        made = self.schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = builtin, min(builtin, 127), version
        self.model.operatorCodes.append(made)
        return len(self.model.operatorCodes) - 1


def border_name(kind: str, name: str) -> str:
    """The name of an `input` or `output` among names of nodes."""
    return f"<{kind}> {name}"


def _aligned(schema: Any, buffer: Any) -> Any:
    class Aligned(schema.BufferT):  # type: ignore[misc,name-defined]
        """A buffer whose data begins at a multiple of `_ALIGNMENT`."""

        def Pack(self, builder: Any) -> Any:
            if self.data is None or len(self.data) == 0:
                return super().Pack(builder)
            payload = bytes(self.data)
            builder.StartVector(1, len(payload), _ALIGNMENT)
            head = builder.Head() - len(payload)
            builder.head = head
            builder.Bytes[head : head + len(payload)] = payload
            builder.vectorNumElems = len(payload)
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return Aligned(buffer.data, buffer.offset, buffer.size)


def _is(parameters: Any, needed: tuple[float, int]) -> bool:
    return float(parameters.scale[0]) == np.float32(needed[0]) and int(parameters.zeroPoint[0]) == needed[1]


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
