"""What OpenVINO's CPU plugin takes, and which channel counts cost time.

Channel grid, measured on an AVX-512 CPU with OpenVINO 2026.4.1, f32, one thread, p10 of 100
interleaved runs of four chained convolutions:

    3x3, 64 x C, 28 px   C = 40..48: 1.52-1.57 ms   50..64: 1.93-2.07   66..80: 2.31-2.51
    3x3, 64 x C, 14 px   C = 232..240: 1.80-1.82 ms 242..256: 1.88-1.93 258..272: 2.01-2.05
    1x1, 64 x C, 28 px   C = 104..112: 0.49-0.50 ms 114..128: 0.54-0.56 130..144: 0.59-0.62
    MatMul [197,256]x[256,C]: +5 % where C passes 224; +4 % where it passes 240, 256 and 272

bf16, the same first convolution: C = 40..48: 0.79-0.84 ms, 50..64: 0.98-1.08, 66..80: 1.23-1.34.

int8 (QDQ), p10 of 60 interleaved runs beside other work:

    3x3, 64 x C, 28 px   C = 40..48: 0.38-0.42 ms   50..64: 0.54-0.60   66..80: 0.77-0.86
    1x1, 64 x C, 28 px   C = 104..112: 0.21-0.22 ms 114..128: 0.24-0.25 130..144: 0.28-0.29
    depthwise 3x3, 28 px C = 100..112: 0.17-0.18 ms 116..128: 0.19-0.21 132..144: 0.22-0.23
    MatMul [197,256]x[256,C]: C = 224, 240, 256: 0.22, 0.24, 0.27 ms; widths between them: +4 to +11 %

So the step is the vector register, 16 floats; inside a step the time is flat within 5 % (f32) or
10 % (bf16), and widths that are no multiple of 4 cost nothing extra.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import host, telemetry
from sartor.backends.legality import (
    Rules,
    boundary_types_without,
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

NAME = "openvino"
REQUIREMENT = "sartor[openvino]"
PRECISIONS = ("f32", "bf16", "f16", "int8")
MAX_OPSET = 25
MAX_RANK = 8
_GRID_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = (
    *("Relu", "Clip", "LeakyRelu", "Elu", "Gelu", "HardSwish", "Mish", "Sigmoid", "Silu", "Softplus", "Tanh"),
)
_CHAINS = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Neg",
        "Abs",
        "Exp",
        "Min",
        "Max",
        "BatchNormalization",
    ),
    *("Relu", "Clip", "LeakyRelu", "Elu", "Gelu", "HardSwish", "Sigmoid", "Tanh", "Erf"),
)
FUSES = {
    "Conv": ("BatchNormalization", "Bias", "InPlaceAdd", "Scale", "Chain", *_ACTIVATIONS),
    "ConvTranspose": ("BatchNormalization", "Bias"),
    "Elementwise": _CHAINS,
    "Gather": ("Siblings", "Views"),
    "Gemm": ("Bias", "Scale", "Chain", *_ACTIVATIONS),
    "Image": ("Reorder",),
    "MatMul": ("Attention", "Bias", "Scale", "Chain", *_ACTIVATIONS),
    "Slice": ("Siblings", "Views"),
    "Transpose": ("Views",),
}
"""As its profiler shows it: the pair is one kernel; any chain of elementwise operators is one (`Subgraph`)."""


@functools.cache
def rules() -> Rules:
    """Everything that the target asks of a program; made when asked for, because it reads ONNX's schemas."""
    from sartor.backends.openvino.operators import OPERATORS

    return Rules(
        model=(
            opset_at_most(MAX_OPSET),
            agreeing_precision(),
            fixed_shapes(),
            max_rank(MAX_RANK),
            boundary_types_without("BFLOAT16"),
        ),
        nodes=(no_functions(), known_domains("", "com.microsoft")),
        operators=OPERATORS,
    )


def supported_precisions() -> tuple[str, ...]:
    """Precisions on this CPU: bf16 only where it has the instructions; the others run everywhere."""
    return tuple(p for p in PRECISIONS if p != "bf16" or host.bfloat16())


def computed_in(precision: str) -> str:
    """The hint for what is not quantized: the runtime's own default may be bf16.

    A program in f16 is computed in f32 by a CPU without such instructions.
    """
    if precision == "f16":
        openvino = telemetry.import_vendor("openvino", REQUIREMENT)
        computes_in = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "f16" if "FP16" in computes_in else "f32"
    return "bf16" if precision == "bf16" else "f32"


def check(program: Program, options: TargetOptions) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(NAME, supported_precisions(), options)
    return check_rules(program, options, rules())


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Channel step of `op_type`; see the module docstring."""
    return host.vector_floats() if op_type in _GRID_OPS and precision in PRECISIONS else 1


def capabilities() -> Capabilities:
    """Capabilities on this machine."""
    openvino = telemetry.import_vendor("openvino", REQUIREMENT)
    precisions = supported_precisions()
    return Capabilities(
        name=NAME,
        version=openvino.__version__.split("-")[0],
        precisions=precisions,
        channel_grid={(op, p): channel_grid(op, p) for op in _GRID_OPS for p in precisions},
        control_flow=True,
        max_rank=MAX_RANK,
        fuses=FUSES,
        notes=(
            "CPU device, one stream, precision hint always explicit, threads not pinned.",
            "int8: activations are uint8; with a free batch the model is compiled for each size that comes.",
            "int8: what is not quantized is computed in f32. f16: computed in "
            f"{computed_in('f16')} on this CPU.",
        ),
    )
