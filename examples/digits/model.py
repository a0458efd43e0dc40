"""A small residual network for 32-pixel digits: three stages of two blocks, 32, 64 and 128 channels wide."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).parent / "model.safetensors"


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a residual connection."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Class scores `[N, 10]` of images `[N, 1, 32, 32]`."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), depth: int = 2):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        c_in = widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                blocks.append(Block(c_in, width, 2 if stage and not index else 1))
                c_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c_in, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def scaled(width: float) -> nn.Module:
    """The architecture with so many channels over those of the original, and fresh weights."""
    return DigitsNet(tuple(max(round(channels * width), 1) for channels in (32, 64, 128)))


def digits_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network, trained if `train.py` has run, and example inputs: `model.py:digits_net`."""
    model = DigitsNet()
    if WEIGHTS.exists():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(WEIGHTS))
    return model.eval(), (torch.zeros(1, 1, 32, 32),)
