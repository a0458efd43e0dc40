"""Copies into and out of the blocked layout under plans: as those of the networks that the plans make."""

from __future__ import annotations

import numpy as np
import pytest

from sartor import backends
from sartor.ir.channels import channel_groups
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.population import Population
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan
from sartor.profiling import networks

RULES = FusionRules.of(backends.get("onnxruntime").capabilities().fuses)


def copies(workload, plans):
    """`(operator, bytes)` of every copy, for each plan of a population."""
    shape = plans.shape or (1,)
    found = [[] for _ in range(shape[0])]
    for copy in workload.layout.copies(plans):
        count, moved = (np.broadcast_to(v, shape) for v in (copy.count, plans.quantity(copy.moved)))
        for plan in np.flatnonzero(count):
            found[plan].append((copy.op_type, round(float(moved[plan]))))
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


def test_a_runtime_without_a_layout_copies_nothing(tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(networks.network("narrow-0-0"))
    workload = build_workload(load(path))
    assert copies(workload, Population({}, {})) == [[]]
