"""What `tape` takes. One constraint is one small function that returns (holds, what was observed).

Sartor calls this before your compiler: an illegal program must be refused here, with a reason that its author
can act on, and never by a crash further down. Every program that passes must lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.legality import (
    Check,
    ModelRule,
    NodeRule,
    Rules,
    check_rules,
    fixed_shapes,
    max_rank,
    opset_at_most,
)
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

NAME = "tape"
PRECISIONS = ("f32",)
MAX_RANK = 4
OPERATORS = (
    *("Add", "Clip", "Concat", "Conv", "Flatten", "Gemm"),
    *("GlobalAveragePool", "MatMul", "MaxPool", "Relu", "Sub"),
)


def _only_float32(program: Program, options: TargetOptions) -> Check:
    # Declared types only: a rule must also answer for programs whose shapes and types cannot be inferred.
    values = [*program.graph.inputs, *program.initializers.values()]
    others = [
        f"'{v.name}' ({v.dtype.name})" for v in values if v.dtype is not None and v.dtype.name != "FLOAT"
    ]
    return not others, f"{', '.join(others[:3])}" if others else f"{len(values)} inputs and weights"


def _known_operator(program: Program, node: ir.Node) -> Check:
    return not node.domain and node.op_type in OPERATORS, f"{node.domain or 'ai.onnx'}::{node.op_type}"


def _two_dimensional(program: Program, node: ir.Node) -> Check:
    weight = node.inputs[1]
    shape = weight.const_value.shape if weight is not None and weight.const_value is not None else ()
    return len(shape) == 4, f"a weight of rank {len(shape)}" if shape else "a weight that is computed"


def _explicit_pads(program: Program, node: ir.Node) -> Check:
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic == "NOTSET", f"auto_pad {automatic}"


def _constant_bounds(program: Program, node: ir.Node) -> Check:
    missing = [v.name for v in node.inputs[1:] if v is not None and v.const_value is None]
    return not missing, f"bounds {', '.join(map(repr, missing))}" if missing else "constant bounds"


def _plain_pool(program: Program, node: ir.Node) -> Check:
    given = {name: node.attributes.get_int(name, 0) for name in ("ceil_mode", "storage_order")}
    spatial = len(node.attributes["kernel_shape"].as_ints())
    plain = not any(given.values()) and spatial == 2 and len(node.outputs) == 1
    return plain, f"{spatial} spatial axes, {len(node.outputs)} outputs, {given}"


def _plain_gemm(program: Program, node: ir.Node) -> Check:
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)
    turned = node.attributes.get_int("transA", 0)
    return alpha == beta == 1.0 and not turned, f"alpha {alpha:g}, beta {beta:g}, transA {turned}"


RULES = Rules(
    model=(
        opset_at_most(21),
        fixed_shapes(),
        max_rank(MAX_RANK),
        ModelRule("float32-only", "Inputs and weights are float32.", _only_float32),
    ),
    nodes=(NodeRule("operator", f"Operators are {', '.join(OPERATORS)}.", _known_operator),),
    operators={
        "Conv": (
            NodeRule("conv-2d", "Convolutions have two spatial axes and constant weights.", _two_dimensional),
            NodeRule("conv-pads", "Pads of convolutions are given as numbers.", _explicit_pads),
        ),
        "Clip": (NodeRule("clip-bounds", "Bounds of Clip are constants.", _constant_bounds),),
        "MaxPool": (
            NodeRule("pool-plain", "Pooling has two spatial axes and rounds sizes down.", _plain_pool),
            NodeRule("pool-pads", "Pads of pooling are given as numbers.", _explicit_pads),
        ),
        "Gemm": (NodeRule("gemm-plain", "Gemm is x W + b, without factors.", _plain_gemm),),
    },
)


def rules() -> Rules:
    """The table; `check` applies it, and support tables are generated from it."""
    return RULES


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """numpy takes any width. A device with 32 lanes answers 32: pruning then cuts in steps of 32."""
    return 1


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the table. An unknown precision is the caller's mistake: an error, not a finding."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, RULES)


def capabilities() -> Capabilities:
    """Version of the vendor's package, and what it can do on this machine."""
    return Capabilities(
        name=NAME,
        version=f"numpy {np.__version__}",
        precisions=PRECISIONS,
        channel_grid={},  # (operator, precision) -> step; absent means that every width costs what it is
        control_flow=False,
        max_rank=MAX_RANK,
        notes=("An example: kernels are numpy, so compare its numbers with nothing.",),
    )
