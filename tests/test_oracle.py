"""The oracle: it passes right programs, fails wrong ones, and says when it could not have seen an error."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import node, program_from_nodes
from models import captured

from sartor import comparison, falsifiability, oracle
from sartor.backends import isolation
from sartor.errors import EXIT_VERIFICATION_FAILED, VerificationError
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels

FAMILIES = ("resnet", "mobilenet", "densenet", "vit")  # all of them: test_masked.py


def _benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "planted_bugs.py"
    spec = importlib.util.spec_from_file_location("planted_bugs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_bugs"] = module
    spec.loader.exec_module(module)
    return module


planted_bugs = _benchmark()


@functools.cache
def _prepared(blocks):
    return planted_bugs.prepare(0, blocks)


def fresh_case(blocks=()):
    """A case whose programs may be changed; the capture behind it is shared."""
    case = _prepared(blocks)
    return dataclasses.replace(case, pruned=case.pruned.clone(), mask=case.mask.clone())


def half(program, seed=0):
    return PruneChannels(ratio=0.5, seed=seed).run(program).plan


# ---- right programs pass ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_family_passes(family):
    program = captured(family)
    result = oracle.check(program, half(program))
    assert result.verdict == "passed" and result.insensitive == ()
    assert 0 <= result.max_rel_error <= 1e-12
    assert result.lowered_rel_error is None and "lowered_rel_error" not in result.to_dict()


def test_lowered_program_is_compared_too():
    program = captured("mobilenet")
    result = oracle.check(program, half(program), target="onnxruntime")
    assert result.verdict == "passed"
    assert 0 < result.lowered_rel_error <= 1e-4
    assert json.loads(json.dumps(result.to_dict()))["lowered_rel_error"] == result.lowered_rel_error


def test_lowered_program_can_fail_alone(monkeypatch):
    """A backend that computes something else is seen although float64 agrees."""
    program = captured("vgg")
    factors = iter((1.0, 1.0 + 2e-4))

    class Wrong(isolation.Session):
        def run(self, inputs):
            factor = next(factors)
            return {name: array * factor for name, array in super().run(inputs).items()}

    monkeypatch.setattr(isolation, "Session", Wrong)
    result = oracle.check(program, half(program), target="onnxruntime")
    assert result.verdict == "failed"
    assert result.max_rel_error <= 1e-12 and result.lowered_rel_error == pytest.approx(2e-4, rel=0.1)


def test_a_group_that_went_with_its_block_needs_no_proof():
    """The plan narrows `body1` and removes the block around it: nothing of it is left to be wrong."""
    case = fresh_case(("node_add",))
    assert "body1" in case.plan.groups and "body1.weight" not in case.pruned.initializers
    found = planted_bugs.look(case)
    assert found.message == "verdict passed" and found.error < 1e-12


# ---- wrong programs fail ---------------------------------------------------------------------

BY_VERIFIER = {
    "bias left behind: not narrowed",
    "depthwise group left unpruned",
    "depthwise group attribute stale",
    "reshape constant stale",
}


@pytest.mark.parametrize("name", planted_bugs.BUGS)
def test_planted_bug_is_caught(name):
    case = fresh_case(planted_bugs.BLOCKS.get(name, ()))
    planted_bugs.BUGS[name](case)
    found = planted_bugs.look(case)
    assert found.by == ("verifier" if name in BY_VERIFIER else "oracle"), found
    assert found.error > 3 * oracle.LOWERED_TOLERANCE["f32"]  # in float32 it would be seen as well


def test_no_bug_is_no_finding():
    found = planted_bugs.look(fresh_case())
    assert found.by == "nothing" and found.message == "verdict passed" and found.error < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_every_narrowed_parameter_matters(family):
    """Rolling any narrowed parameter of the pruned program by one index is seen."""
    program = captured(family)
    analysis = channel_groups(program)
    plan = half(program)
    original = oracle.randomise(program, analysis, 0)
    pruned = apply_plan(original, plan, analysis)
    mask, _ = masked(original, plan, analysis)
    inputs = oracle_inputs(original)
    reference = run_twin(mask, inputs)
    seen = 0
    for group in analysis.groups:
        member = group.members[seen % len(group.members)]
        array = pruned.initializer_array(member.initializer)
        if array.shape[member.axis] < 2 or softmax_ignores(member.initializer):
            continue
        wrong = pruned.clone()
        rolled = np.roll(array, 1, axis=member.axis)
        wrong.initializers[member.initializer].const_value = oracle_tensor(rolled, member.initializer)
        assert comparison.relative_error(reference, run_twin(wrong, inputs)) > 100 * oracle.TOLERANCE_F64
        seen += 1
    assert seen >= 2


def softmax_ignores(name):
    """Rolling a fused qkv axis may permute query and key features alike, which computes the same."""
    return "qkv" in name


def oracle_inputs(program):
    from sartor.ir.batch import random_inputs

    return random_inputs(program, seed=0)


def oracle_tensor(array, name):
    import onnx_ir as ir

    return ir.tensor(np.ascontiguousarray(array), name=name)


def test_wrong_output_shape_fails():
    case = fresh_case()
    pruned = case.pruned
    other = program_from_nodes(
        [node("ReduceMean", ["x", "axes"], [pruned.graph.outputs[0].name], keepdims=0)],
        {"x": ["N", 3, 12, 12]},
        [pruned.graph.outputs[0].name],
        {"axes": np.asarray([2, 3])},
    )
    result = oracle.compare(case.original, other, case.mask, case.plan, analysis=case.analysis)
    assert result.verdict == "failed" and math.isinf(result.max_rel_error)


def test_final_softmax_is_looked_through():
    """An equal error in all logits, which softmax takes away, is still seen."""
    program = softmax_program()
    plan = Plan(program.source.sha256, {"w1": GroupPlan(6, (0, 2, 5))})
    assert oracle.check(program, plan).verdict == "passed"
    seen = oracle.before_softmax(program)
    assert [v.name for v in seen.graph.outputs] == ["logits"]
    assert [v.name for v in program.graph.outputs] == ["y"]  # the given program is not changed
    shifted = seen.clone()
    bias = shifted.initializers["b"]
    bias.const_value = oracle_tensor(bias.const_value.numpy() + np.float32(1), "b")
    feeds = oracle_inputs(program)
    before = comparison.relative_error(run_twin(seen, feeds), run_twin(shifted, feeds))
    hidden = program.clone()
    hidden.initializers["b"].const_value = bias.const_value
    after = comparison.relative_error(run_twin(program, feeds), run_twin(hidden, feeds))
    assert after < 1e-6 and before > 1e-2


def softmax_program():
    draw = np.random.default_rng(0).standard_normal
    return program_from_nodes(
        [
            node("MatMul", ["x", "w1"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "w2", "b"], ["logits"]),
            node("Softmax", ["logits"], ["y"], axis=-1),
        ],
        {"x": ["N", 4]},
        ["y"],
        {
            "w1": draw((4, 6)).astype(np.float32),
            "w2": draw((6, 3)).astype(np.float32),
            "b": draw(3).astype(np.float32),
        },
    )


# ---- a check that could not fail is no check ---------------------------------------------------


def killed_program():
    """Group `w1` reaches the output only through a multiplication by zero; `v1` reaches it."""
    draw = np.random.default_rng(0).standard_normal
    return program_from_nodes(
        [
            node("MatMul", ["x", "w1"], ["a1"]),
            node("Tanh", ["a1"], ["a2"]),
            node("MatMul", ["a2", "w2"], ["a3"]),
            node("Mul", ["a3", "nothing"], ["a4"]),
            node("MatMul", ["x", "v1"], ["b1"]),
            node("Tanh", ["b1"], ["b2"]),
            node("MatMul", ["b2", "v2"], ["b3"]),
            node("Add", ["a4", "b3"], ["y"]),
        ],
        {"x": ["N", 4]},
        ["y"],
        {
            "w1": draw((4, 6)).astype(np.float32),
            "w2": draw((6, 3)).astype(np.float32),
            "v1": draw((4, 6)).astype(np.float32),
            "v2": draw((6, 3)).astype(np.float32),
            "nothing": np.float32(0),
        },
    )


def killed_plan(program, *groups):
    return Plan(program.source.sha256, {name: GroupPlan(6, (0, 2, 5)) for name in groups})


def test_insensitive_group_is_inconclusive():
    program = killed_program()
    assert oracle.check(program, killed_plan(program, "v1")).verdict == "passed"
    result = oracle.check(program, killed_plan(program, "v1", "w1"))
    assert result.verdict == "inconclusive" and result.insensitive == ("w1",)
    assert result.max_rel_error <= 1e-12  # the programs agree, which proves nothing


def test_a_bug_in_an_insensitive_group_would_not_be_seen():
    """Why the verdict exists: this program is wrong and the outputs are equal."""
    program = killed_program()
    plan = killed_plan(program, "w1")
    analysis = channel_groups(program)
    original = oracle.randomise(program, analysis, 0)
    pruned = apply_plan(original, plan, analysis)
    pruned.initializers["w2"].const_value = oracle_tensor(pruned.initializer_array("w2")[::-1].copy(), "w2")
    mask, _ = masked(original, plan, analysis)
    result = oracle.compare(original, pruned, mask, plan, analysis=analysis)
    assert result.max_rel_error == 0 and result.verdict == "inconclusive"


def test_gradients_agree_with_a_real_perturbation():
    """The sweep's derivative predicts what 10 % more of one kept unit does to a linear output."""
    program = killed_program()
    analysis = channel_groups(program)
    plan = killed_plan(program, "v1")
    original = oracle.randomise(program, analysis, 0)
    mask, _ = masked(original, plan, analysis)
    inputs = oracle_inputs(original)
    outputs, gradients = falsifiability.with_gradients(mask, plan, analysis, inputs)
    weights = falsifiability.probe(np.random.default_rng(1), outputs["y"].size)
    for unit in range(6):
        moved = mask.clone()
        array = moved.initializer_array("v2").astype(np.float64).copy()
        array[unit] *= 1 + falsifiability.PERTURBATION
        moved.initializers["v2"].const_value = oracle_tensor(array.astype(np.float32), "v2")
        change = ((run_twin(moved, inputs)["y"] - outputs["y"]).ravel() * weights).sum()
        assert change == pytest.approx(
            falsifiability.PERTURBATION * gradients["v1"][unit], rel=1e-5, abs=1e-7
        )
    assert np.abs(gradients["v1"]).max() > 0.01 and (gradients["w1"] == 0).all()
    seen = [
        falsifiability.moves(mask, analysis, analysis.group(name), 2, inputs, outputs, 1e-7)
        for name in ("v1", "w1")
    ]
    assert seen == [True, False]


def test_removed_block_that_does_nothing_is_inconclusive():
    program = captured("resnet")
    plan = Plan(program.source.sha256, blocks=("layer1.1",))
    analysis = channel_groups(program)
    assert oracle.check(program, plan).verdict == "passed"
    original = oracle.randomise(program, analysis, 0)
    mask, _ = masked(original, plan, analysis)
    pruned = apply_plan(original, plan, analysis)
    result = oracle.compare(mask, pruned, mask, plan, analysis=analysis)
    assert result.verdict == "inconclusive" and result.insensitive == ("layer1.1",)


@pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
def test_require_stops_and_leaves_a_reproducer(verdict, tmp_path):
    program = killed_program()
    plan = killed_plan(program, "w1", "v1")
    result = oracle.check(program, plan)
    if verdict == "failed":
        result = dataclasses.replace(result, verdict="failed", max_rel_error=0.25)
    folder = tmp_path / "made" / "reproducer"
    with pytest.raises(VerificationError) as caught:
        oracle.require(result, program, plan, folder)
    assert caught.value.exit_code == EXIT_VERIFICATION_FAILED == 5
    assert str(folder) in str(caught.value)
    assert ("0.25" if verdict == "failed" else "w1") in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "plan.json"]
    again = load(folder / "model.onnx")
    replayed = oracle.check(again, Plan.load(folder / "plan.json"))
    assert replayed.verdict == "inconclusive" and replayed.insensitive == ("w1",)


def test_require_lets_a_pass_through(tmp_path):
    program = killed_program()
    plan = killed_plan(program, "v1")
    oracle.require(oracle.check(program, plan), program, plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the tolerance helper ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.2], 0.1),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([1.0], [1000.0], 999.0),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-30], math.inf),
        ([1.0], [math.nan], math.inf),
        ([math.nan], [math.nan], math.inf),
        ([math.inf], [math.inf], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([[1.0]], [1.0], math.inf),
    ],
)
def test_relative_error(a, b, expected):
    found = comparison.relative_error({"y": np.asarray(a)}, {"y": np.asarray(b)})
    assert found == (expected if math.isinf(expected) else pytest.approx(expected))


def test_relative_error_takes_the_worst_output():
    a = {"small": np.asarray([1e-3]), "large": np.asarray([1e3])}
    assert comparison.relative_error(a, {**a, "small": np.asarray([2e-3])}) == pytest.approx(1.0)


def test_relative_error_of_integers_and_booleans():
    assert comparison.relative_error({"y": np.asarray([3, 4])}, {"y": np.asarray([3, 8])}) == 1.0
    assert comparison.relative_error({"y": np.asarray([True])}, {"y": np.asarray([False])}) > 0


# ---- random weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_stay_of_order_one(family):
    program = captured(family)
    drawn = oracle.randomise(program, channel_groups(program), 0)
    taps = [n.outputs[0].name for n in drawn.nodes() if n.op_type in ("Conv", "Gemm", "MatMul", "Add")]
    values = run_twin(drawn, oracle_inputs(drawn), taps=taps)
    sizes = [float(np.sqrt(np.square(v).mean())) for v in values.values()]
    assert min(sizes) > 0.1 and max(sizes) < 10


def test_deep_residual_network_does_not_overflow():
    """Fifty residual additions double the variance fifty times under plain He weights."""
    draw = np.random.default_rng(0).standard_normal
    nodes, arrays, x = [], {}, "x"
    for i in range(50):
        arrays[f"w{i}"] = draw((8, 8)).astype(np.float32)
        arrays[f"b{i}"] = draw(8).astype(np.float32)
        nodes += [node("Gemm", [x, f"w{i}", f"b{i}"], [f"g{i}"]), node("Add", [x, f"g{i}"], [f"s{i}"])]
        x = f"s{i}"
    program = program_from_nodes(nodes, {"x": ["N", 8]}, [x], arrays)
    drawn = oracle.randomise(program, channel_groups(program), 0)
    feeds = oracle_inputs(drawn)
    output = run_twin(drawn, feeds)[x]
    assert 0.1 < np.abs(output).max() < 100
    wrong = drawn.clone()
    wrong.initializers["b49"].const_value = oracle_tensor(np.roll(drawn.initializer_array("b49"), 1), "b49")
    assert comparison.relative_error({x: output}, run_twin(wrong, feeds)) > 1e-3


def test_everything_is_random_and_nothing_else():
    program = captured("vit")
    analysis = channel_groups(program)
    one, two, other = (oracle.randomise(program, analysis, seed) for seed in (0, 0, 1))
    assert one.sha256() == two.sha256() != other.sha256()
    for name in program.initializers:
        old, new = program.initializer_array(name), one.initializer_array(name)
        number = old.dtype.kind == "f" and old.size > 1
        assert np.array_equal(old, new) != number, name
        if number:
            assert np.unique(new).size == new.size or new.size > 1000, name


# ---- inputs that a model has no numbers for -----------------------------------------------------


def test_a_small_part_of_a_large_output_is_seen():
    """A branch that makes 2 of 20,002 elements: no probe meets it, but its living units are found and moved."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((4, 8)).astype(np.float32),
        "w2": rng.standard_normal((8, 2)).astype(np.float32),
        "big": rng.standard_normal((4, 20000)).astype(np.float32),
    }
    program = program_from_nodes(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w2"], ["c"]),
            node("MatMul", ["x", "big"], ["d"]),
            node("Concat", ["c", "d"], ["y"], axis=1),
        ],
        {"x": [1, 4]},
        ["y"],
        weights,
    )
    for seed in range(8):
        assert oracle.check(program, half(program), seed=seed).verdict == "passed"


def two_convolutions(beside: list, inputs: dict, initializers: dict | None = None):
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "w2": rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
    }
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Relu", ["a"], ["b"]), node("Conv", ["b", "w2"], ["y"])]
    shapes = {**inputs, "x": [1, 3, 4, 4]}
    return program_from_nodes([*nodes, *beside], shapes, ["y", "z"], weights | (initializers or {}))


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Acosh"])
def test_an_output_without_numbers_hides_nothing_else(op):
    program = two_convolutions([node(op, ["u"], ["z"])], {"u": [1, 5]})
    assert oracle.check(program, half(program)).verdict == "passed"


def test_what_only_reaches_an_output_without_numbers_is_inconclusive():
    """The square root of a negative number at every draw: nothing would be seen, so nothing is claimed."""
    program = program_from_nodes(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w2"], ["c"]),
            node("Mul", ["c", "c"], ["square"]),
            node("Sub", ["minus", "square"], ["d"]),
            node("Sqrt", ["d"], ["y"]),
        ],
        {"x": [1, 4]},
        ["y"],
        {
            "w1": np.ones((4, 8), np.float32),
            "w2": np.ones((8, 4), np.float32),
            "minus": np.float32(-1).reshape(()),
        },
    )
    assert oracle.check(program, half(program)).verdict == "inconclusive"


def test_a_first_input_without_axes():
    program = two_convolutions([node("Neg", ["u"], ["z"])], {"u": []})
    assert oracle.check(program, half(program)).verdict == "passed"


def test_numbers_that_are_missing_on_one_side_only_are_wrong():
    a, nan = np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0])
    assert comparison.relative_error({"y": nan}, {"y": nan}) == 0.0
    assert comparison.relative_error({"y": nan}, {"y": np.array([1.0, np.nan, 4.0])}) == pytest.approx(1 / 3)
    for left, right in ((a, nan), (nan, a), (np.array([np.nan]), np.array([np.nan]))):
        assert comparison.relative_error({"y": left}, {"y": right}) == np.inf
    up, down = np.array([1.0, np.inf]), np.array([1.0, -np.inf])
    assert comparison.relative_error({"y": up}, {"y": down}) == np.inf
