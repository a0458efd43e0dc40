"""The result of label propagation: named groups, their members, what is blocked and why, and extents."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from sartor.errors import PlanError, UsageError
from sartor.ir.channels import rules_movement as _rules  # noqa: F401  (registers both rule tables)
from sartor.ir.channels.floors import floors
from sartor.ir.channels.group import BlockedAxis, ChannelGroup, Member
from sartor.ir.channels.groups import Classes
from sartor.ir.channels.labels import Factor
from sartor.ir.channels.masking import UnmaskableError, Zero, zeros
from sartor.ir.channels.propagate import Propagation, Sink
from sartor.ir.extents import Extent, part
from sartor.ir.plan import Plan
from sartor.ir.program import Program


class ChannelAnalysis:
    """Channel groups of a program. Build it with `channel_groups`."""

    def __init__(self, program: Program, keep: Sequence[str] = (), approximate: bool = False):
        self.program = program
        self.approximate, self.keep = approximate, tuple(keep)
        self.propagation = Propagation(program, approximate)
        self.propagation.run()
        self.classes = Classes(self.propagation)
        simple = self.classes.simple(self.propagation.produced)
        self._produced = self._spread(self.propagation.produced)
        modes = self.classes.joint_modes(self._produced)
        self._parameters = sorted(self.propagation.parameter_atoms.items(), key=lambda item: int(item[1][0]))
        self._group_of = np.full(self.propagation.space.count, -1, dtype=np.int64)
        self._unit_of = np.full(self.propagation.space.count, -1, dtype=np.int64)
        self._modes_of: dict[int, list[int]] = {}
        self._sets = simple + modes
        self._joint_from = len(simple)
        for number, units in enumerate(simple):
            self._group_of[units.classes] = number
            self._unit_of[units.classes] = units.units
        for number, units in enumerate(modes, start=len(simple)):
            for cls in units.classes.tolist():
                self._modes_of.setdefault(cls, []).append(number)
        self._in_mode = np.zeros(self.propagation.space.count, dtype=bool)
        self._in_mode[list(self._modes_of)] = True
        named = self._name(self._collect_members())
        self._refused = self._unmaskable()
        named = [(number, group) for number, group in named if number not in self._refused]
        self._numbers = {group.name: number for number, group in named}
        # Protected groups keep their place in the numbering, so that a plan does not depend on `keep`.
        protected = self._protected(keep)
        kept_by: dict[int, str] = {}
        for number, _ in named:
            units = self._sets[number]
            movable = units.classes[units.units >= 0]
            for pattern, flags in protected.items():
                if flags[movable].any():
                    kept_by[number] = f"protected by --keep '{pattern}'"
        self._all = {group.name: group for _, group in named}
        self.groups: tuple[ChannelGroup, ...] = tuple(g for number, g in named if number not in kept_by)
        self._names = {number: group.name for number, group in named if number not in kept_by}
        self._refused |= {number: (text, "") for number, text in kept_by.items()}
        self._parts: dict[str, dict[bytes, tuple[str, np.ndarray]]] = {}

    def group(self, name: str) -> ChannelGroup:
        """The group called `name`.

        Raises:
            PlanError: there is none.
        """
        if name in self._all:
            return self._all[name]
        raise PlanError(f"There is no channel group '{name}' in '{self.program.source.name}'.")

    def sized(self, name: str, size: int) -> ChannelGroup:
        """The group called `name`, if it has as many units as a plan says.

        Raises:
            PlanError: there is none, or it has another size.
        """
        group = self.group(name)
        if size != group.size:
            raise PlanError(
                f"Group '{name}' has {group.size} units, the plan was made for {size}; "
                "make a new plan for this model."
            )
        return group

    # ---- construction ----------------------------------------------------------------------
    def _unmaskable(self) -> dict[int, tuple[str, str]]:
        """Unit sets whose removal has no MASKED form to be checked against: the reason and the node."""
        meets: dict[int, list[Sink]] = {}
        for sink in self.propagation.sinks:
            if not sink.weight:
                for number in self.sets_of(self.classes.of_atom[sink.atoms]):
                    meets.setdefault(number, []).append(sink)
        refused = {}
        for number, sinks in meets.items():
            if number in self._mixed:
                continue  # an approximate group has no MASKED form anyway
            units = self._sets[number]
            dead = np.zeros(self.propagation.space.count, dtype=bool)
            dead[units.classes[units.units == 0]] = True
            try:
                zeros(self.propagation, dead[self.classes.of_atom], sinks)
            except UnmaskableError as error:
                refused[number] = (error.reason, error.node)
        return refused

    def _protected(self, keep: Sequence[str]) -> dict[str, np.ndarray]:
        """Classes of what `--keep` globs name, by pattern: parameters, or the outputs of nodes and modules."""
        result = {}
        for pattern in keep:
            atoms = [
                atoms
                for (name, _), atoms in self.propagation.parameter_atoms.items()
                if fnmatch.fnmatchcase(name, pattern)
            ]
            hit = any(fnmatch.fnmatchcase(n, pattern) for n in self.program.initializers)
            for node in self.propagation.nodes.values():
                module = self.program.provenance.get(node.name or "")
                names = [node.name or "", module.module if module else ""]
                if any(n and fnmatch.fnmatchcase(n, pattern) for n in names):
                    hit = True
                    atoms += [f.atoms.ravel() for v in node.outputs for f in self.propagation.labels(v)]
            if not hit:
                raise UsageError(
                    f"--keep '{pattern}' matches no parameter, node or module. List names with `sartor inspect`."
                )
            flags = np.zeros(self.propagation.space.count, dtype=bool)
            for array in atoms:
                flags[self.classes.of_atom[array]] = True
            result[pattern] = flags
        return result

    def _lookup(self, number: int, classes: np.ndarray) -> np.ndarray:
        """Unit of each class in set `number`, −1 where it has none."""
        units = self._sets[number]
        if number < self._joint_from:
            return np.where(self._group_of[classes] == number, self._unit_of[classes], -1)
        found = np.minimum(np.searchsorted(units.classes, classes), units.classes.size - 1)
        return np.where(units.classes[found] == classes, units.units[found], -1)

    def sets_of(self, classes: np.ndarray) -> list[int]:
        """Numbers of the unit sets that any of these classes belongs to."""
        flat = classes.ravel()
        numbers = set(np.unique(self._group_of[flat]).tolist()) - {-1}
        for cls in np.unique(flat[self._in_mode[flat]]).tolist():
            numbers.update(self._modes_of[cls])
        return sorted(numbers)

    def _collect_members(self) -> dict[int, list[Member]]:
        produced = self._produced
        consumed = self._spread(sink.atoms for sink in self.propagation.sinks if sink.weight)
        members: dict[int, list[Member]] = {}
        for (name, axis), atoms in self._parameters:
            role = "producer" if produced[atoms].any() else "consumer" if consumed[atoms].any() else "affine"
            classes = self.classes.of_atom[atoms]
            for number in self.sets_of(classes):
                index_map = self._lookup(number, classes)
                if (index_map >= 0).any():
                    members.setdefault(number, []).append(Member(name, axis, role, index_map))
        return members

    def _spread(self, marked_atoms: Iterable[np.ndarray]) -> np.ndarray:
        """Boolean per atom: marked, or a leaf below a marked one (a projection stands for its slices)."""
        flags = np.zeros(self.propagation.space.count, dtype=bool)
        for atoms in marked_atoms:
            flags[atoms] = True
        for projection in reversed(self.propagation.space.projections):
            marked = projection.children[flags[projection.slices]]
            flags[marked.ravel()] = True
        return flags

    def _name(self, members: dict[int, list[Member]]) -> list[tuple[int, ChannelGroup]]:
        result = []
        used: dict[str, int] = {}
        order = {"producer": 0, "affine": 1, "consumer": 2}
        for number in sorted(members, key=lambda n: self._position(members[n])):
            mine = sorted(members[number], key=lambda m: order[m.role])
            first = mine[0]
            if first.role != "producer":
                continue
            size = int(self._sets[number].units.max()) + 1
            base = first.initializer.removesuffix(".weight")
            counts = np.bincount(first.index_map[first.index_map >= 0], minlength=size)
            granularity = int(counts.max())
            kind = "slices" if number >= self._joint_from else "channels"
            name = base if kind == "channels" else f"{base}[{size}x{granularity}]"
            used[name] = used.get(name, 0) + 1
            if used[name] > 1:
                name = f"{name}#{used[name]}"
            least = tuple(self._floors.get(number, []))
            mixed = self._mixed.get(number, "")
            result.append((number, ChannelGroup(name, size, granularity, tuple(mine), kind, least, mixed)))
        return result

    def _position(self, members: list[Member]) -> tuple[int, int]:
        producers = [m for m in members if m.role == "producer"] or members
        return min(int(self.propagation.parameter_atoms[m.initializer, m.axis][0]) for m in producers), 0

    @cached_property
    def _floors(self) -> dict[int, list[np.ndarray]]:
        """Sets of units of which one must stay, by unit set, over every labelled axis of an activation."""
        arrays: dict[bytes, np.ndarray] = {}
        for labels in self.propagation.value_labels.values():
            for factor in labels:
                classes = self.classes.of_atom[factor.atoms.ravel()]
                arrays.setdefault(classes.tobytes(), classes)
        found = ((classes, self.sets_of(classes)) for classes in arrays.values())
        sizes = {number: int(units.units.max()) + 1 for number, units in enumerate(self._sets)}
        return floors(((classes, numbers) for classes, numbers in found if numbers), self._lookup, sizes)

    @cached_property
    def _mixed(self) -> dict[int, str]:
        """Where units are mixed without weights, by unit set; empty unless approximate groups are wanted."""
        result: dict[int, str] = {}
        for atoms, reason in self.propagation.space.mixed:
            for number in self.sets_of(self.classes.of_atom[atoms]):
                result.setdefault(number, f"{reason.text} {self._where(reason.node)}".strip())
        return result

    # ---- what is blocked -------------------------------------------------------------------
    @cached_property
    def blocked(self) -> tuple[BlockedAxis, ...]:
        """Producing parameter axes that no group narrows, with the first reason found."""
        produced = self._produced
        result = []
        grouped = self._classes_in_groups
        for (name, axis), atoms in self._parameters:
            if not produced[atoms].any():
                continue
            classes = self.classes.of_atom[atoms]
            stuck = classes[~grouped[classes]]
            if not stuck.size:
                continue
            reasons = self.classes.reason_of[stuck]
            known = reasons[reasons >= 0]
            refused = [self._refused[n] for n in self.sets_of(stuck) if n in self._refused]
            if refused:
                text, where = refused[0][0], self._where(refused[0][1])
            elif known.size:
                reason = self.classes.reasons[int(known[0])]
                text, where = reason.text, self._where(reason.node)
            else:
                text, where = "tied to others so that no unit can go alone", ""
            result.append(BlockedAxis(name, axis, text, where, int(stuck.size)))
        return tuple(result)

    @cached_property
    def _classes_in_groups(self) -> np.ndarray:
        flags = np.zeros(self.propagation.space.count, dtype=bool)
        for number in self._names:
            units = self._sets[number]
            flags[units.classes[units.units >= 0]] = True
        return flags

    def _where(self, name: str) -> str:
        node = self.propagation.nodes.get(name)
        return self.program.where(node) if node is not None else ""

    # ---- plans -----------------------------------------------------------------------------
    def dead(self, plan: Plan) -> np.ndarray:
        """Boolean per class: removed by the plan.

        Raises:
            PlanError: a group is unknown, has another size, or an axis would become empty.
        """
        dead = np.zeros(self.propagation.space.count, dtype=bool)
        for name, entry in plan.groups.items():
            group = self.sized(name, entry.size)
            kept = np.zeros(group.size, dtype=bool)
            kept[list(entry.keep)] = True
            for floor in group.floors:
                if not kept[floor].any():
                    raise PlanError(
                        f"The plan removes every channel of one input of a Concat or Split in '{name}'."
                    )
            units = self._sets[self._numbers[name]]
            gone = (units.units >= 0) & ~kept[units.units]
            dead[units.classes[gone]] = True
        return dead

    def alive_atoms(self, plan: Plan) -> np.ndarray:
        """Boolean per atom: kept by the plan."""
        return ~self.dead(plan)[self.classes.of_atom]

    def masked_members(self, group: ChannelGroup) -> tuple[Member, ...]:
        """The parameter axes that MASKED zeroes for the units of `group`: where its gates multiply."""
        maps = {(m.initializer, m.axis): m.index_map for m in group.members}
        found: dict[tuple[str, int], Any] = {}
        for zero in self.zeros_of(group):
            key = (zero.initializer, zero.axis)
            found[key] = found.get(key, False) | zero.mask
        places = ((key, np.where(mask, maps[key], -1)) for key, mask in found.items() if key in maps)
        return tuple(Member(name, axis, "masked", units) for (name, axis), units in places)

    def zeros_of(self, group: ChannelGroup, *, linear: bool = False) -> list[Zero]:
        """Where zeros make all units of `group` contribute nothing.

        Args:
            group: of this analysis.
            linear: any factor there must reach the result as the same factor, not only zero as zero.

        Raises:
            UnmaskableError: there is no such place; names the operator.
        """
        units = self._sets[self._numbers[group.name]]
        found: dict[tuple[str, int, str, int], Any] = {}
        for half in (0, 1):  # never all units at once: of a query's features that would take its heads, too
            dead = np.zeros(self.propagation.space.count, dtype=bool)
            dead[units.classes[(units.units >= 0) & (units.units % 2 == half)]] = True
            for zero in zeros(self.propagation, dead[self.classes.of_atom], linear=linear):
                place = (zero.initializer, zero.axis, zero.node, zero.input)
                found[place] = found.get(place, False) | zero.mask
        return [Zero(name, axis, mask, node, index) for (name, axis, node, index), mask in found.items()]

    def units_of_atoms(self, group: ChannelGroup) -> np.ndarray:
        """Unit of `group` per atom, −1 where it has none."""
        return self._lookup(self._numbers[group.name], self.classes.of_atom)

    # ---- extents ---------------------------------------------------------------------------
    @cached_property
    def extents(self) -> Mapping[str, tuple[Extent, ...]]:
        """Length of every axis of every value as an expression of kept fractions."""
        result: dict[str, tuple[Extent, ...]] = {}
        cache: dict[tuple[int, int], Extent] = {}
        by_parameter: dict[str, list[Factor]] = {}
        for (name, axis), atoms in self._parameters:
            by_parameter.setdefault(name, []).append(Factor((axis,), atoms))
        for name, shape in self.propagation.shapes.items():
            labels = by_parameter.get(name) or self.propagation.value_labels.get(name, ())
            axes = [Extent.constant(d) for d in shape]
            for factor in labels:
                for position, axis in enumerate(factor.axes):
                    key = (id(factor.atoms), position)
                    if key not in cache:
                        cache[key] = self._extent(factor, position)
                    axes[axis] = cache[key]
            result[name] = tuple(axes)
        return result

    def _extent(self, factor: Factor, position: int) -> Extent:
        classes = self.classes.of_atom[factor.atoms]
        slices = np.moveaxis(classes, position, 0).reshape(classes.shape[position], -1)
        code = np.zeros(len(slices), dtype=np.int64)
        numbers = [n for n in self.sets_of(slices) if n in self._names]
        for bit, number in enumerate(numbers[:62]):
            units = self._lookup(number, slices)
            code |= ((units[:, 0] >= 0) & (units == units[:, :1]).all(axis=1)).astype(np.int64) << bit
        terms = []
        for value, count in zip(*np.unique(code, return_counts=True), strict=True):
            here = slices[code == value, :1]
            names = tuple(self._part(n, here) for bit, n in enumerate(numbers[:62]) if value >> bit & 1)
            terms.append((float(count), names))
        return Extent(tuple(terms))

    def _part(self, number: int, classes: np.ndarray) -> str:
        """Name of the units of a set that an axis is made of: the group's, if it has all of them equally often."""
        name, units = self._names[number], np.sort(self._lookup(number, classes), axis=None)
        often = np.bincount(units, minlength=self._all[name].size)
        if (often == often[0]).all():
            return name
        known = self._parts.setdefault(name, {})
        if units.tobytes() not in known:
            known[units.tobytes()] = (part(name, len(known)), units)
        return known[units.tobytes()][0]

    def fractions(self, plan: Plan) -> dict[str, float]:
        """Kept fraction per group, and per part of one that an axis is made of, for pricing exactly this plan."""
        found = plan.fractions()
        _ = self.extents  # parts are known when all axes are
        for group, parts in self._parts.items():
            if group in plan.groups:
                keep = np.asarray(plan.groups[group].keep)
                found.update({name: float(np.isin(units, keep).mean()) for name, units in parts.values()})
        return found


def channel_groups(program: Program, keep: Sequence[str] = (), approximate: bool = False) -> ChannelAnalysis:
    """Find every prunable dimension of a program.

    Args:
        program: canonical program.
        keep: globs of parameter, node or module names that must not be narrowed.
        approximate: also the groups whose features a norm or a reduction mixes without weights; those have
            `mixed` set and no MASKED form. Names of groups then differ from those of the exact analysis.

    Raises:
        UsageError: a glob matches nothing.
    """
    key = ("channel_groups", approximate, *keep)
    return program.analysis(key, lambda p: ChannelAnalysis(p, keep, approximate))
