"""The program in training: its twin, which takes and gives what the original does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sartor.ir.fx import to_fx, twin_info
from sartor.ir.program import Program
from sartor.recovery.sizes import Sizes
from sartor.recovery.twins import Predict, predictor


class Student:
    """A trainable twin for samples at the original's size.

    Args:
        program: what is trained.
        original: what the samples are for.

    Attributes:
        gm: the twin in float32, for samples at the program's own size.
        sizes: how samples are made those.
        names: of its inputs, in order.

    Raises:
        UsageError: samples for the original cannot be resized for the program.
    """

    def __init__(self, program: Program, original: Program):
        self.sizes = Sizes.between(program, original)
        self.gm = to_fx(program, dtype=torch.float32)
        info = twin_info(self.gm)
        self.names, self._outputs = info.inputs, info.outputs

    def given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs for `gm` of inputs for the original."""
        return self.sizes.given(self.names, inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Outputs by name, maps at the original's size.

        Args:
            inputs: as the original takes them.
        """
        results = self.gm(*self.given(inputs))
        return self.sizes.taken(dict(zip(self._outputs, results, strict=True)))

    def predictor(self) -> Predict:
        """From arrays at the original's size to arrays at the original's size, in eval mode."""
        return predictor(self.gm, self.sizes)
