"""The search of `budgeted-greedy` on workloads of real graphs, with prices that need no measurement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from models import captured
from search_spaces import floor, greedy

from sartor.cost_models.static import static_cost
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan
from sartor.strategies.budgeted_greedy import Greedy
from sartor.strategies.space import EXCESS, levels

PEAK = "peak_activation_bytes"


def search(name, limits, key, price_of, most=16):
    program = captured(name)
    analysis, blocks = channel_groups(program), residual_blocks(program)
    removable = [b for b in blocks if b.removable]
    workload = build_workload(program, analysis.extents, removable)

    def price(fractions, removed, wanted):
        return {k: np.atleast_1d(v) for k, v in price_of(workload, fractions, removed, wanted).items()}

    full = getattr(static_cost(program), key)
    strategy = greedy(analysis, blocks, price, 4)
    least = floor(strategy.space)[key]
    strategy.space.levels = {g.name: levels(g, 4, most) for g in analysis.groups}
    decision = strategy.search({key: limits * full + (1 - limits) * least})
    return program, decision, full, least


def peak(workload, fractions, removed, wanted):
    priced = {PEAK: workload.peak_activation_bytes(fractions, removed)}
    if PEAK in wanted:
        priced[f"{PEAK} {EXCESS}"] = workload.peak_activation_bytes(fractions, removed, above=wanted[PEAK])
    return priced


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "unet", "mobilenet"])
def test_a_peak_that_no_single_step_lowers_is_reached(name):
    """Where two values are live at the peak, or two places tie, one narrowed group does not lower it."""
    program, decision, full, least = search(name, 0.2, PEAK, peak)
    assert decision.feasible and decision.predicted[PEAK] <= 0.2 * full + 0.8 * least
    cut = apply_plan(program, decision.plan, channel_groups(program))
    assert static_cost(cut).peak_activation_bytes == decision.predicted[PEAK]


def test_the_plateau_is_real():
    """Without the sum of excesses the same search stops short: the test above does test something."""
    stuck = [
        not search(name, 0.2, PEAK, lambda w, f, r, _: {PEAK: w.peak_activation_bytes(f, r)})[1].feasible
        for name in ("vgg", "resnet", "densenet", "unet", "mobilenet")
    ]
    assert any(stuck)


def test_macs_are_reached_as_priced():
    program, decision, full, least = search(
        "resnet", 0.4, "macs", lambda w, f, r, _: {"macs": w.evaluate(f, r).macs}
    )
    assert decision.feasible and decision.predicted["macs"] <= 0.4 * full + 0.6 * least
    cut = apply_plan(program, decision.plan, channel_groups(program))
    assert static_cost(cut).macs == decision.predicted["macs"]


# ---- widening again --------------------------------------------------------------------------
def staircase(fractions, removed, dearer):
    """Time that falls in steps of two channels only, whatever the group; odd ones are `dearer` by this share."""
    time = 0.0
    for name, share in fractions.items():
        channels = np.round(np.asarray(share) * SIZES[name])
        time = time + (channels + channels % 2) * (1 + dearer * (channels % 2)) * SIZES[name] ** 0.5
    return {"latency": time * (1 - 0.01 * sum(np.asarray(r) for r in removed.values()))}


SIZES: dict[str, int] = {}


@pytest.mark.parametrize("dearer", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.7, 0.75, 0.8, 0.85])
def test_what_time_does_not_fall_for_is_not_cut(share, dearer):
    """Of two widths that take equally long the wider one is kept, and the way to it may lead over a dearer one."""
    program = captured("resnet")
    SIZES.clear()
    SIZES.update({g.name: g.size for g in channel_groups(program).groups})
    removed = [b.name for b in residual_blocks(program) if b.removable]
    full = float(staircase(dict.fromkeys(SIZES, 1.0), {}, dearer)["latency"])
    limit = share * full
    analysis, blocks = channel_groups(program), residual_blocks(program)

    def price(fractions, removed, wanted):
        return {k: np.atleast_1d(v) for k, v in staircase(fractions, removed, dearer).items()}

    strategy = greedy(analysis, blocks, price, 1)
    strategy.space.levels = {g.name: levels(g, 1, most=4) for g in analysis.groups}
    decision = strategy.search({"latency": limit})
    assert decision.feasible and decision.plan.groups
    kept = {name: len(group.keep) for name, group in decision.plan.groups.items()}
    gone = {name: name in decision.plan.blocks for name in removed}

    def time(counts):
        fractions = {g: counts.get(g, size) / size for g, size in SIZES.items()}
        return float(price(fractions, gone, None)["latency"][0])

    assert time(kept) == pytest.approx(decision.predicted["latency"])
    for name, count in kept.items():
        for wider in (count + 1, count + 2):
            assert time({**kept, name: min(wider, SIZES[name])}) > limit, f"{name} could have {wider}"


def test_the_last_step_is_as_fine_as_the_grid():
    """Coarse steps end up well below; what is left of the limit is given back."""
    _, decision, full, least = search(
        "mobilenet", 0.2, "macs", lambda w, f, r, _: {"macs": w.evaluate(f, r).macs}, most=2
    )
    limit = 0.2 * full + 0.8 * least
    before = [s.predicted["macs"] for s in decision.steps if s.predicted["macs"] <= limit]
    assert len(before) > 1 and before[-1] == decision.predicted["macs"] > before[0]
    assert decision.predicted["macs"] > 0.97 * limit


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_no_group_can_be_widened_for_the_width_of_another_and_win_importance(name, share):
    program = captured(name)
    analysis = channel_groups(program)
    workload = build_workload(program, analysis.extents)

    def price(fractions, removed, wanted):
        return {"macs": np.atleast_1d(workload.evaluate(fractions, removed).macs)}

    strategy = greedy(analysis, [], price, 4)
    limit = share * float(price({}, {}, None)["macs"][0])
    decision = strategy.search({"macs": limit})
    kept = {g.name: g.size for g in analysis.groups}
    kept |= {name: len(group.keep) for name, group in decision.plan.groups.items()}
    sizes = {g.name: g.size for g in analysis.groups}

    def next_to(name, up):
        counts = [c for c in strategy.space.fine[name] if (c > kept[name] if up else c < kept[name])]
        return sorted(counts, reverse=not up)[:3]

    def worth(name, count):
        return float(strategy.space.cost[name][-1] - strategy.space.cost[name][sizes[name] - count])

    pairs = 0
    for fewer, more in itertools.permutations(sizes, 2):
        for less, wider in itertools.product(next_to(fewer, False), next_to(more, True)):
            other = {**kept, fewer: less, more: wider}
            gain = sum(worth(n, other[n]) - worth(n, kept[n]) for n in (fewer, more))
            macs = price({n: c / sizes[n] for n, c in other.items()}, {}, None)["macs"][0]
            pairs += 1
            assert gain <= 1e-9 or macs > limit, f"{fewer} to {less}, {more} to {wider} is better"
    assert pairs


def test_what_is_not_limited_grows_no_slower_by_an_exchange(monkeypatch):
    """A budget of MACs alone: widths are not exchanged for such that take longer."""
    program = captured("mobilenet")
    analysis = channel_groups(program)
    workload = build_workload(program, analysis.extents)
    taken = []
    original = Greedy._exchange

    def exchange(self, state, current, limits):
        found = original(self, state, current, limits)
        if found is not None:
            taken.append(found[0].predicted["latency"] / current["latency"])
        return found

    monkeypatch.setattr(Greedy, "_exchange", exchange)
    slower = []
    for seed, share in itertools.product(range(4), (0.3, 0.5, 0.7)):
        rng = np.random.default_rng(seed)
        weight = {
            g.name: 10 ** rng.uniform(-1, 1) for g in analysis.groups
        }  # time has nothing to do with MACs

        def price(fractions, removed, wanted, weight=weight):
            latency = sum(weight[name] * np.atleast_1d(v) for name, v in fractions.items())
            return {"macs": np.atleast_1d(workload.evaluate(fractions, removed).macs), "latency": latency}

        limits = {"macs": share * float(workload.evaluate().macs)}
        strategy = greedy(analysis, [], price, 4)
        taken.clear()
        assert strategy.search(limits).feasible
        assert max(taken, default=0.0) < 1.001
        assert strategy.search({**limits, "latency": 1e9}).feasible
        slower += [ratio for ratio in taken if ratio > 1.001]
    assert slower, "there was nothing to refuse"
