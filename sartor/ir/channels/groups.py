"""From atoms to groups: which sets of parameter indices can be removed together, and where they sit.

Atoms that are tied form *classes*. Without joint factors every class is a *unit* of its own, and the
classes created by one weight axis form one group. Where a factor spans several axes, for example
(heads, dim) or (group, channels per group), only whole slices may go; each direction that leaves
more than one unit is a group of its own (remove heads, or the same dims of every head).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sartor.ir.channels.labels import FIXED, Reason

if TYPE_CHECKING:
    from sartor.ir.channels.propagate import Propagation


def connected_components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Smallest member of every node's component; `left[i]`–`right[i]` are the edges. Linear in practice."""
    parent = np.arange(count, dtype=np.int64)
    while left.size:
        a, b = parent[left], parent[right]
        different = a != b
        if not different.any():
            break
        left, right, a, b = left[different], right[different], a[different], b[different]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            grand = parent[parent]
            if (grand == parent).all():
                break
            parent = grand
    return parent


@dataclasses.dataclass(frozen=True, eq=False)
class UnitSet:
    """Units before they are named: `unit_of[class]` is the unit, or −1.

    Attributes:
        classes: class ids that take part, ascending.
        units: unit id per entry of `classes`, numbered from 0; −1 where the class is blocked.
        total: number of units, blocked ones included.
    """

    classes: np.ndarray
    units: np.ndarray
    total: int


class Classes:
    """Classes of tied atoms, why some are blocked, and the joint factors that constrain them."""

    def __init__(self, propagation: Propagation):
        space = propagation.space
        empty = np.zeros(0, dtype=np.int64)
        left = np.concatenate([a for a, _ in space.ties]) if space.ties else empty
        right = np.concatenate([b for _, b in space.ties]) if space.ties else empty
        self.of_atom = connected_components(space.count, left, right)
        self.reasons: list[Reason] = []
        self.reason_of = np.full(space.count, -1, dtype=np.int64)
        for atoms, reason in space.blocks:
            classes = np.unique(self.of_atom[atoms])
            fresh = classes[self.reason_of[classes] < 0]
            if fresh.size:
                self.reason_of[fresh] = len(self.reasons)
                self.reasons.append(reason)
        self.reason_of[self.of_atom[FIXED]] = -2
        self.projections = [
            (self.of_atom[p.slices].ravel(), self.of_atom[p.children].reshape(p.slices.size, -1))
            for p in space.projections
        ]
        joint: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        factors = [f for labels in propagation.value_labels.values() for f in labels]
        factors += [f for f, _ in space._projected.values()]
        for factor in factors:
            if len(factor.axes) > 1:
                array = self.of_atom[factor.atoms]
                joint.setdefault((array.shape, array.tobytes()), array)
        self.joint = list(joint.values())

    def blocked(self, classes: np.ndarray) -> np.ndarray:
        """Whether each class must stay."""
        return self.reason_of[classes] != -1

    # ---- units -----------------------------------------------------------------------------
    @cached_property
    def constrained(self) -> np.ndarray:
        """Boolean per class: a joint factor or a derived atom touches it."""
        flags = np.zeros(self.of_atom.size, dtype=bool)
        for classes in [*self.joint, *(p for pair in self.projections for p in pair)]:
            flags[classes] = True
        return flags

    def simple(self, produced: Iterable[np.ndarray]) -> list[UnitSet]:
        """Groups without joint constraints: classes connected through the weight axes that make them."""
        arrays = []
        for atoms in produced:
            classes = np.unique(self.of_atom[atoms])
            classes = classes[~self.constrained[classes] & (classes != self.of_atom[FIXED])]
            if classes.size:
                arrays.append(classes)
        if not arrays:
            return []
        left = np.concatenate([np.full(a.size - 1, a[0]) for a in arrays])
        right = np.concatenate([a[1:] for a in arrays])
        component = connected_components(len(self.of_atom), left, right)
        members = np.unique(np.concatenate(arrays))
        owner = component[members]
        order = np.argsort(owner, kind="stable")
        result = []
        for classes in np.split(members[order], np.flatnonzero(np.diff(owner[order])) + 1):
            free = ~self.blocked(classes)
            units = np.where(free, np.cumsum(free) - 1, -1)
            if classes.size > 1 and free.any():
                result.append(UnitSet(classes, units, classes.size))
        return result

    def joint_modes(self, produced: np.ndarray) -> list[UnitSet]:
        """Every direction in which a component of joint factors can be narrowed.

        Args:
            produced: boolean per atom, the indices of weight axes that create features. A component in
                which none of them is free has no directions (windows and tokens under a constant mask).
        """
        if not self.constrained.any():
            return []
        left, right = [], []
        for array in self.joint:
            flat = array.ravel()
            left.append(np.full(flat.size, flat[0]))
            right.append(flat)
        for slices, children in self.projections:
            left.append(np.repeat(slices, children.shape[1]))
            right.append(children.ravel())
        component = connected_components(len(self.of_atom), np.concatenate(left), np.concatenate(right))
        of_component: dict[int, tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]] = {}
        for array in self.joint:
            of_component.setdefault(int(component[array.flat[0]]), ([], []))[0].append(array)
        for projection in self.projections:
            of_component.setdefault(int(component[projection[0][0]]), ([], []))[1].append(projection)
        free = np.unique(self.of_atom[produced])
        alive = set(component[free[~self.blocked(free)]].tolist())
        result = []
        for root, (arrays, projections) in sorted(of_component.items()):
            if root not in alive:
                continue
            result.extend(_Component(self, arrays, projections).modes())
        return result


class _Component:
    """Joint factors that constrain one another; finds the partitions in which all stay rectangular."""

    def __init__(
        self,
        classes: Classes,
        arrays: list[np.ndarray],
        projections: list[tuple[np.ndarray, np.ndarray]],
    ):
        self.owner = classes
        parts = [a.ravel() for a in arrays] + [p.ravel() for pair in projections for p in pair]
        self.classes = np.unique(np.concatenate(parts))
        self.arrays = [np.searchsorted(self.classes, a) for a in arrays]
        self.projections = [tuple(np.searchsorted(self.classes, p) for p in pair) for pair in projections]

    def modes(self) -> list[UnitSet]:
        result: list[UnitSet] = []
        seen: set[bytes] = set()
        settled: set[tuple[int, int]] = set()
        for number, array in enumerate(self.arrays):
            for axis in range(array.ndim):
                if (number, axis) in settled:
                    continue
                partition, touched, assigned = self._close(number, axis)
                settled.update(assigned.items())
                settled.add((number, axis))
                key = np.where(touched, partition, -1).tobytes()
                if key in seen:
                    continue
                seen.add(key)
                units = self._units(partition, touched)
                if units is not None:
                    result.append(units)
        return result

    def _units(self, partition: np.ndarray, touched: np.ndarray) -> UnitSet | None:
        members = np.flatnonzero(touched)
        roots, units = np.unique(partition[members], return_inverse=True)
        bad = np.zeros(roots.size, dtype=bool)
        bad[units[self.owner.blocked(self.classes[members])]] = True
        if roots.size < 2 or bad.all():
            return None
        number = np.full(roots.size, -1)
        number[~bad] = np.arange(int((~bad).sum()))
        return UnitSet(self.classes[members], number[units], int(roots.size))

    def _close(self, number: int, axis: int) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
        """Smallest partition that merges each slice of `arrays[number]` along `axis` and is consistent."""
        size = self.classes.size
        left: list[np.ndarray] = []
        right: list[np.ndarray] = []
        touched = np.zeros(size, dtype=bool)
        assigned: dict[int, int] = {}

        def merge(array: np.ndarray, along: int, rows: np.ndarray | None = None) -> None:
            slices = np.moveaxis(array, along, 0).reshape(array.shape[along], -1)
            if rows is not None:
                slices = slices[rows]
            left.append(np.repeat(slices[:, 0], slices.shape[1]))
            right.append(slices.ravel())
            touched[slices.ravel()] = True

        merge(self.arrays[number], axis)
        assigned[number] = axis
        partition = np.arange(size, dtype=np.int64)
        while True:
            roots = connected_components(size, *(partition[np.concatenate(e)] for e in (left, right)))
            partition = roots[partition]
            left.clear()
            right.clear()
            if self._follow_projections(partition, touched, left, right):
                continue
            pending = self._violated(partition, touched, assigned)
            if pending is None:
                return partition, touched, assigned
            merge(self.arrays[pending[0]], *pending[1:])

    def _follow_projections(
        self, partition: np.ndarray, touched: np.ndarray, left: list[np.ndarray], right: list[np.ndarray]
    ) -> bool:
        """A dead slice takes its atoms with it, and a slice whose atoms are all dead is dead."""
        changed = False
        for slices, children in self.projections:
            whole = touched[children].all(axis=1) & (partition[children] == partition[children[:, :1]]).all(
                axis=1
            )
            joined = (partition[children] == partition[slices][:, None]).all(axis=1) & touched[slices]
            follow = (whole | touched[slices]) & ~(joined & touched[children].all(axis=1))
            if follow.any():
                changed = True
                left.append(np.repeat(slices[follow], children.shape[1]))
                right.append(children[follow].ravel())
                touched[slices[follow]] = True
                touched[children[follow].ravel()] = True
        return changed

    def _violated(
        self, partition: np.ndarray, touched: np.ndarray, assigned: dict[int, int]
    ) -> tuple[int, int, np.ndarray] | None:
        """A factor that removal of one unit would leave ragged, and the slices to merge to mend it."""
        for number, array in enumerate(self.arrays):
            if not touched[array].any():
                continue
            best: tuple[int, int, np.ndarray] | None = None
            for axis in range(array.ndim):
                slices = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
                involved = touched[slices].any(axis=1)
                rows = slices[involved]
                torn = ~(touched[rows].all(axis=1) & (partition[rows] == partition[rows[:, :1]]).all(axis=1))
                if not torn.any():
                    assigned.setdefault(number, axis)
                    best = None
                    break
                cost = sum(np.unique(partition[row]).size - 1 for row in rows[torn])
                if best is None or cost < best[0]:
                    best = (cost, axis, np.flatnonzero(involved)[torn])
            else:
                assert best is not None
                return number, best[1], best[2]
        return None
