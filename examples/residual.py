"""Residual blocks, of which the networks of the examples are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn


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


def stem(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """The first convolution: `[N, channels, H, W]` to `[N, width, H / stride, W / stride]`."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


def stages(widths: Sequence[int], depths: Sequence[int]) -> nn.Sequential:
    """Blocks of each width in turn, after a `stem` of the first; every later width begins at half the resolution."""
    blocks: list[nn.Module] = []
    c_in = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            blocks.append(Block(c_in, width, 2 if stage and not index else 1))
            c_in = width
    return nn.Sequential(*blocks)


def load_if_trained(model: nn.Module, weights: Path) -> nn.Module:
    """The model in inference mode, with the weights of a file if it is there."""
    if weights.exists():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model.eval()
