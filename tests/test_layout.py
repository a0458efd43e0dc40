"""What the blocked layout adds and takes away under plans: as in the networks that the plans make."""

from __future__ import annotations

import numpy as np
import pytest
from fusion_networks import Builder

from sartor import backends
from sartor.ir.channels import channel_groups
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.layout import FAMILY
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.population import Population
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan
from sartor.profiling import networks
from sartor.profiling.fusion_check import profile_fusion

RULES = FusionRules.of(backends.get("onnxruntime").capabilities().fuses)


def copies(workload, plans):
    """`(operator, bytes)` of every copy, for each plan of a population."""
    shape = plans.shape or (1,)
    found = [[] for _ in range(shape[0])]
    for kernel, number in workload.layout.kernels(plans):
        if kernel.family != FAMILY:
            continue
        count, moved = (np.broadcast_to(v, shape) for v in (number, plans.quantity(kernel.bytes_read)))
        for plan in np.flatnonzero(count):
            found[plan].append((kernel.op_type, round(float(moved[plan]))))
    return [sorted(one) for one in found]


def random_plan(program, analysis, rng):
    groups = {}
    for group in analysis.groups:
        kept = int(rng.integers(max(1, group.size // 3), group.size + 1))
        if rng.random() < 0.5 and group.size >= 16:
            kept = max(16, kept // 16 * 16)
        keep = set(rng.permutation(group.size)[:kept].tolist())
        for floor in group.floors:
            if not keep & set(map(int, floor)):
                keep.add(int(floor[0]))
        groups[group.name] = GroupPlan(group.size, tuple(sorted(keep)))
    return Plan(program.source.sha256, groups)


@pytest.mark.parametrize("name", ["grouped-0-2", "inverted-0-1", "narrow-0-0"])
def test_copies_under_a_plan_are_those_of_the_network_that_it_makes(name, tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(networks.network(name))
    program = load(path)
    analysis = channel_groups(program)
    rng = np.random.default_rng(0)
    plans = [random_plan(program, analysis, rng) for _ in range(4)]
    fractions = [plan.fractions() for plan in plans]
    columns = {g.name: np.array([f.get(g.name, 1.0) for f in fractions]) for g in analysis.groups}
    workload = build_workload(program, analysis.extents, rules=RULES)
    together = copies(workload, Population(columns, {}))
    assert len({tuple(one) for one in together}) > 1
    for plan, found in zip(plans, together, strict=True):
        made = build_workload(apply_plan(program, plan, analysis), rules=RULES)
        assert found == copies(made, Population({}, {}))[0]


def undecided():
    """Sums, activations and normalizations of which the widths decide what takes them in."""
    b = Builder((1, 3, 16, 16))
    x = b.op("HardSwish", b.conv("x", 3, 40, name="stem"), name="stem.act")
    x = b.op("HardSwish", b.conv(x, 40, 32, name="s"), name="s.act")
    y = b.op("HardSwish", b.conv(x, 32, 48, 1, name="a1"), name="a1.act")
    x = b.op("Relu", b.op("Add", b.conv(y, 48, 32, name="a2"), x, name="a.sum"), name="a.act")
    down = b.norm(b.conv(x, 32, 40, 1, name="down", bias=False), 40, "down.bn")
    y = b.op("Relu", b.conv(x, 32, 24, name="b1"), name="b1.act")
    x = b.op("HardSwish", b.op("Add", b.conv(y, 24, 40, name="b2"), down, name="b.sum"), name="b.act")
    y = b.op("Relu", b.conv(x, 40, 24, name="c1"), name="c1.act")
    x = b.op("Clip", b.op("Add", x, b.conv(y, 24, 40, name="c2"), name="c.sum"), name="c.act")
    y = b.conv(b.op("Relu", b.norm(down, 40, "d.bn"), name="d.act"), 40, 16, name="d")
    b.op("HardSwish", b.conv(b.op("Concat", x, y, name="both", axis=1), 56, 32, name="end"), name="end.act")
    b.op("GlobalAveragePool", name="pool")
    return b.program()


def test_what_a_kernel_takes_in_under_a_plan_is_what_it_takes_in_of_the_network_that_it_makes():
    """Sums and activations are kernels of their own where a width leaves the layout, and none where it comes back."""
    program = undecided()
    analysis = channel_groups(program)
    rng = np.random.default_rng(0)
    plans = [random_plan(program, analysis, rng) for _ in range(32)]
    workload = build_workload(program, analysis.extents, rules=RULES)
    more, fewer = set(), set()
    for plan in plans:
        fractions = analysis.fractions(plan)
        made = build_workload(apply_plan(program, plan, analysis), rules=RULES)
        mine = {(k.name, k.op_type, s) for k, s in sized(workload, Population(fractions, {}))}
        assert mine == {(k.name, k.op_type, s) for k, s in sized(made, Population({}, {}))}
        now, before = ({k.name for k in w.kernels} for w in (made, workload))
        more, fewer = more | (now - before), fewer | (before - now)
    assert {"a1.act", "a.sum", "a.act", "b.act", "c.sum", "d.act", "end.act"} <= more
    assert {"c.act"} <= fewer


def test_the_runtime_executes_what_a_plan_is_priced_as(tmp_path):
    program = undecided()
    analysis = channel_groups(program)
    rng = np.random.default_rng(1)
    for number in range(4):
        made = apply_plan(program, random_plan(program, analysis, rng), analysis)
        found = profile_fusion("onnxruntime", made, tmp_path / str(number))
        assert found.agreed == found.kernels > 10 and found.layout == found.inserted, found


def sized(workload, plans):
    """Every kernel with the bytes that it writes, copies left out."""
    return [
        (kernel, round(float(plans.quantity(kernel.bytes_written))))
        for kernel in workload.existing(plans)
        if kernel.family != FAMILY
    ]


def test_a_runtime_without_a_layout_copies_nothing(tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(networks.network("narrow-0-0"))
    workload = build_workload(load(path))
    assert copies(workload, Population({}, {})) == [[]]
