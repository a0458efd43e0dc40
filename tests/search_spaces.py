"""Search spaces of real graphs whose prices are computed, for tests of strategies."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from models import captured

from sartor.cost_models.static import static_cost
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.fusion_rules import GENERIC
from sartor.passes.prune import apply_plan
from sartor.plan_prices import PlanPrices, sized_programs
from sartor.strategies.budgeted_greedy import Greedy
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import Subject
from sartor.strategies.layer_scores import layer_scores
from sartor.strategies.space import InputSize, Space


def space_of(analysis, blocks, price, step, *, importance=None, sizes=None, judge=None, seed=0):
    """A space with one input size, or with those of `sizes`."""
    if importance is None:
        importance = criterion("l2").unit_importance(Subject(analysis.program, analysis, blocks))
    given = [InputSize({}, 1.0, price, None)] if sizes is None else sizes
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


class FakeJudge:
    """Loses by dimension what it is told to, per share of MACs that go in it; importance by the norm of weights."""

    def __init__(self, program, steepness=None):
        self.program, self.judged, self.tuned = program, [], []
        self.steepness = steepness or {"depth": 1.0, "width": 1.0, "resolution": 1.0}
        self.full = static_cost(program).macs

    has_data = True

    def prospect(self, plan, share):
        return self.score(plan)

    def tune(self, plan, steps):
        self.tuned.append((plan, steps))

    def loss(self, plan):
        self.judged.append(plan)
        parts = {
            "depth": dataclasses.replace(plan, groups={}, sizes={}, widened={}),
            "width": dataclasses.replace(plan, blocks=(), sizes={}, widened={}),
            "resolution": dataclasses.replace(plan, blocks=(), groups={}, widened={}),
        }
        lost = 0.0
        for name, part in parts.items():
            share = static_cost(apply_plan(self.program, part)).macs / self.full
            lost += self.steepness[name] * (1.0 - share)
        return lost

    def score(self, plan):
        return 1.0 - self.loss(plan) / 10.0

    def training(self, plan):
        cost = static_cost(apply_plan(self.program, plan))
        return cost.macs * 1e-9, float(cost.peak_activation_bytes)

    def importance(self, plan, criterion_name=""):
        program = apply_plan(self.program, plan)
        analysis, blocks = channel_groups(program), residual_blocks(program)
        return analysis, criterion("l2").unit_importance(Subject(program, analysis, blocks))

    def layer_scores(self, name):
        return layer_scores(name, self.program, residual_blocks(self.program))


@functools.cache
def _known(name, grows):
    program = captured(name)
    analysis, blocks = channel_groups(program), residual_blocks(program)
    removable = [b for b in blocks if b.removable]
    sized, _ = sized_programs(program, analysis, removable, GENERIC, resizes=True, grows=grows)
    importance = criterion("l2").unit_importance(Subject(program, analysis, blocks))
    return program, analysis, blocks, sized, importance


def priced_space(name, *, latency=None, steepness=None, step=2, seed=0, grows=False):
    """A space of a gallery network: MACs by its workload, latency by `latency(macs, blocks left)` if given."""
    program, analysis, blocks, sized, importance = _known(name, grows)
    removable = [b for b in blocks if b.removable]
    prices = PlanPrices(sized, ["macs"])

    def with_latency(price):
        def priced(fractions, removed, limits):
            found = price(fractions, removed, limits)
            if latency is None:
                return found
            gone = sum(np.atleast_1d(v).astype(float) for v in removed.values()) if removed else 0.0
            return {**found, "latency": latency(found["macs"], len(removable) - gone)}

        return priced

    sizes = [dataclasses.replace(one, price=with_latency(one.price)) for one in prices.input_sizes()]
    judge = FakeJudge(program, steepness)
    return Space(analysis, blocks, lambda: importance, sizes, lambda _: step, judge, seed)
