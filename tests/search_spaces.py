"""Search spaces of real graphs whose prices are computed, for tests of strategies."""

from __future__ import annotations

import numpy as np

from sartor.strategies.budgeted_greedy import Greedy
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import Subject
from sartor.strategies.space import InputSize, Space


def space_of(analysis, blocks, price, step, *, importance=None, sizes=None, judge=None, seed=0):
    """A space with one input size, or with those of `sizes`: (shapes, share, price) each."""
    if importance is None:
        importance = criterion("l2").unit_importance(Subject(analysis.program, analysis, blocks))
    given = [InputSize({}, 1.0, price)] if sizes is None else [InputSize(*one) for one in sizes]
    return Space(analysis, blocks, lambda: importance, given, lambda _: step, judge, seed)


def greedy(analysis, blocks, price, step, **more):
    return Greedy(space_of(analysis, blocks, price, step, **more))


def floor(space):
    """Quantities of the smallest plans, the least of each."""
    states = [space.smallest(), space.smallest(blocks=False)]
    priced = space.priced(states, {})
    return {key: min(one[key] for one in priced) for key in priced[0]}


def whole(price):
    """What the original costs."""
    return {key: float(np.ravel(value)[0]) for key, value in price({}, {}, {}).items()}
