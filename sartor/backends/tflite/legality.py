"""What the route FX twin, litert-torch, LiteRT takes, and which channel counts cost time.

Channel grid, measured on an AVX-512 CPU with VNNI, ai-edge-litert 2.3.0, one thread, p10 of 60 interleaved runs of
four chained convolutions, beside other work:

    int8 3x3, 64 x C, 28 px   C = 40..48: 0.32-0.37 ms   52..64: 0.49-0.56   68..80: 0.69-0.78

So the step of int8 convolutions is 16. What was measured of float32 does not repeat well enough to say one.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import host, telemetry
from sartor.backends.legality import (
    Check,
    ModelRule,
    NodeRule,
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
from sartor.backends.tflite.operators import OPERATORS, QDQ
from sartor.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

REQUIREMENT = "sartor[tflite]"
PRECISIONS = ("f32", "f16", "int8")
MAX_OPSET = 21
MAX_RANK = 6
MAX_BYTES = 1 << 31
_TYPES = frozenset({"FLOAT", "FLOAT16", "INT32", "INT64", "BOOL"})
_GRID_OPS = ("Conv", "Gemm", "MatMul")
_FUSED = ("Bias", "Relu", "Clip")  # of Clip the bounds 0 and 6, the flatbuffer's RELU6
FUSES = {
    "Add": ("Relu", "Clip"),
    "Conv": ("BatchNormalization", *_FUSED),
    "ConvTranspose": ("BatchNormalization", *_FUSED),
    "Gemm": _FUSED,
    "MatMul": _FUSED,
}
"""As the operators of the flatbuffer show it."""


def _no_tail(program: Program, options: TargetOptions) -> Check:
    return program.tail is None, "a tail that is left as it is" if program.tail is not None else "none"


def _element_types(program: Program, options: TargetOptions) -> Check:
    try:
        types = program.types()
    except ModelError as error:
        return False, f"types are not known: {error}"
    allowed: dict[str, set[str | None]] = {
        "INT8": {name for node in program.nodes() if node.op_type in QDQ for name in _names(node)},
        "UINT8": {v.name for v in program.graph.inputs if all(u.op_type == "Cast" for u, _ in v.uses())},
    }
    wrong = [
        f"'{name}' is {kind.name.lower()}"
        for name, kind in types.items()
        if kind.name not in _TYPES and name not in allowed.get(kind.name, ())
    ]
    return not wrong, ", ".join(wrong[:5]) or f"{len(types)} values"


def _names(node: ir.Node) -> list[str]:
    return [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]


def _size(program: Program, options: TargetOptions) -> Check:
    size = sum(v.const_value.nbytes for v in program.initializers.values() if v.const_value is not None)
    return size < MAX_BYTES, f"{size} bytes"


def _canonical(program: Program, node: ir.Node) -> Check:
    from sartor.ir.canonicalize import CANONICAL_OPS

    return node.op_type in CANONICAL_OPS, node.op_type


RULES = Rules(
    model=(
        opset_at_most(MAX_OPSET),
        agreeing_precision(),
        fixed_shapes(),
        max_rank(MAX_RANK),
        ModelRule("no-tail", "Every node is understood; none is left as it is.", _no_tail),
        ModelRule(
            "element-types",
            "Values are float32, int32, int64 or bool; float16 in a program of that precision, int8 between "
            "QuantizeLinear and DequantizeLinear, uint8 for an input that a Cast reads.",
            _element_types,
        ),
        ModelRule("file-size", "Weights have less than 2 GiB: a flatbuffer's offsets are 32 bits.", _size),
    ),
    nodes=(
        no_functions(),
        known_domains(""),
        NodeRule("canonical-operator", "Operators are of the canonical table.", _canonical),
    ),
    operators=OPERATORS,
)


def rules() -> Rules:
    """Everything that the target asks of a program."""
    return RULES


def check(target: str, program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(target, PRECISIONS, options)
    return check_rules(program, options, RULES)


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Channel step of `op_type`; see the module docstring. Convolutions of 1x1 are matrix products."""
    if op_type not in _GRID_OPS or precision not in PRECISIONS:
        return 1
    kernel = (attributes or {}).get("kernel_shape") or (3,)
    wide = op_type == "Conv" and precision != "int8" and any(size != 1 for size in kernel)
    return host.vector_floats() * (2 if wide else 1)


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
        fuses=FUSES,
    )
