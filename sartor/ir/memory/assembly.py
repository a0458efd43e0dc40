"""Which values of a program share a buffer, and which steps are left, under the rules of a runtime."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from sartor.errors import InternalError
from sartor.ir.memory.buffers import BufferGraph, InPlace, Step
from sartor.ir.memory.rules import ALIASES, ELEMENTWISE, METADATA, Rules
from sartor.ir.quantities import Quantity, largest


@dataclasses.dataclass(frozen=True)
class NodeBuffers:
    """A node of the main graph.

    Attributes:
        reads: activations.
        writes: activations.
        stored: initializers that it reads.
        first: its first input, wherever that comes from.
        scratch: bytes that its bodies need.
        plane: of a depthwise convolution, bytes of a channel: of what it reads or writes, the larger.
        padded: of its first input with the pads that it asks for, where TensorFlow has no name for those.
        accumulators: one of 32 bits for each number that it writes, of operators that sum up beside their result.
    """

    name: str
    op_type: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    stored: tuple[str, ...]
    first: str
    scratch: Quantity
    plane: Quantity | None
    padded: Quantity | None = None
    accumulators: Quantity | None = None


@dataclasses.dataclass(frozen=True)
class KernelNodes:
    """Nodes that run as one step, and the one that it is named after."""

    lead: str
    nodes: tuple[NodeBuffers, ...]


@dataclasses.dataclass(frozen=True)
class Bypass:
    """A removable block: its nodes, and which value takes the place of each of its outputs."""

    nodes: frozenset[str]
    replaced: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a graph is assembled from.

    Attributes:
        rules: of the runtime.
        kernels: in an order that can be run, but for addends that are computed later.
        sizes: bytes by value.
        shapes: by value.
        inputs: values.
        outputs: values.
        constants: bytes by initializer.
        bypasses: by removable block.
        copied: by value, the nodes that read it in another layout; "" stands for the border of the program.
        copy_sizes: bytes of the copy, by value.
        copied_early: of those, the ones that are copied as soon as they are there, not when the copy is needed.
    """

    rules: Rules
    kernels: tuple[KernelNodes, ...]
    sizes: Mapping[str, Quantity]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Quantity]
    bypasses: Mapping[str, Bypass]
    copied: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    copied_early: frozenset[str] = frozenset()
    copy_sizes: Mapping[str, Quantity] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Assembled:
    """Buffers at full width, and the sizes of buffers and constants as functions of a plan."""

    graph: BufferGraph
    sizes: Mapping[str, Quantity]
    constants: Mapping[str, Quantity]


def assemble(parts: Parts, removed: Iterable[str] = ()) -> Assembled:
    """The graph without these blocks."""
    return _Assembly(parts, frozenset(removed)).result()


class _Assembly:
    """The graph without some blocks."""

    def __init__(self, source: Parts, removed: frozenset[str]):
        self.source, self.rules = source, source.rules
        self.renamed: dict[str, str] = {}
        gone: set[str] = set()
        for name in removed:
            gone |= source.bypasses[name].nodes
            self.renamed.update(source.bypasses[name].replaced)
        self.kernels = [part for kernel in source.kernels for part in _staying(kernel, gone)]
        self.outputs = [self.resolve(v) for v in source.outputs]
        self.copies: dict[str, str] = {}  # value by its copy in another layout
        self.writer = {value: node for node in self.nodes() for value in node.writes}
        self.readers: dict[str, list[NodeBuffers]] = {}
        for node in self.nodes():
            for value in self.reads(node):
                self.readers.setdefault(value, []).append(node)
        self.root: dict[str, str] = {}
        self.constant: dict[str, tuple[str, ...]] = {}  # values that are initializers, dequantized
        self.free = {k.lead for k in self.kernels if len(k.nodes) == 1 and self.is_free(k.nodes[0])}
        self.sizes = self.buffers()

    def nodes(self) -> Iterator[NodeBuffers]:
        for kernel in self.kernels:
            yield from kernel.nodes

    def resolve(self, value: str) -> str:
        while value in self.renamed:
            value = self.renamed[value]
        return value

    def reads(self, node: NodeBuffers) -> list[str]:
        if self.rules.aliases and node.op_type in METADATA:
            return []
        # What depends on no input may be in no kernel: it was computed when the model was loaded.
        resolved = [self.resolve(value) for value in node.reads]
        return [value for value in resolved if value in self.writer or value in self.source.inputs]

    def buffer(self, value: str) -> str:
        return self.root.get(value, value)

    def read(self, value: str, reader: str) -> str:
        """The buffer in which node `reader` finds `value`: its own, or a copy in another layout."""
        if reader not in self.source.copied.get(value, ()):
            return self.buffer(value)
        copy = f"<layout> {value}"
        self.copies[copy] = value
        return copy

    def is_free(self, node: NodeBuffers) -> bool:
        """Whether the node is no step; if so, what it writes is given the buffer or the constant that it reads."""
        kind, first = node.op_type, self.resolve(node.first)
        if self.rules.quantized and kind == "DequantizeLinear" and not set(node.writes) & set(self.outputs):
            if node.stored and not self.reads(node):
                self.constant[node.writes[0]] = node.stored
                return True
            alias = first in self.reads(node)
        elif self.rules.quantized and kind == "QuantizeLinear":
            alone = len(self.readers.get(first, ())) == 1 and first not in self.outputs
            made = self.writer.get(first)
            alias = alone and made is not None and made.op_type != "DequantizeLinear"
        else:
            alias = self.rules.aliases and kind in ALIASES and first in self.reads(node)
        if alias:
            for value in node.writes[:1]:
                self.root[value] = self.read(first, node.name)
        return alias

    def buffers(self) -> dict[str, Quantity]:
        """Bytes by buffer: of the values that share it, the smallest."""
        sizes: dict[str, Quantity] = {}
        for value in (*self.source.inputs, *(v for node in self.nodes() for v in node.writes)):
            own, name = self.source.sizes[value], self.buffer(value)
            if name not in sizes or own.full < sizes[name].full:
                sizes[name] = own
        return sizes

    def result(self) -> Assembled:
        kernels = [kernel for kernel in self.kernels if kernel.lead not in self.free]
        steps = [step for kernel in kernels for step in self.steps(kernel)]
        outputs = [self.read(value, "") for value in self.outputs]
        early, late = self.layout_steps()
        steps = [s for step in steps for s in (step, *(early[b] for b in step.writes if b in early))]
        steps = _sorted(steps, late, self.source.inputs)
        used = {*self.source.inputs, *(b for s in steps for b in (*s.writes, *s.scratch))}
        used |= {permit.extra for step in steps for permit in step.in_place if permit.extra}
        sizes = {name: size for name, size in self.sizes.items() if name in used}
        read = {name for node in self.nodes() for name in node.stored}
        lost = {
            name for kernel in self.source.kernels for node in kernel.nodes for name in node.stored
        } - read
        constants = {name: size for name, size in self.source.constants.items() if name not in lost}
        graph = BufferGraph(
            steps=tuple(steps),
            sizes={name: math.ceil(size.full) for name, size in sizes.items()},
            inputs=self.source.inputs,
            outputs=tuple(dict.fromkeys(buffer for buffer in outputs if buffer in sizes)),
            inputs_held=self.rules.inputs_held,
            constants={name: math.ceil(size.full) for name, size in constants.items()},
        )
        return Assembled(graph, sizes, constants)

    def steps(self, kernel: KernelNodes) -> list[Step]:
        """The kernel, and in front of it what pads its input."""
        step = self.step(kernel)
        lead = next(node for node in kernel.nodes if node.name == kernel.lead)
        source = self.buffer(self.resolve(lead.first))
        if not self.rules.padded or lead.padded is None or source not in step.reads:
            return [step]
        padded = f"<padded> {lead.name}"
        self.sizes[padded] = self.scaled(lead.padded, self.resolve(lead.first))
        reads = tuple(padded if buffer == source else buffer for buffer in step.reads)
        pad = Step(f"{step.name} (pad)", (source,), (padded,))
        return [pad, dataclasses.replace(step, reads=reads)]

    def step(self, kernel: KernelNodes) -> Step:
        nodes = kernel.nodes
        own = {value for node in nodes for value in node.writes}
        inside = set()
        for value in own - set(self.outputs):
            users = self.readers.get(value, ())
            if users and all(user in nodes for user in users):
                inside.add(value)
        read = [
            self.read(value, node.name)
            for node in nodes
            for value in self.reads(node)
            if value not in own and value not in self.constant
        ]
        written = [v for node in nodes for v in node.writes if v not in inside]
        stored = [name for node in nodes for name in node.stored]
        stored += [c for node in nodes for v in self.reads(node) for c in self.constant.get(v, ())]
        scratch = [f"<scratch> {kernel.lead}"] if any(node.scratch.full for node in nodes) else []
        for name in scratch:
            self.sizes[name] = largest([node.scratch for node in nodes])
        for node in nodes:
            if self.rules.padded and node.accumulators is not None and self.is_narrow(node.writes[0]):
                scratch.append(f"<accumulators> {node.name}")
                self.sizes[scratch[-1]] = node.accumulators
        return Step(
            name=kernel.lead,
            reads=tuple(dict.fromkeys(read)),
            writes=tuple(dict.fromkeys(map(self.buffer, written))),
            in_place=tuple(self.permits(kernel, own, written)),
            scratch=tuple(scratch),
            constants=tuple(dict.fromkeys(stored)),
        )

    def permits(self, kernel: KernelNodes, own: set[str], written: list[str]) -> Iterator[InPlace]:
        """What the step may write over what: never over what a node of it reads that is not elementwise."""
        if not written:
            return
        result = written[-1]
        ends = itertools.takewhile(lambda node: node.op_type in ELEMENTWISE, reversed(kernel.nodes))
        tail = {node.name for node in ends}
        found = [
            (node, value, self.read(value, node.name))
            for node in kernel.nodes
            for value in self.reads(node)
            if value not in own and value not in self.constant
        ]
        kept = {buffer for node, _, buffer in found if node.name not in tail}
        for node, value, buffer in found:
            if self.rules.in_place and buffer not in kept and self.fits(value, result):
                yield InPlace(buffer, self.buffer(result))
            alone = sum(other == buffer for _, _, other in found) == 1
            if (
                self.rules.depthwise
                and node.plane is not None
                and value == self.resolve(node.first)
                and alone
            ):
                extra = f"<channel> {node.name}"
                self.sizes[extra] = self.scaled(node.plane, value)
                yield InPlace(buffer, self.buffer(result), extra)

    def layout_steps(self) -> tuple[dict[str, Step], dict[str, Step]]:
        """What copies values to another layout: early ones by the buffer that they read, others by the copy."""
        early, late = {}, {}
        made = {self.buffer(value) for value in self.writer}
        for copy, value in self.copies.items():
            source = self.buffer(value)
            self.sizes[copy] = self.source.copy_sizes[value]
            step = Step(f"{value} (layout)", (source,), (copy,))
            if value in self.source.copied_early and source in made and source not in early:
                early[source] = step
            else:
                late[copy] = step
        return early, late

    def fits(self, value: str, result: str) -> bool:
        shapes = self.source.shapes
        same = self.sizes[self.buffer(value)].full == self.sizes[self.buffer(result)].full
        return same and shapes.get(value) == shapes.get(result)

    def is_narrow(self, value: str) -> bool:
        """Whether the value exists in fewer bytes than the program says: quantized."""
        return self.sizes[self.buffer(value)].full < self.source.sizes[value].full

    def scaled(self, plane: Quantity, value: str) -> Quantity:
        """Bytes of a part of `value`, or of it with pads, in the type in which it exists where it is quantized."""
        ratio = self.sizes[self.buffer(value)].full / (self.source.sizes[value].full or 1.0)
        return Quantity(tuple((c * ratio, factors) for c, factors in plane.terms))


def _staying(kernel: KernelNodes, gone: set[str]) -> list[KernelNodes]:
    """What is left of a kernel: all of it, or of one whose lead is gone, each node that stays."""
    if kernel.lead not in gone:
        return [kernel]
    return [KernelNodes(node.name, (node,)) for node in kernel.nodes if node.name not in gone]


def _sorted(steps: list[Step], late: Mapping[str, Step], inputs: Iterable[str]) -> list[Step]:
    """In an order that can be run, as close to the given one as that allows: a kernel waits for its addend.

    Args:
        steps: all others.
        late: copies, by the buffer that they write: made when the first step comes up that reads them.
        inputs: buffers that are there.
    """
    made, left, copies = set(inputs), list(steps), dict(late)
    ordered: list[Step] = []
    while left:
        step = next((s for s in left if made.issuperset(_sources(s, copies))), None)
        if step is None:
            raise InternalError(
                f"Kernel '{left[0].name}' waits for itself; its nodes cannot run as one kernel."
            )
        left.remove(step)
        ordered += [copies.pop(buffer) for buffer in step.reads if buffer in copies]
        ordered.append(step)
        made.update((*step.reads, *step.writes))
    return [*ordered, *copies.values()]  # the last ones are outputs


def _sources(step: Step, copies: Mapping[str, Step]) -> set[str]:
    """Buffers that have to exist before it, or before copies that it reads."""
    return {
        source
        for buffer in step.reads
        for source in (copies[buffer].reads if buffer in copies else (buffer,))
    }
