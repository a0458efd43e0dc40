"""What importance is computed from and what it is: protocols of analyses and criteria, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from sartor.ir.program import Program

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


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is to be scored, and on what.

    Attributes:
        program: the program that `analysis` and `blocks` describe.
        analysis: its channel groups.
        blocks: its residual blocks, or layers.
        data: re-iterable of `(inputs, labels)`; only criteria with `needs_data` read it.
        loss: differentiable `(outputs by name, labels) -> scalar`, the mean over samples.
        seed: of random criteria.
    """

    program: Program
    analysis: AnalysisLike
    blocks: Sequence[BlockLike] = ()
    data: Batches | None = None
    loss: Callable[..., Any] | None = None
    seed: int = 0


class Criterion(Protocol):
    """A way to score units and blocks. Implementations hold no state."""

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    def unit_importance(self, subject: Subject) -> Importance:
        """Score every unit of every group and every removable block.

        Raises:
            UsageError: the criterion cannot score this program, or data are missing.
        """
        ...


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


def block_weights(program: Program, block: BlockLike) -> list[str]:
    """Initializers of two or more axes that nodes of the block read, each once."""
    inside = set(block.nodes)
    names = [
        value.name or ""
        for node in program.nodes()
        if node.name in inside
        for value in node.inputs
        if value is not None
        and value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) > 1
        and value.const_value.dtype.is_floating_point()
    ]
    return list(dict.fromkeys(names))


def lamp(scores: np.ndarray) -> np.ndarray:
    """Cost of removing units in ascending order of score, on one scale for all groups.

    Each score over the sum of those not smaller, so that the last units of a layer cost 1 each and no layer collapses.
    Reference: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
    """
    ascending = np.sort(np.maximum(scores, 0.0))
    if not ascending.any():
        ascending = np.ones_like(ascending)
    rest = np.cumsum(ascending[::-1])[::-1]
    return ascending / np.maximum(rest, 1e-300)
