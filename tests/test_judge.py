"""Candidates are judged as recovery would begin with them, once, and a resumed run is told the same."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from models import captured

from sartor.data import Data, Split
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.plan import GroupPlan, Plan
from sartor.journal import Journal
from sartor.judge import Judge
from sartor.passes.prune import apply_plan
from sartor.passes.reconstruction import Moments
from sartor.recovery.twins import predictor
from sartor.tuning import put_back
from sartor.workbench import FitOptions


@pytest.fixture(scope="module")
def case():
    """A network, data whose labels are what it says, and a plan that takes a third of every group."""
    program = captured("resnet")
    ((name, shape),) = program.input_shapes.items()
    images = np.random.default_rng(0).standard_normal((96, *shape[1:])).astype(np.float32)
    labels = next(iter(predictor(program)({name: images}).values())).argmax(1)
    batches = [({name: images[i : i + 32]}, labels[i : i + 32]) for i in (0, 32, 64)]
    parts = [Split(part, batches, [name]) for part in ("evaluate", "calibration", "test")]
    data = Data(evaluate=parts[0], train=None, calibration=parts[1], test=parts[2])
    analysis = channel_groups(program)
    generator = np.random.default_rng(1)
    groups = {
        g.name: GroupPlan(g.size, g.keep_best(generator.random(g.size), round(g.size * 2 / 3)))
        for g in analysis.groups
    }
    return program, data, analysis, Plan(program.source.sha256, groups)


@pytest.fixture
def judge(case, tmp_path):
    """Makes judges: repaired or not, with the journal of a run."""
    program, data, analysis, _ = case

    def make(journal, repair=True, folder=tmp_path):
        options = FitOptions("onnxruntime", {}, repair=repair)
        bench = SimpleNamespace(program=program, data=data, options=options, folder=folder)
        return Judge(bench, analysis, residual_blocks(program), journal, lambda _: None)

    return make


def test_narrow_networks_are_judged_after_least_squares(case, judge, tmp_path):
    plan = case[3]
    with Journal(tmp_path / "a", {}) as first, Journal(tmp_path / "b", {}) as second:
        with_it, without = judge(first), judge(second, repair=False)
        assert with_it.score(plan) > without.score(plan) + 0.1
        assert with_it.loss(plan) < without.loss(plan)
        blocks = [b.name for b in residual_blocks(case[0]) if b.removable][:1]
        removed = Plan(plan.source_sha256, blocks=tuple(blocks))
        assert with_it.loss(removed) < 0.7 * without.loss(removed), (
            "what is behind a block reads other features"
        )
        assert with_it.loss(Plan(plan.source_sha256)) == without.loss(Plan(plan.source_sha256))


def test_a_smaller_input_is_repaired_to_what_the_original_computes_at_it(case, judge, tmp_path):
    program, _, _, plan = case
    ((name, shape),) = program.input_shapes.items()
    smaller = dataclasses.replace(plan, sizes={name: (*shape[:2], 24, 24)})
    with Journal(tmp_path / "a", {}) as first, Journal(tmp_path / "b", {}) as second:
        with_it, without = judge(first), judge(second, repair=False)
        assert with_it.loss(smaller) < without.loss(smaller)
        assert with_it.loss(smaller) != with_it.loss(plan)
        analysis, importance = with_it.importance(smaller)
        assert {g.name: g.size for g in analysis.groups} == {n: len(g.keep) for n, g in plan.groups.items()}
        assert all(len(importance.groups[g.name]) == g.size for g in analysis.groups)


def test_what_is_cut_further_has_the_weights_of_what_was_trained(case, judge, tmp_path):
    plan = case[3]
    further = dataclasses.replace(
        plan, groups={n: GroupPlan(g.size, g.keep[: len(g.keep) // 2 + 1]) for n, g in plan.groups.items()}
    )
    folder = tmp_path / "work"
    with Journal(tmp_path / "journal", {}) as journal:
        one = judge(journal, repair=False, folder=folder)
        before = one.loss(plan), one.loss(further)
        one.tune(plan, 12)
        after = one.loss(plan), one.loss(further)
        assert after[0] < 0.95 * before[0] and after[1] != before[1]
        again = judge(journal, repair=False, folder=folder)
        assert again.loss(plan) == before[0], "nothing is trained yet"
        again.tune(plan, 12)  # as it was trained, not anew
        assert (again.loss(plan), again.loss(further)) == after
        assert len([one for one in journal.records if one["kind"] == "judged-plan"]) == 4


def test_weights_go_back_to_where_they_were_cut_out(case):
    program, _, analysis, plan = case
    trained = apply_plan(program, plan, analysis)
    generator = np.random.default_rng(2)
    for name, value in trained.initializers.items():
        array = trained.initializer_array(name)
        if array.dtype.kind == "f":
            value.const_value = ir.tensor(generator.random(array.shape).astype(array.dtype), name=name)
    trained.invalidate()
    whole = put_back(program, plan, analysis, trained)
    again = apply_plan(whole, plan, analysis)
    for name in trained.initializers:
        assert np.array_equal(again.initializer_array(name), trained.initializer_array(name)), name
    name = next(n for n in program.initializers if program.initializer_array(n).ndim == 4)
    old, new = program.initializer_array(name), whole.initializer_array(name)
    share = np.mean(old == new)
    assert 0.2 < share < 0.9, "what was cut away is what it was"


def test_what_was_judged_is_not_judged_again(case, judge, tmp_path, monkeypatch):
    plan = case[3]
    with Journal(tmp_path / "journal", {}) as journal:
        found = judge(journal).loss(plan), judge(journal).score(plan)
        monkeypatch.setattr(Moments, "add", None)  # a second repair would fail
        assert (judge(journal).loss(plan), judge(journal).score(plan)) == found
