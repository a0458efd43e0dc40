"""Strategies: formulas by hand, and networks within limits on graphs whose prices are computed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from models import captured
from search_spaces import priced_space

from sartor.cost_models.static import static_cost
from sartor.errors import UsageError
from sartor.passes.prune import apply_plan
from sartor.strategies import (
    adaptscale,
    auto,
    compound_shrink,
    evolution,
    hacscale,
    protocol,
    registry,
    teco,
    tico,
)
from sartor.strategies.space import State, within

FAST = {
    "adaptscale": "adaptscale{generations=4,population=8}",
    "compound-shrink": "compound-shrink{samples=2}",
    "hacscale": "hacscale{samples=2}",
    "nsga2": "nsga2{generations=2,population=8}",
    "tico": "tico{samples=6,validation=2,generations=4,population=8}",
}
ALL = [FAST.get(name, name) for name in registry.REGISTRY.names()]


def macs_of(space, plan):
    return static_cost(apply_plan(space.analysis.program, plan)).macs


def full(space):
    return space.static([space.start()])[0]["macs"]


@pytest.mark.parametrize("text", ALL)
def test_plans_are_within_limits_and_as_priced(text):
    space = priced_space("resnet")
    limit = 0.6 * full(space)
    strategy = protocol.strategy(text)
    search = strategy.prepare(space)
    decision = search({"macs": limit})
    assert decision.feasible and not decision.plan.widened
    found = macs_of(space, decision.plan)
    assert found == pytest.approx(decision.predicted["macs"]) and 0.1 * limit < found <= limit
    again = search({"macs": 0.9 * limit})
    assert again.feasible and macs_of(space, again.plan) <= 0.9 * limit
    other = priced_space("resnet")
    assert protocol.strategy(text).prepare(other)({"macs": limit}).plan == decision.plan, (
        "drawn by the seed alone"
    )


@pytest.mark.parametrize("text", ALL)
def test_what_cannot_be_reached_is_not_feasible_and_the_floor_says_so(text):
    space = priced_space("resnet")
    strategy = protocol.strategy(text)
    least = min(one["macs"] for one in space.priced(strategy.smallest(space), {}))
    assert not strategy.prepare(space)({"macs": 0.9 * least}).feasible


def test_uniform_keeps_one_share_of_every_layer():
    space = priced_space("vgg")
    decision = protocol.strategy("uniform").prepare(space)({"macs": 0.4 * full(space)})
    shares = [len(group.keep) / group.size for group in decision.plan.groups.values()]
    assert len(shares) == len(space.uniform_groups) and max(shares) - min(shares) < 0.26
    assert not decision.plan.blocks and not decision.plan.sizes
    wider = [w for w in space.widths if space.static([space.scaled(w)])[0]["macs"] <= 0.4 * full(space)]
    assert macs_of(space, decision.plan) == space.static([space.scaled(wider[-1])])[0]["macs"]


def test_layerprune_removes_the_least_important_blocks_and_as_few_as_it_may():
    space = priced_space("resnet")
    for text in ("layerprune", "layerprune{criterion=l1}"):
        decision = protocol.strategy(text).prepare(space)({"macs": 0.75 * full(space)})
        assert decision.plan.blocks and not decision.plan.groups
        scores = space.importance.blocks if text == "layerprune" else space.judge.layer_scores("l1")
        order = sorted(scores, key=lambda name: scores[name])
        count = len(decision.plan.blocks)
        assert set(decision.plan.blocks) == set(order[:count])
        fewer = State(space.start().kept, frozenset(order[: count - 1]))
        assert not within(space.priced([fewer], {})[0], {"macs": 0.75 * full(space)})
    with pytest.raises(UsageError, match="has none that can be removed"):
        protocol.strategy("layerprune").prepare(priced_space("vgg"))


# ---- compound-shrink -----------------------------------------------------------------------------
def test_coefficients_are_the_geometric_mean_over_the_loss():
    found = compound_shrink.coefficients({"depth": 0.08, "width": 0.01, "resolution": 0.01})
    assert found == pytest.approx(
        {"depth": 0.25, "width": 2.0, "resolution": 2.0}
    )  # cube root of 8e-6 is 0.02


def test_the_curve_goes_through_the_original():
    macs = [0.8, 0.6, 0.3]
    scores = [0.9 + 0.5 * (m - 1) ** 2 + 0.7 * (m - 1) for m in macs]
    a, b = compound_shrink.curve(macs, scores, 0.9)
    assert (a, b) == pytest.approx((0.5, 0.7))
    assert compound_shrink.parabola(a, b, 1.0) == 0 and compound_shrink.parabola(a, b, 0.5) == pytest.approx(
        -0.225
    )


def test_the_dimension_that_loses_least_shrinks_most():
    def shares(steepness):
        space = priced_space("resnet", steepness=steepness)
        decision = protocol.strategy("compound-shrink{samples=2}").prepare(space)({"macs": 0.5 * full(space)})
        sizes = decision.plan.sizes or {"x": (1, 3, 32, 32)}
        kept = [len(group.keep) / group.size for group in decision.plan.groups.values()]
        return next(iter(sizes.values()))[-1], np.mean(kept or [1.0])

    resolution = shares({"depth": 5.0, "width": 5.0, "resolution": 0.05})
    width = shares({"depth": 5.0, "width": 0.05, "resolution": 5.0})
    assert resolution[0] < width[0] and resolution[1] > width[1]


@pytest.mark.parametrize(("depth", "removed"), [(0.2, 2), (100.0, 1)])
def test_the_last_large_step_is_taken_where_it_loses_less_than_width(depth, removed):
    space = priced_space("resnet", steepness={"depth": 0.2, "width": 1.0, "resolution": 1.0})
    search = protocol.strategy("compound-shrink{samples=2}").prepare(space)
    space.judge.steepness["depth"] = depth  # the search goes the same way, and ends in front of the same step
    decision = search({"macs": 0.6 * full(space)})
    assert decision.feasible and len(decision.plan.blocks) == removed


# ---- teco ----------------------------------------------------------------------------------------
def test_loss_over_what_is_saved():
    assert teco.task_importance(0.3, 0.1, 0.2, 0.5) == pytest.approx(2.0)
    assert teco.task_importance(0.3, 0.1, 0.2, 1.0) == pytest.approx(3.0)
    assert teco.task_importance(0.3, 0.0, 0.0, 0.5) == math.inf


def test_slopes_are_those_of_each_dimension():
    space = priced_space("resnet", latency=lambda macs, blocks: macs * 2e-9 + 1e-4 * blocks)
    found = teco.slopes(space)
    assert found["width"] == pytest.approx(2e-9) and found["resolution"] == pytest.approx(2e-9)
    gone = 3 * full(space) * (1 - 0.7478453582861364)
    assert found["depth"] == pytest.approx(2e-9 + 3e-4 / gone), "a block that goes takes its calls along"


@pytest.mark.parametrize("cheap", ["depth", "width", "resolution"])
def test_teco_takes_the_dimension_of_least_loss(cheap):
    steepness = dict.fromkeys(("depth", "width", "resolution"), 3.0) | {cheap: 0.1}
    space = priced_space("resnet", steepness=steepness)
    plan = protocol.strategy("teco").prepare(space)({"macs": 0.85 * full(space)}).plan
    changed = {"depth": bool(plan.blocks), "width": bool(plan.groups), "resolution": bool(plan.sizes)}
    assert changed[cheap] and sum(changed.values()) == 1


def test_teco_trains_what_is_left_after_every_step():
    """Algorithm 2: networks along the path, each a part of the one before, and what is judged next has its weights."""
    space = priced_space("resnet")
    limits = {"macs": 0.8 * full(space)}
    decision = protocol.strategy("teco{tune=7}").prepare(space)(limits)
    tuned = space.judge.tuned
    assert len(tuned) == len(decision.steps) > 1 and {steps for _, steps in tuned} == {7}
    macs = [static_cost(apply_plan(space.analysis.program, plan)).macs for plan, _ in tuned]
    assert macs == sorted(macs, reverse=True) and macs[-1] <= limits["macs"] < macs[-2]
    protocol.strategy("teco").prepare(other := priced_space("resnet"))(limits)
    assert not other.judge.tuned


def test_without_ines_every_group_and_block_is_judged():
    counts = []
    for text in ("teco", "teco{ines=false}"):
        space = priced_space("resnet", steepness={"depth": 3.0, "width": 0.1, "resolution": 3.0})
        search = protocol.strategy(text).prepare(space)
        search({"macs": 0.97 * full(space)})
        first = [p for p in space.judge.judged if len(p.groups) + len(p.blocks) + len(p.sizes) <= 1]
        counts.append(len({p.to_json() for p in first}))
    assert counts[1] > counts[0] and counts[1] >= len(space.analysis.groups) + len(space.blocks)


# ---- tico ----------------------------------------------------------------------------------------
def test_a_predictor_finds_statistic_and_polynomial():
    generator = np.random.default_rng(0)
    features = generator.random((60, 3))
    values = 2.0 * features[:, 1] ** 2 - 0.5 * features[:, 1] + 1.0
    one = tico.Predictor.fit(features[:40], values[:40], np.random.default_rng(1))
    assert one.weights == pytest.approx([0, 1, 0]) and one.terms == pytest.approx([0, 2, -0.5, 1], abs=1e-6)
    assert one(features[40:]) == pytest.approx(values[40:])
    mixed = features @ [0.5, 0.3, 0.2]
    near = tico.Predictor.fit(features[:40], mixed[:40], np.random.default_rng(1))
    assert near.weights.sum() == pytest.approx(1) and np.abs(near(features[40:]) - mixed[40:]).max() < 0.1


def test_weights_decide_what_tico_takes_from_the_front():
    def plan(weights):
        steepness = {"depth": 0.1, "width": 5.0, "resolution": 5.0}
        space = priced_space("resnet", steepness=steepness, latency=lambda macs, _: macs * 1e-9)
        text = f"tico{{samples=16,validation=2,generations=8,population=16,weights={weights}}}"
        return macs_of(space, protocol.strategy(text).prepare(space)({"macs": 0.9 * full(space)}).plan)

    good = plan("[0,0,0,1]")
    assert good > 3 * plan("[0,0,1,0]") and good > 3 * plan("[1,0,0,0]") and good > 3 * plan("[0,1,0,0]")
    with pytest.raises(UsageError, match="must be four numbers"):
        protocol.strategy("tico{weights=[1,2]}")


def test_nsga2_chooses_the_precision_where_it_pays():
    space = priced_space("resnet", latency=lambda macs, _: macs * 1e-9)
    faster = [dataclasses.replace(one, precision="int8", price=_half(one.price)) for one in space.sizes]
    space.sizes = [*space.sizes, *faster]
    strategy = protocol.strategy("nsga2{generations=3,population=8,precision=[int8]}")
    assert strategy.precisions == ("int8",)
    start = space.priced([space.start()], {})[0]["latency"]
    decision = strategy.prepare(space)({"latency": 0.55 * start})
    assert decision.feasible and decision.plan.precision == "int8" and not decision.plan.sizes
    assert min(one["latency"] for one in space.priced(strategy.smallest(space), {})) < 0.51 * start


def _half(price):
    return lambda *given: {k: v * (0.5 if k == "latency" else 1.0) for k, v in price(*given).items()}


def test_the_front_and_the_weighted_choice():
    one = [
        evolution.Evolved({"x": float(i)}, values, 0.0)
        for i, values in enumerate([(0, 4), (1, 1), (4, 0), (2, 2)])
    ]
    beyond = evolution.Evolved({"x": 9.0}, (0, 0), 1.0)
    found = evolution.front([*one, beyond])
    assert [e.genes["x"] for e in found] == [0.0, 1.0, 2.0]
    assert evolution.weighted(found, (1, 1)).genes["x"] == 1.0
    assert evolution.weighted(found, (1, 0.1)).genes["x"] == 0.0


def test_nsga2_finds_a_known_front_under_a_constraint():
    def rate(individuals):
        return [([g["x"] ** 2, (g["x"] - 2) ** 2], max(0.5 - g["x"], 0.0)) for g in individuals]

    tried = evolution.evolve({"x": (-4.0, 4.0)}, rate, population=20, generations=15, objectives=2, seed=3)
    assert len(tried) == 300
    found = [e.genes["x"] for e in evolution.front(tried)]
    assert len(found) > 10 and 0.5 <= min(found) < 0.6 and 1.8 < max(found) < 2.1
    again = evolution.evolve({"x": (-4.0, 4.0)}, rate, population=20, generations=15, objectives=2, seed=3)
    assert tried == again


# ---- adaptscale ----------------------------------------------------------------------------------
def test_balances_by_hand():
    assert adaptscale.balances(8, 64.0, 256.0) == pytest.approx((-1.0, 3.0))
    assert adaptscale.distance((-1.0, 3.0), (1.0, 2.5)) == pytest.approx((2.0, 0.5))
    assert adaptscale.chosen_by((2.0, 0.5), 0.55) == pytest.approx(1.325)


def test_balance_of_a_network_counts_its_layers():
    space = priced_space("vgg")
    program = captured("vgg")
    layers = [n for n in program.nodes() if n.op_type in ("Conv", "Gemm", "MatMul")]
    shapes = program.shapes()
    channels = np.mean([shapes[n.outputs[0].name][1] for n in layers])
    across = next(iter(program.input_shapes.values()))[-1]
    expected = adaptscale.balances(len(layers), channels, across)
    assert adaptscale.balance(space, space.start()) == pytest.approx(expected)
    narrow = adaptscale.balance(space, space.scaled(0.5))
    assert narrow[0] > expected[0] and narrow[1] < expected[1]


def test_targets_of_the_balance_steer():
    def plan(**options):
        space = priced_space("resnet")
        text = ",".join(f"{key.replace('_', '-')}={value}" for key, value in options.items())
        found = protocol.strategy(f"adaptscale{{{text}}}").prepare(space)({"macs": 0.4 * full(space)})
        return len(found.plan.blocks), [s[-1] for s in found.plan.sizes.values()]

    shallow = plan(structure_balance=9.0, alpha=0.0)
    deep = plan(structure_balance=-9.0, alpha=0.0)
    assert shallow[0] > deep[0]
    large = plan(data_balance=9.0, alpha=1.0)
    small = plan(data_balance=-9.0, alpha=1.0)
    assert (large[1] or [999]) > (small[1] or [999])


# ---- hacscale ------------------------------------------------------------------------------------
def test_scales_by_hand():
    assert hacscale.scales(4.0, 0.5) == pytest.approx((math.sqrt(2), math.sqrt(2)))
    assert hacscale.scales(16.0, 0.25) == pytest.approx((math.sqrt(2), 2 * math.sqrt(2)))


def test_the_power_law_is_found():
    widths = [16, 24, 32, 48, 64]
    assert hacscale.power_law(widths, [3.0 * c**-0.7 for c in widths]) == pytest.approx((3.0, -0.7))
    noisy = [3.0 * c**-0.7 * f for c, f in zip(widths, [1.1, 0.9, 1.05, 1.0, 0.95], strict=True)]
    a, b = hacscale.power_law(widths, noisy)
    residual = np.square(a * np.array(widths, float) ** b - noisy).sum()
    line = np.polyfit(np.log(widths), np.log(noisy), 1)
    assert residual < np.square(np.exp(line[1]) * np.array(widths, float) ** line[0] - noisy).sum()
    assert hacscale.power_law([8, 8], [1.0, 2.0]) == (1.5, 0.0)


def test_laws_that_rise_are_guarded():
    space = priced_space("vgg")
    names = [g.name for g in space.uniform_groups][:2]
    size = {g.name: g.size for g in space.uniform_groups}
    found = hacscale.guarded({names[0]: (1.0, -0.5), names[1]: (1.0, 0.5)}, space)
    assert found[names[0]] == (1.0, -0.5) and found[names[1]][1] == -0.5
    assert found[names[1]][0] * size[names[1]] ** -0.5 == pytest.approx(size[names[1]] ** 0.5)


def test_the_layer_that_matters_most_grows_first():
    space = priced_space("vgg")
    scaling = hacscale._Scaling(space, hacscale.HacScale())
    names = [g.name for g in space.uniform_groups]
    law = {name: (1.0, -1.0) for name in names} | {names[1]: (1000.0, -1.0)}
    start = space.smallest(blocks=False, sizes=False)
    state, steps = scaling._grown(start, law, {"macs": 0.3 * full(space)}, 1.0)
    first = [step.change.split(":")[0] for step in steps]
    grown = first.index(next(name for name in first if name != names[1]))
    assert grown and set(first[:grown]) == {names[1]}, "it grows until others matter more or it is full"
    assert within(space.priced([state], {})[0], {"macs": 0.3 * full(space)})
    assert any(state.kept[name] > start.kept[name] for name in names if name != names[1])


def test_limits_above_the_original_grow_it_and_keep_its_function():
    from builders import random_inputs

    from sartor.comparison import relative_error
    from sartor.ir.fx import run_twin

    space = priced_space("resnet", grows=True, steepness={"depth": 0, "width": 0, "resolution": 0})
    limit = 1.6 * full(space)
    decision = protocol.strategy("hacscale{samples=2,alpha=0.1}").prepare(space)({"macs": limit})
    assert decision.feasible and decision.plan.widened and not decision.plan.groups
    wide = apply_plan(space.analysis.program, dataclasses.replace(decision.plan, sizes={}))
    assert full(space) < macs_of(space, decision.plan) <= limit
    assert macs_of(space, decision.plan) == pytest.approx(decision.predicted["macs"])
    inputs = random_inputs(space.analysis.program)
    before, after = run_twin(space.analysis.program, inputs), run_twin(wide, inputs)
    assert relative_error(before, after) < 1e-6, "divided weights are rounded"


# ---- auto and names ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "latency", "limit", "expected"),
    [
        ("resnet", lambda macs, blocks: macs * 1e-9, {"latency": 0.5}, "budgeted-greedy"),
        ("resnet", lambda macs, blocks: macs * 1e-12 + 1.0 + blocks, {"latency": 0.75}, "layerprune"),
        ("resnet", lambda macs, blocks: macs * 1e-12 + 1.0 + blocks, {"latency": 0.95}, "layerprune"),
        ("resnet", lambda macs, blocks: macs * 1e-9, {"macs": 0.5}, "budgeted-greedy"),
        ("vgg", lambda macs, blocks: macs * 1e-9, {"latency": 0.5}, "budgeted-greedy"),
        ("resnet", lambda macs, blocks: macs * 1e-9, {"latency": 1.5}, "hacscale"),
    ],
)
def test_auto_chooses_and_says_why(name, latency, limit, expected):
    space = priced_space(name, latency=latency)
    start = space.priced([space.start()], {})[0]
    limits = {key: share * start[key] for key, share in limit.items()}
    candidates, why = auto.Auto().candidates(space, limits)
    assert candidates[0].name == expected and why
    if expected != "hacscale":
        assert auto.Auto(trial=0).prepare(space)(limits).plan.notes["strategy"] == expected
        assert space.notes == [f"strategy {expected}: {why}"] and not space.judge.judged


@pytest.mark.parametrize(
    ("cheap", "expected"),
    [("depth", "layerprune"), ("resolution", "hacscale"), ("width", "budgeted-greedy")],
)
def test_auto_tries_what_comes_into_question(cheap, expected):
    steepness = dict.fromkeys(("depth", "width", "resolution"), 5.0) | {cheap: 0.01}
    space = priced_space("resnet", latency=lambda macs, _: macs * 1e-9, steepness=steepness)
    limits = {"latency": 0.6e-9 * full(space)}
    decision = auto.Auto().prepare(space)(limits)
    assert decision.feasible and decision.plan.notes["strategy"] == expected
    assert f"strategy {expected}: " in space.notes[-1] and "trials end at" in space.notes[-1]


def test_auto_shrinks_without_larger_inputs(monkeypatch):
    """A larger input that fewer blocks and channels pay for is a way to grow, which nobody asked for."""
    for name in ("BudgetedGreedy", "Uniform", "LayerPrune", "CompoundShrink"):
        monkeypatch.setattr(auto, name, lambda: adaptscale.AdaptScale(data_balance=5.0, alpha=1.0))
    space = priced_space("resnet", latency=lambda macs, _: macs * 1e-9, grows=True)
    limits = {"latency": 0.5e-9 * full(space)}
    before = space.analysis.program.input_shapes["x"]
    assert auto.BudgetedGreedy().prepare(space)(limits).plan.sizes["x"] > before, "the search has a reason"
    assert auto.Auto().prepare(space)(limits).plan.sizes.get("x", before) <= before


def test_elasticity_by_hand():
    space = priced_space("resnet", latency=lambda macs, blocks: macs)
    assert auto.elasticity(space) == pytest.approx(1.0)
    half = priced_space("resnet", latency=lambda macs, blocks: macs + full(space))
    assert auto.elasticity(half) == pytest.approx(0.5)


def test_names_and_options_are_checked():
    assert protocol.strategy("teco{step=0.1}").step == 0.1
    for text, message in (
        ("tecco", "Did you mean"),
        ("teco{stp=1}", "Unknown option 'stp'"),
        ("teco{step=2}", "must be float"),
        ("teco,uniform", "is no strategy"),
        ("", "is no strategy"),
        ("repeat{max=2}(teco)", "is no strategy"),
    ):
        with pytest.raises(UsageError, match=message):
            protocol.strategy(text)
