"""remove-dead: before and expected, bodies, functions, and exactness on random graphs."""

from __future__ import annotations

import numpy as np
import pytest
from builders import assert_equivalent, node, program_from_nodes, run_reference, structure_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.errors import InternalError
from sartor.passes import remove_dead
from sartor.passes.remove_dead import RemoveDead
from sartor.passes.rewriter import Rewriter


def vector(seed=0, size=3):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def body(name, nodes, output, initializers=()):
    return helper.make_graph(
        nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)], list(initializers)
    )


def branchy(*, live=True):
    """An If whose branches read `captured` and `s` of the main graph, with dead nodes here and there."""
    then = body(
        "then",
        [
            helper.make_node("Mul", ["s", "captured"], ["inner"], name="inner"),
            helper.make_node("Add", ["dead_outer", "only_dead"], ["dead_inner"], name="dead_inner"),
        ],
        "inner",
    )
    otherwise = body("else", [helper.make_node("Neg", ["s"], ["other"], name="other")], "other")
    return program_from_nodes(
        [
            node("Relu", ["x"], ["s"], name="shared"),
            node("Exp", ["x"], ["dead_outer"], name="dead_outer"),
            node("If", ["flag"], ["y"], name="branch", then_branch=then, else_branch=otherwise),
            node("Abs", ["x"], ["z"], name="abs"),
        ],
        {"x": (2, 3)},
        ["y", "z"] if live else ["z"],
        {"captured": vector(1), "only_dead": vector(2), "flag": np.array(True)},
    )


def test_before_expected():
    program = program_from_nodes(
        [
            node("Relu", ["x"], ["a"]),
            node("Mul", ["x", "w"], ["dead1"]),
            node("Add", ["dead1", "a"], ["dead2"]),
            node("Add", ["a", "v"], ["y"]),
        ],
        {"x": ("N", 3), "unused": ("N", 2)},
        ["y"],
        {"w": vector(1), "v": vector(2), "orphan": vector(3)},
    )
    result = RemoveDead().run(program)
    assert structure_of(result.program) == ["v: FLOAT [3]", "a = Relu(x)", "y = Add(a, v)"]
    assert result.plan == {
        "nodes": ["node_dead1", "node_dead2"],
        "initializers": ["orphan", "w"],
        "functions": [],
    }
    assert result.counts == {"nodes_removed": 2, "initializers_removed": 2}
    assert [v.name for v in result.program.graph.inputs] == ["x", "unused"]
    assert_equivalent(program, result.program)


def test_nothing_to_do():
    program = program_from_nodes([node("Relu", ["x"], ["y"])], {"x": (2, 3)}, ["y"])
    result = RemoveDead().run(program)
    assert not result.modified and result.program is program and result.plan is None


def test_an_unused_graph_input_with_a_default_stays():
    program = program_from_nodes(
        [node("Relu", ["x"], ["y"])], {"x": (2, 3), "w": (3,)}, ["y"], {"w": vector(1), "orphan": vector(2)}
    )
    result = RemoveDead().run(program)
    assert result.plan["initializers"] == ["orphan"]
    assert sorted(result.program.initializers) == ["w"]


def test_initializer_that_only_a_branch_reads_is_alive():
    program = branchy()
    result = RemoveDead().run(program)
    assert sorted(result.program.initializers) == ["captured", "flag"]
    names = {n.name for n in result.program.graph.all_nodes()}
    assert names == {"shared", "branch", "inner", "other", "abs"}
    for flag in (True, False):
        before, after = program.clone(), result.program.clone()
        for item in (before, after):
            Rewriter(item, "test").set_initializer("flag", np.array(flag))
        assert_equivalent(before, after)


def test_removing_a_dead_if_frees_what_its_branches_read():
    program = branchy(live=False)
    result = RemoveDead().run(program)
    assert structure_of(result.program) == ["z = Abs(x)"]
    assert_equivalent(program, result.program)
    assert not RemoveDead().run(result.program).modified


def test_initializers_inside_bodies():
    constant = helper.make_tensor("k", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    unused = helper.make_tensor("unused", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    then = body("then", [helper.make_node("Mul", ["x", "k"], ["t"], name="t")], "t", [constant, unused])
    otherwise = body("else", [helper.make_node("Neg", ["x"], ["e"], name="e")], "e")
    program = program_from_nodes(
        [node("If", ["flag"], ["y"], name="if", then_branch=then, else_branch=otherwise)],
        {"x": (2, 3)},
        ["y"],
        {"flag": np.array(True)},
    )
    result = RemoveDead().run(program)
    assert result.plan["initializers"] == ["unused"]
    assert_equivalent(program, result.program)


def test_functions():
    def function(name, nodes):
        return helper.make_function(
            "sartor",
            name,
            ["a"],
            ["b"],
            nodes,
            [helper.make_opsetid("", 21), helper.make_opsetid("sartor", 1)],
        )

    functions = [
        function("Inner", [helper.make_node("Relu", ["a"], ["b"], name="r")]),
        function("Outer", [helper.make_node("Inner", ["a"], ["b"], name="i", domain="sartor")]),
        function("Unused", [helper.make_node("Neg", ["a"], ["b"], name="n")]),
    ]
    program = program_from_nodes(
        [
            node("Outer", ["x"], ["g"], domain="sartor"),
            node("Abs", ["g"], ["y"]),
            node("Unused", ["x"], ["dead"], domain="sartor"),
        ],
        {"x": (2, 3)},
        ["y"],
        functions=functions,
    )
    result = RemoveDead().run(program)
    assert [key[1] for key in result.program.model.functions] == ["Inner", "Outer"]
    assert len(program.model.functions) == 3
    assert np.array_equal(
        run_reference(program, {"x": vector(size=(2, 3))})["y"],
        run_reference(result.program, {"x": vector(size=(2, 3))})["y"],
    )


def test_planted_blindness_to_bodies_is_caught(monkeypatch):
    monkeypatch.setattr(remove_dead, "body_graphs", lambda node: [])
    with pytest.raises(InternalError, match="is still used by node 'dead_inner'"):
        RemoveDead().run(branchy())


@st.composite
def graphs(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    constants = {f"w{i}": generator.standard_normal(3) for i in range(draw(st.integers(1, 4)))}
    values, nodes = ["x", *constants], []
    for index in range(draw(st.integers(1, 12))):
        inputs = [draw(st.sampled_from(values)), draw(st.sampled_from(values))]
        nodes.append(node("Add", inputs, [f"v{index}"]))
        values.append(f"v{index}")
    made = [f"v{i}" for i in range(len(nodes))]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=2, unique=True))
    return program_from_nodes(nodes, {"x": (3,)}, outputs, constants, dtype=TensorProto.DOUBLE)


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_exact_and_complete_on_random_graphs(program):
    result = RemoveDead().run(program)
    assert_equivalent(program, result.program, tolerance=0, inputs={"x": np.array([1.0, -2.0, 3.0])})
    for item in result.program.nodes():  # complete: everything left has a use
        assert any(o.uses() or o.is_graph_output() for o in item.outputs)
    assert all(v.uses() for v in result.program.initializers.values())
    assert not RemoveDead().run(result.program).modified
