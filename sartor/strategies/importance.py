"""What importance is computed from, and what it is: protocols of the analyses, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Batches = Iterable[tuple[Mapping[str, np.ndarray], "np.ndarray | None"]]


class MemberLike(Protocol):
    """One narrowed axis of a parameter; see `sartor.ir.channels.Member`."""

    @property
    def initializer(self) -> str | None: ...  # noqa: D102
    @property
    def axis(self) -> int: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def index_map(self) -> np.ndarray: ...  # noqa: D102


class GroupLike(Protocol):
    """A channel group; see `sartor.ir.channels.ChannelGroup`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def members(self) -> Sequence[MemberLike]: ...  # noqa: D102


class AnalysisLike(Protocol):
    """The channel groups of a program; see `sartor.ir.channels.ChannelAnalysis`."""

    @property
    def groups(self) -> Sequence[Any]: ...  # noqa: D102


class BlockLike(Protocol):
    """A residual block; `last_affine` names the last affine weight and bias of its branch."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def nodes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def removable(self) -> bool: ...  # noqa: D102
    @property
    def last_affine(self) -> Sequence[str]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Scores of one criterion; higher is more important, and never negative.

    Attributes:
        groups: by group name, one score per unit `[size]`, float64.
        blocks: by block name; blocks that cannot be removed are absent.
    """

    groups: Mapping[str, np.ndarray]
    blocks: Mapping[str, float]


def per_unit(values: np.ndarray, member: MemberLike, size: int) -> np.ndarray:
    """Sum `values` over everything but the member's axis, and that axis by unit; `[size]`, float64."""
    axis = member.axis % values.ndim
    along = values.sum(axis=tuple(a for a in range(values.ndim) if a != axis), dtype=np.float64)
    index = np.asarray(member.index_map)
    return np.bincount(index[index >= 0], weights=along[index >= 0], minlength=size)


def members_with(group: GroupLike, role: str) -> list[Any]:
    """Members of one role that have an initializer."""
    return [m for m in group.members if m.role == role and m.initializer]


def removable(blocks: Sequence[BlockLike]) -> list[BlockLike]:
    """Blocks that may be removed."""
    return [block for block in blocks if block.removable]
