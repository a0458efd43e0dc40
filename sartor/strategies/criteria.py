"""Importance of channel-group units and residual blocks: what is cheapest to lose.

An importance is extensive: for one group or block it grows with what would be removed, so that units and
blocks compete in one currency *within a criterion*. Between criteria the numbers mean nothing.

Criteria that look at data are in `sartor.strategies.data_criteria`.
"""

from __future__ import annotations

import zlib
from typing import Any, ClassVar

import numpy as np

from sartor.errors import UsageError
from sartor.strategies.data_criteria import Activation, Fisher, HRank, Taylor, TaylorMap, TaylorWeight
from sartor.strategies.importance import (
    Criterion,
    Importance,
    Subject,
    block_weights,
    members_with,
    per_unit,
    removable,
)

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "Activation",
    "BatchNormGamma",
    "Criterion",
    "Fisher",
    "GeometricMedian",
    "HRank",
    "Importance",
    "Random",
    "Taylor",
    "TaylorMap",
    "TaylorWeight",
    "criterion",
]


class _WeightNorm:
    """A norm over each unit's producer slices: weights of all layers that make the unit's features."""

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    order: ClassVar[int] = 1

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`. A block scores the same norm over every weight matrix or kernel inside it."""
        groups = {}
        for group in subject.analysis.groups:
            totals = np.zeros(group.size)
            for member in members_with(group, "producer"):
                totals += per_unit(
                    self._powers(subject.program.initializer_array(member.initializer)), member, group.size
                )
            groups[group.name] = self._root(totals)
        scores = {}
        for block in removable(subject.blocks):
            weights = [
                subject.program.initializer_array(name) for name in block_weights(subject.program, block)
            ]
            scores[block.name] = float(self._root(np.asarray(sum(self._powers(w).sum() for w in weights))))
        return Importance(groups, scores)

    def _powers(self, array: np.ndarray) -> np.ndarray:
        return np.abs(array.astype(np.float64)) ** self.order

    def _root(self, total: np.ndarray) -> np.ndarray:
        return total ** (1.0 / self.order)


class L1(_WeightNorm):
    """Sum of absolute producer weights per unit."""

    name: ClassVar[str] = "l1"
    order: ClassVar[int] = 1


class L2(_WeightNorm):
    """Euclidean norm of producer weights per unit."""

    name: ClassVar[str] = "l2"
    order: ClassVar[int] = 2


class BatchNormGamma:
    """Sum of |γ| of the BatchNormalizations that scale a unit."""

    name: ClassVar[str] = "bn-gamma"
    needs_data: ClassVar[bool] = False

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`. A block scores the sum of |γ| inside it."""
        scales: dict[str, list[str]] = {}
        for node in subject.program.graph.all_nodes():
            if node.op_type == "BatchNormalization" and node.inputs[1] is not None:
                scales.setdefault(node.inputs[1].name or "", []).append(node.name or "")
        groups = {}
        for group in subject.analysis.groups:
            members = [m for m in group.members if m.initializer in scales]
            if not members:
                raise UsageError(
                    f"Criterion 'bn-gamma' needs a BatchNormalization in every group; '{group.name}' has "
                    "none (it may have been folded). Use criterion l1, l2 or taylor, or --keep this group."
                )
            totals = np.zeros(group.size)
            for member in members:
                gamma = np.abs(subject.program.initializer_array(member.initializer).astype(np.float64))
                totals += per_unit(gamma, member, group.size)
            groups[group.name] = totals
        scores = {}
        for block in removable(subject.blocks):
            inside = set(block.nodes)
            names = [name for name, nodes in scales.items() if inside & set(nodes)]
            if not names:
                raise UsageError(
                    f"Criterion 'bn-gamma' needs a BatchNormalization in every block; '{block.name}' has "
                    "none. Use criterion l1, l2 or taylor."
                )
            scores[block.name] = float(sum(np.abs(subject.program.initializer_array(n)).sum() for n in names))
        return Importance(groups, scores)


class Random:
    """Uniform in [0, 1) by seed and name, so that other groups do not shift a group's numbers."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`."""

        def generator(name: str) -> np.random.Generator:
            return np.random.default_rng([subject.seed, zlib.crc32(name.encode())])

        return Importance(
            {group.name: generator(group.name).random(group.size) for group in subject.analysis.groups},
            {block.name: float(generator(block.name).random()) for block in removable(subject.blocks)},
        )


class GeometricMedian:
    """Sum of distances between a unit's producer weights and those of all other units: the most replaceable go first.

    Reference: He et al., "Filter pruning via geometric median for deep convolutional neural networks acceleration",
    CVPR 2019, equation 4. A block scores the sum over the filters of all its weights.
    """

    name: ClassVar[str] = "fpgm"
    needs_data: ClassVar[bool] = False

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`."""
        groups = {}
        for group in subject.analysis.groups:
            totals = np.zeros(group.size)
            for member in members_with(group, "producer"):
                array = subject.program.initializer_array(member.initializer)
                totals += _distances(_rows_of_units(array, member, group.size))
            groups[group.name] = totals
        scores = {
            block.name: float(
                sum(
                    _distances(array.reshape(array.shape[0], -1)).sum()
                    for array in map(subject.program.initializer_array, block_weights(subject.program, block))
                )
            )
            for block in removable(subject.blocks)
        }
        return Importance(groups, scores)


def _rows_of_units(array: np.ndarray, member: Any, size: int) -> np.ndarray:
    """A row per unit: its slices one after another, zeros behind where others have more."""
    index = np.asarray(member.index_map)
    slices = np.moveaxis(array, member.axis, 0).reshape(index.size, -1)
    often = np.bincount(index[index >= 0], minlength=size)
    rows = np.zeros((size, int(often.max(initial=1)), slices.shape[1]))
    for unit in range(size):
        rows[unit, : often[unit]] = slices[index == unit]
    return rows.reshape(size, -1)


def _distances(rows: np.ndarray) -> np.ndarray:
    """Per row the sum of Euclidean distances to all others."""
    rows = rows.astype(np.float64)
    norms = (rows**2).sum(axis=1)
    squares = norms[:, None] + norms[None, :] - 2 * rows @ rows.T
    found: np.ndarray = np.sqrt(np.maximum(squares, 0.0)).sum(axis=1)
    return found


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        *(L1(), L2(), GeometricMedian(), BatchNormGamma(), Random()),
        *(Taylor(), Fisher(), TaylorMap(), TaylorWeight(), Activation(), HRank()),
    )
}
"""Every criterion by name."""


def criterion(name: str) -> Criterion:
    """The criterion called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in CRITERIA:
        raise UsageError(f"Unknown criterion '{name}'; expected one of {', '.join(sorted(CRITERIA))}.")
    return CRITERIA[name]
