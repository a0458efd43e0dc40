"""Where in one block of memory each buffer lies: offsets for a given schedule.

`greedy_by_size` places the largest buffers first, each at the lowest offset at which it meets no placed buffer that
lives at the same time: the planner of TensorFlow Lite Micro (David et al., "TensorFlow Lite Micro: embedded machine
learning for TinyML systems", MLSys 2021, section 4.4.2). `best_fit_by_size` takes the smallest gap instead of the
lowest: that of TensorFlow Lite (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020).
`best_fit` places buffers in the order in which they come up, as allocators do that do not know what follows.

A buffer written in place lies where the one it replaces begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from sartor.ir.memory.buffers import BufferGraph, moments, saved

ALIGNMENT = 16
"""Of TensorFlow Lite Micro's planner; TensorFlow Lite and ONNX Runtime align to 64."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One buffer in the arena.

    Attributes:
        buffer: its name.
        offset: bytes from the beginning.
        bytes: its size, aligned.
        first: moment at which it comes up, -1 for inputs.
        last: the last moment at which it is needed.
    """

    buffer: str
    offset: int
    bytes: int
    first: int
    last: int

    def clashes(self, other: Allocation) -> bool:
        """Whether both need some byte at some moment."""
        in_time = self.first <= other.last and other.first <= self.last
        in_space = self.offset < other.offset + other.bytes and other.offset < self.offset + self.bytes
        return in_time and in_space


@dataclasses.dataclass(frozen=True)
class Arena:
    """Offsets of all buffers.

    Attributes:
        bytes: end of the highest one.
        allocations: in order of production.
        shared: pairs that lie over each other on purpose: one is written in place of the other.
    """

    bytes: int
    allocations: tuple[Allocation, ...]
    shared: frozenset[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Lifetime:
    buffer: str
    bytes: int
    first: int
    last: int


Chain = tuple[_Lifetime, ...]
"""Buffers at one offset: each but the first is written in place of one of the others."""
_Ranges = list[tuple[int, int]]


def greedy_by_size(graph: BufferGraph, alignment: int = ALIGNMENT) -> Arena:
    """The largest first, each at the lowest offset that is free; of equals the one that comes up last is first."""
    chains, shared = _chains(graph, alignment)
    ordered = sorted(reversed(chains), key=lambda chain: -_largest(chain))
    return _placed(graph, ordered, shared, _lowest)


def best_fit_by_size(graph: BufferGraph, alignment: int = ALIGNMENT) -> Arena:
    """What lives throughout first, then the largest, each in the smallest gap that holds it.

    The planner of TensorFlow Lite: of equals, the one that comes up first is first.
    """
    chains, shared = _chains(graph, alignment)
    end = len(graph.steps) - 1

    def rank(chain: Chain) -> tuple[bool, int]:
        throughout = chain[0].first <= 0 and max(life.last for life in chain) == end
        return not throughout, -_largest(chain)

    return _placed(graph, sorted(chains, key=rank), shared, _smallest_gap)


def best_fit(graph: BufferGraph, alignment: int = ALIGNMENT) -> Arena:
    """In order of production, each in the smallest gap that holds it."""
    chains, shared = _chains(graph, alignment)
    return _placed(graph, chains, shared, _smallest_gap)


def plan_arena(graph: BufferGraph, alignment: int = ALIGNMENT) -> Arena:
    """The smallest of the three."""
    planned = (planner(graph, alignment) for planner in (greedy_by_size, best_fit_by_size, best_fit))
    return min(planned, key=lambda arena: arena.bytes)


def peak_with_reuse(graph: BufferGraph) -> int:
    """Peak of an allocator that hands a buffer over to the next one of its size, and keeps it until that comes.

    ONNX Runtime's allocation plan: what is dead is not given back if a later value of the same size is there to take
    it, so that it stays allocated between the two. The one that died last is taken first.
    """
    chains, _ = _chains(graph, 1)
    fixed = {*graph.inputs, *graph.outputs}
    taken: dict[int, list[_Lifetime]] = {}  # by the number of the chain that had the memory first
    dead: list[tuple[int, int, int]] = []  # when it died, its size, that number
    for number, chain in enumerate(chains):
        size = _largest(chain)
        own = number
        if chain[0].buffer not in fixed and not any(life.buffer in fixed for life in chain):
            usable = [entry for entry in dead if entry[1] == size and entry[0] < chain[0].first]
            if usable:
                dead.remove(max(usable))
                own = max(usable)[2]
            dead.append((max(life.last for life in chain), size, own))
        taken.setdefault(own, []).extend(chain)
    totals = [0] * (len(graph.steps) + 1)
    for lives in taken.values():
        size = max(life.bytes for life in lives)
        for moment in range(min(life.first for life in lives), max(life.last for life in lives) + 1):
            totals[moment + 1] += size
    return max(totals)


def _largest(chain: Chain) -> int:
    return max(life.bytes for life in chain)


def _chains(graph: BufferGraph, alignment: int) -> tuple[list[Chain], frozenset[tuple[str, str]]]:
    """Buffers by the offset that they share, in order of production, and the pairs that share at a handover."""
    lives: dict[str, _Lifetime] = {}
    root: dict[str, str] = {}
    shared = set()
    for moment in moments(graph):
        gain, permit = saved(moment.in_place, graph.sizes)
        extra = [permit.extra] if gain and permit is not None and permit.extra else []
        for buffer in (*moment.live, *extra):
            size = -(-graph.sizes[buffer] // alignment) * alignment
            first = lives[buffer].first if buffer in lives else moment.step
            lives[buffer] = _Lifetime(buffer, size, first, moment.step)
        if gain and permit is not None:
            root[permit.write] = root.get(permit.read, permit.read)
            shared.add((permit.read, permit.write))
    members: dict[str, list[_Lifetime]] = {}
    for buffer, life in lives.items():
        if life.bytes:
            members.setdefault(root.get(buffer, buffer), []).append(life)
    return [tuple(chain) for chain in members.values()], frozenset(shared)


def _placed(
    graph: BufferGraph,
    chains: Iterable[Chain],
    shared: frozenset[tuple[str, str]],
    choose: Callable[[_Ranges, int], int],
) -> Arena:
    done: list[Allocation] = []
    for chain in chains:
        offset = choose(_taken(chain, done), _largest(chain))
        done += [Allocation(life.buffer, offset, life.bytes, life.first, life.last) for life in chain]
    order = {buffer: i for i, buffer in enumerate(graph.sizes)}
    done.sort(key=lambda allocation: (allocation.first, order[allocation.buffer]))
    return Arena(max((a.offset + a.bytes for a in done), default=0), tuple(done), shared)


def _taken(chain: Chain, done: Sequence[Allocation]) -> _Ranges:
    """Offsets at which `chain` may not begin: ranges without their ends, in ascending order and apart."""
    ranges = []
    for life in chain:
        for other in done:
            if life.first <= other.last and other.first <= life.last:
                ranges.append((other.offset - life.bytes, other.offset + other.bytes))
    joined: _Ranges = []
    for low, high in sorted(ranges):
        if joined and low < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def _lowest(taken: _Ranges, size: int) -> int:
    offset = 0
    for low, high in taken:
        if offset > low:
            offset = max(offset, high)
    return offset


def _smallest_gap(taken: _Ranges, size: int) -> int:
    """The first free offset of the gap with the fewest offsets to choose from; behind everything if there is none."""
    gaps = []
    offset = 0
    for low, high in taken:
        if offset <= low:
            gaps.append((low - offset, offset))
        offset = max(offset, high)
    return min(gaps)[1] if gaps else offset
