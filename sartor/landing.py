"""Where the search of a fit aims: as near below its limits as measurements can tell, in few of them.

Predictions of plans that are close to each other are off by a per cent or two from one to the next, which is as wide
as what counts as near. So after the first plan several are measured at once, around the aim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sartor.ir.plan import Plan
from sartor.strategies.space import Decision

AIM = 0.983
"""Share of a latency limit that is aimed at: between `NEAR` and what the interval of a measurement leaves."""
NEAR = 0.97
"""A plan below this share of the limit removed more than it had to."""
INSIDE = 0.995
"""A measurement's upper bound must be this far inside the limit: the final one is another draw."""

_FINER, _MOST_STEPS, _UNSURE = 1.01, 8, 1.02
"""A step of an aim, and how many in a row; what is predicted to be over the limit by less may be inside."""
_OFF_SD, _BEND_SD = 0.015, 0.3
"""Of predictions of plans beside each other, and of the power in which measured time follows them."""
_AROUND, _TOGETHER = (1.0, 0.988, 1.012, 1.024, 0.976), 3
"""Aims around one, and how many plans are measured at once."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was measured of one plan.

    Attributes:
        values: by budget key; a latency is not among them.
        latency_s: median, seconds.
        upper_s: upper bound of its 95 % interval, seconds.
    """

    values: Mapping[str, float]
    latency_s: float
    upper_s: float


class Landing:
    """Aims again after each measured plan.

    A plan is a step on a grid, and a prediction is off by some per cent, much the same per cent for two plans that are
    close to each other. So the next aim is corrected by how far the plans before it were off.

    Args:
        limits: absolute limit by budget key.
        predict: latency of a decision in seconds, by the cost model as it is when it is called.

    Attributes:
        wanted: limits for the next search.
        best: the plan inside all limits that is nearest to that of the latency, or None.
        decisions: what followed from each iteration, for people.
    """

    def __init__(self, limits: Mapping[str, float], predict: Callable[[Decision], float]):
        self._limits, self._predict = dict(limits), predict
        self.wanted = dict(limits)
        if "latency" in limits:
            self.wanted["latency"] *= AIM
        self.best: Decision | None = None
        self.decisions: list[str] = []
        self._best_tightness = 0.0
        self._measured: list[tuple[Decision, float]] = []
        self._steps = 0  # of the aim since the last measured plan

    def run(
        self,
        search: Callable[[Mapping[str, float]], Decision],
        measure: Callable[[Sequence[Decision], int], Sequence[Seen]],
        most: int,
    ) -> Decision:
        """Search, measure and aim again, until a plan is near enough or no other is nearer.

        Args:
            search: the plan for some limits.
            measure: plans at once, and the number of the iteration.
            most: iterations.

        Returns:
            The best plan inside all limits, or the last that was measured where none is.
        """
        tried: list[Decision] = []
        for iteration in range(1, most + 1):
            chosen = self._chosen(search, [one.plan for one in tried])
            if not chosen:
                break  # the next finer step is over the limit: this is as near as the grid allows
            tried += chosen
            pairs = list(zip(chosen, measure(chosen, iteration), strict=True))
            limit = self._limits.get("latency", 0.0)
            pairs.sort(
                key=lambda pair: -abs(pair[1].latency_s - limit)
            )  # the next aim starts from the nearest
            said = [self.seen(one, was.latency_s, self.excess(was.values, was.upper_s)) for one, was in pairs]
            if not all(said):
                break
            self.decisions.append(f"iteration {iteration} is {'; '.join(said)}: aimed again")
        return self.best or tried[-1]

    def _chosen(
        self, search: Callable[[Mapping[str, float]], Decision], known: Sequence[Plan]
    ) -> list[Decision]:
        """Plans to be measured at once: those around the aim that are not known yet, or the next finer one."""
        found: list[Decision] = []
        for wanted in self._aims():
            if len(found) == _TOGETHER:
                break
            decision = search(wanted)
            if decision.plan not in [*known, *(one.plan for one in found)]:
                found.append(decision)
        while not found and (self.higher() if self.best is not None else self._lower()):
            decision = search(self.wanted)
            if decision.plan not in known:
                found.append(decision)
        return found

    def _aims(self) -> list[dict[str, float]]:
        """Limits for the searches of the next measurement: one at first, then some around the aim, itself first."""
        if not self._measured:
            return [dict(self.wanted)]
        return [{**self.wanted, "latency": self.wanted["latency"] * factor} for factor in _AROUND]

    def excess(self, values: Mapping[str, float], upper_s: float) -> dict[str, float]:
        """Keys whose measured value is above what is accepted, and by which factor.

        Args:
            values: by budget key; a latency is not looked at.
            upper_s: upper bound of the measured latency, seconds.
        """
        seen = {key: upper_s / INSIDE if key == "latency" else values[key] for key in self._limits}
        return {key: value / self._limits[key] for key, value in seen.items() if value > self._limits[key]}

    def seen(self, decision: Decision, measured_s: float, excess: Mapping[str, float]) -> str:
        """Take note of a measured plan, and aim again.

        Args:
            decision: the plan.
            measured_s: its latency in seconds.
            excess: as `excess` said.

        Returns:
            What follows from it, for people; empty where the search is over.
        """
        limit = self._limits.get("latency", 0.0)
        tightness = measured_s / limit if limit else 1.0
        if not excess:
            if self.best is None or tightness > self._best_tightness:
                self.best, self._best_tightness = decision, tightness
            if tightness >= NEAR:
                return ""
        elif not decision.feasible or (self.best is not None and set(excess) != {"latency"}):
            return ""
        self._steps = 0
        for key, factor in excess.items():
            if key != "latency":
                self.wanted[key] = min(self.wanted[key], self._limits[key] * 0.975) / factor * 0.985
        if limit:
            self._measured.append((decision, measured_s))
            self.wanted["latency"] = self._predicted_at(limit * AIM)
        if excess:
            return "over by " + ", ".join(f"{key} {100 * (f - 1):.1f} %" for key, f in excess.items())
        return f"at {tightness:.3f} of the limit, further than needed"

    def higher(self) -> bool:
        """Aim a little higher, because the last search ended at a plan that is known.

        Returns:
            Whether there may be a plan: not where the next one is surely over.
        """
        if not self._measured or self._steps >= _MOST_STEPS:
            return False
        self._steps += 1
        self.wanted["latency"] *= _FINER
        at_limit = self._predicted_at(self._limits["latency"])
        return self.wanted["latency"] < at_limit * _UNSURE

    def _lower(self) -> bool:
        """Aim a little lower, because the last search ended at a plan that is known to be over."""
        if not self._measured or self._steps >= _MOST_STEPS:
            return False
        self._steps += 1
        self.wanted["latency"] /= _FINER
        return True

    def _predicted_at(self, latency_s: float) -> float:
        """The prediction of plans that take so long: measured time as a power of predicted time, times a factor.

        Both by least squares of logarithms over all that was measured, the power kept near 1 as long as predictions lie
        close to each other: one plan tells no power, and two that differ by less than they are off tell little.
        """
        x = np.log([self._predict(decision) for decision, _ in self._measured])
        y = np.log([measured_s for _, measured_s in self._measured])
        at = math.log(latency_s)
        terms = np.stack([np.ones_like(x), x - at], axis=1)
        ridge = np.diag([0.0, (_OFF_SD / _BEND_SD) ** 2])
        shift, bend = np.linalg.solve(terms.T @ terms + ridge, terms.T @ (y - x))
        return math.exp(at - shift / min(max(1.0 + bend, 0.5), 2.0))
