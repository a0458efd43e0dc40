"""What TensorFlow Lite Micro takes: what the conversion takes, of one sample, in float32 or int8.

Which operators it has kernels for is a question about the flatbuffer; lowering runs its allocator, which says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.legality import Check, ModelRule, Rules, check_rules
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision
from sartor.backends.tflite import legality as tflite

if TYPE_CHECKING:
    from sartor.ir.program import Program

NAME = "tflite-micro"
REQUIREMENT = "sartor[tflite-micro]"
MODULE = "tflite_micro.python.tflite_micro.runtime"
PRECISIONS = ("f32", "int8")


def _one_sample(program: Program, options: TargetOptions) -> Check:
    shapes = {**program.input_shapes, **options.shapes}
    wrong = {name: shapes[name] for name in program.batch.inputs if shapes.get(name, (1,))[0] != 1}
    return not wrong, ", ".join(f"'{n}' has shape {list(s)}" for n, s in wrong.items()) or "one sample"


RULES = dataclasses.replace(
    tflite.RULES,
    model=(
        *tflite.RULES.model,
        ModelRule("one-sample", "The batch is 1: a microcontroller's arena holds one sample.", _one_sample),
    ),
)


def rules() -> Rules:
    """Everything that the target asks of a program."""
    return RULES


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Always 1: the reference kernels know no vectors."""
    return 1


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, RULES)


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
        max_rank=tflite.MAX_RANK,
        notes=(
            "Portable reference kernels: times on this machine are not those of a microcontroller.",
            "The arena in an artifact's metadata is what the allocator plans: bytes of head and tail.",
            "One thread, batch 1. The package exists as a pre-release only.",
        ),
    )
