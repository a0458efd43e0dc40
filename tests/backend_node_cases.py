"""ONNX's node test cases as programs for a backend: what its rules say of each, and what it makes of it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_node_cases as suite

from sartor.backends.legality import check_rules
from sartor.backends.protocol import Backend, Finding, TargetOptions
from sartor.errors import SartorError
from sartor.ir.canonicalize import CANONICAL_OPS
from sartor.ir.program import CANONICAL_IR_VERSION, CANONICAL_OPSET, Program

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import onnx_node_tests as runner


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One case as a program of one node.

    Attributes:
        case: the case of the suite.
        baked: all operands but the first are initializers, as weights are; else only those that have to be.
        program: at the canonical opset, not canonicalized.
        inputs: arrays by graph input.
    """

    case: suite.NodeCase
    baked: bool
    program: Program
    inputs: dict[str, np.ndarray]

    def __str__(self) -> str:
        return f"{self.case.name}{' (operands baked)' if self.baked else ''}"


@functools.lru_cache(maxsize=1)
def cases() -> tuple[suite.NodeCase, ...]:
    """Single-node cases of operators in the canonical table, of plain tensors in types that it has."""
    return tuple(
        case
        for case in suite.all_cases()
        if case.dense
        and not case.expanded
        and len(case.model.graph.node) == 1
        and case.op_type in CANONICAL_OPS
        and not runner.outside(case)
        and not any(0 in array.shape for array in [*case.inputs.values(), *case.outputs])
    )


def prepared(case: suite.NodeCase) -> Iterator[Prepared]:
    """The case with as few operands baked as possible, and with as many."""
    static = suite.static_operands(case, runner.constant_positions())
    free = [name for name in case.inputs if name not in static]
    for baked in (False, True):
        names = [*static, *(free[1:] if baked else ())]
        if not free or (baked and len(free) < 2):  # a program has an input
            continue
        inputs = {name: array for name, array in case.inputs.items() if name not in names}
        try:
            program = runner._bare(suite.bake(case, names), {k: v.shape for k, v in inputs.items()})
            program.model.ir_version = CANONICAL_IR_VERSION
            program.shapes()
        except SartorError:
            continue
        declared = program.model.opset_imports.get("") == CANONICAL_OPSET
        if declared and case.op_type in {node.op_type for node in program.nodes()} and _in_schema(program):
            yield Prepared(case, baked, program, inputs)


def refusals(item: Prepared, backend: Backend) -> tuple[Finding, ...]:
    """What the backend's rules say against it."""
    program = backend.legalize(item.program)
    report = check_rules(program, TargetOptions(shapes=program.input_shapes), backend.rules())
    # A node may be of a quantized or a 16-bit program; which of them it is lowered as is another matter.
    return tuple(finding for finding in report.violations if finding.rule != "precision")


def observed(item: Prepared, backend: Backend) -> str:
    """What is wrong with the backend's outputs; empty if it takes the model and computes what ONNX expects."""
    try:
        found = backend.compile(item.program.to_bytes(), TargetOptions()).run(item.inputs)
    except SartorError as error:
        return f"{type(error).__name__}: {error}"
    case = item.case
    names = [value.name for value in case.model.graph.output]
    largest = max(
        (float(np.nanmax(np.abs(np.nan_to_num(o, posinf=0, neginf=0)))) for o in _floats(case)), default=0.0
    )
    # Rounding is in proportion to what was summed: 1e-4 where a transform of hundreds has a zero.
    lenient = dataclasses.replace(case, atol=case.atol + 1e-6 * largest)
    try:
        suite.compare(lenient, [found[name] for name in names])
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return ""


def _floats(case: suite.NodeCase) -> list[np.ndarray]:
    return [np.asarray(o, np.float64) for o in case.outputs if o.dtype.kind == "f" and o.size]


def _in_schema(program: Program) -> bool:
    """Whether every operand is of a type that the operator has at the canonical opset."""
    from onnx import defs

    types = program.types()
    for node in program.nodes():
        schema = defs.get_schema(node.op_type, CANONICAL_OPSET)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for index, value in enumerate(node.inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if value is not None and value.name in types:
                kind = f"tensor({_spelled(types[value.name])})"
                if kind not in allowed.get(formal.type_str, {formal.type_str}):
                    return False
    return True


def _spelled(kind: ir.DataType) -> str:
    return kind.name.lower()
