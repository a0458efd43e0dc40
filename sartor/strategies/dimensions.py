"""Depth, width and resolution as three numbers each, and networks that have some of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sartor.errors import UsageError
from sartor.strategies.space import Space, State, within

NAMES = ("depth", "width", "resolution")


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension alone.

    Attributes:
        name: one of `NAMES`.
        values: what it can be scaled to, descending, the first is the original's: blocks over removable ones, units
            over those there were, or the number of an input size.
        macs: of the network that is scaled so in this dimension alone, over those of the original.
    """

    name: str
    values: tuple[float, ...]
    macs: tuple[float, ...]

    def at(self, macs: float) -> float:
        """The least value that leaves no less than this share of the MACs."""
        return min(
            (
                (share, value)
                for share, value in zip(self.macs, self.values, strict=True)
                if share >= macs - 1e-9
            ),
            default=(1.0, self.values[0]),
        )[1]


def dimensions(space: Space) -> dict[str, Dimension]:
    """Those in which the network can be scaled.

    Raises:
        UsageError: there is none.
    """
    count = len(space.blocks)
    values = {
        "depth": [1.0 - gone / count for gone in range(count + 1)] if count else [],
        "width": list(reversed(space.widths)) if space.uniform_groups else [],
        "resolution": [float(index) for index in range(len(space.sizes))],
    }
    found = {}
    for name, of_it in values.items():
        if len(of_it) > 1:
            macs = [one["macs"] for one in space.static([state_of(space, {name: v}) for v in of_it])]
            found[name] = Dimension(name, tuple(of_it), tuple(m / macs[0] for m in macs))
    if not found:
        raise UsageError(
            "No block of this network can be removed, no group narrowed and its inputs cannot be smaller; "
            "'sartor inspect' says why."
        )
    return found


def state_of(space: Space, values: Mapping[str, float]) -> State:
    """The state of some values; dimensions that are not named stay."""
    return space.scaled(values.get("width", 1.0), values.get("depth", 1.0), int(values.get("resolution", 0)))


def widest(space: Space, limits: Mapping[str, float], depth: float = 1.0, size: int = 0) -> State:
    """The largest uniform width within the limits, or the narrowest where none is.

    Width has the finest steps, so it takes up what those of the other dimensions leave.
    """
    states = [space.scaled(width, depth, size) for width in space.widths]
    return last_within(space, states, limits) or states[0]


def last_within(space: Space, states: Sequence[State], limits: Mapping[str, float]) -> State | None:
    """The last of some states that is predicted within the limits."""
    priced = space.priced(states, limits)
    fitting = [state for state, one in zip(states, priced, strict=True) if within(one, limits)]
    return fitting[-1] if fitting else None
