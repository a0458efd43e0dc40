"""What is pruned stays on the channel grid that the target declares for the operator and the precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import node, program_from_nodes
from models import captured

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.ir.channels import channel_groups
from sartor.passes.prune_channels import PruneChannels
from sartor.plan_prices import channel_step
from sartor.strategies.space import levels


class Grids:
    """A backend of which only the grid is asked; remembers what it was asked."""

    def __init__(self, grids):
        self.grids, self.asked = grids, []

    def channel_grid(self, op_type, precision="f32", attributes=None):
        self.asked.append((op_type, precision, dict(attributes or {})))
        return self.grids.get((op_type, precision), 1)


def grid_of(program, group, backend, precision="f32"):
    return channel_step(backend, program, precision, group)


def wide():
    """A convolution of 96 channels, a depthwise one, and a linear layer that reads them."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "wide"),
        node("Conv", ["a", "w2"], ["b"], "depthwise", group=96),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "w3"], ["y"], "linear"),
    ]
    shapes = {"w1": (96, 3, 3, 3), "w2": (96, 1, 3, 3), "w3": (96, 5)}
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return program_from_nodes(nodes, {"x": ["N", 3, 9, 9]}, ["y"], constants)


def test_the_step_suits_every_operator_that_reads_the_channels():
    program = wide()
    (group,) = channel_groups(program).groups
    backend = Grids({("Conv", "int8"): 32, ("Gemm", "int8"): 48, ("Conv", "f16"): 8})
    assert grid_of(program, group, backend, "int8") == 96
    assert grid_of(program, group, backend, "f16") == 8
    assert grid_of(program, group, backend) == 1


def test_the_backend_is_told_the_attributes():
    program = wide()
    (group,) = channel_groups(program).groups
    backend = Grids({})
    grid_of(program, group, backend)
    assert {(op, attributes.get("group", 1)) for op, _, attributes in backend.asked} == {
        ("Conv", 1),
        ("Conv", 96),
        ("Gemm", 1),
    }


@pytest.mark.parametrize("family", ["resnet", "vit"])
@pytest.mark.parametrize("grid", [4, 8, 16, 32])
def test_every_width_that_is_proposed_is_on_the_grid(family, grid):
    groups = channel_groups(captured(family)).groups
    assert groups
    for group in groups:
        channels = group.size * group.granularity
        for count in levels(group, grid)[1:]:  # the first is the original
            kept = count * group.granularity
            step = grid if channels > grid else 4 if channels > 4 else 1
            assert kept % math.lcm(step, group.granularity) == 0, (group.name, kept)


@pytest.mark.parametrize(
    ("name", "precision"), [("onnxruntime", "f32"), ("onnxruntime", "int8"), ("openvino", "f16")]
)
def test_pruning_to_the_grid_of_a_real_target(name, precision):
    """As `sartor run` does it: the grid goes into the pass as an option."""
    step = backends.get(name).channel_grid("Conv", precision)
    assert step in (8, 16)
    program = wide()
    plan = PruneChannels(ratio=0.3, grid=step).run(program).plan
    (kept,) = (len(p.keep) for p in plan.groups.values())
    assert kept % step == 0 and kept < 96
    assert TargetOptions(precision=precision).precision == precision
