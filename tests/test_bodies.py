"""What is in the bodies of a node, and what they read from outside."""

import onnx_ir as ir
import pytest

from sartor.ir.bodies import attribute_graphs, body_graphs, captured_values, read_values, with_inner_nodes


def value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))


def node(op_type: str, *inputs: ir.Value | None, name: str, **graphs: ir.Graph) -> ir.Node:
    attributes = [ir.AttrGraph(key, graph) for key, graph in graphs.items()]
    return ir.Node("", op_type, inputs, attributes, outputs=[value(f"{name}_out")], name=name)


def graph(*nodes: ir.Node, outputs: list[ir.Value], inputs: tuple[ir.Value, ...] = ()) -> ir.Graph:
    return ir.Graph(list(inputs), outputs, nodes=nodes)


@pytest.fixture
def outer():
    """An If whose first branch holds a Loop and another If, all of which read values of the main graph."""
    c, x, y, z, step = map(value, ("c", "x", "y", "z", "step"))
    work = node("Add", step, y, name="work")
    loop = node("Loop", None, c, x, name="loop", body=graph(work, outputs=[work.outputs[0]], inputs=(step,)))
    choice = node("If", c, name="choice", then_branch=graph(outputs=[z]))
    neg = node("Neg", loop.outputs[0], name="neg")
    relu = node("Relu", x, name="relu")
    return node(
        "If",
        c,
        name="outer",
        then_branch=graph(loop, choice, neg, outputs=[neg.outputs[0]]),
        else_branch=graph(relu, outputs=[relu.outputs[0]]),
    )


def test_bodies_and_their_nodes(outer):
    assert [[n.name for n in body] for body in body_graphs(outer)] == [["loop", "choice", "neg"], ["relu"]]
    names = [n.name for n in with_inner_nodes(outer)]
    assert names == ["outer", "loop", "work", "choice", "neg", "relu"]
    relu = next(n for n in with_inner_nodes(outer) if n.name == "relu")
    assert body_graphs(relu) == [] and list(with_inner_nodes(relu)) == [relu]


def test_what_bodies_read_from_outside(outer):
    assert [v.name for v in captured_values(outer)] == [
        "c",
        "x",
        "y",
        "z",
    ]  # z is only an inner body's output
    assert [v.name for v in read_values(outer)] == ["c", "c", "x", "y", "z"]
    loop = next(n for n in with_inner_nodes(outer) if n.name == "loop")
    assert [v.name for v in captured_values(loop)] == ["y"]
    assert [v.name for v in read_values(loop)] == ["c", "x", "y"]


def test_a_reference_has_no_graph():
    for kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        assert attribute_graphs(ir.RefAttr("body", "of_function", kind)) == []
