"""Tiny networks of the families that the canonical operator table covers, and `randomise`.

Every function returns `(module.eval(), example_inputs)` at batch 1. Spatial sizes are small and channel
counts unequal, so that a wrong axis is seen.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.nn import functional

from sartor.ir.capture import capture
from sartor.ir.program import Program

Example = tuple[nn.Module, tuple[torch.Tensor, ...]]


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Randomise every parameter and buffer in place so that the variance of activations is preserved.

    Weights ~ N(0, 2/fan_in), scales in [0.5, 1.5], biases and running means ~ N(0, 0.3), running
    variances in [0.5, 1.5]. A fresh BatchNorm (beta 0, mean 0) would hide most errors.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) * std

    def uniform(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) + 0.5

    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    with torch.no_grad():
        for _, child in sorted(module.named_modules()):
            for name, parameter in sorted(child.named_parameters(recurse=False)):
                if isinstance(child, norms) and name == "weight":
                    parameter.copy_(uniform(parameter))
                elif parameter.ndim < 2:
                    parameter.copy_(normal(parameter, 0.3))
                else:
                    fan_in = parameter[0].numel()
                    if isinstance(child, nn.ConvTranspose2d):
                        fan_in = parameter.shape[0] * math.prod(parameter.shape[2:]) // 4
                    parameter.copy_(normal(parameter, math.sqrt(2.0 / max(fan_in, 1))))
            for name, buffer in sorted(child.named_buffers(recurse=False)):
                if name == "running_var":
                    buffer.copy_(uniform(buffer))
                elif buffer.is_floating_point():
                    buffer.copy_(normal(buffer, 0.3))
    return module


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    return randomise(module, seed).eval()


def example(*shape: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),)


class ConvBn(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)
        )


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = ConvBn(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        skip = x if self.downsample is None else self.downsample(x)
        return functional.relu(y + skip)


class TinyResNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = ConvBn(3, 8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def tiny_resnet() -> Example:
    """Residual adds, BatchNorm, a strided downsample branch, global pooling."""
    return seeded(TinyResNet()), example(1, 3, 16, 16)


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            ConvBn(c_in, hidden, 1),
            nn.ReLU6(),
            ConvBn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            ConvBn(hidden, c_out, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class TinyMobileNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            ConvBn(3, 8, 3, 2),
            nn.ReLU6(),
            InvertedResidual(8, 8, 1, 2),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
            ConvBn(12, 24, 1),
            nn.ReLU6(),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


def tiny_mobilenet() -> Example:
    """Depthwise convolutions, ReLU6, linear bottlenecks, Dropout."""
    return seeded(TinyMobileNet()), example(1, 3, 32, 32)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeeze: int, gate: nn.Module):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.fc2(functional.relu(self.fc1(self.avgpool(x)))))


class SeBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, gate: nn.Module, act: nn.Module):
        super().__init__()
        self.expand = ConvBn(channels, hidden, 1)
        self.depthwise = ConvBn(hidden, hidden, 5, groups=hidden)
        self.se = SqueezeExcite(hidden, hidden // 4, gate)
        self.project = ConvBn(hidden, channels, 1)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.depthwise(self.act(self.expand(x))))
        return x + self.project(self.se(y))


class TinySe(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 8, 3, 2), nn.Hardswish())
        self.block1 = SeBlock(8, 16, nn.Hardsigmoid(), nn.Hardswish())
        self.block2 = SeBlock(8, 24, nn.Sigmoid(), nn.SiLU())
        self.head = nn.Sequential(ConvBn(8, 20, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(20, 16), nn.Hardswish(), nn.Dropout(0.1), nn.Linear(16, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.head(self.block2(self.block1(self.stem(x)))))


def tiny_se() -> Example:
    """Squeeze-excite, hard-swish and SiLU (MobileNetV3 and EfficientNet)."""
    return seeded(TinySe()), example(1, 3, 16, 16)


class DenseLayer(nn.Module):
    def __init__(self, c_in: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        x = torch.cat(features, 1)
        x = self.conv1(functional.relu(self.norm1(x)))
        return self.conv2(functional.relu(self.norm2(x)))


class TinyDenseNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv0 = ConvBn(3, 8)
        self.layers = nn.ModuleList([DenseLayer(8 + 4 * i, 4) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False))
        self.pool = nn.AvgPool2d(2, 2)
        self.last = DenseLayer(10, 6)
        self.norm = nn.BatchNorm2d(16)
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [functional.max_pool2d(functional.relu(self.conv0(x)), 3, 2, 1)]
        for layer in self.layers:
            features.append(layer(*features))
        x = self.pool(self.transition(torch.cat(features, 1)))
        x = torch.cat([x, self.last(x)], 1)
        x = functional.adaptive_avg_pool2d(functional.relu(self.norm(x)), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def tiny_densenet() -> Example:
    """Concatenation along channels, BatchNorm before the convolution, max and average pooling."""
    return seeded(TinyDenseNet()), example(1, 3, 16, 16)


class TinyUNet(nn.Module):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.down1 = nn.Sequential(ConvBn(3, 8), nn.ReLU())
        self.down2 = nn.Sequential(ConvBn(8, 12), nn.ReLU())
        self.middle = nn.Sequential(ConvBn(12, 16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.up2 = nn.Sequential(ConvBn(24, 10), nn.ReLU())
        self.up1 = nn.Sequential(ConvBn(18, 8), nn.ReLU())
        self.out = nn.Conv2d(8, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = self.middle(functional.max_pool2d(b, 2))
        d = self.up2(torch.cat([self.up(c), b], 1))
        d = functional.interpolate(d, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(self.up1(torch.cat([a, d], 1)))


def tiny_unet() -> Example:
    """ConvTranspose, bilinear Resize, skip concatenations; a dense output."""
    return seeded(TinyUNet()), example(1, 3, 16, 16)


class Attention(nn.Module):
    """Fused qkv; `manual` writes softmax(q k' / sqrt(d)) v out instead of calling SDPA."""

    def __init__(self, dim: int, heads: int, manual: bool):
        super().__init__()
        self.heads, self.manual = heads, manual
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.manual:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, c))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, manual: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, manual)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    def __init__(
        self, manual: bool = False, classes: int = 10, dim: int = 24, heads: int = 3, depth: int = 2
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, dim))
        self.blocks = nn.Sequential(*[TransformerBlock(dim, heads, 40, manual) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def tiny_vit() -> Example:
    """Class token, position embedding, fused qkv with unbind, scaled_dot_product_attention."""
    return seeded(TinyViT()), example(1, 3, 16, 16)


def tiny_vit_manual() -> Example:
    """As `tiny_vit`, with attention written as two matrix products."""
    return seeded(TinyViT(manual=True)), example(1, 3, 16, 16)


class TinyVgg(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(12 * 4 * 4, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def tiny_vgg() -> Example:
    """Convolutions with bias, flatten of a spatial map into a Linear."""
    return seeded(TinyVgg()), example(1, 3, 16, 16)


ALL = {
    "resnet": tiny_resnet,
    "mobilenet": tiny_mobilenet,
    "se": tiny_se,
    "densenet": tiny_densenet,
    "unet": tiny_unet,
    "vit": tiny_vit,
    "vit_manual": tiny_vit_manual,
    "vgg": tiny_vgg,
}
"""Every family by name, for parametrised tests."""


@functools.cache
def captured(name: str) -> Program:
    """The captured program of a family; shared between tests, so clone it before changing it."""
    return capture(*ALL[name]())
