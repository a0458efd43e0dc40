"""Moments in which a shared machine is as fast as it gets, as a reference kernel tells.

Other tenants use the memory, the last cache and the other half of a core, for tenths of a second at a time. That slows
models down by unlike factors (seen: 1.15 for a convolution that stays in its core's caches, 1.5 for a network of short
kernels), so it does not cancel where one is divided by the other. But the reference shows when it is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

NEAR = 1.06
"""A reference that takes at most so much longer than at its best is one of a quiet moment."""
_FORGOTTEN = 1e-5  # of the best, per look: clocks may fall for good, and a lucky run is no measure for ever
_PATIENCE_S = 1.0


class Quiet:
    """Looks at the reference, and waits.

    Args:
        reference: runs it; returns seconds.
        best_s: at its best, if that is known; 0 if not.
        patience_s: how long to wait for a quiet moment, at most.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        reference: Callable[[], float],
        best_s: float = 0.0,
        *,
        patience_s: float = _PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._reference, self._patience_s, self._clock = reference, patience_s, clock
        self.best_s = best_s or math.inf

    def look(self) -> float:
        """Seconds of the reference now."""
        seconds = self._reference()
        self.best_s = min(seconds, self.best_s * (1 + _FORGOTTEN))
        return seconds

    def learn(self) -> None:
        """Look for as long as `wait` would: a best that is not known yet would be that of a busy moment."""
        end = self._clock() + self._patience_s
        while self._clock() < end:
            self.look()

    def now(self, seconds: float) -> bool:
        """Whether the reference that took `seconds` did so in a quiet moment."""
        return seconds <= NEAR * self.best_s

    def wait(self) -> float:
        """Look until it is quiet or patience is over; seconds of the last look."""
        end = self._clock() + self._patience_s
        seconds = self.look()
        while not self.now(seconds) and self._clock() < end:
            seconds = self.look()
        return seconds
