"""What the FX twin takes: the canonical table, in whatever precision the program has. It fuses nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends.legality import (
    Check,
    ModelRule,
    NodeRule,
    Rules,
    check_rules,
    fixed_shapes,
    opset_at_most,
)
from sartor.backends.precision import agreeing_precision
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

NAME = "reference"
PRECISIONS = ("f32", "f16", "int8")
MAX_OPSET = 21  # the canonical one: the table is proven at that
MAX_RANK = 32  # numpy's and torch's own limits lie above what a file may have


def _understood(program: Program, options: TargetOptions) -> Check:
    tail = program.tail
    return tail is None, "every node is understood" if tail is None else tail.reason()


def _known(program: Program, node: ir.Node) -> Check:
    from sartor.ir.canonicalize import CANONICAL_OPS, STRUCTURAL_OPS

    known = node.domain == "" and node.op_type in CANONICAL_OPS | STRUCTURAL_OPS | {"Constant"}
    return known or node.op_identifier() in program.model.functions, (
        f"{node.domain or 'ai.onnx'}::{node.op_type}"
    )


RULES = Rules(
    model=(
        opset_at_most(MAX_OPSET),
        agreeing_precision(),
        fixed_shapes(),
        ModelRule("understood", "Every node of the model is understood; none is left as it is.", _understood),
    ),
    nodes=(
        NodeRule(
            "canonical-operator", "Operators are of the canonical table, or functions of the model.", _known
        ),
    ),
)


def rules() -> Rules:
    """Everything that the target asks of a program."""
    return RULES


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, RULES)


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Widths are free: nothing is optimised for the reference."""
    return 1


def capabilities() -> Capabilities:
    """Capabilities; nothing of them depends on the machine."""
    return Capabilities(
        name=NAME,
        version=f"torch {importlib.metadata.version('torch')}",
        precisions=PRECISIONS,
        channel_grid={},
        control_flow=True,
        max_rank=MAX_RANK,
        notes=(
            "Computes in float64 whatever the precision: that only says which form of program is meant.",
            "Its latency is that of the reference and of no target.",
        ),
    )
