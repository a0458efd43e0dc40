"""How far training is, by the clock or by steps, and what follows: the learning rate, when to judge, when to stop."""

from __future__ import annotations

import dataclasses
import math
import time

_WARM_UP = 0.03


@dataclasses.dataclass(frozen=True)
class Moment:
    """What holds for the next step.

    Attributes:
        fraction: of training that is done, in [0, 1].
        finished: there is no next step.
        due: progress is to be judged before it.
    """

    fraction: float
    finished: bool
    due: bool

    @property
    def rate(self) -> float:
        """Learning rate, as a share of its peak: a short warm-up, then a cosine."""
        warm = min(1.0, (self.fraction + 1e-3) / _WARM_UP)
        return warm * 0.5 * (1.0 + math.cos(math.pi * self.fraction))


class Clock:
    """Time of one recovery, resumed parts included.

    Args:
        budget_s: wall time for everything.
        max_steps: stop after as many steps; all but the end by time then depends on steps only.

    Attributes:
        earlier_s: of the runs before a resume.
        training_from_s: when training began.
        judgement_s: what one judgement takes.
    """

    def __init__(self, budget_s: float, max_steps: int | None):
        self.started = time.perf_counter()
        self.budget_s, self.max_steps = budget_s, max_steps
        self.earlier_s = self.training_from_s = self.judgement_s = 0.0
        self._judged_s, self._judged_step = 0.0, 0

    @property
    def elapsed_s(self) -> float:
        """Wall time so far."""
        return self.earlier_s + time.perf_counter() - self.started

    def judged(self, step: int) -> None:
        """Note that progress was just judged."""
        self._judged_s, self._judged_step = self.elapsed_s, step

    def moment(self, step: int) -> Moment:
        """What holds after `step` steps."""
        return Moment(self._fraction(step), self._finished(step), self._due(step))

    def reserve_s(self) -> float:
        """Time kept for what follows training: statistics and two judgements."""
        return min(0.05 * self.budget_s + 2.0 * self.judgement_s, 0.5 * self.budget_s)

    def _fraction(self, step: int) -> float:
        if self.max_steps is not None:
            return min(step / self.max_steps, 1.0)
        training_s = self.budget_s - self.reserve_s() - self.training_from_s
        return min((self.elapsed_s - self.training_from_s) / max(training_s, 1e-6), 1.0)

    def _finished(self, step: int) -> bool:
        if self.max_steps is not None and step >= self.max_steps:
            return True
        return self.elapsed_s >= self.budget_s - self.reserve_s()

    def _due(self, step: int) -> bool:
        if self.max_steps is not None:
            return step - self._judged_step >= max(self.max_steps // 10, 1)
        if self.elapsed_s + self.judgement_s >= self.budget_s - self.reserve_s():
            return False  # the one after training is near
        return self.elapsed_s - self._judged_s >= max(self.budget_s / 12, 10.0 * self.judgement_s)
