"""A small residual network for 32-pixel digits: three stages of two blocks, 32, 64 and 128 channels wide."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from residual import load_if_trained, stages, stem

WEIGHTS = Path(__file__).parent / "model.safetensors"


class DigitsNet(nn.Module):
    """Class scores `[N, 10]` of images `[N, 1, 32, 32]`."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), depth: int = 2):
        super().__init__()
        self.stem = stem(1, widths[0])
        self.blocks = stages(widths, [depth] * len(widths))
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def scaled(width: float) -> nn.Module:
    """The architecture with so many channels over those of the original, and fresh weights."""
    return DigitsNet(tuple(max(round(channels * width), 1) for channels in (32, 64, 128)))


def digits_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network, trained if `train.py` has run, and example inputs: `model.py:digits_net`."""
    return load_if_trained(DigitsNet(), WEIGHTS), (torch.zeros(1, 1, 32, 32),)
