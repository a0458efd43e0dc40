"""`adaptscale`: depth, width and resolution that keep a network in balance with its data and with itself.

Balance with the data is `T = log2(r / (t c))`, that of the structure `S = log2(c / t)`, of `t` layers, `c` mean
channels and inputs of `r` pixels across. NSGA-II makes both as near to their targets as the limits allow. Formulas and
symbols: METHODS.md, (4.10) to (4.15).

A network that is small enough is in balance at any size, so every individual is as wide as the limits allow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.ir.fusion import CONTRACTIONS
from sartor.passes.options import option
from sartor.strategies.dimensions import Dimension, dimensions, state_of, widest
from sartor.strategies.evolution import evolve, front
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, over


@dataclasses.dataclass(frozen=True)
class AdaptScale(Strategy):
    """Balance between data, depth and width by NSGA-II; trains nothing and needs no data."""

    name: ClassVar[str] = "adaptscale"
    resizes: ClassVar[bool] = True

    data_balance: float | None = option(None, help="target of T; none: that of the original")
    structure_balance: float | None = option(None, help="target of S; none: that of the original")
    alpha: float = option(0.55, help="weight of T in the choice from the front", minimum=0.0, maximum=1.0)
    generations: int = option(20, help="of the search", minimum=1, maximum=1000)
    population: int = option(20, help="of the search", minimum=4, maximum=1000)

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        found = dimensions(space)
        start = balance(space, space.start())
        given = (self.data_balance, self.structure_balance)
        targets = tuple(own if one is None else one for one, own in zip(given, start, strict=True))
        space.notes.append(f"balance of the original: T {start[0]:.2f}, S {start[1]:.2f}")
        return lambda limits: self._search(space, found, (targets[0], targets[1]), limits)

    def _search(
        self,
        space: Space,
        found: Mapping[str, Dimension],
        targets: tuple[float, float],
        limits: Mapping[str, float],
    ) -> Decision:
        known: dict[tuple[float, int], tuple[State, float]] = {}

        def state(genes: Mapping[str, float]) -> tuple[State, float]:
            """As wide as it may be, and by how much it is over the limits all the same."""
            values = {n: found[n].values[int(index)] for n, index in genes.items()}
            depth, size = values.get("depth", 1.0), int(values.get("resolution", 0))
            if (depth, size) not in known:
                one = widest(space, limits, depth, size) if "width" in found else state_of(space, values)
                known[depth, size] = one, over(space.priced([one], limits)[0], limits)
            return known[depth, size]

        def rate(population: Sequence[Mapping[str, float]]) -> list[tuple[list[float], float]]:
            return [
                (list(distance(balance(space, one), targets)), missed)
                for one, missed in map(state, population)
            ]

        genes: dict[str, tuple[float, float] | int] = {
            name: len(one.values) for name, one in found.items() if name != "width"
        }
        if not genes:
            return space.decision(state({})[0], limits, self.name)
        tried = evolve(
            genes,
            rate,
            population=self.population,
            generations=self.generations,
            objectives=2,
            crossover=0.9,
            mutation=0.3,
            seed=space.seed,
            first=[{name: length - 1 for name, length in genes.items() if isinstance(length, int)}],
        )
        allowed = front(tried) or [min(tried, key=lambda one: one.violation)]
        best = min(allowed, key=lambda one: chosen_by(one.objectives, self.alpha))
        return space.decision(state(best.genes)[0], limits, self.name)


def balance(space: Space, state: State) -> tuple[float, float]:
    """T and S of a state, (4.10) and (4.11).

    Layers are convolutions and matrix products whose weights are parameters, their channels those that they make.
    """
    program = space.analysis.program
    gone = {node for block in space.blocks if block.name in state.removed for node in block.nodes}
    share = {group.name: state.kept[group.name] / group.size for group in space.analysis.groups}
    channels = []
    for node in program.nodes():
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in CONTRACTIONS or node.name in gone or weight is None:
            continue
        if weight.name not in program.initializers:
            continue
        extents = space.analysis.extents.get(node.outputs[0].name or "", ())
        axis = 1 if node.op_type.startswith("Conv") else -1
        if len(extents) > 1:
            channels.append(float(extents[axis].evaluate(share)))
    shapes = {**program.input_shapes, **space.sizes[state.size].shapes}
    across = max(math.sqrt(math.prod(shape[-2:])) for shape in shapes.values())
    return balances(len(channels) or 1, float(np.mean(channels)) if channels else 1.0, across)


def balances(layers: int, channels: float, across: float) -> tuple[float, float]:
    """(4.10) and (4.11).

    Args:
        layers: t.
        channels: c, the mean.
        across: r, pixels.
    """
    return math.log2(across / (layers * channels)), math.log2(channels / layers)


def distance(found: Sequence[float], targets: Sequence[float]) -> tuple[float, float]:
    """How far T and S are from their targets, (4.12) and (4.13)."""
    return abs(found[0] - targets[0]), abs(found[1] - targets[1])


def chosen_by(distances: Sequence[float], alpha: float) -> float:
    """The sum that picks from the front, (4.15)."""
    return alpha * distances[0] + (1.0 - alpha) * distances[1]
