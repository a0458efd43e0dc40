"""Repair behind removed blocks, and what the original makes, kept for many repairs."""

from __future__ import annotations

import dataclasses

import models
import numpy as np
import pytest

from sartor.ir.blocks import residual_blocks
from sartor.ir.plan import Plan
from sartor.passes.base import Context
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels
from sartor.passes.repair import Repair
from sartor.passes.repaired_layers import affected
from sartor.recovery.twins import predictor


def data_of(program, seed):
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal((64, *shape[1:])).astype(np.float32)
        for name, shape in program.input_shapes.items()
    }


def context_of(program):
    return Context(data={"calibration": [(data_of(program, 1), None)]}, original=program)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "se", "vit"])
def test_layers_behind_a_removed_block_make_up_for_it(name):
    program = models.captured(name)
    context, data = context_of(program), data_of(program, 2)
    removable = [block for block in residual_blocks(program) if block.removable]
    assert removable
    for block in removable:
        cut = apply_plan(program, Plan(program.source.sha256, blocks=(block.name,)))
        behind = {node.name for node, _ in affected(cut, program)}
        found = Repair(samples=64).run(cut, context)
        assert 0 < found.counts["layers_repaired"] <= len(behind)
        assert not behind & set(block.nodes)
        wanted, before, after = (
            next(iter(predictor(one)(data).values())) for one in (program, cut, found.program)
        )
        assert np.square(after - wanted).sum() < np.square(before - wanted).sum()


def test_nothing_is_behind_nothing():
    program = models.captured("resnet")
    assert not list(affected(program.clone(), program))
    assert not Repair(samples=8).run(program, context_of(program)).modified


def test_layers_before_a_cut_stay():
    program = models.captured("resnet")
    block = [b for b in residual_blocks(program) if b.removable][-1]
    cut = apply_plan(program, Plan(program.source.sha256, blocks=(block.name,)))
    found = Repair(samples=32).run(cut, context_of(program)).program
    names = [node.name for node in program.graph]
    first = min(names.index(name) for name in block.nodes)
    for node in cut.graph:
        if names.index(node.name) < first:
            for value in node.inputs:
                if value is not None and value.name in cut.initializers:
                    before, after = (one.initializer_array(value.name) for one in (cut, found))
                    np.testing.assert_array_equal(before, after)


def test_targets_serve_many_programs():
    program = models.captured("resnet")
    context, repair = context_of(program), Repair(samples=32, positions=16)
    kept = dataclasses.replace(context, extras={"targets": repair.targets(program, context)})
    for ratio in (0.25, 0.5, 0.25):
        pruned = PruneChannels(ratio=ratio, criterion="l2").run(program, Context()).program
        alone, shared = (repair.run(pruned, one).program for one in (context, kept))
        assert alone.sha256() == shared.sha256()
