"""ResNet-50 and MobileNetV2, written here because torchvision is not a dependency; weights are random.

References: He et al., Deep Residual Learning (2015), table 1, with the stride in the 3x3 convolution;
Sandler et al., MobileNetV2 (2018), table 2.
"""

from __future__ import annotations

import torch
from torch import nn


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(c_out)]


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = 4 * width
        self.body = nn.Sequential(
            *conv(c_in, width, 1),
            nn.ReLU(),
            *conv(width, width, 3, stride),
            nn.ReLU(),
            *conv(width, c_out, 1),
        )
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(c_in, c_out, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    def __init__(self, classes: int = 1000):
        super().__init__()
        layers = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        c_in = 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            for index in range(depth):
                layers.append(Bottleneck(c_in, 64 * 2**stage, 2 if stage and not index else 1))
                c_in = 256 * 2**stage
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(c_in, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        wide = [*conv(c_in, hidden, 1), nn.ReLU6()] if expand != 1 else []
        depthwise = [*conv(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.body = nn.Sequential(*wide, *depthwise, *conv(hidden, c_out, 1))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    SETTINGS = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip
    """(expansion, channels, repeats, stride of the first) per row of the paper's table."""

    def __init__(self, classes: int = 1000, channels: int = 3, width: float = 1.0):
        super().__init__()

        def scaled(count: int) -> int:
            return max(8, int(count * width + 4) // 8 * 8)

        c_in = scaled(32)
        layers = [*conv(channels, c_in, 3, 2), nn.ReLU6()]
        for expand, count, repeats, stride in self.SETTINGS:
            for index in range(repeats):
                layers.append(InvertedResidual(c_in, scaled(count), stride if not index else 1, expand))
                c_in = scaled(count)
        last = max(1280, scaled(1280))
        layers += [*conv(c_in, last, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def example(size: int = 224, channels: int = 3) -> tuple[torch.Tensor, ...]:
    return (torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def resnet50() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return ResNet50().eval(), example()


def mobilenet_v2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return MobileNetV2().eval(), example()
