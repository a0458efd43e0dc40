"""Cutting in rounds: the same widths in the end, units chosen anew, decisions that a resumed run repeats."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fit_fakes import without_timing
from models import captured

import sartor
from sartor.cli import main
from sartor.cli.fit import parse_recovery
from sartor.errors import UsageError
from sartor.fit_rounds import Rounds, rounds_of
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.plan import GroupPlan, Plan, Widening
from sartor.journal import Journal, read
from sartor.passes.prune import apply_plan
from sartor.passes.rewriter import Rewriter
from sartor.workbench import FitOptions


def bench_of(program):
    """What rounds ask of a workbench; without data, importance is the norm of weights."""
    return SimpleNamespace(program=program, options=FitOptions("onnxruntime", {}), data=None)


def plan_of(program, analysis, blocks, share=0.5):
    """Half of every group that stays, and the first removable block."""
    gone = tuple(b.name for b in blocks if b.removable)[:1]
    left = {
        g.name for g in channel_groups(apply_plan(program, Plan(program.source.sha256, blocks=gone))).groups
    }
    scores = np.random.default_rng(0)
    groups = {
        g.name: GroupPlan(g.size, g.keep_best(scores.random(g.size), max(round(share * g.size), 1)))
        for g in analysis.groups
        if g.name in left and g.size > 1
    }
    return Plan(program.source.sha256, {k: p for k, p in groups.items() if len(p.keep) < p.size}, gone)


def weights(program):
    return {name: program.initializer_array(name) for name in program.initializers}


@pytest.mark.parametrize(
    "name", ["resnet", "mobilenet", "se", "densenet", "unet", "vit", "vit_manual", "vgg"]
)
def test_rounds_end_at_the_plans_widths_and_their_plan_leads_there_at_once(name, tmp_path):
    program = captured(name)
    analysis, blocks = channel_groups(program), residual_blocks(program)
    plan = plan_of(program, analysis, blocks)
    with Journal(tmp_path / "journal", {}) as journal:
        rounds = Rounds(bench_of(program), analysis, blocks, journal, plan, 3)
        current, done, sizes = program, Plan(plan.source_sha256), []
        for number in (1, 2, 3):
            done, current = rounds.cut(number, current, done)
            sizes.append(sum(array.size for array in weights(current).values()))
    assert sizes[0] > sizes[1] > sizes[2]
    wanted = weights(apply_plan(program, plan, analysis))
    found, at_once = weights(current), weights(apply_plan(program, done, analysis))
    assert {k: a.shape for k, a in found.items()} == {k: a.shape for k, a in wanted.items()}
    assert done.blocks == plan.blocks and done.groups.keys() == plan.groups.keys()
    for key, array in found.items():  # nothing was trained: the composed plan has to take the same units
        np.testing.assert_array_equal(array, at_once[key], err_msg=key)


def test_every_round_asks_what_matters_then(tmp_path):
    program = captured("vgg")
    analysis = channel_groups(program)
    group = max(analysis.groups, key=lambda g: g.size)
    plan = Plan(program.source.sha256, {group.name: GroupPlan(group.size, tuple(range(group.size // 2)))})
    with Journal(tmp_path / "journal", {}) as journal:
        rounds = Rounds(bench_of(program), analysis, [], journal, plan, 2)
        done, current = rounds.cut(1, program, Plan(plan.source_sha256))
        least = 3  # training makes this unit of no use
        trained = current.clone()
        rewriter = Rewriter(trained, "training")
        for member in channel_groups(trained).group(group.name).members_with("producer"):
            array = trained.initializer_array(member.initializer).copy()
            np.moveaxis(array, member.axis, 0)[least] = 0.0
            rewriter.set_initializer(member.initializer, array)
        after, _ = rounds.cut(2, trained, done)
        kept = done.groups[group.name].keep
        assert len(kept) == group.size - round(group.size / 4)
        assert kept[least] not in after.groups[group.name].keep
        assert len(after.groups[group.name].keep) == group.size // 2
        # A resumed run repeats what was chosen, whatever the weights are.
        again, _ = Rounds(bench_of(program), analysis, [], journal, plan, 2).cut(2, current, done)
        assert again == after


def test_what_cannot_be_divided_is_done_at_once():
    plan = Plan("0" * 64)
    assert rounds_of(plan, 4) == 1
    assert rounds_of(Plan("0" * 64, blocks=("a",)), 4) == 4
    assert rounds_of(Plan("0" * 64, blocks=("a",), widened={"g": Widening(4, (1,))}), 4) == 1


DATA = """
import numpy as np
X = np.random.default_rng(0).standard_normal((64, *{shape})).astype("float32")
Y = np.arange(64) % 10

def split():
    return [({{"{name}": X[i : i + 16]}}, Y[i : i + 16]) for i in (0, 16, 32, 48)]

def load():
    return {{"train": split(), "evaluate": split(), "test": split()}}
"""


@pytest.mark.parametrize("strategy", ["budgeted-greedy", "compound-shrink{samples=2}"])
def test_a_fit_in_rounds_delivers_the_plan_that_it_carried_out(strategy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    without_timing(monkeypatch)
    program = captured("resnet")
    program.save(tmp_path / "model.onnx")
    ((name, shape),) = program.input_shapes.items()
    (tmp_path / "data.py").write_text(DATA.format(name=name, shape=tuple(shape[1:])))
    options = [
        "--target",
        "onnxruntime",
        "--budget",
        "macs=0.5x",
        "--max-drop",
        "100",
        "--strategy",
        strategy,
    ]
    options += ["--data", "data.py:load", "--recovery", "minutes=0.05,rounds=2", "--out", "out", "--json"]
    code = main(["fit", "model.onnx", *options])
    printed = capsys.readouterr()
    assert code in (0, 3), printed.err
    report = json.loads(printed.out)
    assert report["recovery"]["rounds"] == 2
    assert report["oracle"]["verdict"] == "passed"
    lines = [line.split(": ")[0] for line in report["decisions"]]
    assert "round 1" in lines and "round 2" in lines  # what each of them did, or had no time for
    plan = Plan.load(tmp_path / "out/plan.json")
    source = sartor.load(tmp_path / "model.onnx")
    cut, delivered = weights(apply_plan(source, plan)), weights(sartor.load(tmp_path / "out/model.onnx"))
    assert {k: a.shape for k, a in cut.items()} == {k: a.shape for k, a in delivered.items()}
    assert [e["number"] for e in read(tmp_path / "out/journal.jsonl") if e["kind"] == "round"] == [1, 2]


def test_rounds_on_the_command_line():
    assert parse_recovery("minutes=1,rounds=3", True) == (60.0, {"rounds": 3})
    for text in ("minutes=1,rounds=0", "minutes=1,rounds=two"):
        with pytest.raises(UsageError, match="rounds=N"):
            parse_recovery(text, True)
