"""Visits to kernels between runs of a reference, and what remains of them when the machine is noisy.

A shared machine changes speed (clocks, another tenant's use of the memory) and is interrupted. Both only ever
make a run slower. So a visit waits for a quiet moment, keeps the fast runs of many, is divided by the mean of the
reference right before and right after it, and is thrown away where the reference was slow or changed meanwhile or
where it lies far from the others. Visits are repeated until what is left agrees, or until the limit.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sartor.backends.quiet import Quiet, is_near

CONFIDENCE = 0.95
QUANTILE = 0.1
"""Of the runs of one visit. The minimum of many runs falls with their number; this does not."""
_UNSTEADY = 1.15  # the reference may change by this factor during a visit
_BELIEVED, _LESS_SURE = 0.25, 1.36
"""The quantile of the visits that are left: what still disturbs them makes them longer, never shorter. And how much
wider its interval is than that of the mean, for a normal distribution."""
_FEWEST = 3  # visits to believe; where fewer were steady, those next to it
_FAR = 3.5  # standard deviations, estimated from the median deviation
_FLOOR = 0.005  # of that estimate: agreeing visits are no reason to throw away one that nearly agrees
# Student's t at 95 %, two-sided, for 2, 3, … degrees of freedom (n visits have n - 1).
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclasses.dataclass(frozen=True)
class Visit:
    """One visit.

    Attributes:
        own_s: seconds of a run.
        before_s: of the reference before it.
        after_s: of the reference after it.
    """

    own_s: float
    before_s: float
    after_s: float

    @property
    def ratio(self) -> float:
        """Time in units of the reference."""
        return 2 * self.own_s / (self.before_s + self.after_s)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What visits say together.

    Attributes:
        ratio: time in units of the reference.
        half_width: of its 95 % interval, as a share of it; infinite below three visits.
        used: visits that were not thrown away.
        visits: all visits.
    """

    ratio: float
    half_width: float
    used: int
    visits: int


def median_of_microseconds(seconds: Sequence[float]) -> float:
    """The median of durations that a vendor gives in whole microseconds.

    Within the microsecond that holds the middle, by how many lie below it: kernels of 3 us differ by less than one.
    """
    return statistics.median_grouped([round(s * 1e6) for s in seconds], interval=1.0) * 1e-6


def summarise(visits: Sequence[Visit], level_s: float = 0.0) -> Summary:
    """The lower quartile of the visits that can be believed, and its interval.

    Args:
        visits: of one kernel, at least one.
        level_s: seconds of the reference in quiet moments; 0 where they are not known.
    """
    steady = [v for v in visits if _is_steady(v, level_s)]
    if len(steady) < _FEWEST:
        steady = sorted(visits, key=lambda v: _unsteadiness(v, level_s))[:_FEWEST]
    logs = [math.log(v.ratio) for v in steady]
    middle = statistics.median(logs)
    spread = max(1.4826 * statistics.median(abs(x - middle) for x in logs), _FLOOR)
    kept = [x for x in logs if abs(x - middle) <= _FAR * spread]
    middle = float(np.quantile(kept, _BELIEVED))
    if len(kept) < _FEWEST:
        return Summary(math.exp(middle), math.inf, len(kept), len(visits))
    factor = _T95[min(len(kept) - 3, len(_T95) - 1)]
    half = _LESS_SURE * factor * statistics.stdev(kept) / math.sqrt(len(kept))
    return Summary(math.exp(middle), math.expm1(half), len(kept), len(visits))


def _is_steady(visit: Visit, level_s: float) -> bool:
    references = (visit.before_s, visit.after_s)
    quiet = level_s <= 0 or all(is_near(seconds, level_s) for seconds in references)
    return quiet and max(references) <= _UNSTEADY * min(references)


def _unsteadiness(visit: Visit, level_s: float) -> float:
    """How far the references are from their quiet level; where that is not known, how slow they are."""
    references = (visit.before_s, visit.after_s)
    return max(abs(math.log(s / level_s)) for s in references) if level_s > 0 else max(references)


def visit_all(
    subjects: Mapping[int, Callable[[], float]],
    reference: Callable[[], float],
    *,
    half_width: float,
    fewest: int,
    most: int,
    deadline: float,
    clock: Callable[[], float],
    seed: int,
) -> dict[int, list[Visit]]:
    """Visit every subject in rounds of random order, the reference between any two, until all are known well.

    Args:
        subjects: by index; each call is one visit and returns the seconds of a run.
        reference: seconds of a run of the reference.
        half_width: of a subject's interval, as a share, at which it is visited no more.
        fewest: visits of each, at least (unless the time is over).
        most: visits of each, at most.
        deadline: no round starts after it, the first excepted.
        clock: seconds that `deadline` is on.
        seed: of the order.
    """
    generator = random.Random(seed)
    found: dict[int, list[Visit]] = {index: [] for index in subjects}
    pending = list(subjects)
    quiet = Quiet(reference, clock=clock)
    for number in range(1, most + 1):
        generator.shuffle(pending)
        for index in pending:
            before, own = quiet.wait(), subjects[index]()
            found[index].append(Visit(own, before, quiet.look()))
        if number >= fewest:
            pending = [i for i in pending if summarise(found[i], quiet.level_s).half_width > half_width]
        if not pending or clock() >= deadline:
            break
    return found
