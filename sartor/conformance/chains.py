"""Chains of equal layers, for what needs more work or more weights than the kit's models have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.conformance.draft import Draft

if TYPE_CHECKING:
    from sartor.ir.program import Program


def chains(layers: int, precision: str = "f32", *, channels: int = 16, size: int = 20) -> dict[str, Program]:
    """Networks of so many equal layers with a Relu after each, by the operator that they consist of.

    Args:
        layers: convolutions, or linear layers.
        precision: form of the program.
        channels: of 3x3 convolutions; a linear layer has as many weights as one of these, or nearly.
        size: height and width of the images.
    """
    of_conv, of_gemm = Draft(precision, 1), Draft(precision, 1)
    features = max(3 * channels, 256)
    x = of_conv.input("x", "N", channels, size, size)
    y = of_gemm.input("y", "N", features)
    for _ in range(layers):
        x = of_conv.node("Relu", of_conv.conv(x, channels, channels, pads=[1, 1, 1, 1]))
        y = of_gemm.node("Relu", of_gemm.gemm(y, features, features))
    of_conv.output(x, "z")
    of_gemm.output(y, "z")
    return {"Conv": of_conv.program(), "Gemm": of_gemm.program()}
