"""Kernel times from LiteRT's profiler, mapped back to the nodes of the program.

XNNPACK names its kernels but not the operators that they compute. Both are in execution order, so they are aligned
by type; a kernel that fits nothing (a clamp behind an addition, a copy of the delegate's own) goes with the operator
before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.backends.artifact import concrete_shapes, verify_files
from sartor.backends.inputs import random_inputs
from sartor.backends.precision import require_lowered_for
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions, require_precision
from sartor.backends.tflite import legality, profiler, run

_WARM_UP_RUNS = 3
_KERNELS: Mapping[str, tuple[str, ...]] = {
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution",),
    "TRANSPOSE_CONV": ("Deconvolution",),
    "BATCH_MATMUL": ("Batch Matrix Multiply", "Fully Connected"),
    "SUB": ("Subtract",),
    "MUL": ("Multiply",),
    "DIV": ("Divide",),
    "MAX_POOL_2D": ("Max Pooling",),
    "AVERAGE_POOL_2D": ("Average Pooling", "Mean"),
    "LOGISTIC": ("Sigmoid",),
    "NEG": ("Negate",),
    "PAD": ("Constant Pad",),
    "PADV2": ("Constant Pad",),
    "RESHAPE": ("Copy", "Static Reshape"),
    "EXPAND_DIMS": ("Copy",),
    "SQUEEZE": ("Copy",),
    "CONCATENATION": ("Copy", "Concat"),
    "SPLIT": ("Copy", "Split", "Slice"),
    "SLICE": ("Slice", "Copy"),
    "STRIDED_SLICE": ("Slice", "Copy"),
    "QUANTIZE": ("Convert",),
    "DEQUANTIZE": ("Convert",),
    "CAST": ("Convert",),
    "RELU": ("Clamp",),
    "RELU6": ("Clamp",),
    "RELU_N1_TO_1": ("Clamp",),
    "RSQRT": ("Reciprocal Square Root",),
    "POW": ("Power",),
    "SUM": ("Sum",),
}
"""What XNNPACK's kernels of an operator are called, where it is not the operator's own name."""


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per kernel over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    verify_files(artifact)
    require_precision(artifact.target, legality.PRECISIONS, options)
    require_lowered_for(artifact, options)
    concrete_shapes(artifact.inputs, options.shapes)
    border = run.Border(artifact.inputs, artifact.metadata)
    inputs = random_inputs(artifact.inputs, {**artifact.shapes, **options.shapes}, seed=0)
    recorded = profiler.record(artifact.main_file, border.given(inputs), options.threads, _WARM_UP_RUNS, runs)
    operators = artifact.metadata["operators"]
    owners = assigned(recorded[-1], [operator["op_type"] for operator in operators])
    kernels = []
    for position, event in enumerate(recorded[-1]):
        owner = owners[position]
        samples = [events[position].seconds for events in recorded if len(events) == len(recorded[-1])]
        kernels.append(
            KernelTime(
                name=f"{position}:{event.name}",
                op_type=operators[owner]["op_type"] if owner >= 0 else event.name,
                nodes=tuple(operators[owner]["nodes"]) if owner >= 0 else (),
                median_s=statistics.median(samples),
                runs=len(samples),
                implementation=event.name,
            )
        )
    return kernels


def assigned(events: Sequence[profiler.Event], op_types: Sequence[str]) -> list[int]:
    """Operator that each event belongs to, by index; -1 when none comes before it.

    Kernels and operators are aligned so that as many kernels as possible fit the operator that they stand for.
    """
    best = np.zeros((len(events) + 1, len(op_types) + 1), np.int32)
    for i in reversed(range(len(events))):
        for j in reversed(range(len(op_types))):
            both = best[i + 1, j + 1] + 1 if _fits(events[i], j, op_types[j]) else 0
            best[i, j] = max(both, best[i + 1, j], best[i, j + 1])
    found: list[int] = []
    last, j = -1, 0
    for i, event in enumerate(events):
        k = j
        while k < len(op_types) and best[i, k] == best[i, j]:
            if _fits(event, k, op_types[k]) and best[i, j] == best[i + 1, k + 1] + 1:
                last, j = k, k + 1
                break
            k += 1
        found.append(last)
    return found


def _fits(event: profiler.Event, index: int, op_type: str) -> bool:
    if event.operator >= 0:  # LiteRT's own kernel, which knows
        return event.operator == index
    names = _KERNELS.get(op_type, (op_type.replace("_", ""),))
    flat = event.name.replace(" ", "").lower()
    return any(flat.startswith(name.replace(" ", "").lower()) for name in names)
