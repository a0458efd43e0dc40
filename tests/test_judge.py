"""Candidates are judged as recovery would begin with them, once, and a resumed run is told the same."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from models import captured

from sartor.data import Data, Split
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.plan import GroupPlan, Plan
from sartor.journal import Journal
from sartor.judge import Judge
from sartor.passes.reconstruction import Moments
from sartor.recovery.twins import predictor
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

    def make(journal, repair=True):
        options = FitOptions("onnxruntime", {}, repair=repair)
        bench = SimpleNamespace(program=program, data=data, options=options)
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


def test_what_was_judged_is_not_judged_again(case, judge, tmp_path, monkeypatch):
    plan = case[3]
    with Journal(tmp_path / "journal", {}) as journal:
        found = judge(journal).loss(plan), judge(journal).score(plan)
        monkeypatch.setattr(Moments, "add", None)  # a second repair would fail
        assert (judge(journal).loss(plan), judge(journal).score(plan)) == found
