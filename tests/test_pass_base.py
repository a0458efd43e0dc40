"""The pass protocol, its options, the rewriter and the structural comparison."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from builders import assert_equivalent, node, program_from_nodes, run_reference, structure_of
from onnx import TensorProto, helper

from sartor.errors import InternalError, UsageError
from sartor.ir.program import NodeProvenance
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import META_PASS, Rewriter
from sartor.passes.structure import same_bits, signature_of
from sartor.passes.structure import structure_of as exact_structure


def small():
    generator = np.random.default_rng(0)
    return program_from_nodes(
        [
            node("Conv", ["x", "w"], ["y"], name="conv"),
            node("Relu", ["y"], ["z"], name="relu"),
            node("Add", ["z", "y"], ["out"], name="add"),
        ],
        {"x": ("N", 2, 4, 4)},
        ["out"],
        {"w": generator.standard_normal((3, 2, 3, 3)).astype(np.float32)},
    )


@dataclasses.dataclass(frozen=True)
class ScaleWeights(Pass):
    """Multiply an initializer."""

    name: ClassVar[str] = "scale-weights"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE
    factor: float = option(2.0, help="Factor.", above=0, maximum=8)
    times: int = option(1, help="Repetitions.", minimum=0)
    target: str = option("w", help="Initializer.")
    mode: str = option("all", help="What.", choices=("all", "none"))
    axes: tuple[int, ...] = option((), help="Axes.")
    limit: float | None = option(None, help="Limit.", unit="bytes")

    def plan(self, program, context):
        if self.mode == "none":
            return Planned(None, (Refusal("w", "mode is none"),))
        return {"factor": self.factor**self.times}

    def apply(self, program, plan, rewriter):
        array = program.initializer_array(self.target)
        rewriter.set_initializer(self.target, (array * plan["factor"]).astype(array.dtype))
        rewriter.count("weights_scaled")


class TestRun:
    def test_program_is_not_mutated_and_modified_is_observed(self):
        program = small()
        before = program.to_bytes()
        result = ScaleWeights().run(program)
        assert result.modified and result.plan == {"factor": 2.0}
        assert result.counts == {"initializers_changed": 1, "weights_scaled": 1}
        assert program.to_bytes() == before != result.program.to_bytes()
        assert result.program.applied == ("scale-weights",)

    def test_a_change_without_effect_is_not_a_modification(self):
        program = small()
        result = ScaleWeights(factor=1.0).run(program)  # the pass counts, but writes the same bytes
        assert not result.modified and result.program is program and program.applied == ()

    def test_refusal_without_plan(self):
        result = ScaleWeights(mode="none").run(small())
        assert not result.modified and result.refusals == (Refusal("w", "mode is none"),)

    def test_replay_gives_the_same_bytes(self):
        program = small()
        result = ScaleWeights(factor=3).run(program)
        replayed = ScaleWeights().replay(program, result.plan)
        assert replayed.program.to_bytes() == result.program.to_bytes()

    def test_touching_the_given_program_is_caught(self):
        @dataclasses.dataclass(frozen=True)
        class Naughty(ScaleWeights):
            name: ClassVar[str] = "naughty"

            def plan(self, program, context):
                next(program.nodes()).name = "renamed"
                return {"factor": 1.0}

        with pytest.raises(InternalError, match=r"'naughty' changed the program it was given"):
            Naughty().run(small())

    def test_changing_the_signature_is_caught(self):
        @dataclasses.dataclass(frozen=True)
        class Renames(ScaleWeights):
            name: ClassVar[str] = "renames"

            def apply(self, program, plan, rewriter):
                program.graph.outputs[0].name = "other"

        with pytest.raises(InternalError, match=r"'renames' changed the signature.*'out'.*'other'") as caught:
            Renames().run(small())
        assert caught.value.__notes__ == ["In pass 'renames'."]

    def test_shapes_read_while_applying_are_not_stale_afterwards(self):
        @dataclasses.dataclass(frozen=True)
        class Narrow(ScaleWeights):
            name: ClassVar[str] = "narrow"

            def apply(self, program, plan, rewriter):
                assert program.shapes()["y"] == (1, 3, 2, 2)
                rewriter.set_initializer("w", program.initializer_array("w")[:2])

        assert Narrow().run(small()).program.shapes()["y"] == (1, 2, 2, 2)

    def test_names_must_be_kebab_case(self):
        with pytest.raises(InternalError, match="expected kebab-case"):
            type("Bad", (ScaleWeights,), {"name": "Bad_Name"})

    def test_semantics_must_be_declared(self):
        with pytest.raises(InternalError, match="declares no semantics"):
            type("Bad", (Pass,), {"name": "bad"})

    def test_keep_globs(self):
        context = Context(keep=("layer1.*", "head"))
        assert context.is_kept("layer1.0.conv") and context.is_kept("head")
        assert not context.is_kept("Head") and not context.is_kept("layer2.0")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"factor": 0.0}, r"Option 'factor' of 'scale-weights' must be float > 0 and ≤ 8, got 0.0"),
            ({"factor": 9}, r"≤ 8, got 9"),
            ({"factor": float("nan")}, r"got nan"),
            ({"factor": "2"}, r"got '2'"),
            ({"times": True}, r"'times' .* must be int ≥ 0, got True"),
            ({"times": 1.5}, r"got 1.5"),
            ({"mode": "some"}, r"must be one of all, none, got 'some'"),
            ({"axes": "12"}, r"must be \[int, …\], got '12'"),
            ({"axes": (1, "a")}, r"got \(1, 'a'\)"),
            ({"limit": "x"}, r"must be float or none \(bytes\)"),
        ],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(UsageError, match=message):
            ScaleWeights(**options)

    def test_canonical_forms(self):
        made = ScaleWeights(factor=2, axes=[1, 2])
        assert type(made.factor) is float and made.axes == (1, 2)
        assert made == ScaleWeights(axes=(1, 2)) and hash(made) == hash(ScaleWeights(axes=(1, 2)))

    def test_spec(self):
        assert ScaleWeights().spec() == "scale-weights"
        assert str(ScaleWeights(factor=0.5, axes=(1, 2))) == "scale-weights{factor=0.5,axes=[1,2]}"
        assert ScaleWeights(target="a b").spec() == 'scale-weights{target="a b"}'
        assert ScaleWeights().spec(defaults=True) == (
            "scale-weights{factor=2.0,times=1,target=w,mode=all,axes=[],limit=none}"
        )

    def test_unsupported_field_type(self):
        @dataclasses.dataclass(frozen=True)
        class Odd(ScaleWeights):
            name: ClassVar[str] = "odd"
            table: dict[str, int] = dataclasses.field(default_factory=dict)

        with pytest.raises(InternalError, match="Option 'table' of pass class 'Odd'"):
            Odd()


class TestRewriter:
    def rewriter(self, program=None):
        clone = (program or small()).clone()
        return clone, Rewriter(clone, "test-pass")

    def test_insert_and_replace_keeps_the_output_name(self):
        program, rewriter = self.rewriter()
        before = signature_of(program)
        program.provenance["add"] = NodeProvenance("head", "Add", "net.py:3")
        add = rewriter.node("add")
        relu = rewriter.insert_after(add, "Relu", [add.outputs[0]])
        rewriter.replace_value(add.outputs[0], relu.outputs[0])
        assert structure_of(program)[-2:] == ["out_replaced = Add(z, y)", "out = Relu(out_replaced)"]
        assert signature_of(program) == before
        assert relu.meta[META_PASS] == "test-pass" and b"test-pass/Relu" in program.to_bytes()
        assert program.provenance["test-pass/Relu"].module == "head"
        assert rewriter.counts == {"nodes_added": 1, "values_replaced": 1}
        program.invalidate()
        assert program.shapes()["out"] == (1, 3, 2, 2)

    def test_replace_output_by_another_nodes_output(self):
        program, rewriter = self.rewriter()
        rewriter.replace_value(rewriter.node("add").outputs[0], rewriter.node("relu").outputs[0])
        rewriter.remove_node(rewriter.node("add"))
        assert structure_of(program)[1:] == ["y = Conv(x, w)", "out = Relu(y)"]

    def test_replace_output_by_input_or_other_output_needs_identity(self):
        program = program_from_nodes(
            [node("Relu", ["x"], ["a"]), node("Abs", ["x"], ["b"])], {"x": ("N", 2)}, ["a", "b"]
        )
        clone, rewriter = self.rewriter(program)
        a, b = clone.graph.outputs
        rewriter.replace_value(a, clone.graph.inputs[0])
        rewriter.remove_node(rewriter.node("node_a"))
        rewriter.replace_value(clone.graph.outputs[0], b)
        assert signature_of(clone) == signature_of(program)
        clone.graph.sort()
        feeds = {"x": np.array([[-1.0, 2.0]], np.float32)}
        outputs = run_reference(clone, feeds)
        assert np.array_equal(outputs["a"], [[1.0, 2.0]]) and np.array_equal(outputs["b"], [[1.0, 2.0]])

    def test_replacing_does_not_loop_through_the_new_node(self):
        program, rewriter = self.rewriter()
        conv = rewriter.node("conv")
        relu = rewriter.insert_after(conv, "Relu", [conv.outputs[0]], output_names=["y_relu"])
        rewriter.replace_value(conv.outputs[0], relu.outputs[0])
        assert structure_of(program)[2:] == [
            "y_relu = Relu(y)",
            "z = Relu(y_relu)",
            "out = Add(z, y_relu)",
        ]

    def test_removing_a_used_node_lists_its_users(self):
        _, rewriter = self.rewriter()
        with pytest.raises(
            InternalError, match=r"'conv' \(Conv\).*'y' is still used by node 'add', node 'relu'"
        ):
            rewriter.remove_node(rewriter.node("conv"))
        with pytest.raises(InternalError, match="used by the graph's outputs"):
            rewriter.remove_node(rewriter.node("add"))

    def test_uses_inside_bodies_count(self):
        program = branchy()
        clone, rewriter = self.rewriter(program)
        with pytest.raises(InternalError, match="used by node 'inner'"):
            rewriter.remove_node(rewriter.node("shared"))
        with pytest.raises(InternalError, match="used by node 'inner'"):
            rewriter.remove_initializer(clone.initializers["captured"])

    def test_names_are_unique_across_bodies(self):
        _, rewriter = self.rewriter(branchy())
        assert rewriter.unique_value_name("inner_out") == "inner_out_1"
        assert rewriter.unique_node_name("inner") == "inner_1"
        assert rewriter.unique_value_name("inner_out") == "inner_out_2"

    def test_set_initializer_leaves_the_original(self):
        program = small()
        old = program.initializer_array("w").copy()
        clone, rewriter = self.rewriter(program)
        rewriter.set_initializer("w", old[:2])
        assert clone.initializer_array("w").shape == (2, 2, 3, 3)
        assert np.array_equal(program.initializer_array("w"), old)
        clone.invalidate()
        assert clone.shapes()["out"] == (1, 2, 2, 2) and program.shapes()["out"] == (1, 3, 2, 2)

    def test_initializers_do_not_alias_the_callers_array(self):
        clone, rewriter = self.rewriter()
        buffer = np.zeros((4, 2, 3, 3), np.float32)
        rewriter.set_initializer("w", buffer[:3])
        buffer[:] = 7
        assert clone.initializer_array("w").max() == 0
        scalar = rewriter.add_initializer("w", np.array(3, np.int64))
        assert scalar.name == "w_1" and clone.initializer_array("w_1").shape == ()

    def test_set_initializer_refuses_another_type(self):
        _, rewriter = self.rewriter()
        with pytest.raises(InternalError, match="type float32 to an array of type float64"):
            rewriter.set_initializer("w", np.zeros((3, 2, 3, 3)))
        with pytest.raises(InternalError, match="looks for initializer 'nope'"):
            rewriter.set_initializer("nope", np.zeros(3))

    def test_private_initializer(self):
        w = np.random.default_rng(1).standard_normal((2, 2, 1, 1)).astype(np.float32)
        program = program_from_nodes(
            [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "w"], ["b"])],
            {"x": ("N", 2, 3, 3)},
            ["b"],
            {"w": w},
        )
        clone, rewriter = self.rewriter(program)
        second = rewriter.node("node_b")
        copy = rewriter.private_initializer(second, 1)
        assert copy.name == "w_node_b" and rewriter.private_initializer(second, 1) is copy
        rewriter.set_initializer(copy, w * 2)
        assert np.array_equal(clone.initializer_array("w"), w)
        with pytest.raises(AssertionError):
            assert_equivalent(program, clone)

    def test_attributes(self):
        clone, rewriter = self.rewriter()
        conv = rewriter.node("conv")
        rewriter.set_attribute(conv, "pads", [1, 1, 1, 1])
        rewriter.set_attribute(conv, "pads", [1, 1, 1, 1])
        rewriter.set_attribute(conv, "group", None)
        assert rewriter.counts == {"attributes_changed": 1}
        clone.invalidate()
        assert clone.shapes()["out"] == (1, 3, 4, 4)

    def test_set_input_grows_the_list(self):
        clone, rewriter = self.rewriter()
        rewriter.set_input(rewriter.node("conv"), 2, rewriter.add_initializer("b", np.ones(3, np.float32)))
        assert "y = Conv(x, w, b)" in structure_of(clone)


def branchy():
    """An If whose body captures an initializer and a value of the main graph."""
    then = helper.make_graph(
        [helper.make_node("Mul", ["s", "captured"], ["inner_out"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("inner_out", TensorProto.FLOAT, None)],
    )
    otherwise = helper.make_graph(
        [helper.make_node("Neg", ["s"], ["else_out"], name="inner_else")],
        "else",
        [],
        [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)],
    )
    return program_from_nodes(
        [
            node("Relu", ["x"], ["s"], name="shared"),
            node("If", ["flag"], ["y"], name="branch", then_branch=then, else_branch=otherwise),
        ],
        {"x": (2, 3)},
        ["y"],
        {"captured": np.arange(3, dtype=np.float32), "flag": np.array(True)},
    )


class TestStructure:
    def test_bits(self):
        assert same_bits(np.array([np.nan]), np.array([np.nan]))
        assert not same_bits(np.array([0.0]), np.array([-0.0]))
        assert not same_bits(np.zeros(2, np.float32), np.zeros(2))
        assert same_bits(np.array(["ab"], object), np.array(["a" + "b"], object))

    @pytest.mark.parametrize("kind", ["weight", "attribute", "name", "body", "order"])
    def test_sees_every_kind_of_change(self, kind):
        program = branchy() if kind == "body" else small()
        clone = program.clone()
        rewriter = Rewriter(clone, "p")
        assert exact_structure(clone) == exact_structure(program)
        if kind == "weight":
            array = clone.initializer_array("w").copy()
            array[0, 0, 0, 0] = np.nextafter(array[0, 0, 0, 0], np.float32(9))
            rewriter.set_initializer("w", array)
        elif kind == "attribute":
            rewriter.set_attribute(rewriter.node("conv"), "dilations", [1, 1])
        elif kind == "name":
            rewriter.node("conv").name = "conv2"
        elif kind == "body":
            rewriter.set_attribute(rewriter.node("inner"), "planted", 1)
        else:
            rewriter.set_input(rewriter.node("add"), 0, rewriter.node("conv").outputs[0])
        assert exact_structure(clone) != exact_structure(program)
