"""The search of `budgeted-greedy` on workloads of real graphs, with prices that need no measurement."""

from __future__ import annotations

import numpy as np
import pytest
from models import captured

from sartor.cost_models.static import static_cost
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan
from sartor.strategies.budgeted_greedy import EXCESS, BudgetedGreedy, floor
from sartor.strategies.criteria import criterion

PEAK = "peak_activation_bytes"


def search(name, limits, key, price_of):
    program = captured(name)
    analysis, blocks = channel_groups(program), residual_blocks(program)
    removable = [b for b in blocks if b.removable]
    workload = build_workload(program, analysis.extents, removable)

    def price(fractions, removed, wanted):
        return {k: np.atleast_1d(v) for k, v in price_of(workload, fractions, removed, wanted).items()}

    importance = criterion("l2").unit_importance(program, analysis, blocks)
    full = getattr(static_cost(program), key)
    least = floor(analysis.groups, blocks, lambda g: 4, price)[key]
    strategy = BudgetedGreedy(analysis, blocks, importance, workload, price, lambda g: 4)
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
