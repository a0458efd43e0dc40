"""A sample of benchmarks/onnx_node_tests.py: nothing fails, and what is unsupported has a reason of a stated kind."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import sys
from pathlib import Path

import numpy as np
import onnx_node_cases as suite
import pytest

from sartor.ir import fx
from sartor.ir.canonicalize import CANONICAL_OPS
from sartor.ir.torch_ops import OPERATORS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import onnx_node_tests as runner

EVERY = 6
KINDS = re.compile(r"^(operator \S+|type (FLOAT8\w*|FLOAT4\w*|U?INT4|U?INT2|STRING|sequence|optional))$")


def case_of(name: str) -> suite.NodeCase:
    return next(case for case in suite.all_cases() if case.name == name)


def sample() -> list[suite.NodeCase]:
    """Every sixth case, and the first of every operator in the table."""
    cases = suite.all_cases()
    first: dict[str, suite.NodeCase] = {}
    for case in cases:
        first.setdefault(case.op_type, case)
    chosen = {
        case.name: case
        for case in [*cases[::EVERY], *(first[n] for n in sorted(first) if n in CANONICAL_OPS)]
    }
    return list(chosen.values())


def test_sample_passes_or_has_a_reason(tmp_path: Path) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for case in sample():
        outcome = runner.examine(case, tmp_path)
        counts[outcome.status] += 1
        assert outcome.status != "failed", f"{case.name}: {outcome.kind}: {outcome.detail}"
        if outcome.status == "unsupported":
            assert KINDS.match(outcome.kind), f"{case.name}: {outcome.kind}"
            kind, _, name = outcome.kind.partition(" ")
            assert kind == "type" or name not in CANONICAL_OPS, f"{case.name} refuses '{name}' of the table"
            assert outcome.detail
    assert counts["passed"] > 250


def test_the_suite_is_complete() -> None:
    """All cases of the installed package are collected, expansions and several data sets included."""
    cases = suite.all_cases()
    assert len(cases) > 1800
    assert sum(case.expanded for case in cases) > 400
    assert {case.op_type for case in cases} >= CANONICAL_OPS - {"GlobalLpPool"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test_nonzero_example", "operator NonZero"),
        ("test_bernoulli", "operator Bernoulli"),
        ("test_loop11", "operator Loop"),
        ("test_cast_FLOAT_to_INT4", "type INT4"),
        ("test_identity_sequence", "type sequence"),
        ("test_equal_string", "type STRING"),
    ],
)
def test_kinds_of_refusal(name: str, kind: str, tmp_path: Path) -> None:
    outcome = runner.examine(case_of(name), tmp_path)
    assert (outcome.status, outcome.kind) == ("unsupported", kind)
    assert outcome.detail


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_nonzero_example", "the shape of its result depends on data"),
        ("test_unique_sorted_without_axis", "the shape of its result depends on data"),
        ("test_bernoulli", "its result is random"),
        ("test_scan9_sum", "it is a loop"),
        ("test_bitcast_float32_to_int32", "opset 21 does not have"),
    ],
)
def test_refusals_say_why(name: str, reason: str, tmp_path: Path) -> None:
    assert reason in runner.examine(case_of(name), tmp_path).detail


def test_a_wrong_operator_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("test_lstm_bidirectional")
    assert runner.examine(case, tmp_path).status == "passed"
    right = OPERATORS["LSTM"].function

    @functools.wraps(right)
    def wrong(*operands, **attributes):  # type: ignore[no-untyped-def]
        return tuple(result * 1.01 for result in right(*operands, **attributes))

    monkeypatch.setitem(OPERATORS, "LSTM", dataclasses.replace(OPERATORS["LSTM"], function=wrong))
    assert runner.examine(case, tmp_path).kind == "differs"


def test_a_refusal_of_a_table_operator_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPERATORS, "Relu")
    outcome = runner.examine(case_of("test_relu"), tmp_path)
    assert (outcome.status, outcome.kind) == ("failed", "refused")


def test_a_crash_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fx, "run_twin", crash)
    outcome = runner.examine(case_of("test_relu"), tmp_path)
    assert (outcome.status, outcome.kind) == ("failed", "crashed")


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bit_floats_stay(kind: str, tmp_path: Path) -> None:
    """Every supported case that gives 16-bit floats gives them on the twin, at opset 21 or through a Cast."""
    seen = 0
    for case in suite.all_cases():
        if not case.dense or case.expanded or all(o.dtype.name != kind for o in case.outputs) or seen == 12:
            continue
        outcome = runner.examine(case, tmp_path)  # compares element types
        assert outcome.status in ("passed", "unsupported"), f"{case.name}: {outcome.detail}"
        seen += outcome.status == "passed"
    assert seen == 12


def test_constant_operands_are_baked() -> None:
    case = case_of("test_reshape_reduced_dims")
    names = suite.static_operands(case, runner.constant_positions())
    assert names == ["shape"]
    model = suite.bake(case, names)
    assert [value.name for value in model.graph.input] == ["data"]
    np.testing.assert_array_equal(
        suite.numpy_helper.to_array(model.graph.initializer[0]), case.inputs["shape"]
    )
