"""`hacscale`: resolution and width share one scale factor, depth stays; widths go where they matter most.

A factor `s` of compute is divided by one number: `r = sqrt(s ** alpha)`, `w = sqrt(s ** (1 - alpha))`. The best `alpha`
is searched for by judging a network of each. Widths of single layers then follow importance: layers matter as a power
of their width, fitted to uniformly scaled networks, and the one that matters most grows by a few kernels as long as
the limits hold. Within limits above the original's cost the network grows, from the function that it has. Formulas and
symbols: METHODS.md, (4.3) to (4.6) and Algorithm 1.

The step that breaks a limit is taken back, and the layers after it in importance are tried. A layer that would matter
more the wider it is gets the mean exponent of the others, or none but it would grow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.errors import UsageError
from sartor.passes.options import option
from sartor.strategies.dimensions import last_within
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, Step, within

_ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_FACTORS = 200
_LARGEST = 4.0  # of the width, when growing
_FALLBACK = -1.0  # exponent of importance where no layer's falls with its width


@dataclasses.dataclass(frozen=True)
class HacScale(Strategy):
    """Width by importance and resolution, in both directions, at the depth that there is."""

    name: ClassVar[str] = "hacscale"
    needs_data: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    alpha: float | None = option(
        None, help="share of the compute that the resolution takes; none: searched for", above=0.0, below=1.0
    )
    samples: int = option(5, help="networks that importance is fitted to", minimum=2, maximum=32)
    kernels: int = option(10, help="that a layer grows by at once; rounded up to the channel grid", minimum=1)

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        if not space.uniform_groups:
            raise UsageError(
                "Strategy 'hacscale' changes widths, but no group of this network can be another width."
            )
        return _Scaling(space, self).search

    def smallest(self, space: Space) -> Sequence[State]:
        """See `Strategy.smallest`."""
        return [space.smallest(blocks=False)]


class _Scaling:
    def __init__(self, space: Space, options: HacScale):
        self.space, self.options = space, options
        self._sizes: dict[bool, int] = {}
        self._laws: dict[bool, dict[str, tuple[float, float]]] = {}

    def search(self, limits: Mapping[str, float]) -> Decision:
        start = self.space.start()
        grows = within(self.space.priced([start], limits)[0], limits)
        if grows not in self._sizes:
            self._sizes[grows] = self._best_size(limits, grows)
            self._laws[grows] = self._law(grows)
        size, law = self._sizes[grows], self._laws[grows]
        first = dataclasses.replace(start if grows else self.space.smallest(blocks=False), size=size)
        state, steps = self._grown(first, law, limits, most=_LARGEST if grows else 1.0)
        return self.space.decision(state, limits, self.options.name, steps)

    # ---- resolution ------------------------------------------------------------------------
    def _best_size(self, limits: Mapping[str, float], grows: bool) -> int:
        """The input size of the best `alpha`; the largest network of each within the limits is judged."""
        alphas = _ALPHAS if self.options.alpha is None else (self.options.alpha,)
        states: list[State] = []
        tried: list[float] = []
        for alpha in alphas:
            state = last_within(self.space, list(self._line(alpha, grows)), limits)
            if state is not None and state not in states:
                states.append(state)
                tried.append(alpha)
        if not states:
            return self.space.smallest(widths=False, blocks=False).size
        if len(states) == 1:
            return states[0].size
        judge, name = self.space.judge, self.options.name
        losses = [judge.loss(self.space.plan(state, name)) for state in states]
        best = int(np.argmin(losses))
        self.space.notes.append(f"alpha {tried[best]} of {', '.join(map(str, alphas))} loses the least")
        return states[best].size

    def _line(self, alpha: float, grows: bool) -> Iterator[State]:
        """Networks of one `alpha`, the smallest first."""
        least, most = (1.0, _LARGEST**2) if grows else (self.space.widths[0] ** 2, 1.0)
        seen = None
        for factor in np.geomspace(least, most, _FACTORS):
            across, width = scales(float(factor), alpha)
            size = min(
                range(len(self.space.sizes)),
                key=lambda i: abs(math.log(math.sqrt(self.space.sizes[i].share) / across)),
            )
            state = self.space.scaled(width, size=size)
            if state != seen:
                yield state
            seen = state

    # ---- widths ----------------------------------------------------------------------------
    def _law(self, grows: bool) -> dict[str, tuple[float, float]]:
        """`a, b` of every group's importance `a C ** b`, from uniformly scaled networks."""
        least, most = (1.0, 2.0) if grows else (max(self.space.widths[0], 0.25), 1.0)
        counts: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}
        for width in np.linspace(least, most, self.options.samples):
            state = self.space.scaled(float(width))
            plan = self.space.plan(state, self.options.name)
            analysis, importance = self.space.judge.importance(plan, "taylor-weight")
            for group in analysis.groups:
                if state.kept.get(group.name) == group.size:
                    counts.setdefault(group.name, []).append(group.size)
                    values.setdefault(group.name, []).append(float(importance.groups[group.name].sum()))
        return guarded({name: power_law(counts[name], values[name]) for name in counts}, self.space)

    def _grown(
        self, state: State, law: Mapping[str, tuple[float, float]], limits: Mapping[str, float], most: float
    ) -> tuple[State, list[Step]]:
        """Algorithm 1: the layer that matters most grows, then the next, while the limits hold."""
        steps: list[Step] = []
        names = [g.name for g in self.space.uniform_groups if g.name in law]
        sizes = {g.name: g.size for g in self.space.uniform_groups}
        full: set[str] = set()
        while left := [name for name in names if name not in full]:
            name = max(left, key=lambda one: law[one][0] * state.kept[one] ** law[one][1])
            count = self.space.wider(name, state.kept[name], self.options.kernels, round(sizes[name] * most))
            if count is None:
                full.add(name)
                continue
            wider = state.at(name, count)
            priced = self.space.priced([wider], limits)[0]
            if not within(priced, limits):
                full.add(name)
                continue
            steps.append(Step(f"{name}: {state.kept[name]} → {count}", priced))
            state = wider
        return state, steps


def scales(factor: float, alpha: float) -> tuple[float, float]:
    """Resolution and width of a compute factor, (4.3)."""
    return math.sqrt(factor**alpha), math.sqrt(factor ** (1.0 - alpha))


def power_law(widths: Sequence[int], importance: Sequence[float], rounds: int = 50) -> tuple[float, float]:
    """`a, b` of `a C ** b` (4.6), by least squares: Gauss-Newton from the line through the logarithms.

    Args:
        widths: C.
        importance: not negative.
        rounds: of Gauss-Newton; halved steps where one does not improve.
    """
    x = np.log(np.asarray(widths, float))
    y = np.asarray(importance, float)
    positive = y > 0
    if positive.sum() < 2 or np.ptp(x[positive]) == 0:
        return float(y.mean()), 0.0
    b, log_a = np.polyfit(x[positive], np.log(y[positive]), 1)
    at = np.array([math.exp(log_a), b])

    def error(point: np.ndarray) -> float:
        return float(np.square(point[0] * np.exp(point[1] * x) - y).sum())

    for _ in range(rounds):
        grown = np.exp(at[1] * x)
        slopes = np.stack([grown, at[0] * grown * x], axis=1)
        step, *_ = np.linalg.lstsq(slopes, y - at[0] * grown, rcond=None)
        scale = 1.0
        while scale > 1e-6 and not error(at + scale * step) < error(at):
            scale /= 2
        if scale <= 1e-6:
            break
        at = at + scale * step
    return float(at[0]), float(at[1])


def guarded(laws: Mapping[str, tuple[float, float]], space: Space) -> dict[str, tuple[float, float]]:
    """Laws that all fall with the width; one that does not gets the others' mean exponent through its own size."""
    falling = [b for a, b in laws.values() if b < 0 < a]
    exponent = float(np.mean(falling)) if falling else _FALLBACK
    sizes = {group.name: group.size for group in space.analysis.groups}
    found = {}
    for name, (a, b) in laws.items():
        here = max(a * sizes[name] ** b, 0.0)
        found[name] = (a, b) if b < 0 < a else (here / sizes[name] ** exponent, exponent)
    return found
