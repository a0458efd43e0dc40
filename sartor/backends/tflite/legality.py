"""What the route FX twin, litert-torch, LiteRT takes."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from sartor.backends import telemetry
from sartor.backends.legality import (
    Check,
    ModelRule,
    Rules,
    check_rules,
    fixed_shapes,
    known_domains,
    max_rank,
    no_functions,
    opset_at_most,
)
from sartor.backends.precision import agreeing_precision
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision

if TYPE_CHECKING:
    from sartor.ir.program import Program

REQUIREMENT = "sartor[tflite]"
PRECISIONS = ("f32", "f16", "int8")
MAX_OPSET = 21
MAX_RANK = 6
_GRID_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _no_tail(program: Program, options: TargetOptions) -> Check:
    return program.tail is None, "a tail that is left as it is" if program.tail is not None else "none"


RULES = Rules(
    model=(
        opset_at_most(MAX_OPSET),
        agreeing_precision(),
        fixed_shapes(),
        max_rank(MAX_RANK),
        ModelRule("no-tail", "Every node is understood; none is left as it is.", _no_tail),
    ),
    nodes=(no_functions(), known_domains("")),
)


def check(target: str, program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(target, PRECISIONS, options)
    return check_rules(program, options, RULES)


def channel_grid(op_type: str, precision: str) -> int:
    """Channel step of `op_type`."""
    return 1


def capabilities(target: str) -> Capabilities:
    """Capabilities on this machine."""
    telemetry.import_vendor("ai_edge_litert", REQUIREMENT)
    return Capabilities(
        name=target,
        version=importlib.metadata.version("ai-edge-litert"),
        precisions=PRECISIONS,
        channel_grid={(op, p): channel_grid(op, p) for op in _GRID_OPS for p in PRECISIONS},
        control_flow=False,
        max_rank=MAX_RANK,
    )
