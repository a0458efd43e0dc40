"""Buffers of programs: the plain rules are the definition of `liveness`, the others are counted by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cost_networks import FakeBlock, Net, make_program, mobilenet_v2, residual, residual_blocks, resnet50
from hypothesis import HealthCheck, given, settings
from onnx import helper
from random_graphs import programs
from test_liveness import KB, program, small_then, with_if

from sartor.ir.liveness import peak_activation
from sartor.ir.memory import MICROCONTROLLER, PLAIN, Rules, peak, plan_arena, program_buffers, schedule
from sartor.ir.workload import build_workload


def graph_of(model, **rules):
    return program_buffers(model, Rules(**rules)).graph()


MODELS = {
    "chain": lambda: program([("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "b", "y")]),
    "residual": lambda: residual().program(("logits",)),
    "mobilenet": lambda: mobilenet_v2().program(("logits",)),
    "if": lambda: with_if(
        [("Neg", ["a"], "p"), ("Abs", ["p"], "q"), ("Relu", ["q"], "t_out")], small_then_else()
    ),
}


def small_then_else():
    return [("Relu", ["a"], "e_out")]


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_rules_are_the_definition_of_liveness(name):
    model = MODELS[name]()
    found, known = peak(program_buffers(model, PLAIN).graph()), peak_activation(model)
    assert (found.bytes, found.at_node) == (known.bytes, known.at_node)
    assert tuple(b for b in found.live if not b.startswith("<")) == known.live


@pytest.mark.parametrize("name", MODELS)
def test_each_rule_only_ever_saves(name):
    model = MODELS[name]()
    plain = peak(program_buffers(model, PLAIN).graph()).bytes
    for rules in (
        dataclasses.replace(PLAIN, aliases=True),
        dataclasses.replace(PLAIN, in_place=True),
        dataclasses.replace(PLAIN, depthwise=True),
        dataclasses.replace(PLAIN, inputs_held=False),
        dataclasses.replace(PLAIN, fusion=Rules().fusion),
    ):
        assert peak(program_buffers(model, rules).graph()).bytes <= plain
    best = program_buffers(model, Rules(depthwise=True, inputs_held=False)).graph()
    found = schedule(best)
    assert found.optimal and found.peak_bytes <= peak(best).bytes <= plain
    assert plan_arena(best, 1).bytes >= peak(best).bytes


def test_elementwise_steps_write_over_what_nobody_reads_again():
    edges = [("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "b", "c"), ("Add", "ac", "y")]
    model = program(edges)
    # x is the caller's; a is read by the addition, so b needs a place of its own, and c and y take it over.
    assert peak(graph_of(model)).bytes == 3 * KB
    assert peak(graph_of(model, in_place=False)).bytes == 4 * KB
    assert peak(graph_of(model, inputs_held=False)).bytes == 2 * KB
    steps = {step.name: step for step in graph_of(model).steps}
    assert [p.read for p in steps["n3"].in_place] == ["a", "c"]


def test_a_shorter_operand_is_not_written_over():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("ReduceSum", ["a"], ["s"], name="s"),
        helper.make_node("Neg", ["s"], ["t"], name="t"),
        helper.make_node("Mul", ["t", "a"], ["y"], name="y"),
    ]
    steps = graph_of(make_program(nodes, {"x": (1, 256)}, ["y"], {})).steps
    assert [p.read for p in steps[-1].in_place] == ["a"]


def test_renamed_values_share_a_buffer():
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], name="pool", kernel_shape=[1]),
        helper.make_node("Reshape", ["a", "shape"], ["b"], name="reshape"),
        helper.make_node("Softmax", ["b"], ["y"], name="softmax"),
        helper.make_node("ReduceSum", ["a"], ["s"], name="sum"),
    ]
    model = make_program(nodes, {"x": (1, 1, 256)}, ["y", "s"], {"shape": np.array([1, 256])})
    graph = graph_of(model)
    assert [step.name for step in graph.steps] == ["pool", "softmax", "sum"]
    assert graph.steps[1].reads == ("a",) and set(graph.outputs) == {"y", "s"}
    assert peak(graph).bytes == 3 * KB + 4
    assert peak(graph_of(model, aliases=False)).bytes == 4 * KB


def quantized(depthwise=False):
    """x to int8, a convolution with int8 weights, an addition, and back to float."""
    weight = np.ones((8, 1, 1, 1) if depthwise else (8, 8, 1, 1), np.int8)
    constants = {"s": np.float32(0.1), "z": np.int8(0), "w": weight}

    def q(x, y):
        return helper.make_node("QuantizeLinear", [x, "s", "z"], [y], name=f"q_{y}")

    def dq(x, y):
        return helper.make_node("DequantizeLinear", [x, "s", "z"], [y], name=f"dq_{y}")

    conv = helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv", group=8 if depthwise else 1)
    nodes = [q("x", "xq"), dq("xq", "xd"), dq("w", "wd"), conv, q("c", "cq"), dq("cq", "cd")]
    nodes += [helper.make_node("Add", ["cd", "xd"], ["a"], name="add"), q("a", "aq"), dq("aq", "y")]
    return make_program(nodes, {"x": (1, 8, 4, 4)}, ["y"], constants)


def test_quantized_values_exist_in_integers():
    graph = graph_of(quantized(), in_place=False, inputs_held=False)
    assert [step.name for step in graph.steps] == ["q_xq", "conv", "add", "dq_y"]
    assert [graph.sizes[b] for s in graph.steps for b in s.writes] == [128, 128, 128, 512]
    assert "w" in graph.steps[1].constants and "w" not in graph.sizes
    assert peak(graph).bytes == 512 + 128  # at both ends, in float
    assert graph.steps[2].reads == ("c", "xq")
    plain = graph_of(quantized(), quantized=False)
    assert peak(plain).bytes > 3 * 512


def test_a_float_that_others_read_stays_beside_its_quantized_form():
    constants = {"s": np.float32(0.1), "z": np.int8(0)}
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"], name="a"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], name="q"),
        helper.make_node("ReduceSum", ["a"], ["y"], name="y"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["z_out"], name="z_out"),
    ]
    model = make_program(nodes, {"x": (1, 256)}, ["y", "z_out"], constants)
    graph = graph_of(model)
    assert [step.name for step in graph.steps] == ["a", "q", "y", "z_out"]
    assert (graph.sizes["a"], graph.sizes["q"]) == (KB, 256)


def test_a_channel_of_a_quantized_depthwise_convolution_is_quantized():
    graph = graph_of(quantized(True), depthwise=True)
    (permit,) = next(s for s in graph.steps if s.name == "conv").in_place
    assert (permit.read, permit.write, graph.sizes[permit.extra]) == ("xq", "c", 16)


@pytest.mark.parametrize(("depthwise", "expected"), [(True, 1_404_928), (False, 1_505_280)])
def test_mobilenet_v2_in_int8_needs_what_was_computed_by_hand(depthwise, expected):
    """One byte per number: a quarter of the float network. The first layers decide, the classifier does not."""
    model = mobilenet_v2().program(("logits",))
    found = peak(graph_of(model, depthwise=depthwise, inputs_held=False))
    assert found.bytes == 4 * expected
    # 16 channels of 112 x 112 to 96 of them; or those 96 and their half.
    area = 112 * 112
    assert expected == (16 * area + 96 * area if depthwise else 96 * area + 96 * area // 4)


def test_a_population_is_its_plans_one_by_one():
    net = residual()
    model = net.program(("logits",))
    widths = {"a": np.array([1.0, 0.5, 0.25]), "m0": np.array([1.0, 0.5, 1.0])}
    gone = {"block0": np.array([False, True, True]), "block2": np.array([False, False, True])}
    for rules in (PLAIN, Rules(), Rules(depthwise=True, inputs_held=False)):
        buffers = program_buffers(model, rules, net.extents, residual_blocks())
        together = buffers.peaks(widths, gone)
        for i in range(3):
            one = buffers.peaks({k: v[i] for k, v in widths.items()}, {k: v[i] for k, v in gone.items()})
            assert one == together[i] and one.shape == ()
        assert together[0] == peak(buffers.graph()).bytes
    plain = program_buffers(model, PLAIN, net.extents, residual_blocks())
    liveness = build_workload(model, net.extents, residual_blocks()).liveness
    np.testing.assert_array_equal(plain.peaks(widths, gone), liveness.evaluate(widths, gone))


def test_a_plan_costs_what_the_smaller_network_costs():
    net, rules = residual(), Rules(depthwise=True)
    buffers = program_buffers(net.program(("logits",)), rules, net.extents, residual_blocks())
    kept = {"a": 8, "b": 6, "m0": 4, "m2": 12, "e": 10}
    sizes = {"a": 16, "b": 24, "m0": 16, "m2": 24, "e": 40}
    small = residual(kept).program(("logits",))
    expected = peak(program_buffers(small, rules).graph()).bytes
    assert buffers.peaks({g: n / sizes[g] for g, n in kept.items()}) == expected
    for index in range(3):
        without = residual(skip_blocks=(index,)).program(("logits",))
        if index != 1:  # that one is strided
            assert (
                buffers.peaks({}, {f"block{index}": True})
                == peak(program_buffers(without, rules).graph()).bytes
            )


def test_another_order_of_the_steps_is_priced():
    edges = [("Softmax", "x", "a"), ("Softmax", "x", "b"), ("ReduceSum", "a", "s"), ("ReduceSum", "b", "t")]
    model = program([*edges, ("Add", "st", "y")])
    buffers = program_buffers(model)
    graph = buffers.graph()
    found = schedule(graph)
    assert found.optimal and found.peak_bytes == 2 * KB + 4 + 4
    assert buffers.peaks(order=found.order) == found.peak_bytes < buffers.peaks()


def test_an_if_holds_its_larger_body():
    small = small_then_else()
    large = [("Neg", ["a"], "p"), ("Abs", ["p"], "q"), ("Relu", ["q"], "t_out")]
    steps = {s.name: s for s in graph_of(with_if(large, small)).steps}
    assert steps["if"].scratch == ("<scratch> if",) and set(steps["if"].reads) >= {"a", "c"}
    assert graph_of(with_if(large, small)).sizes["<scratch> if"] == 2 * KB
    assert not {s.name: s for s in graph_of(with_if(small_then(), small)).steps}["if"].scratch


def test_what_reads_a_removed_block_keeps_its_input():
    edges = [("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "x", "c"), ("Exp", "c", "d"), ("Sin", "d", "e")]
    model = program([*edges, ("Sum", "bce", "y")])
    block = FakeBlock("block", ("n1",), ("a",), ("b",))
    buffers = program_buffers(model, PLAIN, None, (block,))
    assert buffers.peaks({}, {"block": True}) == 5 * KB


def test_flash_and_traffic_of_a_convolution():
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    model = make_program(nodes, {"x": (1, 3, 4, 4)}, ["y"], {"w": np.zeros((5, 3, 1, 1), np.float32)})
    graph = graph_of(model)
    assert graph.constant_bytes() == 60
    assert graph.traffic_bytes() == 4 * (3 * 16 + 5 * 16) + 60


def test_a_large_network_is_solved_and_laid_out():
    graph = graph_of(resnet50().program(("logits",)), inputs_held=False)
    found = schedule(graph)
    assert found.optimal and found.peak_bytes <= peak(graph).bytes
    assert plan_arena(graph, 1).bytes <= 1.05 * peak(graph).bytes


def test_pads_that_tensorflow_has_no_name_for_are_a_copy():
    """At stride 2 it pads only behind; the copy of the first such depthwise convolution is MobileNetV2's peak."""
    model = mobilenet_v2().program(("logits",))
    found = peak(program_buffers(model, MICROCONTROLLER).graph())
    assert (
        found.bytes == 4 * 96 * (112**2 + 114**2) == 9_807_360
    )  # as TensorFlow Lite Micro's allocator plans
    assert found.at_node.endswith("(pad)")
    steps = {s.name for s in program_buffers(model, MICROCONTROLLER).graph().steps}
    assert len([name for name in steps if name.endswith("(pad)")]) == 5  # one for each stride of 2


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "pads", "copied"),
    [
        *(
            (8, 3, 1, (1, 1), False),
            (8, 3, 2, (1, 1), True),
            (7, 3, 2, (1, 1), False),
            (8, 3, 2, (0, 1), False),
        ),
        *(
            (8, 3, 1, (0, 0), False),
            (8, 3, 1, (2, 2), True),
            (8, 2, 2, (0, 0), False),
            (9, 1, 2, (0, 0), False),
        ),
    ],
)
def test_which_pads_are_a_copy(length, kernel, stride, pads, copied):
    node = helper.make_node(
        "MaxPool", ["x"], ["y"], name="pool", kernel_shape=[kernel], strides=[stride], pads=list(pads)
    )
    model = make_program([node], {"x": (1, 3, length)}, ["y"], {})
    graph = program_buffers(model, MICROCONTROLLER).graph()
    assert [s.name for s in graph.steps] == (["pool (pad)", "pool"] if copied else ["pool"])
    if copied:
        assert graph.sizes["<padded> pool"] == 4 * 3 * (length + sum(pads))


def test_transposed_convolutions_in_int8_have_accumulators():
    constants = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((8, 4, 2, 2), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], name="dw"),
        helper.make_node("ConvTranspose", ["xd", "wd"], ["c"], name="up", strides=[2, 2]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"], name="cq"),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"], name="y"),
    ]
    model = make_program(nodes, {"x": (1, 8, 4, 4)}, ["y"], constants)
    graph = program_buffers(model, MICROCONTROLLER).graph()
    (step,) = [s for s in graph.steps if s.scratch]
    assert step.name == "up" and graph.sizes[step.scratch[0]] == 4 * 4 * 8 * 8
    assert not any(s.scratch for s in graph_of(model).steps)


def up_and_down(channels=("c", 24)):
    """A convolution in the blocked layout, a transposed one outside of it, and their concatenation back in."""
    net = Net((1, 16, 8, 8))
    net.conv("x", channels, 3, "conv")
    net.weight("up.weight", (channels, 8, 1, 1))
    net.node("ConvTranspose", ["conv", "up.weight"], "up", 8, (8, 8))
    net.node("Concat", ["conv", "up"], "cat", 32, (8, 8), axis=1)
    net.conv("cat", 16, 3, "last")
    return net


def test_changes_of_layout_are_copies():
    net = up_and_down()
    model = net.program(("last",))
    buffers = program_buffers(model, Rules(layout=True), net.extents)
    graph = buffers.graph()
    names = [step.name for step in graph.steps]
    assert names == [
        *("x (layout)", "n_conv", "conv (layout)", "n_up", "n_cat"),
        *("cat (layout)", "n_last", "last (layout)"),
    ]
    reads = {step.name: step.reads for step in graph.steps}
    assert reads["n_conv"] == ("<layout> x",) and reads["n_up"] == ("<layout> conv",)
    assert set(reads["n_cat"]) == {"<layout> conv", "up"} and graph.outputs == ("<layout> last",)
    assert graph.sizes["conv"] == 4 * 32 * 64  # 24 channels fill two blocks
    assert graph.sizes["<layout> conv"] == 4 * 24 * 64
    half = buffers.at({"c": 0.5})
    assert (half.sizes["conv"], half.sizes["<layout> conv"]) == (4 * 16 * 64, 4 * 12 * 64)
    assert graph_of(model).sizes["conv"] == 4 * 24 * 64
    widths = np.arange(1, 25) / 24
    one_by_one = [peak(buffers.at({"c": width})).bytes for width in widths]
    np.testing.assert_array_equal(buffers.peaks({"c": widths}), one_by_one)


def test_layouts_only_add():
    for net in (residual(), mobilenet_v2(), up_and_down()):
        model = net.program((next(reversed(net.channels)),))
        assert peak(graph_of(model, layout=True)).bytes >= peak(graph_of(model)).bytes


def test_what_a_convolution_reads_is_not_written_over_by_its_own_sum():
    """y = Conv(a) + a in one kernel: a place of `a` that is written is read again for its neighbours."""
    weight = np.zeros((4, 4, 3, 3), np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Conv", ["a", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "a"], ["s"], name="add"),
        helper.make_node("Neg", ["s"], ["y"], name="neg"),
    ]
    model = make_program(nodes, {"x": (1, 4, 8, 8)}, ["y"], {"w": weight})
    steps = {step.name: step for step in graph_of(model).steps}
    assert set(steps["conv"].reads) == {"a"} and not steps["conv"].in_place
    depthwise = make_program(
        [
            nodes[0],
            helper.make_node("Conv", ["a", "w"], ["c"], name="conv", pads=[1] * 4, group=4),
            *nodes[2:],
        ],
        {"x": (1, 4, 8, 8)},
        ["y"],
        {"w": weight[:, :1]},
    )
    steps = {step.name: step for step in graph_of(depthwise, depthwise=True).steps}
    assert not steps["conv"].in_place
    other = [nodes[0], helper.make_node("Sin", ["x"], ["b"], name="sin"), nodes[1]]
    other += [helper.make_node("Add", ["c", "b"], ["s"], name="add"), nodes[3]]
    apart = make_program(other, {"x": (1, 4, 8, 8)}, ["y"], {"w": weight})
    steps = {step.name: step for step in graph_of(apart).steps}
    assert [p.read for p in steps["conv"].in_place] == ["b"]


RULES = (
    *(PLAIN, Rules(), Rules(depthwise=True, inputs_held=False), Rules(layout=True), MICROCONTROLLER),
    Rules(aliases=False, quantized=False),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_generated_programs_under_any_rules(model):
    """Whatever is fused, renamed or copied: the graph can be run, orders and arenas are sound, plain is `liveness`."""
    assert peak(program_buffers(model, PLAIN).graph()).bytes == peak_activation(model).bytes
    for rules in RULES:
        buffers = program_buffers(model, rules)
        graph = buffers.graph()
        found = schedule(graph, max_states=200)
        assert found.lower_bound_bytes <= found.peak_bytes <= peak(graph).bytes == buffers.peaks()
        assert peak(graph.reordered(found.order)).bytes == found.peak_bytes
        assert plan_arena(graph, 1).bytes >= peak(graph).bytes
        if rules is not PLAIN and not rules.layout and not rules.padded:
            assert peak(graph).bytes <= peak_activation(model).bytes
