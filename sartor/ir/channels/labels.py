"""Labels on axes: which parameter index every position of a channel axis came from.

An *atom* is one index of one parameter axis. Labels live on axes, never on pixels: a value carries
`Factor`s, each an integer array of atoms over one or several of its axes; an axis in no factor is
*free* (batch, space, tokens, image channels) and cannot be narrowed. Operators move the arrays as they
move the data, so a label array is an exact index map from positions to parameter indices.

`LabelSpace` collects what must hold:

* `tie(a, b)`: the two atoms live or die together;
* `block(atoms, reason)`: these atoms must stay;
* `mix(labels, axes, reason)`: narrowing these axes changes more than what is removed;
* `project(factor, axes)`: derived atoms, one per slice; a slice dies when all its atoms are dead, and
  a dead slice takes all its atoms with it;
* every factor over several axes is *rectangular*: what is removed are whole slices along an axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

FIXED = 0
"""The one atom that can never be removed; ties to it block instead of merging everything it touches."""

_MAX_LABELS = 1 << 21  # larger label arrays mean labels per pixel: the rule is wrong, so block instead


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """Atoms over one or several axes of a value.

    Attributes:
        axes: ascending axis (or letter) numbers.
        atoms: int64 array with one dimension per axis.
    """

    axes: tuple[int, ...]
    atoms: np.ndarray


Labels = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Derived atoms: `slices[i…]` stands for everything in `children[i…, :]`."""

    slices: np.ndarray
    children: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why atoms are blocked, and the node at which it was found."""

    text: str
    node: str


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """One operand of a product: its labels, the letter of each axis, and its shape."""

    labels: Labels
    letters: tuple[int, ...]
    shape: tuple[int, ...]


class LabelSpace:
    """Atoms and everything that was learned about them during propagation."""

    def __init__(self, approximate: bool = False) -> None:
        self.approximate = approximate
        self.mixed: list[tuple[np.ndarray, Reason]] = []
        self.count = 1
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.blocks: list[tuple[np.ndarray, Reason]] = []
        self.projections: list[Projection] = []
        self._projected: dict[tuple[int, tuple[int, ...]], tuple[Factor, np.ndarray]] = {}

    def fresh(self, shape: Sequence[int] | int) -> np.ndarray:
        """New atoms of the given shape."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64))
        atoms = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return atoms

    def tie(self, a: np.ndarray, b: np.ndarray, reason: Reason) -> None:
        """`a[i]` and `b[i]` live or die together; `reason` is used where one side is FIXED."""
        if a.shape != b.shape:
            self.block(a, reason)
            self.block(b, reason)
            return
        a, b = a.ravel(), b.ravel()
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.block(a[fixed], reason)
            self.block(b[fixed], reason)
            a, b = a[~fixed], b[~fixed]
        different = a != b
        if different.any():
            self.ties.append((a[different], b[different]))

    def block(self, atoms: np.ndarray, reason: Reason) -> None:
        """These atoms must stay, for the given reason."""
        atoms = np.unique(atoms.ravel())
        atoms = atoms[atoms != FIXED]
        if atoms.size:
            self.blocks.append((atoms, reason))

    def block_labels(self, labels: Labels, reason: Reason) -> None:
        """Block every atom of every factor."""
        for factor in labels:
            self.block(factor.atoms, reason)

    def block_axes(self, labels: Labels, axes: Iterable[int], reason: Reason) -> Labels:
        """Forbid narrowing the given axes; returns the labels of the remaining axes.

        A joint factor only loses the direction of the blocked axes: its other axes keep derived atoms.
        """
        blocked = set(axes)
        kept: list[Factor] = []
        for factor in labels:
            hit = [a for a in factor.axes if a in blocked]
            if not hit:
                kept.append(factor)
                continue
            for axis in hit:
                self.block(self.project(factor, (axis,)), reason)
            rest = tuple(a for a in factor.axes if a not in blocked)
            if rest:
                kept.append(Factor(rest, self.project(factor, rest)))
        return tuple(kept)

    def mix(self, labels: Labels, axes: Iterable[int], reason: Reason) -> Labels:
        """Values are mixed along these axes without weights, so that narrowing them is not exact.

        Forbids it like `block_axes`, unless approximate groups are asked for: then it is noted.
        """
        axes = set(axes)
        if not self.approximate:
            return self.block_axes(labels, axes, reason)
        for factor in labels:
            for axis in axes.intersection(factor.axes):
                self.mixed.append((np.unique(self.project(factor, (axis,))), reason))
        return labels

    def without(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Labels once these axes have been reduced away; a joint factor keeps derived atoms on the others."""
        gone = set(axes)
        rest = [(f, tuple(a for a in f.axes if a not in gone)) for f in labels]
        return tuple(Factor(kept, self.project(f, kept)) for f, kept in rest if kept)

    def project(self, factor: Factor, axes: tuple[int, ...]) -> np.ndarray:
        """Derived atoms of the slices of `factor` over `axes` (ascending, a subset of its axes)."""
        if axes == factor.axes:
            return factor.atoms
        key = (id(factor), axes)
        if key not in self._projected:
            position = [factor.axes.index(a) for a in axes]
            rest = [i for i in range(len(factor.axes)) if i not in position]
            children = np.transpose(factor.atoms, position + rest)
            shape = children.shape[: len(axes)]
            children = children.reshape(*shape, -1)
            slices = self.fresh(shape)
            self.projections.append(Projection(slices, children))
            self._projected[key] = (factor, slices)  # keeps the factor alive, so that its id stays unique
        return self._projected[key][1]

    # ---- data movement ---------------------------------------------------------------------
    def select(self, labels: Labels, axis: int, indices: np.ndarray | range, reason: Reason) -> Labels:
        """Take `indices` along `axis`, as Slice, Split and Gather do; keeps the axis, maybe of size 1.

        A single selected index must stay, because the axis would otherwise become empty.
        """
        result: list[Factor] = []
        for factor in labels:
            if axis not in factor.axes:
                result.append(factor)
                continue
            position = factor.axes.index(axis)
            taken = np.take(factor.atoms, indices, axis=position)
            if len(indices) != 1:
                result.append(Factor(factor.axes, taken))
                continue
            self.block(self.project(factor, (axis,))[indices], reason)
            rest = tuple(a for a in factor.axes if a != axis)
            if rest:
                result.append(Factor(rest, np.squeeze(taken, axis=position)))
        return tuple(result)

    def joint(
        self, labels: Labels, axes: tuple[int, ...], shape: Sequence[int], reason: Reason
    ) -> np.ndarray:
        """Atoms over all of `axes` at once: factors multiplied, free axes repeated.

        A product of independent factors gets fresh atoms whose slices are tied to the factors.
        """
        dims = tuple(shape[a] for a in axes)
        inside = [f for f in labels if set(f.axes) <= set(axes)]
        if not inside:
            return np.full(dims, FIXED, dtype=np.int64)
        if len(inside) == 1:
            return np.broadcast_to(_spread(inside[0], axes), dims)
        product = Factor(axes, self.fresh(dims))
        for factor in inside:
            self.tie(self.project(product, factor.axes), factor.atoms, reason)
        return product.atoms

    def reshape(self, labels: Labels, old: Sequence[int], new: Sequence[int], reason: Reason) -> Labels:
        """Labels after a row-major reshape from shape `old` to shape `new`."""
        blocks = align(old, new)
        if blocks is None:
            self.block_labels(labels, reason)
            return ()
        of_axis = {axis: number for number, (before, _) in enumerate(blocks) for axis in before}
        clusters: list[set[int]] = []
        for factor in labels:
            touched = {of_axis[a] for a in factor.axes}
            for cluster in [c for c in clusters if c & touched]:
                touched |= cluster
                clusters.remove(cluster)
            clusters.append(touched)
        result: list[Factor] = []
        for cluster in sorted(clusters, key=min):
            before = tuple(a for number in sorted(cluster) for a in blocks[number][0])
            after = tuple(a for number in sorted(cluster) for a in blocks[number][1])
            members = [f for f in labels if of_axis[f.axes[0]] in cluster]
            if all(len(blocks[n][0]) == 1 and len(blocks[n][1]) == 1 for n in cluster):
                rename = dict(zip(before, after, strict=True))
                result.extend(
                    f
                    if rename == {a: a for a in rename}
                    else Factor(tuple(rename[a] for a in f.axes), f.atoms)
                    for f in members
                )
                continue
            size = int(np.prod([old[a] for a in before], dtype=np.int64))
            if size > _MAX_LABELS:
                self.block_labels(
                    tuple(members), dataclasses.replace(reason, text=f"{reason.text} ({size} labels)")
                )
                continue
            atoms = self.joint(tuple(members), before, old, reason).reshape([new[a] for a in after])
            result.extend(simplify(Factor(after, atoms)))
        return tuple(sorted(result, key=lambda f: f.axes))

    # ---- products --------------------------------------------------------------------------
    def combine(
        self, operands: Sequence[Operand], summed: frozenset[int], reason: Reason
    ) -> tuple[dict[tuple[int, ...], np.ndarray], list[list[Factor]]]:
        """Labels of a broadcast product over letters, then a sum over the letters in `summed`.

        Covers elementwise operators (nothing summed), MatMul, Gemm, Einsum and convolutions.

        Returns:
            Result factors by letters, and per operand its factors in letters (for the caller to see
            what was summed over).
        """
        size: dict[int, int] = {}
        for operand in operands:
            for letter, length in zip(operand.letters, operand.shape, strict=True):
                size[letter] = max(size.get(letter, 1), length)
        per_operand = [_in_letters(operand) for operand in operands]
        every = [(i, f) for i, factors in enumerate(per_operand) for f in factors]
        for n, (i, first) in enumerate(every):
            for j, second in every[n + 1 :]:
                shared = tuple(a for a in first.axes if a in second.axes)
                if i != j and shared:
                    self.tie(self.project(first, shared), self.project(second, shared), reason)
        for i, factor in every:
            for j, operand in enumerate(operands):
                if i == j:
                    continue
                covered = {a for f in per_operand[j] for a in f.axes}
                for letter, length in zip(operand.letters, operand.shape, strict=True):
                    if letter in factor.axes and length == size[letter] > 1 and letter not in covered:
                        self.block(self.project(factor, (letter,)), reason)
        remaining: dict[tuple[int, ...], np.ndarray] = {}
        for _, factor in every:
            rest = tuple(a for a in factor.axes if a not in summed)
            if rest and rest not in remaining:
                remaining[rest] = self.project(factor, rest)
        for small in sorted(remaining, key=len):
            if any(set(small) < set(large) for large in remaining):
                del remaining[small]
        keys = list(remaining)
        clash = {k for k in keys for other in keys if k != other and set(k) & set(other)}
        for key in clash:
            self.block(remaining.pop(key), reason)
        return remaining, per_operand


def align(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Minimal blocks of axes with equal products; size-1 axes belong to none. None for empty tensors."""
    blocks: list[tuple[list[int], list[int]]] = []
    if 0 in old or 0 in new or np.prod(old, dtype=np.int64) != np.prod(new, dtype=np.int64):
        return None
    before = [i for i, d in enumerate(old) if d != 1]
    after = [i for i, d in enumerate(new) if d != 1]
    i = j = 0
    while i < len(before):
        left, right = [before[i]], [after[j]]
        a, b = old[before[i]], new[after[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                left.append(before[i])
                a *= old[before[i]]
                i += 1
            else:
                right.append(after[j])
                b *= new[after[j]]
                j += 1
        blocks.append((left, right))
    return blocks


def simplify(factor: Factor) -> Labels:
    """Drop axes along which the atoms do not change (they are free) and axes of size 1."""
    axes, atoms = list(factor.axes), factor.atoms
    for position in reversed(range(len(axes))):
        first = np.take(atoms, [0], axis=position)
        if (atoms == first).all() and len(axes) > 1:
            atoms = np.squeeze(first, axis=position)
            del axes[position]
    if (atoms == FIXED).all() or atoms.size == 1:
        return ()
    if len(axes) == 1 and len(atoms) > 1 and (atoms == atoms[0]).all():
        return ()  # one atom repeated: the axis is free, its owner is tied elsewhere
    return (Factor(tuple(axes), np.ascontiguousarray(atoms)),)


def permute(labels: Labels, axis_map: dict[int, int]) -> Labels:
    """Rename axes by `axis_map` (old → new), keeping factor axes ascending."""
    result = []
    for factor in labels:
        renamed = [axis_map[a] for a in factor.axes]
        order = sorted(range(len(renamed)), key=renamed.__getitem__)
        if order == list(range(len(order))) and tuple(renamed) == factor.axes:
            result.append(factor)
        else:
            result.append(Factor(tuple(renamed[i] for i in order), np.transpose(factor.atoms, order)))
    return tuple(sorted(result, key=lambda f: f.axes))


def _in_letters(operand: Operand) -> list[Factor]:
    return list(permute(operand.labels, dict(enumerate(operand.letters))))


def _spread(factor: Factor, axes: tuple[int, ...]) -> np.ndarray:
    """The factor's atoms with length-1 axes inserted for the axes it does not have."""
    shape = [factor.atoms.shape[factor.axes.index(a)] if a in factor.axes else 1 for a in axes]
    return factor.atoms.reshape(shape)
