"""Precision is a property of the program: a pass makes it, and an artifact of another one is refused.

* `f32`: float32 throughout, nothing quantized.
* `bf16`: the same program, which the runtime computes in bfloat16.
* `f16`: weights and activations in float16, as the pass `cast` makes it.
* `int8`: QuantizeLinear and DequantizeLinear, as the pass `quantize` makes it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sartor.backends.legality import Check, ModelRule
from sartor.errors import UsageError

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact, TargetOptions
    from sartor.ir.program import Program

_HOW = {
    "int8": "quantize it first (passes fold-batch-norm,quantize), or use --precision f32",
    "f16": "cast it first (pass cast), or use --precision f32",
}


def precision_of(program: Program) -> str:
    """What the program is written in: `int8`, `f16` or `f32`. `bf16` is up to the runtime."""
    return _form(program)[0]


def _form(program: Program) -> tuple[str, str]:
    from sartor.ir.canonicalize import QUANTIZED

    for node in program.graph.all_nodes():
        if node.op_type in QUANTIZED and not node.domain:
            return "int8", f"node '{node.name}' is a {node.op_type}"
    for name, dtype in _types(program).items():
        if dtype == "FLOAT16":
            return "f16", f"'{name}' is float16"
    return "f32", "nothing is quantized or in float16"


def _types(program: Program) -> dict[str, str]:
    """Element types by value; those that are declared, where others are not known."""
    from sartor.errors import ModelError

    try:
        return {name: dtype.name for name, dtype in program.types().items()}
    except ModelError:  # of an operator that nothing is known of; another rule says so
        declared = (*program.graph.inputs, *program.initializers.values())
        return {value.name or "": value.dtype.name for value in declared if value.dtype is not None}


def agreeing_precision() -> ModelRule:
    """The program is written in the precision that is asked for."""

    def check(program: Program, options: TargetOptions) -> Check:
        found, why = _form(program)
        wanted = _written(options.precision)
        advice = f"use --precision {found}" if found != "f32" else _HOW.get(wanted, "")
        return found == wanted, f"{found} ({why})" + ("" if found == wanted else f"; {advice}")

    return ModelRule("precision", "The program is written in the precision that it is lowered for.", check)


def as_lowered(artifact: Artifact, options: TargetOptions) -> TargetOptions:
    """Options in the precision of the artifact, so that artifacts of several can be measured against each other."""
    same = _written(artifact.precision) == _written(options.precision)
    return options if same else dataclasses.replace(options, precision=artifact.precision)


def require_lowered_for(artifact: Artifact, options: TargetOptions) -> None:
    """Refuse to run an artifact in a precision that it was not lowered for.

    Raises:
        UsageError: names both; f32 and bf16 are one program.
    """
    made, wanted = artifact.precision, options.precision
    if _written(made) != _written(wanted):
        raise UsageError(
            f"The artifact '{artifact.files[0]}' was lowered for precision '{made}' and cannot run in '{wanted}'. "
            f"Use --precision {made}, or lower the program for '{wanted}'."
        )


def _written(precision: str) -> str:
    """The precision that a program is written in, which bf16 is none of."""
    return "f32" if precision == "bf16" else precision
