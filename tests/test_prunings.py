"""Kernels of one network, timed inside it and inside prunings of it: enough to price any other pruning."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from profile_machine import Clock, Machine

from sartor import backends
from sartor.backends.protocol import KernelTime, TargetOptions
from sartor.backends.visits import Summary
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.signatures import key_of, signature_of
from sartor.errors import MetricUnavailableError
from sartor.ir.batch import with_shapes
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.load import load
from sartor.ir.workload import build_workload
from sartor.journal import Journal
from sartor.passes.prune import apply_plan
from sartor.profiling import networks
from sartor.profiling.build import fusion_rules
from sartor.profiling.inside import Inside, InsideEffort
from sartor.profiling.prunings import random_plans, sample_prunings
from sartor.strategies.space import levels
from sartor.tasks import LocalRunner, requests

RULES = fusion_rules(backends.get("onnxruntime"))
STEP = 8


@pytest.fixture(scope="module", params=["inverted-0-1"])
def network(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    path.write_bytes(networks.network(request.param))
    program = load(path)
    return program, channel_groups(program), [b for b in residual_blocks(program) if b.removable]


def of_group(group):
    return levels(group, STEP)


def sampled(network, machine, tmp_path, seconds=20.0):
    program, analysis, blocks = network
    with Journal(tmp_path / "kernels.jsonl", {}) as journal:
        return sample_prunings(
            program,
            analysis,
            [block.name for block in blocks],
            machine,
            journal,
            levels=of_group,
            rules=RULES,
            target={"name": "onnxruntime", "channel_grid": {"Conv": STEP}},
            device={},
            seconds=seconds,
            clock=machine.clock,
        )


# ---- what is learned -------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("network", ["residual-0-0", "inverted-0-1"], indirect=True)
def test_any_other_pruning_is_priced_within_a_few_percent(network, tmp_path):
    program, analysis, blocks = network
    machine = Machine(noise=0.005)
    found = sampled(network, machine, tmp_path)
    assert len(found.ratios) > 15 and all(s.period_s > 0 and s.network for s in found.profile.samples)
    workload = build_workload(program, analysis.extents, blocks, RULES)
    baseline_s = 1.1 * found.profile.networks[0].latency_s  # of a machine that is slower by now
    model = Ladder(found.profile)
    model.calibrate(workload, baseline_s)
    for plan, ratio in found.ratios:
        removed = {name: True for name in plan.blocks}
        model.calibrate(workload, ratio * baseline_s, analysis.fractions(plan), removed, sd=0.04)
    others = itertools.islice(random_plans(program, analysis, [b.name for b in blocks], of_group, seed=7), 12)
    errors = []
    for plan in others:
        models = [program.to_bytes(), apply_plan(program, plan, analysis).to_bytes()]
        whole, pruned = (one.latency.ratio for one in Machine()(models, InsideEffort(profile_s=0.0)))
        removed = {name: True for name in plan.blocks}
        said = float(model.estimate_batch(workload, analysis.fractions(plan), removed))
        errors.append(said / baseline_s / (pruned / whole) - 1)
    assert np.abs(errors).max() < 0.06 and abs(np.mean(errors)) < 0.02


def test_plans_reach_all_quarters_of_every_range_and_remove_blocks(network):
    program, analysis, blocks = network
    names = [block.name for block in blocks]
    plans = list(itertools.islice(random_plans(program, analysis, names, of_group), 4))
    for group in analysis.groups:
        kept = sorted(len(p.groups[group.name].keep) if group.name in p.groups else group.size for p in plans)
        choices = sorted(of_group(group))
        for quarter, count in enumerate(kept):
            index = min(range(len(choices)), key=lambda i: abs(choices[i] - count))
            assert (
                math.floor(quarter * len(choices) / 4) <= index <= math.ceil((quarter + 1) * len(choices) / 4)
            )
        assert kept[0] < kept[-1]
    many = list(itertools.islice(random_plans(program, analysis, names, of_group), 40))
    assert {name for plan in many for name in plan.blocks} == set(names)
    assert many[:4] == plans
    for plan in plans:
        apply_plan(program, plan, analysis)


def kernels_of(workload):
    return {s.key for k in workload.kernels if (s := signature_of(k)) is not None and s.kind == "contraction"}


@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_timed_are_the_kernels_that_a_search_prices(network, tmp_path, monkeypatch, batch):
    """In the batch that the network is for, and with what no plan narrows."""
    monkeypatch.setattr("sartor.profiling.prunings._MOST", 4)
    program, _, _ = network
    (name, shape), *_ = program.input_shapes.items()
    program = with_shapes(program, {name: (batch, *shape[1:])})
    assert program.batch.symbolic
    protected = sorted(g.name for g in channel_groups(program).groups)[:2]
    for keep in ([], protected):
        analysis = channel_groups(program, keep)
        blocks = [b for b in residual_blocks(program) if b.removable]
        folder = tmp_path / str(len(keep))
        folder.mkdir()
        found = sampled((program, analysis, blocks), Machine(), folder)
        timed = {key_of(sample.spec) for sample in found.profile.samples}
        assert kernels_of(build_workload(program, analysis.extents, blocks, RULES)) <= timed
        assert {s.spec["batch"] for s in found.profile.samples if s.spec["op"] == "Conv"} == {batch}


# ---- limits ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_time_decides_how_many_prunings_there_are(network, tmp_path):
    counts = []
    for number, seconds in enumerate((0.5, 4.0, 8.0, 1e6)):
        (tmp_path / str(number)).mkdir()
        machine = Machine(Clock())
        counts.append(len(sampled(network, machine, tmp_path / str(number), seconds).ratios))
        assert machine.clock.now < seconds + 3
    assert counts == sorted(counts) and counts[0] == 3 < counts[1] < counts[2] < counts[3] == 24


def test_the_network_is_looked_at_again_with_every_request(network, tmp_path):
    machine = Machine(busy=(0.0, 0.7))  # the first look at it is disturbed
    disturbed = dict(enumerate(ratio for _, ratio in sampled(network, machine, tmp_path).ratios))
    (tmp_path / "quiet").mkdir()
    quiet = dict(enumerate(ratio for _, ratio in sampled(network, Machine(), tmp_path / "quiet").ratios))
    assert disturbed[10] == pytest.approx(quiet[10], rel=0.03)


FAULTS = {
    "could not be timed: no such operator": lambda one: Inside(None, reason="no such operator"),
    "does not tell": lambda one: dataclasses.replace(one, kernels=()),
    "which nodes they compute": lambda one: dataclasses.replace(
        one, kernels=tuple(dataclasses.replace(k, nodes=()) for k in one.kernels)
    ),
}


@pytest.mark.parametrize("said", FAULTS)
def test_where_the_target_does_not_tell_an_error_says_so(network, tmp_path, said):
    def target(models, effort):
        return [FAULTS[said](one) for one in Machine()(models, effort)]

    target.clock = Clock()
    with pytest.raises(MetricUnavailableError, match=said):
        sampled(network, target, tmp_path)


def test_a_network_that_is_too_slow_for_prunings_is_an_error(network, tmp_path):
    """One model is timed, and the time is over."""
    machine = Machine()

    def target(models, effort):
        machine.clock.now += 30.0
        late = [Inside(None, reason="the time limit was reached") for _ in models[1:]]
        return [*machine(models[:1], effort), *late]

    target.clock = machine.clock
    with pytest.raises(MetricUnavailableError, match=r"Of 3 prunings 0 could be timed in 20 s"):
        sampled(network, target, tmp_path)


def test_a_network_that_is_too_large_is_an_error_before_anything_is_timed(network, tmp_path, monkeypatch):
    monkeypatch.setattr("sartor.profiling.prunings._LARGEST", 1000)
    machine = Machine()
    with pytest.raises(MetricUnavailableError, match="too many to be sent"):
        sampled(network, machine, tmp_path)
    assert machine.models == 0


def test_prunings_that_fail_are_left_out(network, tmp_path):
    machine, seen = Machine(), []

    def target(models, effort):
        found = machine(models, effort)
        seen.append(len(models))
        if len(seen) == 2:  # after the empty call: the network and the first prunings
            found[2] = Inside(None, reason="crashed")
        if len(seen) == 3:  # a look that says nothing
            found[1] = dataclasses.replace(found[1], latency=Summary(1.0, math.inf, 1, 4))
        return found

    target.clock = machine.clock
    found = sampled(network, target, tmp_path)
    assert len(found.ratios) == sum(seen) - len(seen) - 2


def test_a_network_of_which_nothing_can_go_is_timed_itself(network, tmp_path):
    program, _, _ = network
    found = sampled((program, channel_groups(program, keep=["*"]), []), Machine(), tmp_path)
    assert found.ratios == () and found.profile.samples


# ---- where it is asked for -------------------------------------------------------------------------
def test_what_was_timed_elsewhere_comes_back_as_it_was():
    kernels = (KernelTime("a", "Conv", ("n",), 0.5, 8, "gemm", (1, 2)),)
    for inside in (
        Inside(Summary(1.5, 0.01, 4, 4), kernels, 3e-4),
        Inside(Summary(1.5, math.inf, 2, 4), (), 3e-4),
        Inside(None, reason="crashed"),
    ):
        assert Inside.from_dict(inside.to_dict()) == inside


def test_a_task_times_models_and_the_kernels_inside_them(tmp_path):
    models = [networks.network("residual-0-0"), b"no model"]
    effort = InsideEffort(visits=2, visit_s=0.005, profile_s=0.02, limit_s=30.0)
    task = requests.time_inside_task("onnxruntime", models, TargetOptions(), tmp_path, effort)
    found = requests.insides(LocalRunner().run(task))
    assert found[0].latency.ratio > 0 and found[0].reference_s > 0
    assert sum(kernel.op_type == "Conv" for kernel in found[0].kernels) > 3
    assert found[1].latency is None and found[1].reason
