"""A node that may be computed tile by tile: what is known about what it reads, and what a rule says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sartor.ir.cleanup import array_of
from sartor.ir.tiles.spans import Relation, Untileable

Axes = tuple[int, ...]
"""Where the axes of the map are in a value: that of rows, if there are any, and that of columns."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """One input that has positions of the map.

    Attributes:
        axes: where they are in it; None for an axis that it does not have, because it is the same everywhere.
        relations: for each of them.
    """

    axes: tuple[int | None, ...]
    relations: tuple[Relation, ...]


@dataclasses.dataclass(frozen=True)
class Local:
    """A node that can be computed tile by tile.

    Attributes:
        operands: by input.
        axes: of its results.
    """

    operands: Mapping[int, Operand]
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Place:
    """A node and what is known about what it reads.

    Attributes:
        node: the node.
        shapes: of all values.
        axes: of the map, by value that has a map.
    """

    node: ir.Node
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, Axes]

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Of a value.

        Raises:
            Untileable: it is absent.
        """
        if value is None:
            raise Untileable("lacks an input")
        if value.name in self.shapes:
            return self.shapes[value.name]
        if value.const_value is None:
            raise Untileable(f"reads '{value.name}', whose shape is not known")
        return tuple(value.const_value.shape.numpy())

    @property
    def map_axes(self) -> Axes:
        """Of the first input, which has the map."""
        return self.axes_of(0)

    def axes_of(self, index: int) -> Axes:
        """Of one input.

        Raises:
            Untileable: it has no map.
        """
        value = self.node.inputs[index]
        found = self.axes.get(value.name or "") if value is not None else None
        if found is None:
            raise Untileable(f"reads the map elsewhere than in its input {index}")
        return found

    def constant(self, index: int) -> list[int] | None:
        """Whole numbers of a constant input; None where it is absent.

        Raises:
            Untileable: it is computed.
        """
        if index >= len(self.node.inputs) or self.node.inputs[index] is None:
            return None
        array = array_of(self.node, index)
        if array is None:
            raise Untileable(f"computes its input {index}")
        return [int(n) for n in np.ravel(array)]

    def first_alone(self) -> None:
        """Refuse a map in any other input than the first.

        Raises:
            Untileable: there is one.
        """
        for value in self.node.inputs[1:]:
            if value is not None and value.name in self.axes:
                raise Untileable(f"reads the map as '{value.name}', too")
