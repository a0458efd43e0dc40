"""Moments in which a shared machine is as fast as it regularly gets, as a reference kernel tells.

Other tenants use the memory, the last cache and the other half of a core, for tenths of a second at a time. That slows
models down by unlike factors (seen: 1.15 for a convolution that stays in its core's caches, 1.5 for a network of short
kernels), so it does not cancel where one is divided by the other. But the reference shows when it is over. Now and then
it is faster by a fifth, for a few runs on a clock that soon falls; such a moment is no measure of the others, and not a
quiet one.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Collection

import numpy as np

NEAR = 1.06
"""A reference within this factor of its level is one of a quiet moment."""
_PATIENCE_S = 1.0
_APART_S = 0.01  # between looks that count: where it is busy, there are many
_REMEMBERED, _BELIEVED = 4096, 64  # looks that count; and for how many a level stands that is known before
_SHARE, _FEWEST = 0.1, 4  # of the looks are quiet ones, at least


class Quiet:
    """Looks at the reference, and waits.

    Args:
        reference: runs it; returns seconds.
        level_s: its seconds in quiet moments, if they are known; 0 if not.
        patience_s: how long to wait for a quiet moment, at most.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        reference: Callable[[], float],
        level_s: float = 0.0,
        *,
        patience_s: float = _PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._reference, self._patience_s, self._clock = reference, patience_s, clock
        known = [level_s] * _BELIEVED if level_s else []
        self._looks = collections.deque(known, maxlen=_REMEMBERED)
        self._level_s, self._counted = level_s or math.inf, -math.inf

    @property
    def level_s(self) -> float:
        """Seconds of the reference in quiet moments; infinite before the first look."""
        return self._level_s

    def look(self) -> float:
        """Seconds of the reference now."""
        seconds = self._reference()
        now = self._clock()
        if now >= self._counted + _APART_S:
            self._counted = now
            self._looks.append(seconds)
            self._level_s = level(self._looks)
        return seconds

    def learn(self) -> None:
        """Look for as long as `wait` would: a level that is not known yet would be that of a busy moment."""
        end = self._clock() + self._patience_s
        while self._clock() < end:
            self.look()

    def now(self, seconds: float) -> bool:
        """Whether the reference that took `seconds` did so in a quiet moment."""
        return is_near(seconds, self._level_s)

    def wait(self) -> float:
        """Look until it is quiet or patience is over; seconds of the last look."""
        end = self._clock() + self._patience_s
        seconds = self.look()
        while not self.now(seconds) and self._clock() < end:
            seconds = self.look()
        return seconds


def is_near(seconds: float, level_s: float) -> bool:
    """Whether a reference is neither slower nor faster than in quiet moments."""
    return level_s / NEAR <= seconds <= level_s * NEAR


def level(looks: Collection[float]) -> float:
    """The fastest that is no luck: the median of the first tenth of the looks that lie within `NEAR` of each other.

    (Not the least of them, which a clock that was higher for a moment sets. Nor a quantile of all, which depends on how
    often others were busy; nor the most frequent, which may be that of a neighbour who is busy most of the time.)

    Args:
        looks: seconds, at least one.
    """
    found = np.sort(np.fromiter(looks, float, len(looks)))
    first = np.arange(len(found))
    count = np.searchsorted(found, NEAR * found, side="right") - first
    enough = min(max(_FEWEST, math.ceil(_SHARE * len(found))), int(count.max()))
    chosen = int(np.argmax(count >= enough))
    return float(np.median(found[chosen : chosen + enough]))
