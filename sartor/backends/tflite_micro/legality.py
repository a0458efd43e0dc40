"""What TensorFlow Lite Micro takes: what the conversion takes, of one sample, in float32 or int8.

Which operators it has kernels for is a question about the flatbuffer. `operators` has what is known of it; for the
rest, lowering runs the allocator, which says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.legality import Check, ModelRule, Rules, boundary_types_without, check_rules, max_rank
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision
from sartor.backends.tflite import legality as tflite

if TYPE_CHECKING:
    from sartor.ir.program import Program

NAME = "tflite-micro"
REQUIREMENT = "sartor[tflite-micro]"
MODULE = "tflite_micro.python.tflite_micro.runtime"
PRECISIONS = ("f32", "int8")
MAX_RANK = 5  # of its TRANSPOSE


def _one_sample(program: Program, options: TargetOptions) -> Check:
    shapes = {**program.input_shapes, **options.shapes}
    wrong = {name: shapes[name] for name in program.batch.inputs if shapes.get(name, (1,))[0] != 1}
    return not wrong, ", ".join(f"'{n}' has shape {list(s)}" for n, s in wrong.items()) or "one sample"


@functools.cache
def rules() -> Rules:
    """Everything that the target asks of a program; made when asked for, because it reads ONNX's schemas."""
    from sartor.backends.tflite_micro.operators import OPERATORS

    return dataclasses.replace(
        tflite.RULES,
        model=(
            *(rule for rule in tflite.RULES.model if rule.id != "tensor-rank"),
            max_rank(MAX_RANK),
            boundary_types_without("UINT8"),
            ModelRule(
                "one-sample", "The batch is 1: a microcontroller's arena holds one sample.", _one_sample
            ),
        ),
        operators=OPERATORS,
    )


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Always 1: the reference kernels know no vectors."""
    return 1


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, rules())


def capabilities() -> Capabilities:
    """Capabilities of the interpreter."""
    import importlib.metadata

    telemetry.import_vendor(MODULE, REQUIREMENT)
    return Capabilities(
        name=NAME,
        version=importlib.metadata.version("tflite-micro"),
        precisions=PRECISIONS,
        channel_grid={},
        control_flow=False,
        max_rank=MAX_RANK,
        fuses=tflite.FUSES,
        notes=(
            "Portable reference kernels: times on this machine are not those of a microcontroller.",
            "The arena in an artifact's metadata is what the allocator plans: bytes of head and tail.",
            "One thread, batch 1. The package exists as a pre-release only.",
        ),
    )
