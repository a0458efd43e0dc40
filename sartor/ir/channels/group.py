"""What the analysis finds: channel groups with their members, and axes that are blocked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter that a group narrows.

    Attributes:
        initializer: parameter name.
        axis: axis of that parameter.
        role: `producer`, `consumer`, `affine` (scale, shift, statistics, depthwise weights, tables).
        index_map: int array, one entry per index of the axis: the unit, or −1 for none of this group.
    """

    initializer: str
    axis: int
    role: str
    index_map: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that can be removed independently of all other groups.

    Attributes:
        name: the first producing parameter; joint factors add `[axis]` of the direction.
        size: number of removable units.
        granularity: parameter indices that go with one unit on the first producing axis.
        members: every parameter axis that is narrowed, producers first.
        kind: `channels`, or `slices` for a direction of a joint factor.
        floors: sets of units of which at least one must stay, beside the whole group.
        mixed: empty for an exact group. Otherwise the group is approximate: its features are also mixed
            without weights, and this says where; what stays changes when some go.
    """

    name: str
    size: int
    granularity: int
    members: tuple[Member, ...]
    kind: str
    floors: tuple[np.ndarray, ...] = ()
    mixed: str = ""

    def members_with(self, role: str) -> tuple[Member, ...]:
        """Members of one role."""
        return tuple(m for m in self.members if m.role == role)

    def keep_best(self, scores: np.ndarray, count: int) -> tuple[int, ...]:
        """Indices of the `count` units of highest score (at least one), every floor respected.

        Args:
            scores: `[size]`, higher is better; of equal ones the first is kept.
            count: how many stay; more where the floors need more.
        """
        order = np.argsort(-np.asarray(scores), kind="stable")
        kept = np.zeros(self.size, dtype=bool)
        kept[order[: max(count, 1)]] = True
        for floor in self.floors:
            if not kept[floor].any():
                kept[floor[np.argmax(scores[floor])]] = True
        for unit in order[::-1]:  # what a floor added takes the place of the weakest that no floor needs
            if kept.sum() <= max(count, 1):
                break
            if kept[unit]:
                kept[unit] = any(unit in f and np.count_nonzero(kept[f]) == 1 for f in self.floors)
        return tuple(int(i) for i in np.flatnonzero(kept))


def coarsest(groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    """All groups, but of the directions of joint features only the one of largest units: heads, not their features."""
    found: dict[tuple[str, str], ChannelGroup] = {}
    for group in groups:
        key = (group.kind, group.members[0].initializer if group.kind == "slices" else group.name)
        if key not in found or group.granularity > found[key].granularity:
            found[key] = group
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class BlockedAxis:
    """A parameter axis that makes features and cannot be narrowed (or only in part).

    Attributes:
        value: parameter name.
        axis: its axis.
        reason: the rule that forbids it.
        source: the node at which it was found, with the author's module and line where known.
        channels: number of indices concerned.
    """

    value: str
    axis: int
    reason: str
    source: str
    channels: int
