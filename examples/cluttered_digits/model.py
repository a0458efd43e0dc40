"""A small residual network for 96-pixel scenes: four stages, 16 to 96 channels wide, then the maximum over places."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from residual import load_if_trained, stages, stem

WEIGHTS = Path(__file__).parent / "model.safetensors"


class ClutteredDigitsNet(nn.Module):
    """Class scores `[N, 10]` of images `[N, 3, H, W]`; made for 96 pixels, runs at any size from 16."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96), depths: Sequence[int] = (2, 2, 3, 3)):
        super().__init__()
        self.stem = stem(3, widths[0], stride=2)
        self.blocks = stages(widths, depths)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # There is one digit at one place: the strongest evidence for it decides, wherever that is.
        return self.classifier(self.blocks(self.stem(image)).amax(dim=(2, 3)))


def scaled(width: float) -> nn.Module:
    """The architecture with so many channels over those of the original, and fresh weights."""
    return ClutteredDigitsNet(tuple(max(round(channels * width), 1) for channels in (16, 32, 64, 96)))


def cluttered_digits_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network, trained if `train.py` has run, and example inputs: `model.py:cluttered_digits_net`."""
    return load_if_trained(ClutteredDigitsNet(), WEIGHTS), (torch.zeros(1, 3, 96, 96),)
