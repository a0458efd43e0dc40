"""The time of one kernel over all widths that a plan can give it.

A model is asked at widths that are multiples of the target's channel grid, and once per class of widths that are
not. Between two multiples an output width costs what the upper one costs; an input width is interpolated. On
multiples of the grid, more channels are never cheaper. A width off the grid costs its measured penalty: time
may well fall from 126 to 128 channels, and a model that hides it would cut there.

A surface has the times of several states of the caches side by side, in its last axis, from a kernel that ran a moment
ago to one that ran long ago (`Sample.period_s`); a longer period is never cheaper.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sartor.cost_models.features import alignment

Weights = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Index of a knot, the weight of it and of the next one, and a penalty."""
Predict = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""Seconds and the standard deviation of their logarithm, `[rows, states]` each, at sizes, a flat array per variable."""
_MOST_KNOTS = {0: 1, 1: 40, 2: 14, 3: 7}
"""Per axis, by how many axes vary."""


@dataclasses.dataclass(frozen=True)
class Range:
    """What one variable of a kernel can be.

    Attributes:
        full: its largest value.
        varies: whether a plan changes it.
        step: channel grid of the target; 1 for what has none, such as bytes.
        rounds: whether a value between two multiples costs as the upper one.
    """

    full: float
    varies: bool
    step: int = 1
    rounds: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class OffGrid:
    """Times along one axis at widths off the grid, the other variables at their full size.

    Attributes:
        widths: `[alignments, points]`, ascending; those of one alignment (`features.alignment`) in a row.
        seconds: at these widths.
        line: times on the knots of the axis, which widths on the grid are interpolated from.
    """

    widths: np.ndarray
    seconds: np.ndarray
    line: np.ndarray

    def factor(self, values: np.ndarray, index: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """What a width costs in units of what it is interpolated to from the knots.

        Never below 1: that a register is not filled cannot save what filling it costs, so less is the model's noise.
        """
        kind = alignment(values)
        own = np.zeros(values.shape)
        for row, (widths, seconds) in enumerate(zip(self.widths, self.seconds, strict=True)):
            curve = np.interp(values, np.append(0.0, widths), np.append(0.0, seconds))
            own = np.where(kind == row, curve, own)
        plain = low * self.line[index]
        if len(self.line) > 1:
            plain = plain + high * self.line[np.minimum(index + 1, len(self.line) - 1)]
        return np.maximum(own / np.maximum(plain, 1e-12), 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """Knots of one variable.

    Attributes:
        extent: what it can be.
        knots: ascending; the last one is `extent.full`.
        off_grid: what widths off the grid cost; None where every width is on it.
    """

    extent: Range
    knots: np.ndarray
    off_grid: OffGrid | None = None

    def weights(self, values: np.ndarray) -> Weights:
        """Index of the lower knot, weight of it, weight of the next, and the penalty of a width off the grid."""
        values = np.asarray(values, float)
        if len(self.knots) == 1:
            index = np.zeros(values.shape, np.intp)
            low, high = np.ones(values.shape), np.zeros(values.shape)
        else:
            x = self._up(values)
            index = np.clip(np.searchsorted(self.knots, x, "right") - 1, 0, len(self.knots) - 2)
            below = self.knots[index]
            high = (x - below) / (self.knots[index + 1] - below)
            low = 1.0 - high
        penalty = np.ones(values.shape)
        if self.off_grid is not None:
            exact = (values % self.extent.step == 0) | (values == self.extent.full)
            penalty = np.where(exact, penalty, self.off_grid.factor(values, index, low, high))
        return index, low, high, penalty

    def _up(self, values: np.ndarray) -> np.ndarray:
        extent = self.extent
        if not extent.rounds or extent.step <= 1:
            return values
        upper = np.ceil(values / extent.step - 1e-9) * extent.step
        x = np.where(values <= extent.full, np.minimum(upper, extent.full), upper)
        return np.maximum(x, self.knots[1] if self.knots[0] == 0 else self.knots[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Surface:
    """Times of one kernel on the knots of its axes.

    Attributes:
        axes: one per variable; may be empty (a constant).
        seconds: `[knots per axis, states]`, never falling along any axis.
        log_sd: standard deviation of their logarithm.
    """

    axes: tuple[Axis, ...]
    seconds: np.ndarray
    log_sd: np.ndarray

    def interpolate(self, variables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and their standard deviation in seconds, `[…, states]`; one array per variable, all of one shape."""
        weights = [axis.weights(v) for axis, v in zip(self.axes, variables, strict=True)]
        return gathered(self.seconds, weights), gathered(self.seconds * self.log_sd, weights)


def gathered(table: np.ndarray, weights: Sequence[Weights]) -> np.ndarray:
    """Multilinear interpolation, `Axis.weights` per axis of `table` but the last, times the largest of the penalties.

    Not times all of them: one width off the grid is enough to leave the kernel that whole vectors have.
    """
    total: np.ndarray | float = 0.0
    worst: np.ndarray | None = None
    varying = [n > 1 for n in table.shape[:-1]]
    for corner in itertools.product(*((0, 1) if v else (0,) for v in varying)):
        factor = np.ones(())
        place = []
        for (index, low, high, _), step in zip(weights, corner, strict=True):
            factor = factor * (high if step else low)
            place.append(index + step)
        total = total + factor[..., None] * table[tuple(place)]
    for *_, penalty in weights:
        worst = penalty if worst is None else np.maximum(worst, penalty)
    return np.asarray(total if worst is None else total * worst[..., None])


def build(ranges: Sequence[Range], predict: Predict) -> Surface:
    """Ask a model at the knots, and at one width off the grid per knot and alignment.

    Args:
        ranges: one per variable of the kernel.
        predict: the model.
    """
    most = _MOST_KNOTS.get(sum(r.varies for r in ranges), 5)
    knots = [_knots(r, most) for r in ranges]
    mesh = np.meshgrid(*knots, indexing="ij") if knots else []
    seconds, log_sd = predict([m.ravel() for m in mesh])
    shape = (*map(len, knots), seconds.shape[-1])
    times, sds = monotone(seconds.reshape(shape)), log_sd.reshape(shape)
    axes = []
    for number, (extent, found) in enumerate(zip(ranges, knots, strict=True)):
        axis = Axis(extent, found)
        if len(found) > 1 and not extent.rounds:
            axis, times, sds = _from_zero(axis, times, sds, number)
        axes.append(axis)
    surface = Surface(tuple(axes), times, sds)
    return dataclasses.replace(
        surface, axes=tuple(_penalised(surface, number, predict) for number in range(len(axes)))
    )


def _knots(extent: Range, most: int) -> np.ndarray:
    if not extent.varies:
        return np.array([extent.full])
    step = max(extent.step, 1)
    if extent.step <= 1:
        return np.unique(
            np.geomspace(max(extent.full / 64, min(extent.full, 1.0)), extent.full, min(most, 9))
        )
    multiples = np.arange(step, extent.full + 1e-9, step)
    if not extent.rounds and len(multiples) < 2:
        multiples = np.append(multiples, max(1.0, extent.full // 2))
    every = np.unique(np.append(multiples, extent.full))
    if len(every) <= most:
        return every
    # Thinned by octaves: kernels differ in size by factors. The ends stay.
    wanted = np.geomspace(every[0], every[-1], most)
    return np.unique(every[np.abs(np.log(every)[:, None] - np.log(wanted)[None, :]).argmin(0)])


def _from_zero(
    axis: Axis, times: np.ndarray, sds: np.ndarray, number: int
) -> tuple[Axis, np.ndarray, np.ndarray]:
    """Below the smallest knot, time falls along the line through the two smallest, but not below zero."""
    knots = axis.knots
    low, next_one = np.take(times, [0], number), np.take(times, [1], number)
    slope = (next_one - low) / (knots[1] - knots[0])
    start = np.clip(low - slope * knots[0], 0.0, low)
    grown = Axis(axis.extent, np.concatenate([[0.0], knots]))
    first = np.take(sds, [0], number)
    return grown, np.concatenate([start, times], number), np.concatenate([first, sds], number)


def _penalised(surface: Surface, number: int, predict: Predict) -> Axis:
    """The axis with the penalties of widths off the grid, the others at their full size."""
    axis = surface.axes[number]
    step = axis.extent.step
    on_grid = int(alignment(step))
    if not axis.extent.varies or on_grid == 0:
        return axis
    # The widest of an alignment below each multiple that is a knot, and below the first multiple after the last.
    last = np.floor(axis.extent.full / step) * step
    anchors = np.unique(np.append(np.floor(axis.knots[axis.knots >= step] / step) * step, last + step))
    widths = anchors[None, :] - 2.0 ** np.arange(on_grid)[:, None]  # [alignments, anchors]
    full = [np.full(widths.size, a.extent.full) for a in surface.axes]
    seconds, _ = predict([widths.ravel() if i == number else f for i, f in enumerate(full)])
    middle = seconds.shape[-1] // 2  # what registers are left empty does not depend on the caches
    on_knots = [
        axis.knots if i == number else np.full(len(axis.knots), a.extent.full)
        for i, a in enumerate(surface.axes)
    ]
    line, _ = surface.interpolate(on_knots)
    off_grid = OffGrid(widths, seconds[:, middle].reshape(widths.shape), line[:, middle])
    return dataclasses.replace(axis, off_grid=off_grid)


def ranges_of(
    names: Sequence[str], fulls: Sequence[float], varies: Sequence[bool], steps: Mapping[str, int]
) -> tuple[Range, ...]:
    """Ranges of a kernel's variables.

    Args:
        names: of the variables, as `sartor.cost_models.signatures.variable_names` gives them.
        fulls: largest values.
        varies: whether a plan changes them.
        steps: channel grid by name; a variable that is not in it has none.
    """
    last = [n for n in names if n in steps][-1:]
    return tuple(
        Range(full, varying, steps.get(name, 1), name in last)
        for name, full, varying in zip(names, fulls, varies, strict=True)
    )


def monotone(values: np.ndarray) -> np.ndarray:
    """The middle between the running maximum and the running minimum from the other end.

    Both are monotone along every axis, so their mean is; values that already are stay unchanged.
    """
    rising, falling = values.copy(), values.copy()
    for axis in range(values.ndim):
        rising = np.maximum.accumulate(rising, axis)
        falling = np.flip(np.minimum.accumulate(np.flip(falling, axis), axis), axis)
    return (rising + falling) / 2
