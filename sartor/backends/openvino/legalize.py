"""What OpenVINO needs rewritten: functions of the `sartor` domain, and activations in int8.

Its reader does not know the functions. Activations are uint8 to its kernels, and OpenVINO 2026.4.1 computes something
else where int8 ones meet in a Concat before a quantized layer: its quantization is moved in front of the Concat, and
what is quantized there is first cut to whole numbers. In uint8 the same program is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """Exits as `If`, the dialect's other functions inlined, activations in uint8; the program itself without either."""
    from sartor.backends.signed import activations_to_uint8
    from sartor.ir.dialect import inline_dialect
    from sartor.ir.exits import with_choices

    return activations_to_uint8(inline_dialect(with_choices(program)))
