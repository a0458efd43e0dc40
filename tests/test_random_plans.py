"""Random networks, random plans: what remains computes what the masked original computes."""

from __future__ import annotations

import numpy as np
import pytest
from builders import random_inputs, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import legal_plans, programs
from test_channels import reordered, shape_of_groups

from sartor.errors import PlanError
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.verify import verify_program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan

SETTINGS = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
TOLERANCE = 1e-9


def check_plan(program, analysis, plan) -> None:
    """Pruned ≡ masked in float64, the pruned program is well formed, and widths are what is kept."""
    pruned = apply_plan(program, plan, analysis)
    verify_program(pruned)
    reference, _ = masked(program, plan, analysis)
    verify_program(reference)
    feeds = random_inputs(program, seed=5)
    error = relative_error(run_twin(reference, feeds), run_twin(pruned, feeds))
    assert error <= TOLERANCE, f"pruned differs from masked by {error:.3g}"
    alive = analysis.alive_atoms(plan)
    for (name, axis), atoms in analysis.propagation.parameter_atoms.items():
        if name in pruned.initializers:
            assert pruned.initializer_array(name).shape[axis] == alive[atoms].sum()


@given(st.data())
@SETTINGS
def test_pruned_equals_masked(data):
    program = data.draw(programs())
    verify_program(program)
    analysis = channel_groups(program)
    check_plan(program, analysis, data.draw(legal_plans(analysis)))


@st.composite
def illegal_plans(draw, analysis) -> Plan:
    """A plan that is wrong in one way."""
    sha = analysis.program.source.sha256
    group = draw(st.sampled_from(analysis.groups))
    kinds = ["size", "unknown", "range", "source", "repeated"] + (["floor"] if group.floors else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "size":
        return Plan(sha, {group.name: GroupPlan(group.size + 1, (0,))})
    if kind == "unknown":
        return Plan(sha, {group.name + "?": GroupPlan(group.size, (0,))})
    if kind == "source":
        return Plan(sha[::-1], {group.name: GroupPlan(group.size, (0,))})
    if kind == "floor":
        rest = np.setdiff1d(np.arange(group.size), draw(st.sampled_from(group.floors)))
        return Plan(sha, {group.name: GroupPlan(group.size, tuple(int(i) for i in rest))})
    wrong = {"range": (group.size,), "repeated": (0, 0)}
    return Plan(sha, {group.name: GroupPlan(group.size, wrong[kind])})


@given(st.data())
@SETTINGS
def test_illegal_plans_are_refused(data):
    program = data.draw(programs())
    analysis = channel_groups(program)
    if not analysis.groups:
        return
    before = program.to_bytes()
    with pytest.raises(PlanError):
        apply_plan(program, data.draw(illegal_plans(analysis)), analysis)
    assert program.to_bytes() == before


def test_an_empty_keep_is_refused():
    with pytest.raises(PlanError, match="at least one"):
        GroupPlan(4, ())


@given(st.data())
@SETTINGS
def test_extents_are_lengths(data):
    """Extents at {} are the shapes; under a plan that keeps every unit's share they stay within bounds."""
    program = data.draw(programs())
    analysis = channel_groups(program)
    for name, shape in program.shapes().items():
        lengths = tuple(float(e.evaluate({})) for e in analysis.extents[name])
        assert lengths == shape, name
        for extent in analysis.extents[name]:
            halves = float(extent.evaluate({g: 0.5 for g in extent.groups}))
            assert (0 < halves < extent.full) if extent.groups else halves == extent.full


@given(programs(), st.integers(0, 2**16))
@SETTINGS
def test_groups_do_not_depend_on_the_order_of_nodes(program, seed):
    again = channel_groups(reordered(program, seed))
    assert shape_of_groups(again) == shape_of_groups(channel_groups(program))
