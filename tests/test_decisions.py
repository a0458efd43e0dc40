"""Outputs that are decided are held to how close the decision was, and to the numbers behind it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import node, program_from_nodes
from onnx import TensorProto

from sartor.comparison import relative_error
from sartor.ir.fx import run_twin
from sartor.ir.verify import verify_program
from sartor.lowered.decisions import before_decisions, decisions, error_of

ROW = np.array([[1.0, 4.0, 3.9, -2.0]])


def decided(nodes, constants=None, x=ROW):
    """The decision of output `y` of a program of one input, and the reference's values."""
    program = program_from_nodes(
        [node("Neg", ["x"], ["n"]), node("Neg", ["n"], ["v"]), *nodes],
        {"x": list(x.shape)},
        ["y"],
        constants,
    )
    (decision,) = decisions(program).values()
    names = [name for name in decision.reads() if name not in (constants or {})]
    values = run_twin(program, {"x": x.astype(np.float32)}, taps=[n for n in names if n != "y"])
    return decision, {**(constants or {}), **values}


def error(nodes, found, constants=None, x=ROW):
    decision, values = decided(nodes, constants, x)
    return error_of(decision, "y", values, {"y": np.asarray(found)})


THREE = {"k": np.array([3])}
HALF = {"t": np.array(3.95, np.float32)}


@pytest.mark.parametrize(
    ("nodes", "constants", "found", "expected", "share"),
    [
        ([node("ArgMax", ["v"], ["y"], axis=1)], {}, [[1]], 0.0, 0.0),
        ([node("ArgMax", ["v"], ["y"], axis=1)], {}, [[2]], 0.1 / 8, 1.0),
        ([node("ArgMax", ["v"], ["y"], axis=1, keepdims=0)], {}, [3], 6 / 8, 1.0),
        ([node("ArgMax", ["v"], ["y"], axis=1)], {}, [[4]], math.inf, 1.0),
        ([node("ArgMin", ["v"], ["y"], axis=1)], {}, [[0]], 3 / 8, 1.0),
        ([node("TopK", ["v", "k"], ["best", "y"], axis=1)], THREE, [[2, 1, 0]], 0.1 / 8, 2 / 3),
        ([node("TopK", ["v", "k"], ["best", "y"], axis=1)], THREE, [[1, 1, 0]], math.inf, 1 / 3),
        (
            [node("TopK", ["v", "k"], ["best", "y"], axis=1, largest=0)],
            THREE,
            [[3, 0, 1]],
            0.1 / 8,
            1 / 3,
        ),
        ([node("Greater", ["v", "t"], ["y"])], HALF, [[False, True, False, False]], 0.0, 0.0),
        ([node("Greater", ["v", "t"], ["y"])], HALF, [[False, True, True, False]], 0.05 / 4, 0.25),
        ([node("Less", ["v", "n"], ["y"])], {}, [[True, False, False, True]], 2 / 8, 0.25),
        ([node("Sign", ["v"], ["y"])], {}, [[-1.0, 1, 1, -1]], 1 / 4, 0.25),
        ([node("Sign", ["v"], ["y"])], {}, [[0.5, 1, 1, -1]], math.inf, 0.25),
        ([node("Round", ["v"], ["y"])], {}, [[1.0, 4, 3, -2]], 0.4 / 4, 0.25),
        ([node("Floor", ["v"], ["y"])], {}, [[1.0, 4, 4, -2]], 0.1 / 4, 0.25),
        ([node("Floor", ["v"], ["y"])], {}, [[1.0, 4, 2, -2]], 0.9 / 4, 0.25),
        ([node("Ceil", ["v"], ["y"])], {}, [[1.0, 4, 3, -2]], 0.9 / 4, 0.25),
        ([node("Cast", ["v"], ["y"], to=TensorProto.INT32)], {}, [[1, 4, 4, -2]], 0.1 / 4, 0.25),
        ([node("Cast", ["v"], ["y"], to=TensorProto.INT32)], {}, [[1, 4, 3, -1]], 0.0, 0.25),
        ([node("Cast", ["v"], ["y"], to=TensorProto.INT32)], {}, [[1, 4, 3, 0]], 1 / 4, 0.25),
        ([node("Cast", ["v"], ["y"], to=TensorProto.BOOL)], {}, [[True, True, True, False]], 2 / 4, 0.25),
    ],
)
def test_the_error_of_a_decision_is_how_far_numbers_would_have_to_move(
    nodes, constants, found, expected, share
):
    assert error(nodes, found, constants) == (pytest.approx(expected, abs=1e-6), pytest.approx(share))


def test_a_decision_in_another_shape_and_type():
    nodes = [
        node("ArgMax", ["v"], ["i"], axis=1),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Squeeze", ["f", "axes"], ["y"]),
    ]
    axes = {"axes": np.array([1])}
    assert error(nodes, np.array([2.0]), axes)[0] == pytest.approx(0.1 / 8, abs=1e-6)
    assert error(nodes, np.array([np.nan]), axes)[0] == math.inf
    assert error(nodes, np.array([[2.0]]), axes)[0] == math.inf  # not the shape of the output


def test_what_is_rounded_before_a_cast_is_held_to_the_rounding():
    nodes = [node("Round", ["v"], ["r"]), node("Cast", ["r"], ["y"], to=TensorProto.INT64)]
    assert error(nodes, [[1, 4, 3, -2]])[0] == pytest.approx(0.4 / 4, abs=1e-6)


def test_where_takes_the_other_operand_only_near_the_threshold():
    """y = v where v > 3.95, otherwise n: at 3.9, a step of 0.05 away, both are right; at -2 one is."""
    nodes = [node("Greater", ["v", "t"], ["c"]), node("Where", ["c", "v", "n"], ["y"])]
    assert error(nodes, [[-1.0, 4.0, -3.9, 2.0]], HALF) == (pytest.approx(0.0, abs=1e-6), 0.0)
    assert error(nodes, [[-1.0, 4.0, 3.9, 2.0]], HALF)[0] == pytest.approx(0.05 / 4, abs=1e-6)
    assert error(nodes, [[-1.0, 4.0, -3.9, -2.0]], HALF)[0] == pytest.approx(4 / 4, abs=1e-6)
    assert error(nodes, [[-1.2, 4.0, -3.9, 2.0]], HALF)[0] == pytest.approx(0.2 / 4, abs=1e-6)


def test_zeros_have_no_near_ties():
    assert error([node("Sign", ["v"], ["y"])], [[1.0]], x=np.array([[0.0]]))[0] == 0.0  # any number would do
    assert error([node("ArgMax", ["v"], ["y"], axis=1)], [[1]], x=np.zeros((1, 2)))[0] == 0.0


def test_numbers_and_integers_are_no_decisions():
    nodes = [node("Relu", ["x"], ["y"]), node("ArgMax", ["x"], ["i"]), node("Add", ["i", "one"], ["j"])]
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y", "j"], {"one": np.array(1)})
    assert decisions(program) == {} and before_decisions(program) is program


def test_what_is_decided_on_becomes_the_output():
    """In float32, once each; what a constant is compared with is its other operand."""
    nodes = [
        node("Neg", ["x"], ["n"]),
        node("Cast", ["n"], ["half"], to=TensorProto.FLOAT16),
        node("ArgMax", ["half"], ["i"], axis=1),
        node("Greater", ["n", "t"], ["g"]),
        node("TopK", ["half", "k"], ["best", "places"], axis=1),
        node("Cast", ["best"], ["values"], to=TensorProto.FLOAT),
    ]
    program = program_from_nodes(
        nodes,
        {"x": ("N", 4)},
        ["i", "g", "values", "places"],
        {"t": np.array(0.5, np.float32), "k": np.array([2])},
    )
    cut = before_decisions(program)
    verify_program(cut)
    assert [v.name for v in cut.graph.outputs] == ["values", "half/as_float", "n"]
    assert {v.dtype.name for v in cut.graph.outputs} == {"FLOAT"} and not cut.batch.symbolic
    assert [v.name for v in program.graph.outputs] == ["i", "g", "values", "places"]
    x = {"x": ROW.astype(np.float32)}
    assert relative_error({"n": -ROW}, run_twin(cut, x)) < 1e-6
