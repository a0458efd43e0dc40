"""MACs and bytes by hand, populations against networks that really are smaller, removed blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cost_networks import FakeBlock, Net, make_program, mobilenet_v2, residual, residual_blocks, resnet50
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.errors import InternalError, PlanError
from sartor.ir.extents import Extent
from sartor.ir.workload import build_workload

GROUPS = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}


def recount(layers) -> int:
    """Independent: sum of H·W·out·(in/groups)·k·k."""
    return sum(h * h * out * (cin // g) * k * k for h, cin, out, k, g in layers)


def one(op: str, shapes: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]], **attrs):
    arrays = {n: np.zeros(s, np.float32) for n, s in weights.items()}
    node = helper.make_node(op, [*shapes, *weights], ["y"], name="n", **attrs)
    return build_workload(make_program([node], shapes, ["y"], arrays))


@pytest.mark.parametrize(
    ("op", "shapes", "weights", "attrs", "expected"),
    [
        ("Conv", {"x": (2, 8, 10, 12)}, {"w": (16, 8, 3, 5)}, {}, 2 * 16 * 8 * 8 * 8 * 15),
        ("Conv", {"x": (1, 8, 9, 9)}, {"w": (8, 1, 3, 3)}, {"group": 8}, 8 * 7 * 7 * 9),
        ("Conv", {"x": (1, 8, 9, 9)}, {"w": (12, 2, 3, 3)}, {"group": 4, "strides": [2, 2]}, 12 * 16 * 2 * 9),
        ("Conv", {"x": (1, 4, 20)}, {"w": (6, 4, 3)}, {"dilations": [2]}, 6 * 16 * 4 * 3),
        ("ConvTranspose", {"x": (1, 8, 5, 5)}, {"w": (8, 6, 2, 2)}, {"strides": [2, 2]}, 25 * 8 * 6 * 4),
        ("ConvTranspose", {"x": (1, 8, 5, 5)}, {"w": (8, 3, 2, 2)}, {"group": 2}, 25 * 8 * 3 * 4),
        ("Gemm", {"x": (5, 7)}, {"w": (7, 11)}, {}, 5 * 7 * 11),
        ("Gemm", {"x": (7, 5)}, {"w": (11, 7)}, {"transA": 1, "transB": 1}, 5 * 7 * 11),
        ("MatMul", {"a": (2, 3, 5, 7), "b": (2, 3, 7, 4)}, {}, {}, 2 * 3 * 5 * 7 * 4),
        ("MatMul", {"a": (2, 5, 7)}, {"w": (7, 4)}, {}, 2 * 5 * 7 * 4),
        ("LSTM", {"x": (6, 2, 5)}, {"w": (1, 12, 5), "r": (1, 12, 3)}, {"hidden_size": 3}, 6 * 2 * 12 * 8),
        (
            "GRU",
            {"x": (6, 2, 5)},
            {"w": (2, 9, 5), "r": (2, 9, 3)},
            {"hidden_size": 3, "direction": "bidirectional"},
            6 * 2 * 2 * 9 * 8,
        ),
        ("Relu", {"x": (5, 7)}, {}, {}, 0),
        ("MaxPool", {"x": (1, 3, 8, 8)}, {}, {"kernel_shape": [2, 2]}, 0),
    ],
)
def test_macs_by_hand(op, shapes, weights, attrs, expected):
    workload = one(op, shapes, weights, **attrs)
    assert float(workload.evaluate().macs) == expected
    stored = 4 * sum(math.prod(s) for s in weights.values())
    assert float(workload.evaluate().weight_bytes) == stored


def test_bytes_of_one_convolution_by_hand():
    priced = one("Conv", {"x": (1, 8, 10, 10)}, {"w": (16, 8, 3, 3)}).evaluate()
    assert float(priced.bytes_read) == 4 * (8 * 100 + 16 * 8 * 9)
    assert float(priced.bytes_written) == 4 * 16 * 64


def test_resnet50_against_an_independent_recount():
    layers, h, c = [(112, 3, 64, 7, 1)], 56, 64
    for width, repeats, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(repeats):
            inner = h // stride if i == 0 else h
            layers += [(h, c, width, 1, 1), (inner, width, width, 3, 1), (inner, width, 4 * width, 1, 1)]
            if i == 0:
                layers.append((inner, c, 4 * width, 1, 1))
            h, c = inner, 4 * width
    layers.append((1, 2048, 1000, 1, 1))
    priced = build_workload(resnet50().program(("logits",))).evaluate()
    assert float(priced.macs) == recount(layers) == pytest.approx(4089.2e6, rel=1e-4)
    assert float(priced.parameters) == 25_557_032


def test_mobilenet_v2_against_published_numbers():
    workload = build_workload(mobilenet_v2().program(("logits",)))
    priced = workload.evaluate()
    assert float(priced.macs) == pytest.approx(300.8e6, rel=2e-4)
    assert float(priced.parameters) == 3_504_872  # the two Clip bounds are settings, not parameters
    assert sum(k.family == "depthwise" for k in workload.kernels) == 17


def test_kernels_are_fused_as_runtimes_do():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents)
    fused = {k.nodes[0]: [f.op_type for f in k.epilogue] for k in workload.kernels}
    assert fused["n_stem"] == ["Relu"]
    assert fused["n_b0.c2"] == ["Add", "Relu"]
    assert fused["n_b1.down"] == ["Add", "Relu"]  # the later of the two convolutions takes the Add
    assert fused["n_b1.c2"] == []
    assert fused["n_dw.project"] == ["Add"]
    assert fused["n_logits"] == []
    names = [n for k in workload.kernels for n in k.nodes]
    assert len(names) == len(set(names)) == len(net.nodes) - 1  # Flatten is free
    assert "n_flat" not in names


def test_silu_is_one_kernel_and_a_second_reader_prevents_fusion():
    net = Net((1, 3, 8, 8))
    y = net.conv("x", 8, 3, "c")
    net.unary("Sigmoid", y, "s")
    net.node("Mul", [y, "s"], "m", 8, (8, 8))
    workload = build_workload(net.program(("m",)))
    assert [f.op_type for k in workload.kernels for f in k.epilogue] == ["Silu"]
    workload = build_workload(net.program(("m", "c")))
    assert [len(k.nodes) for k in workload.kernels] == [1, 1, 1]


def test_linear_with_bias_is_one_kernel():
    net = Net((2, 3, 8, 8))
    net.weight("w", (8, 6)), net.weight("b", (6,))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="m"),
        helper.make_node("Add", ["y", "b"], ["z"], name="a"),
        helper.make_node("Gelu", ["z"], ["g"], name="g"),
    ]
    workload = build_workload(make_program(nodes, {"x": (2, 3, 8, 8)}, ["g"], net.weights))
    (kernel,) = workload.kernels
    assert [f.op_type for f in kernel.epilogue] == ["Bias", "Gelu"]


def test_shape_arithmetic_and_metadata_are_free():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="s", start=0, end=1),
        helper.make_node("Concat", ["s", "rest"], ["t"], name="t", axis=0),
        helper.make_node("Expand", ["cls", "t"], ["e"], name="e"),
        helper.make_node("Concat", ["e", "x"], ["y"], name="y", axis=1),
    ]
    weights = {"rest": np.array([1, 6]), "cls": np.zeros((1, 1, 6), np.float32)}
    workload = build_workload(make_program(nodes, {"x": (1, 4, 6)}, ["y"], weights))
    assert [k.name for k in workload.kernels] == ["e", "y"]
    assert float(workload.evaluate().parameters) == 6
    assert float(workload.evaluate().weight_bytes) == 6 * 4 + 2 * 8


kept_widths = st.fixed_dictionaries({g: st.integers(1, size) for g, size in GROUPS.items()})


@settings(max_examples=15, deadline=None)
@given(st.lists(kept_widths, min_size=1, max_size=3))
def test_a_population_is_priced_as_networks_that_really_are_smaller(population):
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    fractions = {g: np.array([p[g] / size for p in population]) for g, size in GROUPS.items()}
    priced = workload.evaluate(fractions)
    peaks = workload.peak_activation_bytes(fractions)
    for index, widths in enumerate(population):
        small = build_workload(residual(widths).program(("logits",)))
        real = small.evaluate()
        for metric in ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written"):
            assert getattr(priced, metric)[index] == float(getattr(real, metric)), metric
        assert peaks[index] == small.liveness.peak().bytes


def test_a_removed_block_is_priced_as_a_network_without_it():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    removed = {"block0": np.array([False, True, False, True]), "block2": np.array([False, False, True, True])}
    fractions = {"a": np.array([1, 0.5, 0.25, 0.75])}
    priced, peaks = workload.evaluate(fractions, removed), workload.peak_activation_bytes(fractions, removed)
    for index, skip in enumerate([(), (0,), (2,), (0, 2)]):
        small = residual({"a": round(16 * fractions["a"][index])}, skip)
        real = build_workload(small.program(("logits",)))
        for metric in ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written"):
            assert getattr(priced, metric)[index] == float(getattr(real.evaluate(), metric)), (metric, skip)
        assert peaks[index] == real.liveness.peak().bytes


def test_removing_a_block_never_costs_and_more_channels_are_never_cheaper():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    base = workload.evaluate()
    steps = np.arange(1, 17) / 16
    for group in GROUPS:
        wide = workload.evaluate({group: steps})
        for metric in ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written"):
            assert (np.diff(getattr(wide, metric)) >= 0).all()
        assert wide.macs[-1] > wide.macs[0]
    for block in workload.blocks:
        gone = workload.evaluate({}, {block: True})
        for metric in ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written"):
            assert getattr(gone, metric) < getattr(base, metric)


def test_parts_sum_to_the_whole():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    always = [k for k in workload.kernels if not k.instead_of]
    assert sum(k.macs.full for k in always) == float(workload.evaluate().macs)
    assert sum(k.bytes_written.full for k in always) == float(workload.evaluate().bytes_written)
    names = [n for k in workload.kernels for n in k.nodes]
    assert workload.macs_of_nodes(names) == float(workload.evaluate().macs)


def test_a_scalar_plan_gives_scalars_and_an_absent_group_stays_whole():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents)
    assert workload.evaluate().macs.shape == ()
    assert workload.evaluate({"m0": 1.0}).macs == workload.evaluate().macs
    assert workload.groups == set(GROUPS)


def test_shared_weight_stays_while_anything_reads_it():
    net = Net((1, 8, 4, 4))
    net.conv("x", 8, 3, "c1")
    net.nodes.append(helper.make_node("Conv", ["c1", "c1.weight"], ["c2"], name="n_c2", pads=[1] * 4))
    program = net.program(("c2",))
    first, second = FakeBlock("p", ("n_c1",), ("x",), ("c1",)), FakeBlock("q", ("n_c2",), ("c1",), ("c2",))
    workload = build_workload(program, None, (first, second))
    weight = 8 * 8 * 9 * 4
    priced = workload.evaluate({}, {"p": np.array([0, 1, 0, 1], bool), "q": np.array([0, 0, 1, 1], bool)})
    assert list(priced.weight_bytes) == [weight, weight, weight, 0]


def test_an_if_counts_its_dearest_branch():
    value = helper.make_tensor_value_info
    branches = []
    for name, w in (("small", "w1"), ("large", "w2")):
        nodes = [helper.make_node("Gemm", ["x", w], [f"{name}_h"], name=name)]
        nodes.append(helper.make_node("ReduceSum", [f"{name}_h"], [f"{name}_y"], name=f"{name}_r"))
        out = value(f"{name}_y", TensorProto.FLOAT, None)
        branches.append(helper.make_graph(nodes, name, [], [out]))
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], name="total", keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["c"], name="c"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branches[0], else_branch=branches[1]),
    ]
    weights = {"w1": np.zeros((4, 5), np.float32), "w2": np.zeros((4, 9), np.float32)}
    weights["zero"] = np.zeros((), np.float32)
    workload = build_workload(make_program(nodes, {"x": (3, 4)}, ["y"], weights))
    assert float(workload.evaluate().macs) == 3 * 4 * 9
    assert float(workload.evaluate().parameters) == 20 + 36


def test_extents_of_another_program_are_refused():
    net = residual()
    wrong = {**net.extents, "stem": (Extent.constant(2), Extent.constant(99), *net.extents["stem"][2:])}
    with pytest.raises(InternalError, match=r"'stem'.*99.*\[2, 16, 16, 16\]"):
        build_workload(net.program(("logits",)), wrong)


def test_an_unknown_block_is_refused():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    with pytest.raises(PlanError, match="'blok'"):
        workload.evaluate({}, {"blok": True})


def test_values_inside_a_fused_kernel_are_not_moved():
    net = Net((1, 8, 10, 10))
    net.unary("Relu", net.add(net.conv("x", 8, 3, "c"), "x", "s"), "y")
    (kernel,) = build_workload(net.program(("y",))).kernels
    assert kernel.bytes_read.full == 4 * (8 * 100 + 8 * 8 * 9)
    assert kernel.bytes_written.full == 4 * 8 * 100


def test_an_add_whose_other_operand_comes_later_is_not_fused():
    net = Net((1, 8, 10, 10))
    c = net.conv("x", 8, 3, "c")
    late = net.unary("Neg", "x", "late")
    net.add(c, late, "y")
    workload = build_workload(net.program(("y",)))
    assert [k.nodes for k in workload.kernels] == [("n_c",), ("n_late",), ("n_y",)]


# ---- parts of a group ----------------------------------------------------------------------------
def shuffled_program():
    """Halves of the channels, of which one passes a convolution; then both are interleaved, and parted again."""
    rng = np.random.default_rng(0)

    def weight(*dims):
        return rng.standard_normal(dims).astype(np.float32)

    arrays = {
        **{
            "w0": weight(16, 3, 3, 3),
            "w1": weight(8, 8, 1, 1),
            "w2": weight(8, 8, 1, 1),
            "w3": weight(4, 16, 1, 1),
        },
        **{"half": np.array([8, 8]), "five": np.array([1, 2, 8, 6, 6]), "four": np.array([1, 16, 6, 6])},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="c0"),
        helper.make_node("Split", ["a", "half"], ["l", "r"], name="s0", axis=1),
        helper.make_node("Conv", ["r", "w1"], ["r1"], name="c1"),
        helper.make_node("Concat", ["l", "r1"], ["b"], name="j0", axis=1),
        helper.make_node("Reshape", ["b", "five"], ["b5"], name="v0"),
        helper.make_node("Transpose", ["b5"], ["t5"], name="t0", perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["t5", "four"], ["m"], name="v1"),
        helper.make_node("Split", ["m", "half"], ["l2", "r2"], name="s1", axis=1),
        helper.make_node("Conv", ["r2", "w2"], ["r3"], name="c2"),
        helper.make_node("Concat", ["l2", "r3"], ["d"], name="j1", axis=1),
        helper.make_node("Conv", ["d", "w3"], ["y"], name="c3"),
    ]
    return make_program(nodes, {"x": (1, 3, 8, 8)}, ["y"], arrays)


def test_a_plan_is_priced_by_the_units_that_it_keeps_of_what_a_split_has_parted():
    """By fractions of groups, both halves were equally wide; kernels and copies of the pruned network differ."""
    from sartor.ir.channels import channel_groups
    from sartor.ir.plan import GroupPlan, Plan
    from sartor.passes.prune import apply_plan

    program = shuffled_program()
    analysis = channel_groups(program)
    workload, rng, unlike = build_workload(program, analysis.extents), np.random.default_rng(1), 0
    for _ in range(12):
        groups = {}
        for group in analysis.groups:
            keep = set(rng.permutation(group.size)[: rng.integers(1, group.size + 1)].tolist())
            keep |= {int(floor[0]) for floor in group.floors if not keep & set(map(int, floor))}
            if len(keep) < group.size:
                groups[group.name] = GroupPlan(group.size, tuple(sorted(keep)))
        plan = Plan(program.source.sha256, groups)
        pruned = apply_plan(program, plan, analysis)
        truth = build_workload(pruned, channel_groups(pruned).extents)
        exact = workload.evaluate(analysis.fractions(plan))
        assert float(exact.macs) == float(truth.evaluate().macs)
        unlike += float(workload.evaluate(plan.fractions()).macs) != float(exact.macs)
    assert unlike >= 6
    assert (
        workload.groups == {g.name for g in analysis.groups} & workload.groups
    )  # parts have the names of groups


def test_a_part_that_no_plan_names_keeps_what_its_group_does():
    from sartor.ir.extents import group_of, part

    half = Extent(((8.0, (part("g", 0),)), (4.0, ("h",))))
    assert half.groups == {"g", "h"} and group_of(part("g", 0)) == group_of("g") == "g"
    assert half.evaluate({"g": 0.5}) == 8.0 and half.evaluate({"g": 0.5, part("g", 0): 0.25}) == 6.0
    np.testing.assert_array_equal(half.evaluate({"g": np.array([0.5, 1.0]), "h": 0.5}), [6.0, 10.0])
