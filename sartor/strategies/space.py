"""What strategies search in: widths of groups, blocks that may go, and sizes of the inputs, with what they cost."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sartor.ir.channels import ChannelAnalysis, ChannelGroup, coarsest
from sartor.ir.plan import GroupPlan, Plan, Widening
from sartor.passes import widen
from sartor.strategies.importance import Importance, lamp

Price = Callable[
    [Mapping[str, np.ndarray], Mapping[str, np.ndarray], Mapping[str, float]], Mapping[str, np.ndarray]
]
"""(kept fraction by group, removed by block, limits), arrays `[plans]` → predicted quantity by budget key.

A quantity that is a maximum over many places comes with a second one, called `KEY EXCESS`: what stands above
the limit, summed over the places. A single step seldom lowers the maximum, but it lowers this.
"""
EXCESS = "excess"

_FEWEST_SHARE = 0.125  # a group keeps at least this share of its units: wider cuts ruin recovery


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision of a search: what was changed, and what was predicted after it."""

    change: str
    predicted: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Decision:
    """A plan, the steps that led to it, and whether all limits are predicted to hold."""

    plan: Plan
    steps: tuple[Step, ...]
    predicted: Mapping[str, float]
    feasible: bool


@dataclasses.dataclass(frozen=True)
class State:
    """Where a search stands: units by group, removed blocks, and which of the space's input sizes."""

    kept: Mapping[str, int]
    removed: frozenset[str] = frozenset()
    size: int = 0

    def at(self, name: str, count: int) -> State:
        """The same with another width of one group."""
        return dataclasses.replace(self, kept={**self.kept, name: count})


@dataclasses.dataclass(frozen=True)
class InputSize:
    """One size of the inputs, and how plans are priced at it.

    Attributes:
        shapes: of the inputs that are another size than the original's, by name.
        share: elements of all inputs over those of the original.
        price: see `Price`.
        static: what the graph alone says of plans, arrays `[plans]`: `macs`, `parameters`, `bytes_written`.
        precision: that networks of this form are lowered in; empty: that of the fit.
    """

    shapes: Mapping[str, tuple[int, ...]]
    share: float
    price: Price
    static: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    precision: str = ""


class Judge(Protocol):
    """What says how good a network is; see `sartor.judge.Judge`."""

    @property
    def has_data(self) -> bool:
        """Whether there is anything to judge by; without, only `layer_scores` by weights answers."""
        ...

    def loss(self, plan: Plan) -> float:
        """Loss of a plan's network, not trained."""
        ...

    def score(self, plan: Plan) -> float:
        """Score of a plan's network, not trained."""
        ...

    def prospect(self, plan: Plan, share: float) -> float:
        """Score that a plan's network reaches early in its recovery."""
        ...

    def tune(self, plan: Plan, steps: int) -> None:
        """Train a plan's network for some steps, and judge with its weights from here on."""
        ...

    def importance(self, plan: Plan, criterion: str = "") -> tuple[ChannelAnalysis, Importance]:
        """Groups of a plan's network and the importance of what is left, by a criterion of this name."""
        ...

    def training(self, plan: Plan) -> tuple[float, float]:
        """Seconds per sample and bytes that a training step of a plan's network takes."""
        ...

    def layer_scores(self, criterion: str) -> Mapping[str, float]:
        """Importance of the original's blocks by a criterion."""
        ...


class Space:
    """See the module docstring.

    Args:
        analysis: channel groups of the original.
        blocks: its residual blocks.
        importance: of units and blocks; asked for when it is needed.
        sizes: of the inputs, the original's first; behind them the same in other precisions.
        grid: channel step of the target for a group.
        judge: what says how good plans are, or None where nothing does.
        seed: of searches that draw.

    Attributes:
        notes: what a strategy found out, for people.
    """

    def __init__(
        self,
        analysis: ChannelAnalysis,
        blocks: Sequence[Any],
        importance: Callable[[], Importance],
        sizes: Sequence[InputSize],
        grid: Callable[[ChannelGroup], int],
        judge: Judge | None = None,
        seed: int = 0,
    ):
        self.analysis, self.sizes, self.seed = analysis, sizes, seed
        self.blocks = [b for b in blocks if b.removable]
        self.levels = {g.name: levels(g, grid(g)) for g in analysis.groups}
        self.fine = {g.name: levels(g, grid(g), most=g.size) for g in analysis.groups}
        self._grid, self._importance, self._judge = grid, importance, judge
        self.notes: list[str] = []

    def shrinking(self) -> Space:
        """The same without inputs that are larger than the original's, for searches that only take away."""
        found = copy.copy(self)
        found.sizes = [one for one in self.sizes if one.share <= 1.0]
        return found

    @property
    def judge(self) -> Judge:
        """What says how good plans are; a strategy that asks has said so (`Strategy.needs_data`)."""
        assert self._judge is not None
        return self._judge

    @property
    def judges(self) -> bool:
        """Whether there are data to judge plans on."""
        return self._judge is not None and self._judge.has_data

    @functools.cached_property
    def importance(self) -> Importance:
        """Of the original's units and blocks."""
        return self._importance()

    @functools.cached_property
    def cost(self) -> dict[str, np.ndarray]:
        """By group, importance that is lost with so many units, `[size + 1]`."""
        scores = self.importance.groups
        return {
            g.name: np.concatenate([[0.0], np.cumsum(lamp(scores[g.name]))]) for g in self.analysis.groups
        }

    @functools.cached_property
    def block_cost(self) -> dict[str, float]:
        """A block costs what its inner widths would, weighted by its importance among blocks."""
        found = self.importance.blocks
        scores = {b.name: max(found.get(b.name, 0.0), 0.0) for b in self.blocks}
        mean = float(np.mean(list(scores.values()))) if scores else 0.0
        inside = {
            block.name: sum(float(self.cost[name][-1]) for name in sorted(self.gone({block.name})))
            for block in self.blocks
        }
        return {
            name: max(inside[name], 1.0) * (score / mean if mean > 0 else 1.0) + 1e-9
            for name, score in scores.items()
        }

    @functools.cached_property
    def uniform_groups(self) -> tuple[ChannelGroup, ...]:
        """Groups that are narrowed together: of heads and their features, the heads."""
        return tuple(coarsest(self.analysis.groups))

    @functools.cached_property
    def ranked_blocks(self) -> tuple[str, ...]:
        """Removable blocks, the least important first."""
        scores = self.importance.blocks
        return tuple(sorted((b.name for b in self.blocks), key=lambda name: (scores.get(name, 0.0), name)))

    def gone(self, removed: Iterable[str]) -> set[str]:
        """Groups that go as a whole with removed blocks."""
        wanted = set(removed)
        nodes = {node for block in self.blocks if block.name in wanted for node in block.nodes}
        found = set()
        for group in self.analysis.groups:
            producers = {m.initializer for m in group.members if m.role == "producer"}
            if nodes and producers and all(self._read_only_by(p, nodes) for p in producers):
                found.add(group.name)
        return found

    def _read_only_by(self, initializer: str, nodes: set[str]) -> bool:
        pending = list(self.analysis.program.initializers[initializer].uses())
        while pending:
            node, _ = pending.pop()
            if node.name in nodes:
                continue
            if node.op_type != "Transpose":
                return False
            pending.extend(node.outputs[0].uses())
        return True

    # ---- states ----------------------------------------------------------------------------
    def start(self) -> State:
        """The original."""
        return State({g.name: g.size for g in self.analysis.groups})

    def smallest(self, *, widths: bool = True, blocks: bool = True, sizes: bool = True) -> State:
        """Everything that may go gone, in the dimensions that are asked for."""
        start = self.start()
        kept = {name: counts[-1] for name, counts in self.levels.items()} if widths else start.kept
        removed = frozenset(b.name for b in self.blocks) if blocks else frozenset()
        share = [size.share for size in self.sizes]
        return State(kept, removed, int(np.argmin(share)) if sizes else 0)

    def scaled(self, width: float = 1.0, depth: float = 1.0, size: int = 0) -> State:
        """All groups at one share of their units, and one share of the removable blocks, the most important.

        Args:
            width: units over those of the original, the nearest on the grid; above 1, of groups that can be widened.
            depth: blocks that stay over all removable ones, rounded.
            size: of the inputs.
        """
        kept = dict(self.start().kept)
        for group in self.uniform_groups:
            wanted = group.size * width
            if width <= 1.0:
                kept[group.name] = min(self.fine[group.name], key=lambda c: (abs(c - wanted), -c))
            elif group.name in self.widenable:
                units = self._step(group)
                kept[group.name] = max(math.ceil(wanted / units - 1e-9) * units, group.size)
        count = round(len(self.blocks) * (1.0 - depth))
        return State(kept, frozenset(self.ranked_blocks[:count]), size)

    @functools.cached_property
    def widenable(self) -> frozenset[str]:
        """Groups that can have more units than they have."""
        return frozenset(g.name for g in self.uniform_groups if not widen.obstacle(self.analysis, g))

    def _step(self, group: ChannelGroup) -> int:
        """Units between two widths beyond the original's."""
        grid = self._grid(group)
        return max(1, grid // math.gcd(grid, group.granularity))

    def wider(self, name: str, count: int, channels: int, most: int) -> int | None:
        """The next width of a group that has some channels more, or None above `most` units."""
        group = self.analysis.group(name)
        wanted = count + math.ceil(channels / group.granularity)
        if count < group.size:
            whole = group.size if group.size <= most else None
            return min((c for c in self.fine[name] if wanted <= c <= most), default=whole)
        units = self._step(group)
        found = math.ceil(wanted / units) * units
        return found if name in self.widenable and found <= most else None

    @functools.cached_property
    def widths(self) -> tuple[float, ...]:
        """A share for every different network that `scaled` gives, ascending, 1 last."""
        turns = {1.0}
        for group in self.uniform_groups:
            for more, fewer in itertools.pairwise(self.fine[group.name]):
                turns.add((more + fewer) / 2 / group.size - 1e-9)  # where the fewer are nearer
        return tuple(sorted(turns))

    # ---- what they cost --------------------------------------------------------------------
    def priced(self, states: Sequence[State], limits: Mapping[str, float]) -> list[dict[str, float]]:
        """Predicted quantities of states."""
        return self._of_each(states, lambda size, f, r: self.sizes[size].price(f, r, limits))

    def static(self, states: Sequence[State]) -> list[dict[str, float]]:
        """What the graph alone says of states; see `InputSize.static`."""
        return self._of_each(states, lambda size, f, r: self.sizes[size].static(f, r))

    def _of_each(self, states: Sequence[State], value: Callable[..., Any]) -> list[dict[str, float]]:
        """Quantities of states, those of one input size at once."""
        found: list[dict[str, float]] = [{}] * len(states)
        for size in sorted({state.size for state in states}):
            places = [i for i, state in enumerate(states) if state.size == size]
            fractions = {
                name: np.array([states[i].kept[name] / counts[0] for i in places])
                for name, counts in self.levels.items()
            }
            removed = {b.name: np.array([b.name in states[i].removed for i in places]) for b in self.blocks}
            values = value(size, fractions, removed)
            for row, i in enumerate(places):
                found[i] = {key: float(array[row]) for key, array in values.items()}
        return found

    def plan(self, state: State, strategy: str, kept: Mapping[str, Sequence[int]] | None = None) -> Plan:
        """The plan of a state.

        Args:
            state: what is left.
            strategy: for the plan's notes.
            kept: units by group, of groups whose kept units are not the most important ones.
        """
        groups, widened = {}, {}
        gone = self.gone(state.removed)
        for group in self.analysis.groups:
            count = state.kept[group.name]
            if group.name in gone or count == group.size:
                continue
            scores = self.importance.groups[group.name]
            if count > group.size:
                order = np.argsort(-scores, kind="stable")
                whole, rest = divmod(count - group.size, group.size)
                copies = [*np.tile(np.arange(group.size), whole), *order[:rest]]
                widened[group.name] = Widening(group.size, tuple(sorted(map(int, copies))))
                continue
            given = (kept or {}).get(group.name)
            keep = group.keep_best(scores, count) if given is None else tuple(map(int, given))
            if len(keep) < group.size:
                groups[group.name] = GroupPlan(group.size, keep)
        return Plan(
            self.analysis.program.source.sha256,
            groups,
            tuple(b.name for b in self.blocks if b.name in state.removed),
            {"strategy": strategy},
            sizes=self.sizes[state.size].shapes,
            widened=widened,
            precision=self.sizes[state.size].precision,
        )

    def decision(
        self,
        state: State,
        limits: Mapping[str, float],
        strategy: str,
        steps: Sequence[Step] = (),
        kept: Mapping[str, Sequence[int]] | None = None,
    ) -> Decision:
        """A state as what a search gives; arguments as for `plan`."""
        predicted = self.priced([state], limits)[0]
        return Decision(self.plan(state, strategy, kept), tuple(steps), predicted, within(predicted, limits))


def within(predicted: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether every limit holds."""
    return all(predicted[key] <= limit for key, limit in limits.items())


def over(predicted: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """By how much the limits are missed, as shares of them added up; 0 where all hold."""
    return sum(max(predicted[key] / limit - 1.0, 0.0) for key, limit in limits.items() if limit > 0)


def levels(group: ChannelGroup, grid: int, most: int = 16) -> list[int]:
    """About `most` kept unit counts from full to fewest, on the target's channel grid.

    A group of no more channels than the grid goes in steps of 4 channels (the least that keeps the vector
    path of the runtimes), and of no more than 4 in single units.
    """
    channels = group.size * group.granularity
    step = grid if channels > grid else 4 if channels > 4 else 1
    units = max(1, step // math.gcd(step, group.granularity))
    units = max(units, math.ceil(group.size / most / units) * units)
    fewest = max(1, min(units, group.size), math.ceil(group.size * _FEWEST_SHARE))
    counts = range((group.size - 1) // units * units, 0, -units)
    return [group.size, *(c for c in counts if c >= fewest)]
