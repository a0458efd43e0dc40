"""What ONNX Runtime's CPU provider takes, and which channel counts cost time.

Channel grid, measured on an AVX-512 CPU with ONNX Runtime 1.31.1, f32, one thread, minimum-like p10
of 100 interleaved runs of four chained convolutions:

    3x3, 64 x C, 28 px   C = 40..48: 1.473 ms   50..64: 1.962   66..80: 2.473   (multiples of 4)
                         C = 42, 46: 1.59, 1.67  54, 58, 62: 2.07, 2.16, 2.23   66: 2.58
    3x3, 64 x C, 14 px   C = 228..240: 1.80 ms  244..256: 1.93  260..272: 2.05;  238: 2.23, 254: 2.38
    1x1, 64 x C, 28 px   C = 104..112: 0.409 ms 116..128: 0.465  132..144: 0.525; 126: 0.509
    depthwise 3x3, 28 px C = 100..112: 0.071 ms 116..128: 0.081  132..144: 0.090; 126: 0.408
    MatMul [197,256]x[256,C]: +4 % where C passes 224, 240, 256, 272; +1 % per further 4.

int8 (QDQ) and f16, the same chains, p10 of 60 interleaved runs beside other work:

    int8 3x3, 28 px      C = 40..48: 0.35-0.39 ms   52..64: 0.49-0.56   68..80: 0.69-0.77;  46: 0.51, 62: 0.70
    int8 1x1, 28 px      C = 104..112: 0.18-0.19 ms 116..128: 0.21-0.22 132..144: 0.25-0.26; 126: 0.29
    int8 depthwise       C = 112: 0.18 ms           128: 0.20           144: 0.22;  100..126 between: 0.29-0.47
    int8 MatMul, as above: +6 % where C passes 224, 240 and 256; flat within 3 % between
    f16  3x3, 28 px      C = 40..48: 1.33 ms        52..64: 2.05        68..80: 3.0;  46: 1.62, 62: 2.47

So the step is the vector register, 16 floats: MLAS rounds output channels up to its NCHWc block. A
width that is no multiple of 4 leaves the blocked layout altogether (ReorderInput requires it), up to
5x slower for depthwise. Multiples of 16 are always safe.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import host, telemetry
from sartor.backends.legality import (
    Check,
    ModelRule,
    Rules,
    boundary_types_without,
    check_rules,
    fixed_shapes,
    ir_version_at_most,
    known_domains,
    max_rank,
    opset_at_most,
)
from sartor.backends.precision import agreeing_precision
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision

if TYPE_CHECKING:
    from sartor.ir.program import Program

NAME = "onnxruntime"
PRECISIONS = ("f32", "f16", "int8")
MAX_OPSET = 26  # ONNX Runtime 1.31.1 rejects newer ones
MAX_IR_VERSION = 13
MAX_RANK = 8
_GRID_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTION = ("BatchNormalization", "Bias", "BlockedAdd")
_INSIDE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")
FUSES = {
    "BatchNormalization": _INSIDE,
    "Conv": (*_CONVOLUTION, *_INSIDE),
    "ConvTranspose": ("BatchNormalization",),
    "Gather": ("Siblings",),
    "Gemm": (
        *("Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign"),
        "ThresholdedRelu",
    ),
    "LayerNormalization": ("Add before",),
    "MatMul": ("Bias", "Scale before", "Scale behind", "Transpose before"),
    "Sigmoid": ("Silu",),
    "Slice": ("Siblings",),
}
"""As its profiler shows it: the pair is one kernel. In the blocked layout a BatchNormalization that follows no
convolution becomes a depthwise one, and takes an activation in."""


def _dialect_has_bodies(program: Program, options: TargetOptions) -> Check:
    called = {n.op_identifier() for n in program.nodes() if n.domain == "sartor"}
    missing = sorted(name for _, name, _ in called - set(program.model.functions))
    return not missing, f"no body for {missing}" if missing else f"{len(called)} dialect functions"


@functools.cache
def rules() -> Rules:
    """Everything that the target asks of a program; made when asked for, because it reads ONNX's schemas."""
    from sartor.backends.onnxruntime.operators import OPERATORS

    return Rules(
        model=(
            opset_at_most(MAX_OPSET),
            ir_version_at_most(MAX_IR_VERSION),
            agreeing_precision(),
            fixed_shapes(),
            max_rank(MAX_RANK),
            boundary_types_without("BFLOAT16"),
            ModelRule(
                "dialect-bodies", "Every function of the 'sartor' domain has its body.", _dialect_has_bodies
            ),
        ),
        nodes=(known_domains("", "ai.onnx.ml", "com.microsoft"),),
        operators=OPERATORS,
    )


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, rules())


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Channel step of `op_type`; see the module docstring."""
    return host.vector_floats() if op_type in _GRID_OPS and precision in PRECISIONS else 1


def capabilities() -> Capabilities:
    """Capabilities on this machine."""
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    return Capabilities(
        name=NAME,
        version=runtime.__version__,
        precisions=PRECISIONS,
        channel_grid={(op, p): channel_grid(op, p) for op in _GRID_OPS for p in PRECISIONS},
        control_flow=True,
        max_rank=MAX_RANK,
        fuses=FUSES,
        notes=(
            "CPU execution provider, sequential execution, all graph optimisations.",
            "Convolution widths that are no multiple of 4 leave the blocked layout and run slower.",
            "f16 halves the file; the CPU provider has few kernels for it and computes the rest in f32.",
        ),
    )
