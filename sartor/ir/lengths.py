"""What an axis is made of, and how long it is at another input size.

An axis is parts, one after another (Concat makes one axis of several), and a part is a product of factors in row-major
order (Reshape makes several axes of one, and one of several). A factor has a length now and one at the other size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


class Unscalable(Exception):  # a reason, caught where rules are applied
    """Why something cannot have another size."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of an axis: its length `now`, and `then`, at the other size."""

    now: int
    then: int


@dataclasses.dataclass(frozen=True)
class Axis:
    """See the module docstring; `parts` is never empty, and a part without factors has one position."""

    parts: tuple[tuple[Factor, ...], ...]

    @staticmethod
    def of(now: int, then: int | None = None) -> Axis:
        """An axis of one factor, of the same length at both sizes if `then` is absent."""
        return Axis(((Factor(now, now if then is None else then),),))

    @property
    def now(self) -> int:
        """Positions now."""
        return sum(math.prod(factor.now for factor in part) for part in self.parts)

    @property
    def then(self) -> int:
        """Positions at the other size."""
        return sum(math.prod(factor.then for factor in part) for part in self.parts)

    @property
    def scaled(self) -> bool:
        """Whether anything of it changes: then it may have another number of positions."""
        return any(factor.now != factor.then for part in self.parts for factor in part)


def broadcast(axes: Sequence[Axis]) -> Axis:
    """The axis of a result whose operands have these; one with a single position at both sizes gives way.

    Raises:
        Unscalable: two of them would differ.
    """
    long = [axis for axis in axes if axis.now != 1 or axis.then != 1]
    if not long:
        return Axis.of(1)
    lengths = {axis.then for axis in long}
    if len(lengths) > 1:
        raise Unscalable(
            f"its operands would have {' and '.join(map(str, sorted(lengths)))} positions where all have "
            f"{long[0].now}"
        )
    return max(long, key=lambda axis: (axis.scaled, len(axis.parts), max(map(len, axis.parts))))


def reshaped(axes: Sequence[Axis], target: Sequence[int]) -> list[Axis]:
    """Axes after a row-major reshape to the lengths `target` (now).

    Where a factor that changes is split, its outer part changes, as the number of windows does, and not their size.

    Raises:
        Unscalable: it cuts through what changes, or the inner part does not divide it at the other size.
    """
    if 0 in target or any(axis.now == 0 for axis in axes):
        raise Unscalable("an empty tensor")
    left = _atoms(axes)
    result = []
    for length in target:
        found: list[Axis] = []
        need = length
        while need > 1:
            if not left:
                raise Unscalable(f"has fewer elements than {list(target)}")
            atom = left.pop(0)
            if need % atom.now == 0:
                found.append(atom)
                need //= atom.now
                continue
            if atom.now % need:
                raise Unscalable(f"cuts an axis of {atom.now} positions into pieces of {need}")
            outer, inner = _split(atom, need)
            found.append(outer)
            left.insert(0, inner)
            need = 1
        result.append(_joined(found))
    if left:
        raise Unscalable(f"has more elements than {list(target)}")
    return result


def _atoms(axes: Sequence[Axis]) -> list[Axis]:
    """Factors as axes of their own, without those of one position; axes of several parts whole."""
    found = []
    for axis in axes:
        if len(axis.parts) > 1:
            found.append(axis)
            continue
        for factor in axis.parts[0]:
            if factor.now == 1 and factor.then != 1:
                raise Unscalable("of a map of one position it cannot be told which axis it is")
            if factor.now != 1:
                found.append(Axis(((factor,),)))
    return found


def _split(atom: Axis, outer: int) -> tuple[Axis, Axis]:
    """An axis as `outer` times the rest."""
    inner = atom.now // outer
    if not atom.scaled:
        return Axis.of(outer), Axis.of(inner)
    if len(atom.parts) == 1 and atom.then % inner == 0:
        return Axis.of(outer, atom.then // inner), Axis.of(inner)
    raise Unscalable(
        f"makes {outer} x {inner} of an axis of {atom.now} positions, and {inner} does not divide {atom.then}"
    )


def _joined(atoms: Sequence[Axis]) -> Axis:
    if len(atoms) == 1:
        return atoms[0]
    factors = [atom.parts[0] if len(atom.parts) == 1 else (Factor(atom.now, atom.then),) for atom in atoms]
    return Axis((tuple(factor for part in factors for factor in part),)) if atoms else Axis.of(1)
