"""Interleaved rounds, the interval of a median, and when enough has been measured.

One round visits every artifact twice, in a mirrored order (A B B A, or B A A B): within a round any
linear drift of the machine's speed, and any cost of being first, falls on all artifacts alike.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

CONFIDENCE = 0.95
FEWEST_ROUNDS = 6  # below this no order-statistic interval of a median reaches 95 %


@dataclasses.dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        order: artifact index per visit.
        visits_s: per visit, the median of its inner runs, seconds.
    """

    order: tuple[int, ...]
    visits_s: tuple[float, ...]

    def seconds(self, index: int) -> float:
        """Mean of the visits of artifact `index`."""
        return statistics.fmean(s for i, s in zip(self.order, self.visits_s, strict=True) if i == index)


def schedule(count: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Endless orders of visits for `count` artifacts; the seed chooses, and both orders alternate."""
    generator = random.Random(seed)
    order = list(range(count))
    while True:
        generator.shuffle(order)
        forth, back = tuple(order), tuple(reversed(order))
        yield forth + back if count > 1 else forth
        yield back + forth if count > 1 else forth


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Distribution-free interval of the median: the l-th smallest to the l-th largest sample.

    It covers the median with probability 1 − 2·P(Bin(n, ½) < l) for independent samples of *any*
    continuous distribution, outliers included; l is the largest for which that is at least
    `confidence`. A normal or bootstrap interval would need light tails or many rounds; here a round
    disturbed by another process is one order statistic, whatever its size.

    Reference: H. A. David, H. N. Nagaraja, Order Statistics, 3rd ed., section 7.1.

    Raises:
        ValueError: fewer than `FEWEST_ROUNDS` samples at 95 %.
    """
    ordered = sorted(samples)
    count = len(ordered)
    tail, rank = 0.0, 0
    while True:
        tail += math.comb(count, rank) / 2.0**count
        if 2.0 * tail > 1.0 - confidence or rank >= count // 2:
            break
        rank += 1
    if rank == 0:
        raise ValueError(f"{count} samples are too few for a {confidence:.0%} interval of the median.")
    return ordered[rank - 1], ordered[count - rank]


def ratios(rounds: Sequence[Round], index: int) -> list[float]:
    """Ratio of artifact `index` to artifact 0, per round."""
    return [r.seconds(index) / r.seconds(0) for r in rounds]


def is_precise(rounds: Sequence[Round], count: int, target_half_width: float) -> bool:
    """Whether every interval is narrow enough, as a share of its median.

    With several artifacts the ratios to the first are judged; one alone is judged by its seconds.
    """
    if len(rounds) < FEWEST_ROUNDS:
        return False
    series = [ratios(rounds, i) for i in range(1, count)] or [[r.seconds(0) for r in rounds]]
    for samples in series:
        low, high = median_interval(samples)
        if (high - low) / 2 > target_half_width * statistics.median(samples):
            return False
    return True


def run_rounds(
    visit: Callable[[int], float],
    count: int,
    *,
    min_rounds: int,
    max_rounds: int,
    time_limit_s: float,
    target_half_width: float,
    seed: int,
    clock: Callable[[], float],
    on_round: Callable[[Round], None] = lambda _: None,
) -> tuple[list[Round], str]:
    """Repeat rounds until the interval is narrow enough, the time is over, or `max_rounds`.

    The time limit takes effect after `FEWEST_ROUNDS`, because fewer rounds have no interval.

    Args:
        visit: measures one artifact once; returns the median of its inner runs, seconds.
        count: artifacts; 0 is the baseline.
        min_rounds: never fewer, unless the time is over. Stopping at the first narrow interval
            favours lucky ones; a minimum well above `FEWEST_ROUNDS` bounds that.
        max_rounds: never more.
        time_limit_s: for all rounds.
        target_half_width: of the interval, as a share of the median.
        seed: of the order.
        clock: monotonic seconds.
        on_round: called after each round.

    Returns:
        The rounds, and what ended them: `interval`, `time_limit` or `max_rounds`.
    """
    rounds: list[Round] = []
    started = clock()
    orders = schedule(count, seed)
    while True:
        order = next(orders)
        done = Round(order, tuple(visit(index) for index in order))
        rounds.append(done)
        on_round(done)
        if len(rounds) < FEWEST_ROUNDS:
            continue
        # Both orders equally often, so that neither start is favoured.
        if (
            len(rounds) >= min_rounds
            and len(rounds) % 2 == 0
            and is_precise(rounds, count, target_half_width)
        ):
            return rounds, "interval"
        if len(rounds) >= max_rounds:
            return rounds, "max_rounds"
        if clock() - started >= time_limit_s:
            return rounds, "time_limit"
