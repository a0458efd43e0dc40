"""The order of steps that needs least memory.

What is live depends only on the set of steps that have run, a downset of the dependency order, so the search is over
downsets, by lowest peak first. Three things keep it small:

* steps that every other step comes before or after (dominator cuts) split it into regions that are searched alone;
* a step that fits under the peak so far and leaves no more than it found is taken at once: moving it to the front of
  any continuation lowers what is live at every later moment;
* a state at or above the peak of the best known schedule is dropped, and every region is done when it is at or below
  a bound that some single step enforces on any schedule.

Finding the best order is NP-hard in general (Sethi, "Complete register allocation problems", SIAM J. Comput. 4(3),
1975), hence the limit on states; beyond it the best of a beam search stands, with the bound that the search reached.
Downsets as states are as in Ahn et al., "Ordering chaos: memory-aware scheduling of irregularly wired neural networks
for edge devices", MLSys 2020.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator

from sartor.ir.memory.buffers import BufferGraph
from sartor.ir.memory.peak import peak

MAX_STATES = 20_000
BEAM = 32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of a graph's steps.

    Attributes:
        order: indices into `graph.steps`.
        peak_bytes: of this order.
        lower_bound_bytes: no order needs less.
        optimal: whether the two are equal.
        states: how many downsets the exact search looked at; 0 where the heuristic met the bound.
    """

    order: tuple[int, ...]
    peak_bytes: int
    lower_bound_bytes: int
    optimal: bool
    states: int


@dataclasses.dataclass(frozen=True)
class _Permit:
    read: int
    gain: int


class _Problem:
    """The graph in integers: buffers by number, sets of steps as bits."""

    def __init__(self, graph: BufferGraph):
        number = {name: i for i, name in enumerate(graph.sizes)}
        self.count = len(graph.steps)
        self.size = list(graph.sizes.values())
        self.reads = [tuple(number[b] for b in step.reads) for step in graph.steps]
        self.needs = [sum(graph.sizes[b] for b in (*s.writes, *s.scratch)) for s in graph.steps]
        self.readers = [0] * len(number)
        self.before = [0] * self.count  # direct predecessors
        self.behind = [0] * self.count  # direct successors
        self.permits: list[tuple[_Permit, ...]] = []
        producer = {number[b]: i for i, step in enumerate(graph.steps) for b in step.writes}
        self.held = {number[b] for b in graph.held}
        for index, reads in enumerate(self.reads):
            for buffer in reads:
                self.readers[buffer] |= 1 << index
                if buffer in producer:
                    self.before[index] |= 1 << producer[buffer]
                    self.behind[producer[buffer]] |= 1 << index
        self.left = []  # of what a step writes, the bytes that outlive it
        for step in graph.steps:
            kept = [number[b] for b in step.writes if self.readers[number[b]] or number[b] in self.held]
            self.left.append(sum(self.size[b] for b in kept))
            self.permits.append(tuple(_permits(graph, step.in_place, number)))
        inputs = [number[b] for b in graph.inputs]
        self.start = sum(self.size[b] for b in inputs if self.readers[b] or b in self.held)
        self.producer = producer
        self.inputs = set(inputs)
        self.ancestors, self.descendants = self._closures()

    def _closures(self) -> tuple[list[int], list[int]]:
        above, below = [0] * self.count, [0] * self.count
        for index in range(self.count):  # the given order can be run
            for other in _bits(self.before[index]):
                above[index] |= above[other] | 1 << other
        for index in reversed(range(self.count)):
            for other in _bits(self.before[index]):
                below[other] |= below[index] | 1 << index
        return above, below

    def run(self, done: int, live: int, step: int) -> tuple[int, int]:
        """Bytes while `step` runs after the set `done`, and bytes after it."""
        rest = ~(done | 1 << step)
        freed = [b for b in self.reads[step] if not self.readers[b] & rest and b not in self.held]
        gain = max((p.gain for p in self.permits[step] if p.read in freed), default=0)
        after = live + self.left[step] - sum(self.size[b] for b in freed)
        return live + self.needs[step] - gain, after

    def first(self, done: int, region: int) -> int:
        """Steps of `region` that may run after `done`."""
        return sum(1 << step for step in _bits(region) if not self.before[step] & ~done)

    def following(self, done: int, ready: int, step: int) -> int:
        """Steps that may run after `step`, which was one of those that could; `done` contains it."""
        new = sum(1 << s for s in _bits(self.behind[step]) if not self.before[s] & ~done)
        return (ready | new) & ~(1 << step)

    def unavoidable(self, step: int) -> int:
        """Bytes that exist while `step` runs, whatever the order: what it touches, what passes over it."""
        above, below = self.ancestors[step], self.descendants[step]
        total = self.needs[step]
        for buffer, size in enumerate(self.size):
            made = self.producer.get(buffer)
            there = buffer in self.inputs or (made is not None and above >> made & 1)
            needed = buffer in self.reads[step] or self.readers[buffer] & below or buffer in self.held
            total += size if there and needed else 0
        return total - max((p.gain for p in self.permits[step]), default=0)

    def regions(self) -> list[int]:
        """Sets of steps that run one after another in every schedule."""
        everything = (1 << self.count) - 1
        bounds = {0, everything}
        for step in range(self.count):
            above = self.ancestors[step]
            if above | self.descendants[step] | 1 << step == everything:
                bounds |= {above, above | 1 << step}
        cuts = sorted(bounds, key=int.bit_count)
        return [high & ~low for low, high in itertools.pairwise(cuts)]


def _permits(graph: BufferGraph, permits: tuple, number: dict[str, int]) -> Iterator[_Permit]:
    for permit in permits:
        extra = graph.sizes[permit.extra] if permit.extra else 0
        gain = min(graph.sizes[permit.read], graph.sizes[permit.write]) - extra
        if gain > 0:
            yield _Permit(number[permit.read], gain)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclasses.dataclass(frozen=True)
class _Found:
    """Schedule of one region."""

    order: tuple[int, ...]
    peak: int
    bound: int
    live: int
    states: int


def schedule(graph: BufferGraph, max_states: int = MAX_STATES, beam: int = BEAM) -> Schedule:
    """The order of steps with the lowest peak, or the best one found.

    Args:
        graph: its own order is the one to beat; among equals it stands.
        max_states: downsets to look at, over all regions.
        beam: downsets of equal size that the heuristic keeps.
    """
    given = peak(graph).bytes
    problem = _Problem(graph)
    begin = sum(graph.sizes[b] for b in graph.inputs)
    floor = max([begin, *map(problem.unavoidable, range(problem.count))])
    own = tuple(range(problem.count))
    if given == floor:
        return Schedule(own, given, floor, True, 0)
    order: list[int] = []
    done, live, highest, bound, states = 0, problem.start, floor, floor, 0
    for region in problem.regions():
        found = _region(problem, done, region, live, highest, max_states - states, beam)
        order += found.order
        done, live, states = done | region, found.live, states + found.states
        if found.bound > highest:  # else it says only what regions before it need, which may not be the least
            bound = max(bound, found.bound)
        highest = max(highest, found.peak)
    if highest >= given:
        order, highest = list(own), given
    return Schedule(tuple(order), highest, bound, highest == bound, states)


def _region(
    problem: _Problem, done: int, region: int, live: int, floor: int, budget: int, beam: int
) -> _Found:
    """The best order of the steps of `region` after `done`; nothing below `floor` is looked for."""
    known = _beam(problem, done, region, live, floor, 1)
    if known.peak > floor and beam > 1:
        known = min(known, _beam(problem, done, region, live, floor, beam), key=lambda found: found.peak)
    if known.peak <= floor:
        return known
    return _search(problem, done, region, floor, known, live, budget)


def _moves(problem: _Problem, done: int, ready: int, live: int, highest: int) -> list[tuple[int, int, int]]:
    """Steps that may come next: (step, peak with it, live after it); one only if it costs nothing."""
    found = []
    for step in _bits(ready):
        during, after = problem.run(done, live, step)
        if during <= highest and after <= live:
            return [(step, highest, after)]
        found.append((step, max(highest, during), after))
    return found


_State = tuple[int, int, tuple, int]
"""Peak so far, bytes that are live, steps as nested pairs, steps that may come next."""


def _beam(problem: _Problem, done: int, region: int, live: int, floor: int, width: int) -> _Found:
    """Beam search: of the downsets of each size, those with the lowest peak, and of these the emptiest."""
    goal = done | region
    layer: dict[int, _State] = {done: (floor, live, (), problem.first(done, region))}
    for _ in range(region.bit_count()):
        following: dict[int, _State] = {}
        for mask, (highest, held, path, ready) in layer.items():
            for step, during, after in _moves(problem, mask, ready, held, highest):
                key = mask | 1 << step
                if key not in following or during < following[key][0]:
                    then = problem.following(key, ready, step) & region
                    following[key] = (during, after, (path, step), then)
        kept = sorted(following.items(), key=lambda item: (item[1][0], item[1][1], item[0]))[:width]
        layer = dict(kept)
    highest, held, path, _ = layer[goal]
    return _Found(_unrolled(path), highest, floor, held, 0)


def _unrolled(path: tuple) -> tuple[int, ...]:
    order = []
    while path:
        path, step = path
        order.append(step)
    return tuple(reversed(order))


def _search(
    problem: _Problem, done: int, region: int, floor: int, known: _Found, live: int, budget: int
) -> _Found:
    """Best first over downsets; `known` is the schedule to beat."""
    goal = done | region
    heap = [(floor, 0, done, live, problem.first(done, region))]
    best = {done: floor}
    came: dict[int, tuple[int, int]] = {}
    closed: set[int] = set()
    while heap:
        highest, depth, mask, held, ready = heapq.heappop(heap)
        if mask == goal:
            return _Found(_walked(came, done, goal), highest, highest, held, len(closed))
        if mask in closed:
            continue
        if len(closed) >= budget:
            return dataclasses.replace(known, bound=max(floor, highest), states=len(closed))
        closed.add(mask)
        for step, during, after in _moves(problem, mask, ready, held, highest):
            key = mask | 1 << step
            if during < min(known.peak, best.get(key, known.peak)):
                best[key], came[key] = during, (mask, step)
                then = problem.following(key, ready, step) & region
                heapq.heappush(heap, (during, depth - 1, key, after, then))
    return dataclasses.replace(known, bound=known.peak, states=len(closed))


def _walked(came: dict[int, tuple[int, int]], done: int, goal: int) -> tuple[int, ...]:
    order = []
    while goal != done:
        goal, step = came[goal]
        order.append(step)
    return tuple(reversed(order))
