"""The time of one kernel over all widths that a plan can give it.

Time steps with the width: a runtime has other code for whole vectors, for multiples of four, for the rest, and for
fewer channels than a block. So the widths of every axis fall into classes, each has knots of its own, and a width is
interpolated between knots of its class. Where an output width costs what the next multiple of the grid costs, the knots
stand right behind a multiple and right before the next one, and what is flat between them stays flat. Within a class
more channels are never cheaper, and a width off the grid is never cheaper than the multiple below it; but it may cost
more than the one above: time falls from 126 to 128 channels, and a model that hides it would cut there.

A surface has the times of several states of the caches side by side, in its last axis, from a kernel that ran a moment
ago to one that ran long ago (`Sample.period_s`); a longer period is never cheaper. Of a kernel that may have twins
(`Sample.twins`) it has them twice, with all of its twins and alone, which is never cheaper either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.work import Units

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Index of a knot, the weight of it and of the next one."""
Predict = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""Seconds and the standard deviation of their logarithm, `[rows, states]` or `[rows, 2, states]` each, at sizes, a flat
array per variable."""
_VECTOR = 4
"""Widths off the grid that are multiples of it are a class of their own."""
_MOST_ON = {1: 40, 2: 12, 3: 5}
_MOST_OFF = {1: 20, 2: 5, 3: 3}
_FEW = {1: 64, 2: 12, 3: 5}
"""By how many axes vary: knots on the grid, multiples beside which there are knots off it; widths that are all knots if
there are no more of them."""
_MOST_BYTES = 12
_SAME = 0.05
"""Logarithm of two times that are the same, as far as models can tell."""
_SPAN = 64
"""Of what has no grid, less than a part in so many of its full size costs no less."""


@dataclasses.dataclass(frozen=True)
class Range:
    """What one variable of a kernel can be.

    Attributes:
        full: its largest value.
        varies: whether a plan changes it.
        step: channel grid of the target; 1 for what has none, such as numbers of groups.
        rounds: whether a value between two multiples costs as the upper one.
        units: where the variable is bytes: the channels that they are of. None for what is a whole number itself.
        vectors: whether there is other code for multiples of a vector that are none of the grid.
        few: widths up to it have other code: one depthwise channel is a convolution of one group, and what has fewer
            input channels than a block is read as images are.
    """

    full: float
    varies: bool
    step: int = 1
    rounds: bool = False
    units: Units | None = None
    vectors: bool = True
    few: int = 0

    def class_of(self, widths: np.ndarray) -> np.ndarray:
        """0 for multiples of the grid, 1 for other multiples of a vector, 2 for the rest; up to `few`, 3 and 4."""
        if self.step <= 1:
            return np.zeros(np.shape(widths), np.intp)
        off = np.where(widths % _VECTOR == 0, 1, 2) if self.vectors and self.step > _VECTOR else 2
        return np.where(widths % self.step == 0, 0, off + 2 * (widths <= self.few))


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """Knots of one variable.

    Attributes:
        extent: what it can be.
        classes: knots by class of widths, ascending in each; some may be empty. Of bytes, the channels.
    """

    extent: Range
    classes: tuple[np.ndarray, ...]

    @functools.cached_property
    def knots(self) -> np.ndarray:
        """All of them, class by class."""
        return np.concatenate(self.classes)

    @property
    def segments(self) -> list[slice]:
        """Where the knots of each class stand."""
        ends = np.cumsum([len(c) for c in self.classes])
        return [
            slice(int(end) - len(c), int(end)) for c, end in zip(self.classes, ends, strict=True) if len(c)
        ]

    @property
    def sizes(self) -> np.ndarray:
        """The variable at the knots."""
        return self.knots if self.extent.units is None else self.extent.units.bytes_of(self.knots)

    def weights(self, values: np.ndarray) -> Weights:
        """Index of the lower knot, weight of it, weight of the next."""
        values = np.asarray(values, float)
        if self.extent.units is not None:
            values = self.extent.units.channels_of(values)
        index = np.zeros(values.shape, np.intp)
        high = np.zeros(values.shape)
        kinds, start = self.extent.class_of(values), 0
        for kind, knots in enumerate(self.classes):
            if len(knots):
                mine = kinds == kind
                place, share = _between(knots, values)
                index, high = np.where(mine, start + place, index), np.where(mine, share, high)
            start += len(knots)
        return index, 1.0 - high, high


@dataclasses.dataclass(frozen=True, eq=False)
class Surface:
    """Times of one kernel on the knots of its axes.

    Attributes:
        axes: one per variable; may be empty (a constant).
        seconds: `[knots per axis, states]`, or `[knots per axis, 2, states]`: with all of its twins, and alone.
        log_sd: standard deviation of their logarithm.
    """

    axes: tuple[Axis, ...]
    seconds: np.ndarray
    log_sd: np.ndarray

    @property
    def alone(self) -> np.ndarray:
        """Seconds without twins, `[knots per axis, states]`."""
        return self.seconds if self.seconds.ndim == len(self.axes) + 1 else self.seconds[..., 1, :]

    @property
    def gain(self) -> np.ndarray | None:
        """What is added to that, nothing or less, where all of its twins are there; None where that is nothing."""
        if self.seconds.ndim == len(self.axes) + 1:
            return None
        gain = self.seconds[..., 0, :] - self.seconds[..., 1, :]
        return gain if gain.any() else None

    def interpolate(self, variables: Sequence[np.ndarray], crowd: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and their standard deviation in seconds, `[…, states]`.

        Args:
            variables: one array per variable, all of one shape.
            crowd: as `sartor.cost_models.items.crowds` has it, a number or an array of that shape.
        """
        weights = [axis.weights(v) for axis, v in zip(self.axes, variables, strict=True)]
        found = gathered(self.seconds, weights), gathered(self.seconds * self.log_sd, weights)
        if self.alone is self.seconds:
            return found
        share = np.asarray(crowd, float)[..., None]
        seconds, sd = (share * part[..., 0, :] + (1.0 - share) * part[..., 1, :] for part in found)
        return seconds, sd


def gathered(table: np.ndarray, weights: Sequence[Weights]) -> np.ndarray:
    """Multilinear interpolation, `Axis.weights` per axis of `table` but the last ones."""
    total: np.ndarray | float = 0.0
    lengths, rest = table.shape[: len(weights)], (1,) * (table.ndim - len(weights))
    for corner in itertools.product(*((0, 1) if n > 1 else (0,) for n in lengths)):
        factor = np.ones(())
        place = []
        for (index, low, high), step, length in zip(weights, corner, lengths, strict=True):
            factor = factor * (high if step else low)
            place.append(np.minimum(index + step, length - 1))  # behind the last knot of all, with weight 0
        total = total + factor.reshape(*factor.shape, *rest) * table[tuple(place)]
    return np.asarray(total)


def build(ranges: Sequence[Range], predict: Predict) -> Surface:
    """Ask a model at the knots.

    Args:
        ranges: one per variable of the kernel.
        predict: the model.
    """
    varying = sum(r.varies for r in ranges)
    axes = tuple(Axis(r, _classes(r, varying)) for r in ranges)
    mesh = np.meshgrid(*(axis.sizes for axis in axes), indexing="ij") if axes else []
    seconds, log_sd = predict([m.ravel() for m in mesh])
    shape = (*(len(axis.knots) for axis in axes), *seconds.shape[1:])
    times = seconds.reshape(shape)
    for corner in itertools.product(*(axis.segments for axis in axes)):
        times[corner] = monotone(times[corner])
    for number, axis in enumerate(axes):
        times = _never_below(_as_the_upper_one(times, axis, number), axis, number)
    if times.ndim > len(axes) + 1:  # what rounds widths up looks at either end by itself
        times[..., 0, :] = np.minimum(times[..., 0, :], times[..., 1, :])
    return Surface(axes, times, log_sd.reshape(shape))


def _never_below(times: np.ndarray, axis: Axis, number: int) -> np.ndarray:
    """No width off the grid is cheaper than the multiple below it."""
    below = np.floor(axis.knots / max(axis.extent.step, 1)) * axis.extent.step
    known, least = _on_grid(times, axis, number, below)
    return np.where(known, np.maximum(times, least), times)


def _as_the_upper_one(times: np.ndarray, axis: Axis, number: int) -> np.ndarray:
    """A width that is rounded up costs what the multiple above it costs, unless a model says clearly otherwise."""
    if not axis.extent.rounds:
        return times
    above = np.ceil(axis.knots / max(axis.extent.step, 1)) * axis.extent.step
    known, upper = _on_grid(times, axis, number, above)
    near = np.abs(np.log(np.maximum(times, 1e-12) / np.maximum(upper, 1e-12))) < _SAME
    return np.where(known & near, upper, times)


def _on_grid(times: np.ndarray, axis: Axis, number: int, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times at multiples of the grid, one per knot of an axis, and which of them are known; shaped like `times`."""
    on, shape = axis.classes[0], [1] * times.ndim
    shape[number] = len(widths)
    if axis.extent.step <= 1 or not len(on):
        return np.zeros(shape, bool), times
    place, high = _between(on, widths)
    upper, share = np.minimum(place + 1, len(on) - 1), high.reshape(shape)
    found = np.take(times, place, number) * (1.0 - share) + np.take(times, upper, number) * share
    return ((widths >= on[0]) & (widths <= on[-1])).reshape(shape), found


def _between(knots: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the knot below, and how far it is from there to the next one."""
    if len(knots) == 1:
        return np.zeros(values.shape, np.intp), np.zeros(values.shape)
    place = np.clip(np.searchsorted(knots, values, "right") - 1, 0, len(knots) - 2)
    return place, np.clip((values - knots[place]) / (knots[place + 1] - knots[place]), 0.0, 1.0)


# ---- knots ---------------------------------------------------------------------------------------
def _classes(extent: Range, varying: int) -> tuple[np.ndarray, ...]:
    full = extent.full if extent.units is None else float(extent.units.channels_of(np.array(extent.full)))
    every = np.append(_below(full, extent.step) if extent.varies else (), full)
    if extent.varies and full % extent.step:  # what the widest one is rounded up to
        every = np.append(every, np.ceil(full / extent.step) * extent.step)
    kinds, few = extent.class_of(every), _FEW.get(varying, 5)
    on, most = _MOST_ON.get(varying, 5), _MOST_OFF.get(varying, 3)
    if extent.units is not None:
        few, on, most = (min(n, _MOST_BYTES) for n in (few, on, most))
    found = []
    for kind in range(5):
        mine = every[kinds == kind]
        if len(every) > few:
            mine = (
                _thinned(mine, on)
                if kind == 0
                else _beside(mine, extent, _VECTOR if kind in (1, 3) else 1, most)
            )
        found.append(mine)
    return tuple(found)


def _below(full: float, step: int) -> np.ndarray:
    if step > 1 or full <= _SPAN:
        return np.arange(1.0, full)
    return np.unique(np.round(np.geomspace(full / _SPAN, full, _MOST_ON[1])))[:-1]


def _thinned(widths: np.ndarray, most: int) -> np.ndarray:
    """By octaves: kernels differ in size by factors. The ends stay."""
    if len(widths) <= most:
        return widths
    wanted = np.geomspace(widths[0], widths[-1], most)
    return np.unique(widths[np.abs(np.log(widths)[:, None] - np.log(wanted)[None, :]).argmin(0)])


def _beside(widths: np.ndarray, extent: Range, off: int, most: int) -> np.ndarray:
    """Of the widths off the grid, those right before some multiples, right behind if they cost as the upper one."""
    if not len(widths):
        return widths
    step = extent.step
    multiples = np.append(0.0, _thinned(np.arange(step, widths[-1] + 1, step, dtype=float), most - 1))
    wanted: list[np.ndarray] = [multiples + step - off, np.array([float(off)]), widths[[0, -1]]]
    if extent.rounds:
        wanted.append(multiples + off)
    found = np.unique(np.concatenate(wanted))
    return found[np.isin(found, widths)]


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
    stepped = [n for n in names if n in steps]
    few = {"channels": 1, "c_in": steps.get("c_in", 1) - 1}
    return tuple(
        # The outputs of several widths are filled up to whole blocks.
        Range(
            full,
            varying,
            steps.get(name, 1),
            rounds=name in stepped[-1:] and not name.endswith("per_group"),
            vectors=name not in stepped[-1:] or len(stepped) == 1,
            few=few.get(name, 0),
        )
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
