"""remove-blocks: equal to MASKED on every family, options, refusals, and planted bugs."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest
from builders import node, program_from_nodes, random_inputs, relative_error, structure_of
from models import captured

from sartor.errors import PlanError, UsageError
from sartor.ir.blocks import residual_blocks
from sartor.ir.fx import run_twin
from sartor.ir.plan import Plan
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.remove_blocks import RemoveBlocks, nonnegative_values, remove_blocks
from sartor.passes.rewriter import Rewriter
from sartor.strategies.importance import Importance

FAMILIES = ("resnet", "mobilenet", "se", "vit", "vit_manual")
TOLERANCE = 1e-9


def masked(program, blocks, *, skip=()):
    """The program with the last affine parameters of `blocks` zeroed where the branch reads them.

    Args:
        skip: initializers to leave as they are, to plant a bug.
    """
    clone = program.clone()
    nodes = {item.name: item for item in clone.nodes()}
    for block in blocks:
        for name, (reader, index) in zip(block.last_affine, block.last_affine_sites, strict=True):
            if name in skip:
                continue
            zero = ir.Value(name=f"{name}.zeroed.{reader}.{index}")
            array = np.zeros_like(program.initializer_array(name))
            zero.const_value = ir.Tensor(array, name=zero.name)
            zero.type, zero.shape = ir.TensorType(zero.const_value.dtype), ir.Shape(array.shape)
            clone.graph.initializers.add(zero)
            nodes[reader].replace_input_with(index, zero)
    clone.invalidate()
    return clone


def removed(program, names):
    result = RemoveBlocks(blocks=tuple(names)).run(program)
    assert result.refusals == () and result.counts["blocks_removed"] == len(names)
    verify_program(result.program)
    return result.program


@functools.cache
def original(name):
    program = captured(name)
    inputs = random_inputs(program)
    return inputs, run_twin(program, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_equals_masked_and_differs_from_the_original(name):
    program = captured(name)
    inputs, before = original(name)
    removable = [b for b in residual_blocks(program) if b.removable]
    assert removable
    for blocks in [*([block] for block in removable), removable]:
        small = removed(program, [block.name for block in blocks])
        after = run_twin(small, inputs)
        assert relative_error(run_twin(masked(program, blocks), inputs), after) < TOLERANCE
        assert relative_error(before, after) > 1e-3
        gone = {n for b in blocks for n in b.nodes}
        assert gone.isdisjoint(item.name for item in small.nodes())
        assert all(value.uses() for value in small.graph.initializers.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_planted_bug_a_bias_left_behind_is_seen(name):
    program = captured(name)
    inputs, _ = original(name)
    for block in (b for b in residual_blocks(program) if b.removable):
        weight, bias = block.last_affine
        after = run_twin(removed(program, [block.name]), inputs)
        for kept in (weight, bias):
            wrong = run_twin(masked(program, [block], skip=(kept,)), inputs)
            assert relative_error(wrong, after) > 1e-3


def chain(*, entry="Relu", outputs=("y",), layers=2, weight=None):
    """`layers` blocks `v = Relu(v + Conv(v))` after an entry, all reading one weight if it is given."""
    generator = np.random.default_rng(0)
    nodes, initializers, value = [node(entry, ["x"], ["v0"], "entry")], {}, "v0"
    for k in range(1, layers + 1):
        name, target = weight or f"w{k}", "y" if k == layers else f"v{k}"
        initializers[name] = generator.standard_normal((4, 4, 1, 1)).astype(np.float32)
        nodes += [
            node("Conv", [value, name], [f"c{k}"], f"conv{k}"),
            node("Add", [value, f"c{k}"], [f"a{k}"], f"add{k}"),
            node("Relu", [f"a{k}"], [f"v{k}"] if k < layers else ["r"], f"relu{k}"),
        ]
        if k == layers:
            nodes.append(node("Neg", ["r"], [target], "last"))
        value = target
    return program_from_nodes(nodes, {"x": ("N", 4, 3, 3)}, outputs, initializers)


def test_before_expected():
    result = RemoveBlocks(blocks=("add1",)).run(chain(layers=1))
    expected = program_from_nodes(
        [node("Relu", ["x"], ["v0"], "entry"), node("Neg", ["v0"], ["y"], "last")],
        {"x": ("N", 4, 3, 3)},
        ["y"],
    )
    assert structure_of(result.program) == structure_of(expected)
    assert result.counts["relus_removed"] == 1


def test_relu_stays_where_its_input_may_be_negative():
    result = RemoveBlocks(blocks=("add1",)).run(chain(entry="Tanh", layers=1))
    assert [item.op_type for item in result.program.nodes()] == ["Tanh", "Relu", "Neg"]
    assert "relus_removed" not in result.counts


@pytest.mark.parametrize("entry", ["Relu", "Tanh"])
@pytest.mark.parametrize("names", [("add1",), ("add2",), ("add3",), ("add1", "add2"), ("add3", "add1")])
def test_consecutive_blocks_that_share_a_weight(names, entry):
    program = chain(entry=entry, layers=3, weight="w")
    blocks = [b for b in residual_blocks(program) if b.name in names]
    inputs = random_inputs(program)
    clone = program.clone()
    remove_blocks(clone, names, Rewriter(clone, "test"))
    verify_program(clone)
    after = run_twin(clone, inputs)
    assert relative_error(run_twin(masked(program, blocks), inputs), after) < TOLERANCE
    assert relative_error(run_twin(program, inputs), after) > 1e-3
    assert "w" in clone.graph.initializers


def nested():
    generator = np.random.default_rng(1)
    shapes = {f"w{k}": (4, 4, 1, 1) for k in range(3)}
    return program_from_nodes(
        [
            node("Tanh", ["x"], ["s"], "entry"),
            node("Conv", ["s", "w0"], ["a"], "c0"),
            node("Conv", ["a", "w1"], ["i"], "c1"),
            node("Add", ["i", "a"], ["n"], "inner"),
            node("Relu", ["n"], ["r"], "relu"),
            node("Conv", ["r", "w2"], ["b"], "c2"),
            node("Add", ["s", "b"], ["o"], "outer"),
            node("Sigmoid", ["o"], ["y"], "last"),
        ],
        {"x": ("N", 4, 3, 3)},
        ["y"],
        {k: generator.standard_normal(v).astype(np.float32) for k, v in shapes.items()},
    )


@pytest.mark.parametrize("names", [("inner",), ("outer",), ("inner", "outer"), ("outer", "inner")])
def test_nested_blocks(names):
    program = nested()
    blocks = [b for b in residual_blocks(program) if b.name in names]
    inputs = random_inputs(program)
    clone = program.clone()
    remove_blocks(clone, names, Rewriter(clone, "test"))
    verify_program(clone)
    after = run_twin(clone, inputs)
    assert relative_error(run_twin(masked(program, blocks), inputs), after) < TOLERANCE
    assert relative_error(run_twin(program, inputs), after) > 1e-3
    if "outer" in names:
        assert [item.name for item in clone.nodes()] == ["entry", "last"]


def test_parameter_arithmetic_shared_by_removed_blocks_goes_with_the_last_of_them():
    generator = np.random.default_rng(0)
    program = program_from_nodes(
        [
            node("Transpose", ["w"], ["t"], "t", perm=[1, 0]),
            node("Tanh", ["x"], ["s"], "entry"),
            node("MatMul", ["s", "t"], ["h"], "m1"),
            node("Mul", ["h", "g1"], ["b1"], "g1"),
            node("Add", ["s", "b1"], ["v"], "add1"),
            node("MatMul", ["v", "t"], ["k"], "m2"),
            node("Mul", ["k", "g2"], ["b2"], "g2"),
            node("Add", ["v", "b2"], ["u"], "add2"),
            node("Neg", ["u"], ["y"], "last"),
        ],
        {"x": ("N", 3)},
        ["y"],
        {
            k: generator.standard_normal(s).astype(np.float32)
            for k, s in {"w": (3, 3), "g1": 3, "g2": 3}.items()
        },
    )
    assert [item.name for item in RemoveBlocks(blocks=("add*",)).run(program).program.nodes()] == [
        "entry",
        "last",
    ]
    assert "t" in {item.name for item in RemoveBlocks(blocks=("add1",)).run(program).program.nodes()}


# ---- options -------------------------------------------------------------------------------
def test_option_blocks_takes_globs_and_reports_what_stays():
    result = RemoveBlocks(blocks=("layer*",)).run(captured("resnet"))
    assert result.plan.blocks == ("layer1.0", "layer1.1", "layer2.1")
    (refusal,) = result.refusals
    assert refusal.node == "layer2.0" and "the shortcut passes through" in refusal.reason


def test_nothing_asked_for_is_nothing_done():
    result = RemoveBlocks().run(captured("resnet"))
    assert not result.modified and result.plan is None and result.refusals == ()


def test_option_count_and_seed():
    program = captured("vit")
    plans = {seed: RemoveBlocks(count=2, seed=seed).plan(program, Context()).data for seed in range(6)}
    assert all(len(plan.blocks) == 2 for plan in plans.values())
    assert len({plan.blocks for plan in plans.values()}) > 1
    assert RemoveBlocks(count=2, seed=3).plan(program, Context()).data == plans[3]
    few = RemoveBlocks(count=9).run(program)
    assert len(few.plan.blocks) == 4
    assert few.refusals[-1].reason == "9 blocks are to be removed, but only 4 can be"


def test_option_count_within_globs():
    plan = RemoveBlocks(blocks=("blocks.1.*",), count=1).plan(captured("vit"), Context()).data
    assert len(plan.blocks) == 1 and plan.blocks[0].startswith("blocks.1.")


def test_option_criterion_reads_importance_from_the_context():
    program = captured("resnet")
    seen = []

    def importance(criterion, given, analysis, blocks, context):
        seen.append((criterion, [b.name for b in blocks]))
        return Importance({}, {"layer1.0": 3.0, "layer1.1": 1.0, "layer2.1": 2.0})

    context = Context(extras={"importance": importance})
    plan = RemoveBlocks(count=2, criterion="taylor").plan(program, context).data
    assert plan.blocks == ("layer1.1", "layer2.1")
    assert seen == [("taylor", ["layer1.0", "layer1.1", "layer2.1"])]
    with pytest.raises(UsageError, match="'taylor' needs data"):
        RemoveBlocks(count=2, criterion="taylor").plan(program, Context())
    broken = Context(extras={"importance": lambda *_: Importance({}, {"layer1.0": float("nan")})})
    with pytest.raises(UsageError, match=r"'layer1\.0' the score nan"):
        RemoveBlocks(count=1, criterion="l1").plan(program, broken)


@pytest.mark.parametrize("pattern", ["layer1.0.conv2.weight", "node_conv2d_2"])
def test_kept_nodes_and_parameters_protect_their_block(pattern):
    result = RemoveBlocks(blocks=("layer1.*",)).run(captured("resnet"), Context(keep=(pattern,)))
    assert result.plan.blocks == ("layer1.1",)
    assert [r.node for r in result.refusals] == ["layer1.0"] and pattern in result.refusals[0].reason


# ---- refusals ------------------------------------------------------------------------------
def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(UsageError, match=r"No residual block matches 'layer9.\*'.*'layer1.0'"):
        RemoveBlocks(blocks=("layer1.0", "layer9.*")).run(captured("resnet"))


def test_plans_for_another_program_are_refused():
    program = captured("resnet")
    for name, message in (("layer7.0", "does not have"), ("layer2.0", "the shortcut passes through")):
        with pytest.raises(PlanError, match=message):
            RemoveBlocks().replay(program, Plan(program.source.sha256, blocks=(name,)))


def test_replay_gives_the_same_bytes_whatever_the_order():
    program = captured("vit")
    plan = RemoveBlocks(count=3, seed=1).plan(program, Context()).data
    first = RemoveBlocks().replay(program, Plan.from_json(plan.to_json())).program.to_bytes()
    turned = Plan(plan.source_sha256, blocks=tuple(reversed(plan.blocks)))
    assert RemoveBlocks().replay(program, turned).program.to_bytes() == first


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("Relu", ["x"], ["y"])], True),
        ([node("Tanh", ["x"], ["y"])], False),
        ([node("Clip", ["x", "zero"], ["y"])], True),
        ([node("Clip", ["x", "minus"], ["y"])], False),
        ([node("Clip", ["x", "zero", "minus"], ["y"])], False),
        ([node("Abs", ["x"], ["a"]), node("Add", ["a", "minus"], ["y"])], False),
        ([node("Abs", ["x"], ["a"]), node("Add", ["a", "zero"], ["y"])], True),
        ([node("Abs", ["x"], ["a"]), node("Concat", ["a", "x"], ["y"], axis=0)], False),
        ([node("Abs", ["x"], ["a"]), node("Neg", ["a"], ["y"])], False),
        ([node("Mul", ["x", "x"], ["y"])], True),
        ([node("HardSwish", ["x"], ["y"])], False),
    ],
)
def test_nonnegative_values(nodes, expected):
    given = {"zero": np.float32(0), "minus": np.float32(-1)}
    used = {name for item in nodes for name in item.input}
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"], {k: v for k, v in given.items() if k in used})
    assert ("y" in {value.name for value in nonnegative_values(program)}) is expected


def test_a_fit_keeps_what_keep_names_inside_blocks():
    from sartor.passes.candidates import kept_by

    program = captured("resnet")
    block = next(b for b in residual_blocks(program) if b.removable)
    inside = set(block.nodes)
    reads = [v.name for n in program.nodes() if n.name in inside for v in n.inputs if v.is_initializer()]
    assert len(reads) > len(block.last_affine)
    for name in [*reads, block.name, *block.nodes]:
        assert kept_by(program, block, Context(keep=(name,))) == name
    assert kept_by(program, block, Context(keep=("elsewhere*",))) is None
