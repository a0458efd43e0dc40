"""Kernels that are the same share their code: counted under a plan, learned from networks, and priced per plan."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from cost_networks import FakeBlock, Net
from cost_profiles import make_profile

from sartor.cost_models import pricer as pricer_module
from sartor.cost_models.fitting import fit_profile, networks_terms
from sartor.cost_models.items import crowds
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.pricer import PlanBatch, Pricer
from sartor.cost_models.profile import ALONE, NetworkTime
from sartor.cost_models.samples import kernels_of
from sartor.cost_models.signatures import signature_of
from sartor.cost_models.surface import Range, build
from sartor.cost_models.tiers import Tiers
from sartor.ir.population import Population
from sartor.ir.workload import build_workload, presence

BLOCKS = 6
GROUPS = {**{f"g{i}": 64 for i in range(BLOCKS)}, "h2": 64, "h4": 64}
GAIN = 0.12
"""What a kernel takes less per unit of the logarithm of its twins."""


def blocks(kept=None, skip=()):
    """Inverted residuals of one width, each with groups of its own inside, two of them with two; the last have none."""
    net = Net((1, 48, 28, 28), kept)
    x = "x"
    for i in range(BLOCKS + 2):
        if f"b{i}" in skip:
            continue
        inner = (f"g{i}", 64) if i < BLOCKS else 96
        y = net.unary("Relu", net.conv(x, inner, 1, f"b{i}.c1"), f"b{i}.r1")
        y = net.unary("Relu", net.conv(y, inner, 3, f"b{i}.dw", depthwise=True), f"b{i}.r2")
        if i in (2, 4):
            y = net.unary("Relu", net.conv(y, (f"h{i}", 64), 3, f"b{i}.m"), f"b{i}.rm")
        x = net.add(net.conv(y, 48, 1, f"b{i}.c2"), x, f"b{i}.add")
    return net, x


@pytest.fixture(scope="module")
def workload():
    net, out = blocks()
    parts = ("c1", "r1", "dw", "r2", "c2", "add")
    ends = {i: "x" if i == 0 else f"b{i - 1}.add" for i in range(BLOCKS + 2)}
    removable = [
        FakeBlock(f"b{i}", tuple(f"n_b{i}.{p}" for p in parts), (ends[i],), (f"b{i}.add",)) for i in (1, 3, 6)
    ]
    return build_workload(net.program((out,)), net.extents, removable)


@pytest.fixture(scope="module")
def ladder():
    """Of a machine on which twins gain, and kernels gain nothing that are of one operator only."""
    pytest.importorskip("lightgbm")
    profile = make_profile(1500, noise=0.01)
    rng = np.random.default_rng(3)
    samples = []
    for number, sample in enumerate(profile.samples):
        twins, others = int(rng.integers(1, 9)), int(rng.integers(0, 20))
        seconds = sample.seconds * (1 - GAIN * math.log(twins))
        at = {"alike": twins + others, "twins": twins, "network": f"net-{number // 10}"}
        samples.append(dataclasses.replace(sample, seconds=seconds, **at))
    return Ladder(fit_profile(dataclasses.replace(profile, samples=tuple(samples))))


def plans_of(count, seed=0):
    """Few widths, so that some blocks come out the same; and blocks that are removed."""
    rng = np.random.default_rng(seed)
    kept = rng.choice([16, 32, 64], (count, len(GROUPS)))
    removed = rng.random((count, 3)) < 0.3
    kept[0], removed[0] = 64, False
    return kept, removed


def population(kept, removed):
    return (
        {name: kept[:, i] / size for i, (name, size) in enumerate(GROUPS.items())},
        {name: removed[:, i] for i, name in enumerate(("b1", "b3", "b6"))},
    )


def test_twins_are_the_kernels_that_are_the_same_under_a_plan(workload, ladder):
    kept, removed = plans_of(60)
    plans = Population(*population(kept, removed))
    items = ladder.items(workload)
    said = [
        np.broadcast_to(np.exp(near * math.log(item.company.twins)), 60)
        for item, near in zip(items, crowds(items, plans), strict=True)
    ]
    several = set()
    for number in range(60):
        one = Population(*population(kept[number : number + 1], removed[number : number + 1]))
        there = [
            (kernel, signature_of(kernel))
            for kernel in workload.kernels
            if np.any(one.present(presence(kernel)))
        ]
        sizes = {
            k.name: (s.key, tuple(float(np.ravel(one.quantity(v))[0]) for v in s.variables)) for k, s in there
        }
        counted = Counter(sizes.values())
        for item, twins in zip(items, said, strict=True):
            for kernel in item.kernels:
                if kernel.name in sizes:
                    assert twins[number] == pytest.approx(counted[sizes[kernel.name]])
                    several.add(round(twins[number]))
    assert {1, 2, 3, 4} <= several


def test_a_network_of_equal_blocks_gains_by_them(workload, ladder):
    """Predicted as the machine has it, and as the networks that a law is fitted to are priced."""
    equal = np.full((1, len(GROUPS)), 32)
    other = np.array([[16, 20, 24, 28, 36, 40, 32, 48]])
    none = np.zeros((1, 3), bool)
    depthwise_s = {}
    for name, kept in (("equal", equal), ("other", other)):
        priced = ladder.terms(workload, Population(*population(kept, none))).seconds
        net, out = blocks({group: int(kept[0, i]) for i, group in enumerate(GROUPS)})
        smaller = build_workload(net.program((out,)))
        kernels = tuple((s.spec, sizes, count) for s, sizes, count in kernels_of(smaller, layout=True)[0])
        found = networks_terms([NetworkTime(name, kernels, 1.0, (1.0, 1.0))], ladder.tiers, ladder.profile)
        expected = found[0].expected(ladder.law).seconds
        for family in ("conv", "depthwise"):
            assert float(np.ravel(priced[family])[0]) == pytest.approx(float(expected[family]), rel=0.02)
        depthwise_s[name] = float(np.ravel(priced["depthwise"])[0])
    plans = Population(*population(equal, none))
    depthwise = [i for i in ladder.items(workload) if i.kernel.family == "depthwise"]
    alone = [len(i.kernels) * float(np.ravel(i.seconds(plans, ladder.tiers)[0])[0]) for i in depthwise]
    twins = [
        BLOCKS if i.signature.variables[0].groups else 2 for i in depthwise
    ]  # the last two have no group
    truth = sum(s * (1 - GAIN * math.log(n)) for s, n in zip(alone, twins, strict=True))
    assert depthwise_s["equal"] == pytest.approx(truth, rel=0.06)
    assert truth < 0.88 * sum(alone)


@pytest.mark.parametrize("cells", [1 << 16, 500, 10])
def test_the_pricer_says_what_the_ladder_says(workload, ladder, monkeypatch, cells):
    monkeypatch.setattr(pricer_module, "_MOST_CELLS", cells)  # with few cells, kernels stay on their knots
    pricer = Pricer(ladder, workload, GROUPS)
    found = [part for parts in pricer._parts.values() for part in parts]
    gains = {type(part.whole).__name__ for part in found if type(part).__name__ == "_Gain"}
    assert gains == {"_Dense"} | ({"_Knotted"} if cells <= 500 else set())
    assert ("_Direct" in {type(part).__name__ for part in found}) == (cells == 10)
    kept, removed = plans_of(200, seed=5)
    columns = [list(GROUPS).index(name) for name in pricer.groups]
    order = [("b1", "b3", "b6").index(name) for name in workload.blocks]
    expected = ladder.estimate_batch(workload, *population(kept, removed))
    found = pricer.estimate_batch(PlanBatch(kept[:, columns], removed[:, order]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    alone = [
        pricer.estimate_batch(PlanBatch(kept[i : i + 1, columns], removed[i : i + 1, order])) for i in (0, 7)
    ]
    np.testing.assert_allclose(np.ravel(alone), expected[[0, 7]], rtol=1e-12)


def test_a_breakdown_adds_up(workload, ladder):
    kept, removed = plans_of(4, seed=2)
    for number in range(4):
        fractions = {name: kept[number, i] / size for i, (name, size) in enumerate(GROUPS.items())}
        gone = dict(zip(("b1", "b3", "b6"), removed[number].tolist(), strict=True))
        found = ladder.estimate(workload, fractions, gone)
        total = sum(kernel.latency_s for kernel in found.kernels) + ladder.constant_s
        assert found.latency_s == pytest.approx(total, rel=1e-9)


def test_twins_never_cost_more_where_widths_are_rounded_up():
    """Either end is drawn to the multiple above it where it is near, and the other one may not be."""

    def predicted(sizes):
        on = sizes[0] % 16 == 0
        ends = [np.where(on, dearer, 1.0) * np.ceil(sizes[0] / 16) for dearer in (1.049, 1.06)]
        seconds = 1e-6 * np.stack(ends, -1)[..., None]
        return seconds, np.full(seconds.shape, 0.1)

    surface = build([Range(64.0, True, 16, True)], predicted)
    widths = np.arange(1.0, 65.0)
    alone, together = (surface.interpolate([widths], crowd)[0] for crowd in (0.0, 1.0))
    assert (together <= alone + 1e-15).all()


def test_twins_never_cost_more_than_kernels_that_are_alone():
    """Whatever a model says: a search would keep blocks apart for it."""

    def noisy(sizes):
        rng = np.random.default_rng(0)
        seconds = 1e-6 * sizes[0][:, None, None] * np.exp(0.2 * rng.standard_normal((len(sizes[0]), 2, 3)))
        return seconds, np.full(seconds.shape, 0.1)

    surface = build([Range(64.0, True, 16)], noisy)
    widths = np.arange(1.0, 65.0)
    alone, half, together = (surface.interpolate([widths], crowd)[0] for crowd in (0.0, 0.5, 1.0))
    assert alone.shape == (64, 3) and (together <= alone + 1e-15).all() and (together < alone).any()
    np.testing.assert_allclose(half, (alone + together) / 2)
    by_plan = surface.interpolate([widths], np.linspace(0, 1, 64))[0]
    np.testing.assert_allclose(by_plan[[0, -1]], [alone[0], together[-1]])


class Gaining:
    """A roofline on which all kernels gain by their twins, also those that few samples are of."""

    tier = "roofline"

    def __init__(self, rates):
        self.rates = rates

    def predict(self, signature, sizes, period_s=0.0, company=ALONE):
        seconds, sd = self.rates.predict(signature, sizes, period_s, company)
        return seconds * (1 - GAIN * np.log(company.twins)), sd


def test_kernels_that_only_some_plans_have_cost_what_they_cost_where_they_are(ladder, monkeypatch):
    """ONNX Runtime runs these activations by themselves behind sums of blocked convolutions, and inside others."""
    from sartor import backends
    from sartor.profiling.build import fusion_rules

    net = Net((1, 64, 14, 14))
    for name, value in (("low", 0.0), ("high", 6.0)):
        net.constant(name, np.asarray(value, np.float32))
    x = net.conv("x", ("c", 64), 1, "stem")
    for i in range(3):
        y = net.conv(x, ("c", 64), 3, f"c{i}")
        x = net.unary("Clip", net.add(y, x, f"add{i}"), f"act{i}", "low", "high")
    workload = build_workload(net.program((x,)), net.extents, rules=fusion_rules(backends.get("onnxruntime")))
    ladder = Ladder(ladder.profile)
    monkeypatch.setattr(Tiers, "model_for", lambda tiers, _: Gaining(tiers.rates))
    differing = workload.layout.kernels(Population({"c": np.array([63 / 64])}, {}))
    assert any(np.any(np.asarray(count) < 0) for _, count in differing)
    for kept in (64, 63):
        found = ladder.estimate(workload, {"c": kept / 64})
        total = sum(kernel.latency_s for kernel in found.kernels) + ladder.constant_s
        assert found.latency_s == pytest.approx(total, rel=1e-9)
    pricer = Pricer(ladder, workload, {"c": 64})
    kept = np.arange(1, 65)[:, None]
    expected = ladder.estimate_batch(workload, {"c": kept[:, 0] / 64})
    said = pricer.estimate_batch(PlanBatch(kept, np.zeros((64, 0), bool)))
    np.testing.assert_allclose(said, expected, rtol=1e-12)
