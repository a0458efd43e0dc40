"""Channel groups inside the branches of `If` and through them; both branches are always checked.

The truth here is brute force: the pruned program against MASKED in float64 with the condition forced each
way, and ONNX Runtime on the shipped bytes against the twin. Planted bugs (one branch narrowed, one branch's
number left behind) must be seen.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from builders import random_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_files import random, run, weights
from random_graphs import legal_plans, programs

from sartor import oracle
from sartor.comparison import relative_error
from sartor.conditions import cases
from sartor.errors import UnsupportedOperatorError
from sartor.ir.blocks import residual_blocks
from sartor.ir.bodies import body_graphs
from sartor.ir.branches import flatten, flattened, nest
from sartor.ir.canonicalize import check_operators
from sartor.ir.capture import capture
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import Program, Source
from sartor.ir.verify import verify_program
from sartor.ir.workload import build_workload
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.structure import structure_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def program(
    folder: Path, signature: str, body: str, arrays: Mapping[str, Sequence[int] | np.ndarray]
) -> Program:
    """A loaded file in ONNX's text form: `signature` is `(inputs) => (outputs)`, `arrays` are shapes or values."""
    model = onnx.parser.parse_model(f"{HEAD} main {signature} {{ {body} }}")
    for name, value in arrays.items():
        array = isinstance(value, np.ndarray)
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(value, name) if array else weights(name, *value, seed=len(arrays))
        )
    onnx.checker.check_model(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return load(path)


def conditions(prog: Program) -> list[dict[str, np.ndarray]]:
    """Random inputs for every combination of the boolean graph inputs."""
    flags = [v.name for v in prog.graph.inputs if v.dtype == ir.DataType.BOOL]
    rest = {v.name: random(*prog.input_shapes[v.name]) for v in prog.graph.inputs if v.name not in flags}
    return [
        rest | {f: np.array(b) for f, b in zip(flags, bits, strict=True)}
        for bits in itertools.product([True, False], repeat=len(flags))
    ]


def half(analysis, seed: int = 0, only: str | None = None) -> Plan:
    """Keeps a random half of every group, as its floors allow."""
    generator = np.random.default_rng(seed)
    entries = {
        g.name: GroupPlan(g.size, g.keep_best(generator.random(g.size), g.size // 2))
        for g in analysis.groups
        if only in (None, g.name)
    }
    return Plan(analysis.program.source.sha256, entries)


def gap(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return max(relative_error({n: a[n]}, {n: b[n]}) for n in a)


def check(prog: Program, expected: set[str] | None = None, seeds: Sequence[int] = (0,)):
    """Every group by half: pruned equals masked whichever way, the shipped bytes run, and the oracle passes."""
    analysis = channel_groups(prog)
    if expected is not None:
        assert {g.name for g in analysis.groups} == expected
    for seed in seeds:
        plan = half(analysis, seed)
        small, zeroed = apply_plan(prog, plan, analysis), masked(prog, plan, analysis)[0]
        verify_program(small)
        verify_program(zeroed)
        for feeds in conditions(prog):
            wide, narrow = run_twin(zeroed, feeds), run_twin(small, feeds)
            assert gap(wide, narrow) <= 1e-9
            assert gap(run_twin(prog, feeds), narrow) > 1e-6  # the plan removes something that shows
            shipped = dict(zip(wide, run(small.to_bytes(), feeds), strict=True))
            assert gap(narrow, shipped) <= 1e-4
        removed = {n: len(e.keep) / e.size for n, e in plan.groups.items()}
        counted = build_workload(small)
        priced = build_workload(prog, analysis.extents)
        assert float(priced.evaluate(removed).macs) == float(counted.evaluate().macs)
        assert float(priced.peak_activation_bytes(removed)) == float(counted.peak_activation_bytes())
    assert oracle.check(prog, half(analysis), analysis=analysis).verdict == "passed"
    return analysis


def reasons(analysis) -> dict[str, tuple[str, str]]:
    return {b.value: (b.reason, b.source) for b in analysis.blocked}


CONVS = "(float[1,3,6,6] x, bool c) => (float[1,2,6,6] y)"


def both(
    then: str, otherwise: str, out: str = "h", condition: str = "c", types: str = "float[1,8,6,6]"
) -> str:
    return (
        f"{out} = If ({condition}) <then_branch = a () => ({types} t_{out}) {{ {then} }}, "
        f"else_branch = b () => ({types} e_{out}) {{ {otherwise} }}>"
    )


PAD = "<pads = [1, 1, 1, 1]>"


# ---- groups of one branch --------------------------------------------------------------------


@pytest.fixture
def inside(tmp_path: Path) -> Program:
    """A hidden width in the then-branch; everything else is the graph's output."""
    body = both(
        f"p = Conv {PAD} (x, w1, b1)  q = Relu (p)  t_y = Conv (q, w2)", "e_y = Conv (x, w3)", "y",
        types="float[1,2,6,6]",
    )  # fmt: skip
    return program(
        tmp_path, CONVS, body, {"w1": [8, 3, 3, 3], "b1": [8], "w2": [2, 8, 1, 1], "w3": [2, 3, 1, 1]}
    )


def test_a_hidden_width_of_one_branch(inside: Program):
    analysis = channel_groups(inside)
    assert [g.name for g in analysis.groups] == ["w1"]
    assert {(m.initializer, m.axis) for m in analysis.groups[0].members} == {("w1", 0), ("b1", 0), ("w2", 1)}
    plan = half(analysis)
    small, zeroed = apply_plan(inside, plan), masked(inside, plan)[0]
    verify_program(small)
    for feeds in conditions(inside):
        assert gap(run_twin(zeroed, feeds), run_twin(small, feeds)) <= 1e-12
    assert small.initializer_array("w1").shape == (4, 3, 3, 3)


def test_the_untaken_branch_does_not_make_the_oracle_blind(inside: Program):
    """Random input takes one branch; the oracle looks at the other one, too, whatever the seed."""
    plan = half(channel_groups(inside))
    for seed in range(6):
        assert oracle.check(inside, plan, seed=seed).verdict == "passed"
        assert _verdict_with(inside, plan, "w2", seed) == "failed"


def _verdict_with(prog: Program, plan: Plan, name: str, seed: int = 0) -> str:
    """The oracle on a pruned program with one parameter rolled: the wrong indices were kept."""
    analysis = channel_groups(prog)
    original = oracle.randomise(prog, analysis, seed)
    wrong = apply_plan(original, plan, analysis)
    value = wrong.initializers[name]
    value.const_value = ir.Tensor(np.roll(value.const_value.numpy(), 1, axis=1), name=name)
    wrong.invalidate()
    mask = masked(original, plan, analysis)[0]
    return oracle.compare(original, wrong, mask, plan, analysis=analysis, seed=seed).verdict


# ---- groups that cross the boundary ----------------------------------------------------------


def test_a_captured_width(tmp_path: Path):
    """Both branches and the main graph contract one captured width."""
    body = f"k = Conv {PAD} (x, w0)  s = Relu (k)" + both(
        "t_h = Conv (s, w1, b1)", f"m = Sigmoid (s)  e_h = Conv {PAD} (m, w2)"
    ) + "r = Conv (s, w3)  z = Conv (h, w4)  y = Add (r, z)"  # fmt: skip
    arrays = {"w0": [6, 3, 3, 3], "w1": [8, 6, 1, 1], "b1": [8], "w2": [8, 6, 3, 3], "w3": [2, 6, 1, 1]}
    prog = program(tmp_path, CONVS, body, arrays | {"w4": [2, 8, 1, 1]})
    analysis = check(prog, {"w0", "w1"})
    first, second = (analysis.group(n) for n in ("w0", "w1"))
    assert {(m.initializer, m.axis) for m in first.members} == {("w0", 0), ("w1", 1), ("w2", 1), ("w3", 1)}
    assert {(m.initializer, m.axis) for m in second.members} == {("w1", 0), ("b1", 0), ("w2", 0), ("w4", 1)}


def test_a_branch_that_passes_on_what_it_captures(tmp_path: Path):
    """The else-branch gives the captured value itself, so both widths are one group."""
    body = f"s = Conv {PAD} (x, w0)" + both("p = Relu (s)  t_h = Conv (p, w1)", "e_h = Identity (s)")
    arrays = {"w0": [8, 3, 3, 3], "w1": [8, 8, 1, 1], "w2": [2, 8, 1, 1]}
    prog = program(tmp_path, CONVS, body + "y = Conv (h, w2)", arrays)
    analysis = check(prog, {"w0"})
    assert {(m.initializer, m.axis) for m in analysis.groups[0].members} == {
        ("w0", 0), ("w1", 0), ("w1", 1), ("w2", 1),
    }  # fmt: skip


def test_a_branch_without_a_weight_blocks_the_other(tmp_path: Path):
    body = (
        both(f"t_h = Conv {PAD} (x, w1)", "e_h = Expand (m, s)")
        + "p = Conv (h, w2)  q = Relu (p)  y = Conv (q, w3)"
    )
    arrays = {"w1": [8, 3, 3, 3], "w2": [5, 8, 1, 1], "w3": [2, 5, 1, 1], "s": np.array([1, 8, 6, 6])}
    signature = "(float[1,3,6,6] x, float[1,8,1,1] m, bool c) => (float[1,2,6,6] y)"
    prog = program(tmp_path, signature, body, arrays)
    analysis = check(prog, {"w2"})
    reason, source = reasons(analysis)["w1"]
    assert "no weight makes" in reason and "(If)" in source


def test_a_constant_branch_is_narrowed(tmp_path: Path):
    """One branch gives a parameter as it is: it loses the same channels."""
    body = both(f"t_h = Conv {PAD} (x, w1)", "e_h = Identity (k)") + "y = Conv (h, w2)"
    prog = program(tmp_path, CONVS, body, {"w1": [8, 3, 3, 3], "k": [1, 8, 6, 6], "w2": [2, 8, 1, 1]})
    analysis = check(prog, {"w1"})
    assert ("k", 1) in {(m.initializer, m.axis) for m in analysis.groups[0].members}


def test_numbers_in_both_branches_are_rewritten(tmp_path: Path):
    """Reshape targets, split sizes, slice bounds and gather indices inside bodies, own and captured ones."""
    then = """shape = Constant <value = int64[4] {1, 2, 6, 16}> ()
        r = Reshape (s, shape)  t = Transpose <perm = [0, 2, 1, 3]> (r)  flat = Constant <value = int64[2] {6, 32}> ()
        f = Reshape (t, flat)  t_h = MatMul (f, w1)"""
    otherwise = """sizes = Constant <value = int64[2] {12, 20}> ()  u, v = Split <axis = 0> (s2, sizes)
        g = Gather <axis = 0> (u, order)  j = Concat <axis = 0> (g, v)
        lo = Constant <value = int64[1] {3}> ()  hi = Constant <value = int64[1] {32}> ()
        ax = Constant <value = int64[1] {0}> ()  k = Slice (j, lo, hi, ax)
        w = Transpose <perm = [1, 0]> (k)  e_h = MatMul (w, w2)"""
    body = "s = MatMul (x, w0)  s3 = Reshape (s, square)  s2 = Transpose <perm = [1, 0]> (s3)" + both(
        then, otherwise, types="float[6,5]"
    ) + "y = MatMul (h, w3)"  # fmt: skip
    arrays = {"w0": [4, 32], "w1": [32, 5], "w2": [29, 5], "w3": [5, 2], "square": np.array([6, 32])}
    arrays["order"] = np.array([11, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 0])
    prog = program(tmp_path, "(float[1,6,4] x, bool c) => (float[6,2] y)", body, arrays)
    check(prog, None)


def test_a_branch_inside_a_branch(tmp_path: Path):
    inner = both(f"t_i = Conv {PAD} (s, w1)", "e_i = Conv (s, w2)", "i", "d")
    body = f"k = Conv {PAD} (x, w0)  s = Relu (k)" + both(f"{inner}  t_h = Sigmoid (i)", "e_h = Conv (s, w3)")
    arrays = {
        "w0": [6, 3, 3, 3],
        "w1": [8, 6, 3, 3],
        "w2": [8, 6, 1, 1],
        "w3": [8, 6, 1, 1],
        "w4": [2, 8, 1, 1],
    }
    signature = "(float[1,3,6,6] x, bool c, bool d) => (float[1,2,6,6] y)"
    prog = program(tmp_path, signature, body + "y = Conv (h, w4)", arrays)
    assert [n.op_type for n in prog.nodes()] == ["Conv", "Relu", "If", "Conv"]
    check(prog, {"w0", "w1"})
    plan = half(channel_groups(prog))
    for name in ("w1", "w2", "w3"):  # whichever of the three branches is wrong
        assert _verdict_with(prog, plan, name) == "failed"


def test_several_outputs(tmp_path: Path):
    signature = "(float[1,3,6,6] x, bool c) => (float[1,2,6,6] y)"
    body = """h, g = If (c) <
        then_branch = a () => (float[1,8,6,6] t1, float[1,5,6,6] t2) { t1 = Conv (x, w1)  t2 = Conv (x, w2) },
        else_branch = b () => (float[1,8,6,6] e1, float[1,5,6,6] e2) {
            p = Conv (x, w3)  e1, e2 = Split <axis = 1> (p, n) }>
        r = Conv (h, w4)  s = Conv (g, w5)  y = Add (r, s)"""
    arrays = {
        "w1": [8, 3, 1, 1],
        "w2": [5, 3, 1, 1],
        "w3": [13, 3, 1, 1],
        "w4": [2, 8, 1, 1],
        "w5": [2, 5, 1, 1],
    }
    check(program(tmp_path, signature, body, arrays | {"n": np.array([8, 5])}))


# ---- attention, norms, grouped convolutions --------------------------------------------------


def test_a_query_that_a_branch_chooses(tmp_path: Path):
    """q·k dims have no weight at the contraction: both branches' producers must give zeros in MASKED."""
    body = both(
        "t_q = MatMul (x, w1)", "a = MatMul (x, w2)  e_q = Add (a, b2)", "q", types="float[1,7,8]"
    ) + (
        "k = MatMul (x, w3)  u = Transpose <perm = [0, 2, 1]> (k)  s = MatMul (q, u)  p = Softmax <axis = -1> (s)"
        "v = MatMul (x, w4)  o = MatMul (p, v)  y = MatMul (o, w5)"
    )
    arrays = {"w1": [6, 8], "w2": [6, 8], "b2": [8], "w3": [6, 8], "w4": [6, 10], "w5": [10, 3]}
    analysis = check(
        program(tmp_path, "(float[1,7,6] x, bool c) => (float[1,7,3] y)", body, arrays), {"w1", "w4"}
    )
    assert {(m.initializer, m.axis) for m in analysis.masked_members(analysis.group("w1"))} == {
        ("w1", 1), ("w2", 1), ("b2", 0),
    }  # fmt: skip


def test_norms_and_groups_inside_a_branch(tmp_path: Path):
    then = f"p = Conv {PAD} (x, w1)  n = BatchNormalization (p, g, b, m, v)  t_h = Relu (n)"
    otherwise = "p = Conv (x, w2)  e_h = Conv <pads = [1, 1, 1, 1], group = 8> (p, w3)"
    positive = np.linspace(0.5, 1.5, 8).astype(np.float32)
    arrays = {"w1": [8, 3, 3, 3], "g": positive, "b": [8], "m": [8], "v": positive, "w2": [8, 3, 1, 1]}
    prog = program(
        tmp_path,
        CONVS,
        both(then, otherwise) + "y = Conv (h, w4)",
        arrays | {"w3": [8, 1, 3, 3], "w4": [2, 8, 1, 1]},
    )
    check(prog, {"w1"})
    drawn = oracle.randomise(prog, channel_groups(prog), 3)
    assert (
        (drawn.initializer_array("g") >= 0.5) & (drawn.initializer_array("g") <= 1.5)
    ).all()  # a scale's draw
    assert (drawn.initializer_array("v") > 0).all() and not np.array_equal(
        drawn.initializer_array("v"), positive
    )
    small = apply_plan(prog, half(channel_groups(prog)))
    depthwise = next(n for n in small.graph.all_nodes() if n.attributes.get_int("group", 1) > 1)
    assert depthwise.attributes["group"].as_int() == 4


# ---- conditions ------------------------------------------------------------------------------

EXIT = "(float[1,3,6,6] x) => (float[1,2] y)"


def early_exit(folder: Path, threshold: float = 0.0) -> Program:
    """An exit decides by its own confidence whether the rest of the network runs."""
    pooled = "GlobalAveragePool ({})  {} = Flatten ({})"
    body = (
        f"a = Conv {PAD} (x, w0)  b = Relu (a)  k = Conv (b, w1)  g = {pooled.format('k', 'f', 'g')}"
        "d = Gemm (f, w2)  s = Softmax (d)  m = ReduceMax <keepdims = 0> (s)  l = Less (m, limit)"
        + both(
            f"i = Conv {PAD} (b, w3)  j = Relu (i)  o = {pooled.format('j', 'q', 'o')}  t_y = Gemm (q, w4)",
            "e_y = Identity (d)",
            "y",
            "l",
            "float[1,2]",
        )
    )
    arrays = {"w0": [8, 3, 3, 3], "w1": [6, 8, 1, 1], "w2": [6, 2], "w3": [10, 8, 3, 3], "w4": [10, 2]}
    return program(folder, EXIT, body, arrays | {"limit": np.array(threshold, np.float32)})


@pytest.mark.parametrize("limit", [0.0, 2.0])  # never and always
def test_an_early_exit(tmp_path: Path, limit: float):
    prog = early_exit(tmp_path, limit)
    analysis = channel_groups(prog)
    assert {g.name for g in analysis.groups} == {"w0", "w1", "w3"}
    plan = half(analysis)
    assert oracle.check(prog, plan, analysis=analysis).verdict == "passed"
    for name in ("w1", "w2", "w3", "w4"):
        assert _verdict_with(prog, plan, name) == "failed", name


def test_a_group_that_only_decides_is_checked(tmp_path: Path):
    """What leads to a condition and nowhere else is compared before the comparison hides it."""
    body = (
        "a = Flatten (x)  k = Gemm (a, w1)  r = Relu (k)  d = MatMul (r, w2)  n = Squeeze (d)  l = Less (n, limit)"
        + both("t_y = Gemm (a, w3)", "e_y = Gemm (a, w4)", "y", "l", "float[1,2]")
    )
    arrays = {"w1": [12, 8], "w2": [8, 1], "w3": [12, 2], "w4": [12, 2], "limit": np.array(0.5, np.float32)}
    prog = program(tmp_path, "(float[1,3,2,2] x) => (float[1,2] y)", body, arrays)
    plan = half(channel_groups(prog))
    assert list(plan.groups) == ["w1"] and oracle.check(prog, plan).verdict == "passed"
    analysis = channel_groups(prog)
    original = oracle.randomise(prog, analysis, 0)
    wrong, mask = apply_plan(original, plan), masked(original, plan)[0]
    value = wrong.initializers["w2"]
    value.const_value = ir.Tensor(np.roll(value.const_value.numpy(), 1, axis=0), name="w2")
    wrong.invalidate()
    assert oracle.compare(original, wrong, mask, plan, analysis=analysis).verdict == "failed"


def test_a_dead_branch_is_inconclusive(tmp_path: Path):
    """A branch whose result a constant hides: an error in it would not be seen, and the oracle says so."""
    body = both(f"p = Conv {PAD} (x, w1)  q = Relu (p)  r = Conv (q, w2)  t_y = Mul (r, zero)", "e_y = Conv (x, w3)",
                "y", types="float[1,2,6,6]")  # fmt: skip
    arrays = {"w1": [8, 3, 3, 3], "w2": [2, 8, 1, 1], "w3": [2, 3, 1, 1], "zero": np.zeros((), np.float32)}
    prog = program(tmp_path, CONVS, body, arrays)
    result = oracle.check(prog, half(channel_groups(prog)))
    assert result.verdict == "inconclusive" and result.insensitive == ("w1",)


def test_cases_take_every_branch(tmp_path: Path):
    inner = both("t_i = Neg (x)", "e_i = Abs (x)", "i", "d", "float[1,4]")
    nested = program(
        tmp_path,
        "(float[1,4] x, bool c, bool d) => (float[1,4] y)",
        both(f"{inner} t_y = Relu (i)", "e_y = Sigmoid (x)", "y", types="float[1,4]"),
        {},
    )
    assert [sorted(case.values()) for case in cases(nested)] == [[True, True], [False, True], [False]]
    chain, last = "", "x"
    for i in range(6):
        chain += both(f"t_v{i} = Neg ({last})", f"e_v{i} = Abs ({last})", f"v{i}", f"c{i}", "float[1,4]")
        last = f"v{i}"
    flags = ", ".join(f"bool c{i}" for i in range(6))
    many = program(tmp_path, f"(float[1,4] x, {flags}) => (float[1,4] v5)", chain, {})
    found = cases(many)
    assert len(found) <= 8
    names = sorted(found[0])
    for a, b in itertools.combinations(names, 2):  # every two conditions meet in every way
        assert {(case[a], case[b]) for case in found} == set(itertools.product([True, False], repeat=2))


def test_a_constant_condition_inside_a_branch_is_decided(tmp_path: Path):
    inner = both("t_i = Conv (x, w1)", "e_i = Conv (x, w2)", "i", "yes")
    body = both(f"yes = Constant <value = bool {{1}}> ()  {inner}  t_h = Relu (i)", "e_h = Conv (x, w3)")
    arrays = {"w1": [8, 3, 1, 1], "w2": [8, 3, 1, 1], "w3": [8, 3, 1, 1], "w4": [2, 8, 1, 1]}
    prog = program(tmp_path, CONVS, body + "y = Conv (h, w4)", arrays)
    assert [n.op_type for n in prog.graph.all_nodes()].count("If") == 1 and "w2" not in prog.initializers
    check(prog, {"w1"})


# ---- what is stored --------------------------------------------------------------------------


def test_loading_keeps_what_is_computed(tmp_path: Path):
    """Own initializers, constants, shape arithmetic, shared names, outer values as outputs: as the file computes."""
    then = """n = Shape (x)  one = Constant <value = int64[1] {1}> ()  rest = Constant <value = int64[1] {-1}> ()
        lead = Gather <axis = 0> (n, zero)  target = Concat <axis = 0> (lead, rest)  f = Reshape (x, target)
        p = MatMul (f, w)  q = Dropout (p)  out = Add (q, bias)"""
    otherwise = """f = Flatten (x)  p = MatMul (f, w)  big = Constant <value = float[1] {2.0}> ()  out = Mul (p, big)"""
    signature = "(float[2,3,2] x, bool c) => (float[2,5] y, float[2,3,2] z)"
    text = f"""y, z = If (c) <then_branch = a () => (float[2,5] out, float[2,3,2] same)
        <float[5] bias = {{1.0, 2.0, 3.0, 4.0, 5.0}}> {{ {then}  same = Identity (x) }},
        else_branch = b () => (float[2,5] out, float[2,3,2] other) {{ {otherwise}  other = Neg (x) }}>"""
    prog = program(tmp_path, signature, text, {"w": [6, 5], "zero": np.array([0])})
    verify_program(prog)
    assert {"w", "bias"} <= set(prog.initializers)
    for graph in prog.graph.subgraphs():
        assert not graph.initializers
    assert not {"Shape", "Concat", "Dropout", "Constant"} & {n.op_type for n in prog.graph.all_nodes()}
    for feeds in conditions(prog):
        for a, b in zip(run(tmp_path / "model.onnx", feeds), run(prog.to_bytes(), feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        for a, b in zip(run(prog.to_bytes(), feeds), run_twin(prog, feeds).values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_flat_and_nested_are_inverse(tmp_path: Path):
    inner = both("t_i = Neg (s)", "e_i = Identity (s)", "i", "d", "float[1,4]")
    body = "s = Relu (x)" + both(
        f"{inner}  j = Add (i, k)  t_y = Relu (j)", "e_y = Sigmoid (s)", "y", types="float[1,4]"
    )
    prog = program(tmp_path, "(float[1,4] x, bool c, bool d) => (float[1,4] y)", body, {"k": [4]})
    before, copy = structure_of(prog), prog.clone()
    assert flatten(copy.graph) == []
    assert [n.op_type for n in copy.nodes()] == ["Relu", "Neg", "If", "Add", "Relu", "Sigmoid", "If"]
    for feeds in conditions(prog):
        assert gap(run_twin(prog, feeds), run_twin(copy, feeds)) == 0
    nest(copy.graph)
    assert structure_of(copy) == before
    assert flattened(prog.model) is not prog.model and structure_of(prog) == before


def test_nodes_stay_where_the_author_put_them(tmp_path: Path):
    """A node outside that only one branch reads is not moved into it."""
    body = "s = Exp (x)" + both("t_y = Neg (s)", "e_y = Abs (x)", "y", types="float[1,4]")
    prog = program(tmp_path, "(float[1,4] x, bool c) => (float[1,4] y)", body, {})
    assert [n.op_type for n in prog.nodes()] == ["Exp", "If"]


# ---- what stays blocked ----------------------------------------------------------------------


def test_a_loop_is_outside_the_table_wherever_it_stands():
    loop = """l = Loop (trip, go, h) <body = b (int64 i, bool k, float[1,8] s) => (bool k2, float[1,8] s2) {
        k2 = Identity (k)  q = Relu (s)  s2 = Add (q, bias) }>"""
    signature = "(float[1,4] x, int64 trip, bool go, bool c) => (float[1,2] y)"
    for body in (
        f"h = Gemm (x, w1)  {loop}  y = Gemm (l, w2)",
        both(f"h = Gemm (x, w1)  {loop}  t_y = Gemm (l, w2)", "e_y = Gemm (x, w3)", "y", types="float[1,2]"),
    ):
        model = onnx.parser.parse_model(f"{HEAD} main {signature} {{ {body} }}")
        with pytest.raises(UnsupportedOperatorError, match=r"'Loop'.*it is a loop"):
            check_operators(ir.from_proto(model))


def test_a_scan_blocks_what_it_touches_and_nothing_else():
    """In a program that did not come from the loader: the state, what is scanned and what is captured stay whole."""
    model = onnx.parser.parse_model(
        f"""{HEAD} main (float[1,4] x) => (float[1,2] y, float[3,8] z) {{
        h = Gemm (x, w1)  q = MatMul (steps, w4)
        l, z = Scan <num_scan_inputs = 1, body = b (float[1,8] s, float[8] e) => (float[1,8] t, float[8] o) {{
            r = Relu (s)  t = Add (r, bias)  o = Identity (e) }}> (h, q)
        m = Gemm (l, w2)  n = Relu (m)  y = Gemm (n, w3) }}"""
    )
    shapes = {"w1": (4, 8), "bias": (8,), "w2": (8, 6), "w3": (6, 2), "w4": (5, 8), "steps": (3, 5)}
    model.graph.initializer.extend([weights(n, *s) for n, s in shapes.items()])
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    built = Program(ir.from_proto(model), source=Source("onnx", "scan", "0" * 64), input_shapes={"x": (1, 4)})
    analysis = channel_groups(built)
    assert "w2" in {g.name for g in analysis.groups}
    narrowed = {(m.initializer, m.axis) for g in analysis.groups for m in g.members}
    assert not narrowed & {("w1", 1), ("bias", 0), ("w2", 0), ("w4", 1)}
    assert reasons(analysis)["w1"] == ("operator 'Scan' has no channel rule", "'n2' (Scan)")


# ---- random networks -------------------------------------------------------------------------


def branched(prog: Program, start: int, stop: int, seed: int) -> Program | None:
    """The nodes `start:stop` of a program in an `If`: as they are, or with other weights in the other branch."""
    proto = prog.to_proto()
    nodes, generator = list(proto.graph.node), np.random.default_rng(seed)
    inside, after = nodes[start:stop], nodes[stop:]
    made = [name for node in inside for name in node.output]
    later = {name for node in after for name in node.input} | {o.name for o in proto.graph.output}
    results = [name for name in made if name in later]
    if not results:
        return None
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    bodies = {}
    for key, tag in (("then_branch", ""), ("else_branch", "_else")):
        copies = []
        for node in inside:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name += tag
            names = []
            for name in node.input:
                if tag and name in arrays and name + tag not in arrays:
                    flat = arrays[name].ravel()
                    mixed = generator.permutation(flat) if flat.dtype.kind == "f" else flat
                    arrays[name + tag] = mixed.reshape(arrays[name].shape)
                names.append(f"{name}_in{tag}" if name in made else name + tag if name in arrays else name)
            del copy.input[:], copy.output[:]
            copy.input.extend(names)
            copy.output.extend(f"{name}_in{tag}" if name else "" for name in node.output)
            copies.append(copy)
        outputs = [
            onnx.helper.make_tensor_value_info(f"{n}_in{tag}", onnx.TensorProto.FLOAT, None) for n in results
        ]
        bodies[key] = onnx.helper.make_graph(copies, key, [], outputs)
    choice = onnx.helper.make_node("If", ["condition"], results, name="choice", **bodies)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend([*nodes[:start], choice, *after])
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    proto.graph.input.append(onnx.helper.make_tensor_value_info("condition", onnx.TensorProto.BOOL, []))
    return Program(
        ir.from_proto(proto),
        source=prog.source,
        input_shapes={**prog.input_shapes, "condition": ()},
        batch=prog.batch,
    )


def test_random_networks_with_a_choice():
    seen: collections.Counter[str] = collections.Counter()

    @given(st.data())
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def holds(data):
        plain = data.draw(programs())
        count = len(list(plain.nodes()))
        start = data.draw(st.integers(0, count - 1))
        stop = data.draw(st.integers(start + 1, min(count, start + 6)))
        prog = branched(plain, start, stop, data.draw(st.integers(0, 99)))
        if prog is None:
            return
        verify_program(prog)
        analysis = channel_groups(prog)
        plan = data.draw(legal_plans(analysis))
        small, zeroed = apply_plan(prog, plan, analysis), masked(prog, plan, analysis)[0]
        verify_program(small)
        for flag in (True, False):
            feeds = random_inputs(plain, seed=3) | {"condition": np.array(flag)}
            assert gap(run_twin(zeroed, feeds), run_twin(small, feeds)) <= 1e-9
        names = {m.initializer for g in analysis.groups if g.name in plan.groups for m in g.members}
        twins = {n for n in names if n.endswith("_else")}
        seen["both"] += any(n.removesuffix("_else") in names for n in twins)
        seen["outside"] += bool(twins) and len(names) > 2 * len(twins)

    holds()
    assert seen["both"] >= 10 and seen["outside"] >= 10, seen


def test_a_residual_block_that_chooses(tmp_path: Path):
    """A removed block takes its If along; groups and the block in one plan."""
    body = (
        f"s = Conv {PAD} (x, w0)  n = ReduceMean <keepdims = 0> (k)  l = Less (n, limit)"
        + both(
            f"p = Conv {PAD} (s, w1)  t_h = Relu (p)",
            "e_h = Conv (s, w2)",
            condition="l",
            types="float[1,6,6,6]",
        )
        + "q = Conv (h, w3, b3)  r = Add (q, s)  y = Conv (r, w4)"
    )
    body = body.replace("n = ReduceMean", "k = Conv (s, w5)  n = ReduceMean")
    arrays = {"w0": [8, 3, 3, 3], "w1": [6, 8, 3, 3], "w2": [6, 8, 1, 1], "w3": [8, 6, 1, 1], "b3": [8]}
    arrays |= {"w4": [2, 8, 1, 1], "w5": [1, 8, 1, 1], "limit": np.zeros((), np.float32)}
    prog = program(tmp_path, CONVS.replace(", bool c", ""), body, arrays)
    blocks = [b.name for b in residual_blocks(prog) if b.removable]
    assert blocks == ["Add_r"]
    analysis = channel_groups(prog)
    assert {g.name for g in analysis.groups} == {"w0", "w1"}
    for groups in ({}, half(analysis).groups):
        plan = Plan(prog.source.sha256, groups, tuple(blocks))
        assert oracle.check(prog, plan).verdict == "passed"
    assert [n.op_type for n in apply_plan(prog, plan).graph.all_nodes()] == ["Conv", "Conv"]


def test_the_oracle_looks_before_the_softmax_of_a_branch(tmp_path: Path):
    body = both(
        f"p = Conv {PAD} (x, w1)  q = Relu (p)  r = Conv (q, w2)  t_y = Softmax <axis = 1> (r)",
        "s = Conv (x, w3)  e_y = Softmax <axis = 1> (s)", "y", types="float[1,2,6,6]",
    )  # fmt: skip
    prog = program(tmp_path, CONVS, body, {"w1": [8, 3, 3, 3], "w2": [2, 8, 1, 1], "w3": [2, 3, 1, 1]})
    cut = oracle.before_softmax(prog)
    verify_program(cut)
    assert all(b.outputs[0].producer().op_type == "Conv" for n in cut.nodes() for b in body_graphs(n))
    assert all(b.outputs[0].producer().op_type == "Softmax" for n in prog.nodes() for b in body_graphs(n))
    assert oracle.check(prog, half(channel_groups(prog))).verdict == "passed"


class Chooser(torch.nn.Module):
    """torch.cond with parameters on both sides; the condition is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.large = torch.nn.Sequential(
            torch.nn.Conv2d(8, 10, 1), torch.nn.BatchNorm2d(10), torch.nn.ReLU(), torch.nn.Conv2d(10, 6, 1)
        )
        self.small = torch.nn.Conv2d(8, 6, 1)
        self.head = torch.nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(torch.cond(hard, lambda y: self.large(y), lambda y: self.small(y), (x,)))


def test_torch_cond():
    module = Chooser().eval()
    prog = capture(module, (torch.randn(1, 3, 6, 6), torch.tensor(True)))
    assert [n.op_type for n in prog.nodes()] == ["Conv", "Relu", "If", "Conv"]
    check(prog, {"stem", "large.0", "large.3"}, seeds=(0,))
    lines = {
        prog.provenance[n.name or ""].location.partition(":")[0]
        for n in prog.graph.all_nodes()
        if n.op_type == "Conv"
    }
    assert lines == {"test_if_bodies.py"}
