"""A target's practical roofline: the envelope of what it gave networks of every size, and a law fitted to it.

With work W and time L of each measured network, the envelope joins those that no other beats in both, by straight
lines in log W and log L. It rises, and lies on or below every measured network. Two laws are fitted to it where
networks were measured, by least squares of log L, and the closer one is kept:

    sum:  L = floor + W / rate          max:  L = max(floor, W / rate)

Both are flat up to the saturation point `floor * rate` and rise with `1 / rate` from there on.

Reference: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52 (2009), for the shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST_SIZES = 4
SPAN = 10.0
"""Between the smallest and the largest work, at least, for a law to mean anything."""
_STEPS, _ROUNDS = 41, 6


@dataclasses.dataclass(frozen=True)
class Roofline:
    """An envelope. `vertices`: `(flop, seconds)`, both rising."""

    vertices: tuple[tuple[float, float], ...]

    @property
    def best_flop_per_s(self) -> float:
        """Highest rate of any vertex."""
        return max(flop / seconds for flop, seconds in self.vertices)

    def latency_s(self, flop: float) -> float:
        """Seconds that the device needs for this work: flat below the smallest vertex.

        Raises:
            ValueError: more work than that of the largest vertex, of which nothing is known.
        """
        works, times = np.array(self.vertices).T
        if flop > works[-1]:
            raise ValueError(f"{flop:.3g} FLOP are beyond the envelope, which ends at {works[-1]:.3g}.")
        return float(np.exp(np.interp(np.log(max(flop, works[0])), np.log(works), np.log(times))))


def envelope(points: Sequence[tuple[float, float]]) -> Roofline:
    """The lower envelope of `(flop, seconds)`; at least one point."""
    kept: list[tuple[float, float]] = []
    best = np.inf
    # From the largest work down, and of equal work the faster first: what is slower than more work is beaten.
    for flop, seconds in sorted(points, key=lambda p: (-p[0], p[1])):
        if seconds < best and (not kept or flop < kept[-1][0]):
            kept.append((flop, seconds))
            best = seconds
    return Roofline(tuple(reversed(kept)))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law of the envelope, with its residuals as shares of the measured time.

    Attributes:
        law: `sum` or `max`; see the module docstring.
        floor_s: launch floor.
        rate_flop_per_s: peak rate.
        rms_residual_fraction: root mean square over the sizes that were measured.
        worst_residual_fraction: largest absolute one.
        sizes: number of them.
    """

    law: str
    floor_s: float
    rate_flop_per_s: float
    rms_residual_fraction: float
    worst_residual_fraction: float
    sizes: int

    @property
    def saturation_flop(self) -> float:
        """Work from which on the device is busy."""
        return self.floor_s * self.rate_flop_per_s

    def latency_s(self, flop: float) -> float:
        """Seconds by the law."""
        return float(_law(self.law, np.array(self.floor_s), np.array(self.rate_flop_per_s), np.array(flop)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self) | {"saturation_flop": self.saturation_flop}


def fit(points: Sequence[tuple[float, float]]) -> tuple[Fit | None, str]:
    """The closer of both laws of the envelope of `(flop, seconds)`, or why there is none."""
    line = envelope(points)
    # Every size counts, not the vertices alone: all that is flat has only one of them.
    works = np.unique([flop for flop, _ in points])
    if len(works) < FEWEST_SIZES or works[-1] < SPAN * works[0]:
        return None, (
            f"{len(works)} sizes over a factor of {works[-1] / works[0]:.3g} in work were measured; a law needs "
            f"{FEWEST_SIZES} over a factor of {SPAN:g}"
        )
    times = np.array([line.latency_s(work) for work in works])
    fits = [_fit(law, works, times) for law in ("sum", "max")]
    return min(fits, key=lambda f: f.rms_residual_fraction), ""


def _fit(law: str, works: np.ndarray, times: np.ndarray) -> Fit:
    """Search of both logarithms on grids that close in: robust, and two parameters need no solver."""
    rates = works / times
    low = np.log([times[0] / 20, rates.min() / 2])
    high = np.log([times[-1], rates.max() * 20])
    for _ in range(_ROUNDS):
        floors, peaks = (np.linspace(a, b, _STEPS) for a, b in zip(low, high, strict=True))
        floor, rate = np.meshgrid(np.exp(floors), np.exp(peaks), indexing="ij")
        error = np.log(_law(law, floor[..., None], rate[..., None], works)) - np.log(times)
        at = np.unravel_index(np.argmin((error**2).sum(axis=-1)), floor.shape)
        centre = np.array([floors[at[0]], peaks[at[1]]])
        half = 2 * (high - low) / (_STEPS - 1)
        low, high = centre - half, centre + half
    found_floor, found_rate = np.exp(centre)
    residuals = _law(law, found_floor, found_rate, works) / times - 1
    return Fit(
        law,
        float(found_floor),
        float(found_rate),
        float(np.sqrt((residuals**2).mean())),
        float(np.abs(residuals).max()),
        len(works),
    )


def _law(law: str, floor: np.ndarray, rate: np.ndarray, works: np.ndarray) -> np.ndarray:
    busy = works / rate
    return floor + busy if law == "sum" else np.maximum(floor, busy)
