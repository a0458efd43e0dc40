"""`teco`: one dimension at a time shrinks, whichever costs the least loss per saving.

Importance within a dimension (INES) picks a candidate of each: channels and blocks by the squares of their gates'
mean gradients, and the next smaller input. Importance across dimensions (ITES) picks one of these: the loss that it
adds, over what it saves in MACs and in latency, the latter by a linear model per dimension. Then the same again on
the network that is left. Formulas and symbols: METHODS.md, (5.2) to (5.8) and Algorithm 2.

Both savings are shares of the original's, so that they have one unit. How much a step removes is not published. The
document trains for an epoch after every step and the result anew; here that is `tune`, and recovery begins with the
original's weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.ir.channels import ChannelAnalysis
from sartor.ir.plan import Plan
from sartor.passes.options import option
from sartor.strategies.dimensions import dimensions, state_of
from sartor.strategies.importance import Importance
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, Step, within


@dataclasses.dataclass(frozen=True)
class Teco(Strategy):
    """Depth, width and resolution by turns: local importance within each, then loss per saving across them."""

    name: ClassVar[str] = "teco"
    needs_data: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    step: float = option(
        0.05, help="MACs that channels go with in a step, over the original's", above=0.0, maximum=0.5
    )
    alpha: float = option(
        0.5, help="weight of MACs in what is saved; the rest is latency", minimum=0.0, maximum=1.0
    )
    ines: bool = option(
        True, help="one candidate per dimension by local importance; false: every group and block is judged"
    )

    tune: int = option(
        0,
        help="training steps after each removal; the document: an epoch of them. 0: candidates are repaired alone",
        minimum=0,
    )

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        return _Descent(space, self).search


@dataclasses.dataclass(frozen=True)
class _Move:
    """Something that goes: units of a group, a block, or a part of the inputs."""

    dimension: str
    name: str
    units: tuple[int, ...] = ()
    size: int = 0

    def __str__(self) -> str:
        if self.dimension == "width":
            return f"{self.name}: {len(self.units)} fewer"
        return f"remove {self.name}" if self.dimension == "depth" else f"input size {self.size}"


class _Descent:
    """The path of the descent, which limits only end: it is walked once, as far as any search asks."""

    def __init__(self, space: Space, options: Teco):
        self.space, self.options = space, options
        self.slopes = slopes(space)
        self.path: list[tuple[_Move, ...]] = []
        self.ended = False
        self.known: dict[int, tuple[ChannelAnalysis, Importance]] = {}
        start = space.start()
        self.macs = space.static([start])[0]["macs"]
        self.latency = space.priced([start], {})[0].get("latency", 0.0)

    def search(self, limits: Mapping[str, float]) -> Decision:
        """The first network on the path that is within the limits, with channels given back as far as they allow.

        Where the step that reached them was another dimension's, which has few and large ones, channels in its place
        are tried.
        """
        taken = 0
        while not self._fits(self._moves(taken), limits):
            if taken == len(self.path) and not self._walk():
                break
            taken += 1
        moves = self._moves(taken)
        if self._fits(moves, limits):
            moves = self._given_back(moves, limits)
            if taken and self.path[taken - 1][0].dimension != "width":
                instead = self._with_channels(taken - 1, limits)
                if instead and self._loss(instead) < self._loss(moves):
                    moves = instead
        steps = [
            Step(", ".join(map(str, step)), self.space.priced([self._state(self._moves(i + 1))], limits)[0])
            for i, step in enumerate(self.path[:taken])
        ]
        return self.space.decision(self._state(moves), limits, self.options.name, steps, self._kept(moves))

    def _fits(self, moves: Sequence[_Move], limits: Mapping[str, float]) -> bool:
        return within(self.space.priced([self._state(moves)], limits)[0], limits)

    def _loss(self, moves: Sequence[_Move]) -> float:
        return self.space.judge.loss(self._plan(moves))

    def _plan(self, moves: Sequence[_Move]) -> Plan:
        return self.space.plan(self._state(moves), self.options.name, self._kept(moves))

    def _with_channels(self, taken: int, limits: Mapping[str, float]) -> list[_Move]:
        """A point of the path and so many channels less that the limits hold; empty where they cannot."""
        moves, chunks = self._moves(taken), self._chunks(taken)
        states = [self._state([*moves, *chunks[: i + 1]]) for i in range(len(chunks))]
        priced = self.space.priced(states, limits) if states else []
        count = next((i + 1 for i, one in enumerate(priced) if within(one, limits)), 0)
        return [*moves, *chunks[:count]] if count else []

    def _moves(self, taken: int) -> list[_Move]:
        return [move for step in self.path[:taken] for move in step]

    def _kept(self, moves: Sequence[_Move]) -> dict[str, tuple[int, ...]]:
        """Units that stay, of groups that lost some."""
        lost: dict[str, set[int]] = {}
        for move in moves:
            if move.dimension == "width":
                lost.setdefault(move.name, set()).update(move.units)
        sizes = {g.name: g.size for g in self.space.analysis.groups}
        return {name: tuple(u for u in range(sizes[name]) if u not in gone) for name, gone in lost.items()}

    def _state(self, moves: Sequence[_Move]) -> State:
        kept = {name: len(units) for name, units in self._kept(moves).items()}
        return State(
            {**self.space.start().kept, **kept},
            frozenset(move.name for move in moves if move.dimension == "depth"),
            max((move.size for move in moves), default=0),
        )

    def _given_back(self, moves: list[_Move], limits: Mapping[str, float]) -> list[_Move]:
        """Without the last channels that went, as many of them as the limits allow."""
        places = [i for i, move in enumerate(moves) if move.dimension == "width"]
        variants = [
            [move for i, move in enumerate(moves) if i not in set(places[len(places) - count :])]
            for count in range(1, len(places) + 1)
        ]
        if not variants:
            return moves
        priced = self.space.priced([self._state(one) for one in variants], limits)
        fitting = [one for one, price in zip(variants, priced, strict=True) if within(price, limits)]
        return fitting[-1] if fitting else moves

    # ---- one step --------------------------------------------------------------------------
    def _walk(self) -> bool:
        """Add the best step to the path; False where nothing can go any more."""
        moves = self._moves(len(self.path))
        candidates = [] if self.ended else list(self._candidates())
        if not candidates:
            self.ended = True
            return False
        before = self._loss(moves)
        macs = self.space.static([self._state(moves)])[0]["macs"]
        scores = []
        for step in candidates:
            after = [*moves, *step]
            state = self._state(after)
            lost = self._loss(after) - before
            saved = macs - self.space.static([state])[0]["macs"]
            scores.append(self._importance(lost, saved, step[0].dimension))
        self.path.append(candidates[int(np.argmin(scores))])
        if self.options.tune:
            self.space.judge.tune(self._plan(self._moves(len(self.path))), self.options.tune)
        return True

    def _importance(self, loss: float, saved: float, dimension: str) -> float:
        """(5.6), with both savings as shares of the original's."""
        share = saved / self.macs
        time = self.slopes[dimension] * saved / self.latency if self.latency else share
        return task_importance(loss, share, time, self.options.alpha)

    def _matters(self, taken: int) -> tuple[ChannelAnalysis, Importance]:
        """What matters in the network at a point of the path."""
        if taken not in self.known:
            self.known[taken] = self.space.judge.importance(self._plan(self._moves(taken)))
        return self.known[taken]

    def _chunks(self, taken: int) -> list[_Move]:
        """Units of all groups that may go, in runs between widths on the grid, the least important first."""
        kept = self._kept(self._moves(taken))
        analysis, importance = self._matters(taken)
        chunks = []
        for group in analysis.groups:
            known = self.space.fine.get(group.name)
            units = kept.get(group.name, tuple(range(group.size)))
            if known is None or len(units) != group.size:
                continue  # what is left of it is part of another group
            order = np.argsort(importance.groups[group.name], kind="stable")
            now = len(units)
            for count in (c for c in known if c < now):
                chosen = order[group.size - now : group.size - count]
                score = float(np.mean(importance.groups[group.name][chosen]))
                chunks.append((score, _Move("width", group.name, tuple(units[i] for i in chosen))))
                now = count
        return [move for _, move in sorted(chunks, key=lambda chunk: chunk[0])]

    def _candidates(self) -> Iterator[tuple[_Move, ...]]:
        taken = len(self.path)
        moves, chunks = self._moves(taken), self._chunks(taken)
        state, blocks = self._state(moves), self._matters(taken)[1].blocks
        if not self.options.ines:
            yield from ((move,) for move in {move.name: move for move in reversed(chunks)}.values())
        elif step := self._channels(moves, chunks):
            yield step
        left = [b.name for b in self.space.blocks if b.name not in state.removed and b.name in blocks]
        ranked = sorted(left, key=lambda name: blocks[name])
        for name in ranked[:1] if self.options.ines else ranked:
            yield (_Move("depth", name),)
        if state.size + 1 < len(self.space.sizes):
            yield (_Move("resolution", "inputs", size=state.size + 1),)

    def _channels(self, moves: Sequence[_Move], ordered: Sequence[_Move]) -> tuple[_Move, ...]:
        """The least important units, until the MACs of a step are saved."""
        taken: list[_Move] = []
        before = self.space.static([self._state(moves)])[0]["macs"]
        for move in ordered:
            taken.append(move)
            if (
                before - self.space.static([self._state([*moves, *taken])])[0]["macs"]
                >= self.options.step * self.macs
            ):
                break
        return tuple(taken)


def task_importance(loss: float, macs: float, latency: float, alpha: float) -> float:
    """Loss that a removal adds, over what it saves (5.6).

    Args:
        loss: added, (5.2).
        macs: saved, (5.3), as a share.
        latency: saved, (5.5), as a share.
        alpha: weight of the MACs.
    """
    saved = alpha * macs + (1.0 - alpha) * latency
    return loss / saved if saved > 0 else float("inf")


def slopes(space: Space) -> dict[str, float]:
    """Seconds per MAC of each dimension: latency is a line over MACs where only that one is scaled (5.4).

    Fitted to predictions; 0 for a dimension that has none.
    """
    found = dict.fromkeys(("depth", "width", "resolution"), 0.0)
    for name, one in dimensions(space).items():
        states = [state_of(space, {name: value}) for value in one.values]
        priced = space.priced(states, {})
        if "latency" in priced[0]:
            macs = np.array([each["macs"] for each in space.static(states)])
            seconds = np.array([each["latency"] for each in priced])
            found[name] = max(float(np.polyfit(macs, seconds, 1)[0]), 0.0)
    return found
