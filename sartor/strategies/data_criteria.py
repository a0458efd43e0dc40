"""Criteria that run the network: gradients of gates and weights, and statistics of feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.strategies.feature_maps import FeatureMap, feature_maps, map_of_block, map_of_group
from sartor.strategies.gates import gate_gradients, weight_gradients
from sartor.strategies.importance import (
    Batches,
    Importance,
    Subject,
    block_weights,
    members_with,
    per_unit,
    removable,
)


def required(data: Batches | None, name: str) -> Batches:
    """The data.

    Raises:
        UsageError: there are none.
    """
    if data is None:
        raise UsageError(f"Criterion '{name}' needs data; give --data, or use l1 or l2.")
    return data


class _GateGradient:
    """Squared gradients of gates, times `factor`: of their mean over samples, or the mean of their squares."""

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True
    per_sample: ClassVar[str] = ""
    factor: ClassVar[float] = 1.0

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`."""
        found = gate_gradients(
            subject.program,
            subject.analysis,
            subject.blocks,
            required(subject.data, self.name),
            loss=subject.loss,
            per_sample=self.per_sample,
        )
        power = 1 if self.per_sample else 2
        return Importance(
            {name: self.factor * gradient**power for name, gradient in found.groups.items()},
            {name: self.factor * gradient**power for name, gradient in found.blocks.items()},
        )


class Taylor(_GateGradient):
    """First-order Taylor expansion in gates: the squared gradient of the mean loss.

    Reference: METHODS.md, TECO (5.7) for units and (5.8) for blocks: the gradient is averaged over the data
    and then squared. The mean of squared per-sample gradients ranks differently and is `Fisher`.
    """

    name: ClassVar[str] = "taylor"


class Fisher(_GateGradient):
    """Mean over samples of the squared gradient of gates, halved: what the loss rises by, to second order.

    Reference: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 9.
    """

    name: ClassVar[str] = "fisher"
    per_sample: ClassVar[str] = "square"
    factor: ClassVar[float] = 0.5


class TaylorMap(_GateGradient):
    """First-order Taylor expansion in feature maps: |mean over a map of activation times gradient|, mean over samples.

    The sum of that over a map is the gradient of a gate on it. Reference: Molchanov et al., "Pruning convolutional
    neural networks for resource efficient inference", ICLR 2017, equation 7. It prefers deep layers, whose maps are
    small.
    """

    name: ClassVar[str] = "taylor-map"
    per_sample: ClassVar[str] = "absolute"

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`."""
        found = super().unit_importance(subject)
        shapes = subject.program.shapes()
        return Importance(
            {
                group.name: found.groups[group.name]
                / map_of_group(subject.program, subject.analysis, group).positions(shapes, group.size)
                for group in subject.analysis.groups
            },
            {
                block.name: found.blocks[block.name]
                / map_of_block(subject.program, block).positions(shapes, 1)
                for block in removable(subject.blocks)
            },
        )


class TaylorWeight:
    """First-order Taylor expansion in weights: the sum over a unit's producer weights of (gradient times weight)².

    Reference: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, equation 8. A block
    scores the sum over all its weights.
    """

    name: ClassVar[str] = "taylor-weight"
    needs_data: ClassVar[bool] = True

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`."""
        inside = {block.name: block_weights(subject.program, block) for block in removable(subject.blocks)}
        producers = {group.name: members_with(group, "producer") for group in subject.analysis.groups}
        names = {m.initializer for members in producers.values() for m in members}
        names.update(name for weights in inside.values() for name in weights)
        gradients = weight_gradients(
            subject.program, sorted(names), required(subject.data, self.name), loss=subject.loss
        )
        terms = {
            name: (gradient * subject.program.initializer_array(name).astype(np.float64)) ** 2
            for name, gradient in gradients.items()
        }
        return Importance(
            {
                group.name: np.sum(
                    [per_unit(terms[m.initializer], m, group.size) for m in producers[group.name]], axis=0
                )
                for group in subject.analysis.groups
            },
            {name: float(sum(terms[weight].sum() for weight in weights)) for name, weights in inside.items()},
        )


class _MapStatistic:
    """A mean over samples of a number per feature map."""

    name: ClassVar[str] = ""
    spatial: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def unit_importance(self, subject: Subject) -> Importance:
        """See `Criterion`. A block scores the mean over the maps of its branch, times their number."""
        maps = {
            f"group {g.name}": map_of_group(subject.program, subject.analysis, g, spatial=self.spatial)
            for g in subject.analysis.groups
        }
        maps |= {f"block {b.name}": map_of_block(subject.program, b) for b in removable(subject.blocks)}
        sizes = {f"group {g.name}": g.size for g in subject.analysis.groups}
        found = self._means(subject.program, maps, sizes, required(subject.data, self.name))
        return Importance(
            {group.name: found[f"group {group.name}"] for group in subject.analysis.groups},
            {block.name: float(found[f"block {block.name}"].sum()) for block in removable(subject.blocks)},
        )

    def _means(
        self, program: Program, maps: Mapping[str, FeatureMap], sizes: Mapping[str, int], data: Batches
    ) -> dict[str, np.ndarray]:
        sums: dict[str, np.ndarray] = {}
        count = 0
        for samples, values in feature_maps(program, sorted({one.value for one in maps.values()}), data):
            count += samples
            for key, one in maps.items():
                rows = one.rows(values[one.value])  # [samples, channels, ...]
                per_channel = self._of(rows, one).sum(axis=0, dtype=np.float64)
                unit = one.units if key in sizes else np.arange(len(per_channel))
                size = sizes.get(key, len(per_channel))
                often = np.maximum(np.bincount(unit[unit >= 0], minlength=size), 1)
                total = np.bincount(unit[unit >= 0], weights=per_channel[unit >= 0], minlength=size) / often
                sums[key] = sums.get(key, 0.0) + total
        if not count:
            raise UsageError(
                f"The calibration data are empty; criterion '{self.name}' needs at least one sample."
            )
        return {key: total / count for key, total in sums.items()}

    def _of(self, rows: np.ndarray, one: FeatureMap) -> np.ndarray:
        """A number per sample and channel, `[samples, channels]`."""
        raise NotImplementedError


class Activation(_MapStatistic):
    """Mean absolute activation.

    Reference: Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017,
    section 2.2, where the mean is over the map behind the activation function.
    """

    name: ClassVar[str] = "activation"

    def _of(self, rows: np.ndarray, one: FeatureMap) -> np.ndarray:
        found: np.ndarray = np.abs(rows.reshape(*rows.shape[:2], -1)).mean(axis=2, dtype=np.float64)
        return found


class HRank(_MapStatistic):
    """Mean rank of feature maps.

    Reference: Lin et al., "HRank: filter pruning using high-rank feature map", CVPR 2020, equation 5.
    """

    name: ClassVar[str] = "hrank"
    spatial: ClassVar[bool] = True

    def _of(self, rows: np.ndarray, one: FeatureMap) -> np.ndarray:
        if rows.ndim != 4:
            raise UsageError(
                f"Criterion 'hrank' needs maps of height and width; '{one.value}' has {rows.ndim - 2} such axes. Use "
                "activation or taylor, or --keep what reads it."
            )
        return np.linalg.matrix_rank(rows).astype(np.float64)
