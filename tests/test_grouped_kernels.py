"""Groups of a convolution as functions of a plan, against networks that really were pruned."""

from __future__ import annotations

import itertools

import pytest
from cost_networks import Net
from fusion_networks import Builder

from sartor.ir.channels import channel_groups
from sartor.ir.extents import Extent, Ratio, quotient
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan


def resnext_block(op="Conv", groups=4):
    """1x1, grouped 3x3, 1x1 with a residual sum, as in ResNeXt."""
    b = Builder((1, 16, 8, 8))
    x = b.op("Relu", b.norm(b.conv("x", 16, 32, 1, "a", bias=False), 32, "an"), name="ar")
    if op == "Conv":
        y = b.conv(x, 32, 48, 3, "g", group=groups, bias=False)
    else:
        w = b.weight("g.w", 32, 48 // groups, 3, 3)
        y = b.op(op, x, w, name="g", pads=[1] * 4, group=groups)
    y = b.conv(b.op("Relu", b.norm(y, 48, "gn"), name="gr"), 48, 16, 1, "p")
    b.op("Add", y, "x", name="sum")
    return b.program()


def grouped(workload):
    (kernel,) = [k for k in workload.kernels if k.name == "g"]
    return kernel


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_a_plan_removes_groups_or_channels_of_every_group(op):
    program = resnext_block(op)
    analysis = channel_groups(program)
    workload = build_workload(program, analysis.extents)
    kernel = grouped(workload)
    sizes = {group.name: group.size for group in analysis.groups}
    assert sorted(sizes.values()) == [4, 8, 12]  # whole groups; channels in, and out, of every group
    kept = {4: (4, 3, 1), 8: (8, 5), 12: (12, 7)}
    for widths in itertools.product(*(kept[n] for n in sizes.values())):
        plan = Plan(
            program.source.sha256,
            {g: GroupPlan(n, tuple(range(w))) for (g, n), w in zip(sizes.items(), widths, strict=True)},
        )
        pruned = build_workload(apply_plan(program, plan, analysis))
        real = grouped(pruned)
        fractions = plan.fractions()
        found = [
            float(e.evaluate(fractions)) for e in (kernel.groups, kernel.in_per_group, kernel.out_per_group)
        ]
        wanted = [e.full for e in (real.groups, real.in_per_group, real.out_per_group)]
        by_size = dict(zip(sizes.values(), widths, strict=True))
        assert found == wanted == [by_size[4], by_size[8], by_size[12]]
        assert real.attributes["group"] == by_size[4]
        priced = workload.evaluate(fractions)
        for metric in ("macs", "parameters", "bytes_read", "bytes_written"):
            assert float(getattr(priced, metric)) == float(getattr(pruned.evaluate(), metric)), metric


def test_a_depthwise_convolution_has_as_many_groups_as_channels():
    net = Net((1, 3, 8, 8))
    x = net.conv("x", ("a", 12), 1, "first")
    net.conv(x, ("a", 12), 3, "deep", depthwise=True)
    first, deep = build_workload(net.program(("deep",)), net.extents).kernels
    assert [first.groups.full, first.in_per_group.full, first.out_per_group.full] == [1, 3, 12]
    assert first.groups.evaluate({"a": 0.5}) == 1 and first.out_per_group.evaluate({"a": 0.5}) == 6
    assert [deep.groups.full, deep.in_per_group.full, deep.out_per_group.full] == [12, 1, 1]
    assert [float(e.evaluate({"a": 0.25})) for e in (deep.groups, deep.out_per_group)] == [3, 1]


def test_only_convolutions_have_groups():
    b = Builder((2, 6))
    b.op("Gemm", "x", b.weight("w", 6, 4), name="fc")
    (kernel,) = build_workload(b.program()).kernels
    assert kernel.groups is kernel.in_per_group is kernel.out_per_group is None


def test_a_quotient_that_does_not_cancel_is_evaluated():
    over = Extent(((8.0, ("a",)), (4.0, ("b",))))
    ratio = quotient(over, Extent(((4.0, ("a",)),)))
    assert isinstance(ratio, Ratio) and ratio.full == 3 and ratio.groups == {"a", "b"}
    assert ratio.evaluate({"a": 0.5, "b": 0.25}) == 2.5
    assert quotient(over, over) == Extent.constant(1)
    assert quotient(over, Extent.constant(4)) == Extent(((2.0, ("a",)), (1.0, ("b",))))
