"""What memory is planned over: steps in an order that may change, and the buffers that they read and write.

A `BufferGraph` says nothing of operators. Those of a program are made by `sartor.ir.memory.programs`, those of a
flatbuffer by `sartor.backends.tflite.buffers`; schedules and arenas are found on either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from sartor.errors import UsageError


@dataclasses.dataclass(frozen=True)
class InPlace:
    """A step may write one buffer over another that it reads, where nothing reads that one afterwards.

    Attributes:
        read: the buffer that is given up.
        write: the buffer that takes its place.
        extra: a buffer that exists during the step only if this is done, or empty. A depthwise convolution
            needs one channel beside the place that its input and output share.
    """

    read: str
    write: str
    extra: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """What runs at once.

    Attributes:
        name: of the kernel or operator.
        reads: buffers, each once.
        writes: buffers, each once; no other step writes them.
        in_place: permissions; at most one of them is used.
        scratch: buffers that exist while it runs.
        constants: weights that it reads; they lie elsewhere (flash), and count as traffic only.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    in_place: tuple[InPlace, ...] = ()
    scratch: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class BufferGraph:
    """Steps and buffers of one inference.

    Attributes:
        steps: in an order that can be run.
        sizes: bytes by buffer, scratch included.
        inputs: buffers that are full when it begins.
        outputs: buffers that have to stay until it ends.
        inputs_held: inputs belong to the caller: they stay, and nothing is written over them.
        constants: bytes by constant, those included that no step reads.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs_held: bool = True
    constants: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        written = set(self.inputs)
        for step in self.steps:
            for buffer in step.reads:
                if buffer not in written:
                    raise UsageError(
                        f"Step '{step.name}' reads buffer '{buffer}', which no input and no step before it writes; "
                        "give the steps in an order that can be run."
                    )
            for buffer in (*step.writes, *step.scratch):
                if buffer in written:
                    raise UsageError(
                        f"Step '{step.name}' writes buffer '{buffer}', which is written already; "
                        "give each result a buffer of its own, and permission with InPlace."
                    )
            written.update(step.writes)
            written.update(step.scratch)
        used = written | {permit.extra for step in self.steps for permit in step.in_place if permit.extra}
        missing = sorted(used - set(self.sizes))
        if missing:
            raise UsageError(f"Buffer '{missing[0]}' has no size; give one to each buffer, 0 included.")
        lost = sorted(set(self.outputs) - written)
        if lost:
            raise UsageError(f"Output '{lost[0]}' is written by no step; name buffers of this graph.")

    @property
    def held(self) -> frozenset[str]:
        """Buffers that stay until the end."""
        return frozenset(self.outputs) | (frozenset(self.inputs) if self.inputs_held else frozenset())

    def reordered(self, order: Sequence[int]) -> BufferGraph:
        """The same with its steps in another order: indices into `steps`.

        Raises:
            UsageError: not each step once, or a step before what it reads.
        """
        if sorted(order) != list(range(len(self.steps))):
            raise UsageError(
                f"A schedule of {len(self.steps)} steps names each of them once; found {list(order)[:8]}…"
            )
        return dataclasses.replace(self, steps=tuple(self.steps[i] for i in order))

    def constant_bytes(self) -> int:
        """Bytes of the constants: what has to lie in flash, or in memory beside the activations."""
        return sum(self.constants.values())

    def traffic_bytes(self) -> int:
        """Bytes that the steps read and write, constants included: memory traffic if no cache held anything.

        Apart from peak memory: it adds over the steps, and a schedule does not change it.
        """
        total = 0
        for step in self.steps:
            total += sum(self.sizes[b] for b in (*step.reads, *step.writes))
            total += sum(self.constants[c] for c in step.constants)
        return total


@dataclasses.dataclass(frozen=True)
class Moment:
    """What exists while a step runs.

    Attributes:
        step: its index, -1 for the moment before the first one.
        live: buffers, in order of production; of an in-place pair both.
        in_place: permissions that may be used here: what is given up has no later reader.
    """

    step: int
    live: tuple[str, ...]
    in_place: tuple[InPlace, ...] = ()


def moments(graph: BufferGraph) -> list[Moment]:
    """The moment before the first step, and one per step in the order of `graph.steps`."""
    end = len(graph.steps)
    born = dict.fromkeys(graph.inputs, -1)
    last = dict.fromkeys(graph.inputs, -1)
    for index, step in enumerate(graph.steps):
        for buffer in (*step.writes, *step.scratch):
            born[buffer] = last[buffer] = index
        for buffer in step.reads:
            last[buffer] = index
    for buffer in graph.held:
        last[buffer] = end
    rows: list[list[str]] = [[] for _ in range(end + 1)]
    for buffer, first in born.items():
        for index in range(first, min(last[buffer], end - 1) + 1):
            rows[index + 1].append(buffer)
    found = [Moment(-1, tuple(rows[0]))]
    for index, step in enumerate(graph.steps):
        usable = tuple(p for p in step.in_place if last[p.read] == index and p.read in step.reads)
        found.append(Moment(index, tuple(rows[index + 1]), usable))
    return found


def saved(permits: Iterable[InPlace], sizes: Mapping[str, int]) -> tuple[int, InPlace | None]:
    """Bytes that the best of the permissions saves, and which one that is; None where none saves any."""
    best, choice = 0, None
    for permit in permits:
        extra = sizes[permit.extra] if permit.extra else 0
        gain = min(sizes[permit.read], sizes[permit.write]) - extra
        if gain > best:
            best, choice = gain, permit
    return best, choice
