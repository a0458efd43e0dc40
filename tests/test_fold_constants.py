"""fold-constants: before and expected, refusals, and exactness on random constant subgraphs."""

from __future__ import annotations

import numpy as np
import pytest
from builders import assert_equivalent, node, program_from_nodes, structure_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.passes import fold_constants
from sartor.passes.fold_constants import FoldConstants


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def transposed_linear():
    return program_from_nodes(
        [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])],
        {"x": ("N", 3)},
        ["y"],
        {"w": weights(5, 3)},
    )


class TestBeforeExpected:
    def test_transposed_weight(self):
        program = transposed_linear()
        result = FoldConstants().run(program)
        assert structure_of(result.program) == ["t: FLOAT [3, 5]", "y = MatMul(x, t)"]
        assert result.counts["nodes_folded"] == 1 and result.counts["initializers_removed"] == 1
        assert_equivalent(program, result.program)
        assert structure_of(program)[0] == "w: FLOAT [5, 3]"

    def test_chain_with_a_second_reader_of_the_weight(self):
        program = program_from_nodes(
            [
                node("MatMul", ["x", "w"], ["a"]),
                node("Mul", ["w", "w"], ["square"]),
                node("ReduceSum", ["square"], ["total"], keepdims=0),
                node("Add", ["a", "total"], ["y"]),
            ],
            {"x": ("N", 3)},
            ["y"],
            {"w": weights(3, 3)},
        )
        result = FoldConstants().run(program)
        assert structure_of(result.program) == [
            "total: FLOAT []",
            "w: FLOAT [3, 3]",
            "a = MatMul(x, w)",
            "y = Add(a, total)",
        ]
        assert_equivalent(program, result.program, tolerance=1e-6)

    def test_several_outputs(self):
        program = program_from_nodes(
            [
                node("Split", ["w"], ["w1", "w2"], axis=0, num_outputs=2),
                node("MatMul", ["x", "w2"], ["y"]),
            ],
            {"x": ("N", 2)},
            ["y"],
            {"w": weights(4, 3)},
        )
        result = FoldConstants().run(program)
        assert structure_of(result.program) == ["w2: FLOAT [2, 3]", "y = MatMul(x, w2)"]
        assert_equivalent(program, result.program)

    def test_read_inside_a_body(self):
        then = helper.make_graph(
            [helper.make_node("Mul", ["x", "t"], ["inner"], name="inner")],
            "then",
            [],
            [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
        )
        otherwise = helper.make_graph(
            [helper.make_node("Neg", ["x"], ["other"], name="other")],
            "else",
            [],
            [helper.make_tensor_value_info("other", TensorProto.FLOAT, None)],
        )
        program = program_from_nodes(
            [
                node("Exp", ["w"], ["t"]),
                node("If", ["flag"], ["y"], name="if", then_branch=then, else_branch=otherwise),
            ],
            {"x": (2, 3)},
            ["y"],
            {"w": weights(3), "flag": np.array(True)},
        )
        result = FoldConstants().run(program)
        assert [n.op_type for n in result.program.nodes()] == ["If"]
        assert sorted(result.program.initializers) == ["flag", "t"]
        assert_equivalent(program, result.program, tolerance=1e-6)

    def test_what_reads_an_input_stays(self):
        program = program_from_nodes(
            [
                node("Shape", ["x"], ["s"], start=0, end=1),
                node("Concat", ["s", "rest"], ["shape"], axis=0),
                node("Expand", ["token", "shape"], ["e"]),
                node("Concat", ["x", "e"], ["y"], axis=1),
            ],
            {"x": ("N", 4, 3)},
            ["y"],
            {"token": weights(1, 1, 3), "rest": np.array([1, 3])},
        )
        result = FoldConstants().run(program)
        assert not result.modified and not result.refusals

    def test_an_initializer_that_callers_may_override_is_no_constant(self):
        program = program_from_nodes(
            [node("Exp", ["w"], ["e"]), node("Add", ["x", "e"], ["y"])],
            {"x": (2, 3), "w": (3,)},
            ["y"],
            {"w": weights(3)},
        )
        assert not FoldConstants().run(program).modified


class TestOption:
    def test_max_bytes(self):
        program = transposed_linear()
        assert FoldConstants(max_bytes=60).run(program).modified
        result = FoldConstants(max_bytes=59).run(program)
        assert not result.modified
        assert result.refusals[0].reason == "its result 't' has 60 bytes, more than max-bytes=59"

    def test_a_huge_intermediate_is_never_computed(self, monkeypatch):
        program = program_from_nodes(
            [
                node("Expand", ["c", "shape"], ["big"]),
                node("ReduceSum", ["big"], ["total"], keepdims=0),
                node("Add", ["x", "total"], ["y"]),
            ],
            {"x": ("N", 3)},
            ["y"],
            {"c": weights(1), "shape": np.array([2**40])},
        )

        def fail(*_):
            raise AssertionError("evaluated")

        monkeypatch.setattr(fold_constants, "_evaluate", fail)
        result = FoldConstants().run(program)
        assert [r.node for r in result.refusals] == ["node_big"] and not result.modified


class TestRefusals:
    def reasons(self, program):
        result = FoldConstants().run(program)
        assert not result.modified and result.program is program
        return [r.reason for r in result.refusals]

    def test_graph_output(self):
        program = program_from_nodes(
            [node("Exp", ["w"], ["t"]), node("Relu", ["x"], ["y"])],
            {"x": ("N", 3)},
            ["y", "t"],
            {"w": weights(3)},
        )
        assert self.reasons(program) == ["its output 't' is a graph output"]

    def test_random(self):
        program = program_from_nodes(
            [node("RandomNormalLike", ["w"], ["r"]), node("Add", ["x", "r"], ["y"])],
            {"x": ("N", 3)},
            ["y"],
            {"w": weights(3)},
        )
        assert self.reasons(program) == ["RandomNormalLike is random"]

    @pytest.mark.parametrize("op_type", ["RandomNormal", "RandomUniform"])
    def test_random_without_inputs(self, op_type):
        program = program_from_nodes(
            [node(op_type, [], ["r"], shape=[3]), node("Add", ["x", "r"], ["y"])], {"x": ("N", 3)}, ["y"]
        )
        assert self.reasons(program) == [f"{op_type} is random"]

    def test_quantized_weights_stay_quantized(self):
        program = program_from_nodes(
            [node("DequantizeLinear", ["q", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
            {"x": ("N", 3)},
            ["y"],
            {"q": np.ones((3, 3), np.int8), "s": np.array(0.5, np.float32)},
        )
        assert self.reasons(program) == ["DequantizeLinear carries the quantization of its input"]

    def test_data_dependent_shape(self):
        program = program_from_nodes(
            [
                node("NonZero", ["w"], ["i"]),
                node("ReduceSum", ["i"], ["n"], keepdims=0),
                node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
                node("Add", ["x", "f"], ["y"]),
            ],
            {"x": ("N", 3)},
            ["y"],
            {"w": weights(3)},
        )
        assert self.reasons(program) == ["the shape of 'i' is not known before it runs"]

    def test_failing_evaluator_refuses_it_and_what_follows(self, monkeypatch):
        right = fold_constants._evaluate

        def planted(item, program):
            if item.op_type == "Exp":
                raise NotImplementedError("no Exp here")
            return right(item, program)

        monkeypatch.setattr(fold_constants, "_evaluate", planted)
        program = program_from_nodes(
            [
                node("Exp", ["w"], ["e"]),
                node("Neg", ["e"], ["n"]),
                node("Abs", ["w"], ["a"]),
                node("Add", ["x", "n"], ["s"]),
                node("Add", ["s", "a"], ["y"]),
            ],
            {"x": ("N", 3)},
            ["y"],
            {"w": weights(3)},
        )
        result = FoldConstants().run(program)
        assert [(r.node, r.reason) for r in result.refusals] == [
            ("node_e", "not evaluated: NotImplementedError: no Exp here"),
            ("node_n", "an input could not be folded"),
        ]
        assert result.counts["nodes_folded"] == 1
        assert_equivalent(program, result.program, tolerance=1e-6)

    @pytest.mark.parametrize(
        "wrong", [lambda a: a.astype(np.float64), lambda a: a[None], lambda a: a.tolist()]
    )
    def test_result_of_another_type_or_shape_is_refused(self, monkeypatch, wrong):
        right = fold_constants._evaluate
        monkeypatch.setattr(fold_constants, "_evaluate", lambda *args: [wrong(a) for a in right(*args)])
        reasons = self.reasons(transposed_linear())
        assert reasons[0].startswith("not evaluated: ValueError: 't' ")


def test_planted_wrong_value_is_seen(monkeypatch):
    right = fold_constants._evaluate
    monkeypatch.setattr(fold_constants, "_evaluate", lambda *args: [a * 1.001 for a in right(*args)])
    monkeypatch.setattr(fold_constants, "_check", lambda *args: None)
    program = transposed_linear()
    result = FoldConstants().run(program)
    with pytest.raises((AssertionError, TypeError)):
        assert_equivalent(program, result.program)


UNARY = ("Neg", "Abs", "Tanh", "Transpose", "Identity")
BINARY = ("Add", "Mul", "Sub", "MatMul")


@st.composite
def mixed_programs(draw):
    """Square matrices: a random mixture of operators over weights and the input."""
    dtype = np.float64
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    constants = {f"w{i}": generator.standard_normal((3, 3)).astype(dtype) for i in range(3)}
    values = ["x", *constants]
    nodes = []
    for index in range(draw(st.integers(1, 12))):
        op_type = draw(st.sampled_from(UNARY + BINARY))
        count = 1 if op_type in UNARY else 2
        inputs = [draw(st.sampled_from(values)) for _ in range(count)]
        nodes.append(node(op_type, inputs, [f"v{index}"]))
        values.append(f"v{index}")
    nodes.append(node("Add", [draw(st.sampled_from(values)), "x"], ["y"]))
    return program_from_nodes(nodes, {"x": (3, 3)}, ["y"], constants, dtype=TensorProto.DOUBLE)


@settings(max_examples=50, deadline=None)
@given(mixed_programs())
def test_exact_on_random_graphs(program):
    before = program.to_bytes()
    result = FoldConstants().run(program)
    assert program.to_bytes() == before and not result.refusals
    constant = set(result.program.initializers.values())
    assert not any(n.inputs and all(v in constant for v in n.inputs) for n in result.program.nodes())
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3))}
    assert_equivalent(program, result.program, tolerance=1e-12, inputs=feeds)
    assert not FoldConstants().run(result.program).modified
