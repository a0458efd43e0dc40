"""`compound-shrink`: depth, width and resolution shrink together, each the less the steeper accuracy falls with it.

Accuracy over MACs is a parabola per dimension through the original's, fitted to a few networks that are scaled in
that dimension alone. At the same MACs they lose different amounts, and the coefficient of a dimension is the
geometric mean of all losses over its own. Reference: H. Kong et al., "EdgeCompress: Coupling Multidimensional Model
Compression and Dynamic Inference for EdgeAI", IEEE TCAD 2023, whose formulas are METHODS.md (6.5) and (6.6).

How coefficients become scale factors is not published. Here the logarithm of the MACs is divided among the dimensions
in proportion to them. Where the last step to the limit is a block or an input size, the network with it and the one
without are narrowed or widened to the limit, and the one of less loss stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.passes.options import option
from sartor.strategies.dimensions import Dimension, dimensions, state_of, widest
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, within

_LEAST_LOSS = 1e-3  # of score: what a dimension loses at least, or it would take all of it
_STEPS = 200


@dataclasses.dataclass(frozen=True)
class CompoundShrink(Strategy):
    """One number shrinks depth, width and resolution together, by coefficients from accuracy curves."""

    name: ClassVar[str] = "compound-shrink"
    needs_data: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    samples: int = option(4, help="networks per dimension that its curve is fitted to", minimum=2, maximum=32)

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        found = dimensions(space)
        start = space.judge.score(space.plan(space.start(), self.name))
        curves = {}
        for name, one in found.items():
            chosen = [round(i) for i in np.linspace(1, len(one.values) - 1, self.samples)]
            chosen = sorted(set(chosen))
            scores = [
                space.judge.score(space.plan(state_of(space, {name: one.values[i]}), self.name))
                for i in chosen
            ]
            curves[name] = (
                curve([one.macs[i] for i in chosen], scores, start),
                min(one.macs[i] for i in chosen),
            )
        common = max(least for _, least in curves.values())
        losses = {name: max(-parabola(a, b, common), _LEAST_LOSS) for name, ((a, b), _) in curves.items()}
        shares = coefficients(losses)
        text = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        space.notes.append(
            f"at {common:.2f} of the MACs, accuracy falls by "
            + ", ".join(f"{loss:.3f} ({name})" for name, loss in losses.items())
            + f": they shrink by {text}"
        )
        return lambda limits: self._search(space, found, shares, limits)

    def _search(
        self,
        space: Space,
        found: Mapping[str, Dimension],
        shares: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> Decision:
        total = sum(shares.values())
        values = []
        for amount in np.linspace(0.0, _most(found, shares), _STEPS):
            at = {name: one.at(math.exp(-amount * shares[name] / total)) for name, one in found.items()}
            if at not in values:
                values.append(at)
        states = [state_of(space, at) for at in values]
        priced = space.priced(states, limits)
        first = next((i for i, one in enumerate(priced) if within(one, limits)), len(states) - 1)
        chosen = [states[first]]
        if "width" in found:
            # Removed blocks and smaller inputs are large steps: with the last ones or without, what is left is width.
            coarse = {
                (at.get("depth", 1.0), int(at.get("resolution", 0)))
                for at in values[max(first - 1, 0) : first + 1]
            }
            wide = [widest(space, limits, depth, size) for depth, size in sorted(coarse)]
            kept = [one for one in wide if within(space.priced([one], limits)[0], limits)]
            chosen = kept or chosen
        state = chosen[0]
        if len(chosen) > 1:
            state = min(chosen, key=lambda one: space.judge.loss(space.plan(one, self.name)))
        return space.decision(state, limits, self.name)


def curve(macs: Sequence[float], scores: Sequence[float], start: float) -> tuple[float, float]:
    """`(a, b)` of `A(M) = a (M - 1)^2 + b (M - 1) + A_0` (6.6), by least squares.

    Args:
        macs: of sampled networks over those of the original.
        scores: of them.
        start: of the original, A_0.
    """
    x = np.asarray(macs) - 1.0
    (a, b), *_ = np.linalg.lstsq(np.stack([x**2, x], axis=1), np.asarray(scores) - start, rcond=None)
    return float(a), float(b)


def parabola(a: float, b: float, macs: float) -> float:
    """What the curve says of the change in accuracy at a share of the MACs."""
    x = macs - 1.0
    return a * x * x + b * x


def coefficients(losses: Mapping[str, float]) -> dict[str, float]:
    """Of each dimension: the geometric mean of what all of them lose, over what it loses (6.5)."""
    mean = math.exp(sum(math.log(loss) for loss in losses.values()) / len(losses))
    return {name: mean / loss for name, loss in losses.items()}


def _most(found: Mapping[str, Dimension], shares: Mapping[str, float]) -> float:
    """The amount at which every dimension is at its end."""
    total = sum(shares.values())
    return max(-math.log(max(min(one.macs), 1e-9)) * total / shares[name] for name, one in found.items())
