"""Costs that follow from the program alone."""

from __future__ import annotations

import dataclasses

from sartor.ir.program import Program
from sartor.ir.workload import build_workload


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """Device-independent costs of a program at its reference shapes.

    Attributes:
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm, MatMul and recurrent operators
            (1 MAC = 2 FLOP); of an If, its dearest branch; of a Loop, its body once.
        parameters: elements of float initializers, without BatchNormalization's running statistics,
            operators' settings and rank-0 constants.
        weight_bytes: bytes of all initializers, those of nodes that are left as they are included.
        peak_activation_bytes: defined in `sartor.ir.liveness`.
    """

    macs: int
    parameters: int
    weight_bytes: int
    peak_activation_bytes: int


def static_cost(program: Program) -> StaticCost:
    """MACs, parameters, weight bytes and peak activation bytes of `program`.

    Raises:
        ModelError: a shape depends on data.
    """
    workload = build_workload(program)
    priced = workload.evaluate()
    return StaticCost(
        macs=round(float(priced.macs)),
        parameters=round(float(priced.parameters)),
        weight_bytes=round(float(priced.weight_bytes)),
        peak_activation_bytes=workload.liveness.peak().bytes,
    )
