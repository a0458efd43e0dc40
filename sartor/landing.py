"""Where the search of a fit aims: as near below its limits as measurements can tell, in few of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sartor.strategies.budgeted_greedy import Decision

AIM = 0.983
"""Share of a latency limit that is aimed at: between `NEAR` and what the interval of a measurement leaves."""
NEAR = 0.97
"""A plan below this share of the limit removed more than it had to."""
INSIDE = 0.995
"""A measurement's upper bound must be this far inside the limit: the final one is another draw."""

_FINER, _MOST_FINER, _UNSURE = 1.01, 8, 1.02
"""A step of an aim, and how many in a row; what is predicted to be over the limit by less may be inside."""
_APART = 0.03  # logarithm of the ratio of two predictions


class Landing:
    """Aims again after each measured plan.

    A plan is a step on a grid, and a prediction is off by some per cent, much the same per cent for two plans that are
    close to each other. So the next aim is corrected by how far the last plan was off, and stays between the plans that
    were inside the limit and those that were over it. From two plans on, measured time is taken as a power of predicted
    time: it bends where a part of it is not modelled.

    Args:
        limits: absolute limit by budget key.
        predict: latency of a decision in seconds, by the cost model as it is when it is called.

    Attributes:
        wanted: limits for the next search.
        best: the plan inside all limits that is nearest to that of the latency, or None.
    """

    def __init__(self, limits: Mapping[str, float], predict: Callable[[Decision], float]):
        self._limits, self._predict = dict(limits), predict
        self.wanted = dict(limits)
        if "latency" in limits:
            self.wanted["latency"] *= AIM
        self.best: Decision | None = None
        self._best_tightness = 0.0
        self._inside: list[Decision] = []
        self._over: list[Decision] = []
        self._last: tuple[Decision, float] | None = None
        self._higher = 0  # steps since the last measured plan

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
        self._higher = 0
        (self._over if excess else self._inside).append(decision)
        for key, factor in excess.items():
            if key != "latency":
                self.wanted[key] = min(self.wanted[key], self._limits[key] * 0.975) / factor * 0.985
        if limit:
            factor = (limit * AIM / measured_s) ** (1.0 / self._power(decision, measured_s))
            self.wanted["latency"] = self._between(self._predict(decision) * factor)
            self._last = decision, measured_s
        if excess:
            return "over by " + ", ".join(f"{key} {100 * (f - 1):.1f} %" for key, f in excess.items())
        return f"at {tightness:.3f} of the limit, further than needed"

    def higher(self) -> bool:
        """Aim a little higher, because the last search ended at a plan that is known.

        Returns:
            Whether there may be a plan: not where the next one is surely over.
        """
        if self._last is None or self._higher >= _MOST_FINER:
            return False
        self._higher += 1
        decision, measured_s = self._last
        at_limit = self._predict(decision) * self._limits["latency"] / measured_s
        self.wanted["latency"] *= _FINER
        return self.wanted["latency"] < min([at_limit * _UNSURE, *map(self._predict, self._over)])

    def _power(self, decision: Decision, measured_s: float) -> float:
        """How measured time follows predicted time, from the last two plans; 1 where they are too close to tell."""
        if self._last is None:
            return 1.0
        other, other_s = self._last
        predicted = math.log(self._predict(decision) / self._predict(other))
        measured = math.log(measured_s / other_s)
        return min(max(measured / predicted, 0.5), 2.0) if abs(predicted) > _APART else 1.0

    def _between(self, wanted: float) -> float:
        """The aim, kept between plans that were seen inside and over: noise would lead back to one of them."""
        low = max(map(self._predict, self._inside), default=0.0)
        high = min(map(self._predict, self._over), default=float("inf"))
        if low < wanted < high or high <= low:
            return wanted
        if high == float("inf"):
            return low * 1.01
        return (low + high) / 2 if low else high * 0.99
