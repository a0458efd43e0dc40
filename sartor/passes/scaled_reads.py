"""Factors for parameters, as some of their readers see them: zeros for MASKED, shares for copied units."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledRead:
    """One use of a parameter that is to see multiples of it.

    Attributes:
        initializer: parameter name.
        axis: its axis.
        factors: one per index of the axis.
        node: the node that reads it.
        input: the position at which that node reads it.
    """

    initializer: str
    axis: int
    factors: np.ndarray
    node: str
    input: int


def scale_reads(
    program: Program, reads: Iterable[ScaledRead], rewriter: Rewriter
) -> Mapping[tuple[str, int], np.ndarray]:
    """Multiply parameters in place; what others need as it is becomes a private copy first.

    Returns:
        The factors by initializer, as it is called now, and axis.
    """
    by_name: dict[str, dict[tuple[str, int], dict[int, np.ndarray]]] = {}
    for read in reads:
        axes = by_name.setdefault(read.initializer, {}).setdefault((read.node, read.input), {})
        axes[read.axis] = axes.get(read.axis, np.ones(1)) * read.factors
    result: dict[tuple[str, int], np.ndarray] = {}
    for name, wanted in by_name.items():
        uses = {(node.name or "", index) for node, index in program.initializers[name].uses()}
        first = next(iter(wanted.values()))
        alike = all(_equal(axes, first) for axes in wanted.values()) and uses == set(wanted)
        for (node, index), axes in [(next(iter(wanted)), first)] if alike else wanted.items():
            value = (
                program.initializers[name]
                if alike
                else rewriter.private_initializer(rewriter.node(node), index)
            )
            result.update({(value.name or "", axis): factors for axis, factors in axes.items()})
            rewriter.derive_initializer(value, functools.partial(_multiplied, axes))
    return result


def _multiplied(axes: Mapping[int, np.ndarray], array: np.ndarray) -> np.ndarray:
    array = np.array(array)
    for axis, factors in axes.items():
        # zeros are written: a factor would leave what is infinite, and the sign
        if not array.ndim:
            array[...] = 0 if factors[0] == 0 else array * factors[0]
            continue
        gone, changed = factors == 0, (factors != 0) & (factors != 1)
        lead = (slice(None),) * axis
        array[(*lead, gone)] = 0
        if changed.any():
            along = [-1 if i == axis else 1 for i in range(array.ndim)]
            array[(*lead, changed)] = (array[(*lead, changed)] * factors[changed].reshape(along)).astype(
                array.dtype
            )
    return array


def _equal(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[a] == other[a]).all() for a in one)
