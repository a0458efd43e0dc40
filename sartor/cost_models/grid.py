"""Piecewise multilinear interpolation of measured times, never cheaper with more channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np


def monotone(values: np.ndarray) -> np.ndarray:
    """The middle between the running maximum and the running minimum from the other end.

    Both are monotone along every axis, so their mean is; values that already are stay unchanged.
    """
    rising, falling = values.copy(), values.copy()
    for axis in range(values.ndim):
        rising = np.maximum.accumulate(rising, axis)
        falling = np.flip(np.minimum.accumulate(np.flip(falling, axis), axis), axis)
    return (rising + falling) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Times on a rectangular grid of variables.

    Attributes:
        axes: ascending coordinates per variable; may be empty (a constant).
        seconds: times `[len(axis) per axis]`, as measured.
        step: of the last variable (output channels) on this target: between two multiples, time is
            that of the upper one.
    """

    axes: tuple[tuple[float, ...], ...]
    seconds: np.ndarray
    step: int = 1

    @staticmethod
    def from_points(points: Mapping[tuple[float, ...], float], step: int = 1) -> Grid | None:
        """The grid spanned by `points`; None when they do not fill a rectangle."""
        if not points:
            return None
        dimensions = len(next(iter(points)))
        axes = tuple(tuple(sorted({p[i] for p in points})) for i in range(dimensions))
        shape = tuple(len(a) for a in axes)
        if int(np.prod(shape)) != len(points):
            return None
        seconds = np.empty(shape)
        for point, value in points.items():
            seconds[tuple(axis.index(c) for axis, c in zip(axes, point, strict=True))] = value
        return Grid(axes, seconds, step)

    @cached_property
    def _cleaned(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Axes with a point at zero, and monotone times on them.

        Below the smallest sample, time falls along the line through the two smallest ones, but not
        below zero; with one sample it is proportional.
        """
        values = np.maximum(np.asarray(self.seconds, float), 0.0)
        axes = []
        for index, axis in enumerate(self.axes):
            coordinates = np.asarray(axis, float)
            low = np.take(values, [0], index)
            if len(coordinates) > 1:
                slope = (np.take(values, [1], index) - low) / (coordinates[1] - coordinates[0])
                start = np.clip(low - slope * coordinates[0], 0.0, low)
            else:
                start = np.zeros_like(low)
            values = np.concatenate([start, values], index)
            axes.append(np.concatenate([[0.0], coordinates]))
        return axes, monotone(values)

    def interpolate(self, variables: Sequence[Any]) -> Any:
        """Times at `variables`, one scalar or array `[plans]` per axis."""
        axes, values = self._cleaned
        if not axes:
            return float(values)
        corners: list[tuple[tuple[Any, ...], Any]] = [((), 1.0)]
        for number, (axis, variable) in enumerate(zip(axes, variables, strict=True), 1):
            x = np.asarray(variable, float)
            if self.step > 1 and number == len(axes):
                upper = np.ceil(x / self.step - 1e-9) * self.step
                x = np.where(x <= axis[-1], np.minimum(upper, axis[-1]), upper)
            low = np.clip(np.searchsorted(axis, x, "right") - 1, 0, len(axis) - 2)
            share = (x - axis[low]) / (axis[low + 1] - axis[low])
            corners = [
                ((*index, low + step), weight * (share if step else 1.0 - share))
                for index, weight in corners
                for step in (0, 1)
            ]
        return sum(weight * values[index] for index, weight in corners)

    def contains(self, variables: Sequence[float]) -> bool:
        """Whether a point lies between samples on every axis."""
        return all(
            axis[0] * (1 - 1e-9) <= v <= axis[-1] * (1 + 1e-9)
            for axis, v in zip(self.axes, variables, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"axes": [list(a) for a in self.axes], "seconds": self.seconds.tolist(), "step": self.step}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Grid:
        """Inverse of `to_dict`."""
        axes = tuple(tuple(map(float, a)) for a in data["axes"])
        grid = Grid(axes, np.asarray(data["seconds"], float), int(data["step"]))
        if grid.seconds.shape != tuple(len(a) for a in grid.axes):
            raise ValueError(f"seconds of shape {grid.seconds.shape} for axes {grid.axes}")
        return grid
