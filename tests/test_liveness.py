"""Peak activation bytes by hand, on chains, residuals, bodies and unused outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from cost_networks import FakeBlock, make_program, mobilenet_v2, residual, residual_blocks
from onnx import TensorProto, helper

from sartor.ir.liveness import peak_activation
from sartor.ir.program import Program
from sartor.ir.workload import build_workload

KB = 256 * 4  # one value of 256 floats


def program(edges, outputs=("y",), inputs=("x",), size=256):
    nodes = [helper.make_node(op, list(i), list(o), name=f"n{k}") for k, (op, i, o) in enumerate(edges)]
    return make_program(nodes, {n: (1, size) for n in inputs}, outputs, {})


def test_a_chain_holds_the_input_and_two_values():
    edges = [("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "b", "c"), ("Relu", "c", "y")]
    peak = peak_activation(program(edges))
    assert peak.bytes == 3 * KB  # x belongs to the caller, then the node's own input and output
    assert (peak.at_node, peak.live) == ("n1", ("x", "a", "b"))


def test_a_program_without_nodes_holds_its_inputs():
    peak = peak_activation(make_program([], {"x": (1, 256)}, ["x"], {}))
    assert (peak.bytes, peak.at_node, peak.live) == (KB, "", ("x",))


def test_a_residual_stays_until_its_add():
    edges = [("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "b", "c"), ("Add", "ac", "y")]
    peak = peak_activation(program(edges))
    assert peak.bytes == 4 * KB
    assert (peak.at_node, peak.live) == ("n2", ("x", "a", "b", "c"))


def test_graph_outputs_stay_to_the_end_and_unused_outputs_count_once():
    edges = [("Relu", "x", "y"), ("Neg", "x", "a"), ("Neg", "a", "b"), ("Neg", "b", "z")]
    assert peak_activation(program(edges, ("y", "z"))).bytes == 4 * KB
    assert peak_activation(program(edges, ("z",))).bytes == 3 * KB
    dead = [("Relu", "x", "a"), ("Neg", "x", "u"), ("Neg", "a", "y")]
    assert peak_activation(program(dead)).bytes == 3 * KB


def test_metadata_operators_allocate_and_initializers_do_not():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Reshape", ["a", "shape"], ["b"], name="reshape"),
        helper.make_node("Gemm", ["b", "w"], ["y"], name="gemm"),
    ]
    weights = {"shape": np.array([1, 256]), "w": np.zeros((256, 4096), np.float32)}
    peak = peak_activation(make_program(nodes, {"x": (1, 1, 256)}, ["y"], weights))
    assert peak.bytes == 2 * KB + 4096 * 4
    assert peak.live == ("x", "b", "y")
    without_gemm = make_program(nodes[:2], {"x": (1, 1, 256)}, ["b"], {"shape": weights["shape"]})
    assert peak_activation(without_gemm).bytes == 3 * KB


def test_element_sizes_are_those_of_the_type():
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], name="cast", to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["a"], ["y"], name="back", to=TensorProto.INT8),
    ]
    model = make_program(nodes, {"x": (1, 256)}, ["y"], {}, {"y": TensorProto.INT8})
    assert peak_activation(model).bytes == 256 * (4 + 8 + 1)


def branch(name, edges, output):
    nodes = [helper.make_node(op, list(i), [o], name=f"{name}{k}") for k, (op, i, o) in enumerate(edges)]
    info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [info])


def with_if(then_edges, else_edges, out=("t_out", "e_out")):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("ReduceSum", ["x"], ["s"], name="s", keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"], name="c"),
        helper.make_node("Neg", ["x"], ["b"], name="b"),
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            name="if",
            then_branch=branch("t", then_edges, out[0]),
            else_branch=branch("e", else_edges, out[1]),
        ),
        helper.make_node("Add", ["y", "b"], ["z"], name="z"),
    ]
    return make_program(nodes, {"x": (1, 256)}, ["z"], {"zero": np.zeros((), np.float32)})


def test_captured_values_live_across_the_if_and_the_larger_body_is_added():
    small = [("Relu", ["a"], "e_out")]
    large = [("Neg", ["a"], "p"), ("Abs", ["p"], "q"), ("Relu", ["q"], "t_out")]
    peak = peak_activation(with_if(large, small))
    # x, a (captured), b, y, condition, and in the body p with q; the branch's output is y itself
    assert peak.bytes == 4 * KB + 1 + 2 * KB
    assert peak.at_node == "if"
    assert peak.live == ("x", "a", "c", "b", "y")
    assert peak_activation(with_if(small_then(), small)).bytes == 4 * KB + 1


def small_then():
    return [("Relu", ["a"], "t_out")]


def test_nested_ifs_are_seen():
    inner = helper.make_node(
        "If",
        ["c"],
        ["t_out"],
        name="inner",
        then_branch=branch("it", [("Neg", ["a"], "deep"), ("Abs", ["deep"], "it_out")], "it_out"),
        else_branch=branch("ie", [("Neg", ["b"], "ie_out")], "ie_out"),
    )
    outer = with_if([("Neg", ["x"], "t_out")], [("Neg", ["x"], "e_out")])
    proto = outer.to_proto()
    then = next(a for n in proto.graph.node for a in n.attribute if a.name == "then_branch").g
    del then.node[:]
    then.node.append(inner)
    nested = Program(ir.from_proto(proto), source=outer.source, input_shapes=outer.input_shapes)
    # a is read only two levels down, and still lives: x, a, b, y, condition, and `deep`
    assert peak_activation(nested).bytes == 4 * KB + 1 + KB


def test_mobilenet_v2_peaks_at_its_first_wide_layer():
    peak = peak_activation(mobilenet_v2().program(("logits",)))
    # BatchNormalization is a node of its own, nothing is in place: two 96-channel maps, and the input
    assert peak.bytes == 4 * (3 * 224 * 224 + 2 * 96 * 112 * 112)


def test_removed_blocks_shorten_lifetimes_in_a_population():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks())
    assert workload.peak_activation_bytes() == workload.liveness.peak().bytes
    first = workload.peak_activation_bytes({}, {"block0": np.array([False, True])})
    assert first[1] < first[0]
    widths = workload.peak_activation_bytes({"a": np.arange(1, 17) / 16})
    assert (np.diff(widths) >= 0).all() and widths[-1] > widths[0]


def test_what_reads_a_removed_block_keeps_the_blocks_input_alive():
    edges = [("Relu", "x", "a"), ("Neg", "a", "b"), ("Abs", "x", "c"), ("Exp", "c", "d"), ("Sin", "d", "e")]
    edges += [("Sum", "bce", "y")]
    block = FakeBlock("block", ("n1",), ("a",), ("b",))
    workload = build_workload(program(edges), None, (block,))
    # x, then a in the place of b, c, e and y at the sum
    assert workload.peak_activation_bytes({}, {"block": True}) == 5 * KB
    assert workload.peak_activation_bytes() == 5 * KB
    without = [("Relu", "x", "a"), *edges[2:-1], ("Sum", "ace", "y")]
    assert peak_activation(program(without)).bytes == 5 * KB
