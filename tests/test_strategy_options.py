"""Each option of a strategy does what it says: how much is judged, in which steps, and in what order."""

from __future__ import annotations

import pytest
from search_spaces import priced_space
from test_strategies import full

from sartor.strategies import hacscale, nsga2, protocol
from sartor.strategies.dimensions import dimensions


def judged(text, share=0.5, name="resnet"):
    """Plans that a strategy has judged for one search, in order, and its space."""
    space = priced_space(name, latency=lambda macs, _: macs * 1e-9)
    protocol.strategy(text).prepare(space)({"macs": share * full(space)})
    return space, space.judge.judged


@pytest.mark.parametrize("samples", [2, 3])
def test_compound_shrink_samples_each_curve(samples):
    space, plans = judged(f"compound-shrink{{samples={samples}}}")
    expected = 1 + sum(min(samples, len(one.values) - 1) for one in dimensions(space).values())
    assert (
        expected <= len(plans) <= expected + 2
    )  # the search judges the network in front of its last step, and that behind


@pytest.mark.parametrize(("samples", "validation"), [(6, 2), (9, 4)])
def test_tico_judges_samples_and_validation(samples, validation):
    text = f"tico{{samples={samples},validation={validation},generations=2,population=4}}"
    assert len(judged(text)[1]) == 1 + samples + validation


@pytest.mark.parametrize(("generations", "population"), [(2, 4), (3, 8)])
def test_nsga2_judges_no_more_than_its_generations(generations, population):
    _, plans = judged(f"nsga2{{generations={generations},population={population}}}")
    assert 0 < len(plans) <= generations * population


def test_nsga2_levels_are_widths_to_choose_from():
    space = priced_space("resnet")
    few = nsga2._Evolution(space, nsga2.Nsga2(levels=2)).counts
    assert all(counts == [space.fine[name][0], space.fine[name][-1]] for name, counts in few.items())
    more = nsga2._Evolution(space, nsga2.Nsga2(levels=4)).counts
    assert {len(counts) for counts in more.values()} == {4}


def test_hacscale_searches_for_alpha_unless_it_is_given():
    space, plans = judged("hacscale{samples=2}")
    assert len(plans) > 1 and any("loses the least" in note for note in space.notes)
    given, none = judged("hacscale{samples=2,alpha=0.9}")
    assert not none and not given.notes


def test_hacscale_grows_by_kernels_at_once():
    def steps(kernels):
        space = priced_space("vgg", step=1)
        scaling = hacscale._Scaling(space, hacscale.HacScale(kernels=kernels))
        law = {group.name: (1.0, -1.0) for group in space.uniform_groups}
        start = space.smallest(blocks=False, sizes=False)
        _, found = scaling._grown(start, law, {"macs": 0.5 * full(space)}, 1.0)
        changes = [step.change.split(": ")[1].split(" → ") for step in found]
        return [int(after) - int(before) for before, after in changes]

    assert min(steps(1)) >= 1 and len(steps(1)) > len(steps(8))
    assert max(steps(1)) < 8 <= max(steps(8))


def test_layerprune_ranks_by_its_criterion():
    space, _ = judged("layerprune{criterion=random}", 0.8)
    plan = protocol.strategy("layerprune{criterion=random}").prepare(space)({"macs": 0.8 * full(space)}).plan
    scores = space.judge.layer_scores("random")
    assert min(scores, key=lambda name: scores[name]) in plan.blocks


def test_adaptscale_weighs_its_two_targets():
    def distances(alpha):
        space = priced_space("resnet")
        text = f"adaptscale{{data-balance=3,structure-balance=9,alpha={alpha}}}"
        plan = protocol.strategy(text).prepare(space)({"macs": 0.4 * full(space)}).plan
        return len(plan.blocks), min((shape[-1] for shape in plan.sizes.values()), default=999)

    data, structure = distances(1.0), distances(0.0)
    assert data[1] >= structure[1] and structure[0] >= data[0] and data != structure
