"""Networks of the thesis' tables that can be rebuilt, as workloads at batch 1."""

from __future__ import annotations

from typing import Any

from zoo_models import import_torchvision

# Name in the tables -> how to build it. "reconstructed" ones have the printed MACs, but their structure is ours.
ZOO = {
    "InceptionV3": ("inception_v3", 299),
    "MobileNetV2": ("mobilenet_v2", 224),
    "MnasNetB1": ("mnasnet1_0", 224),
}
IMAGENET = {"ResNet18": "resnet18", "ResNet34": "resnet34", "ResNet50": "resnet50"}
CIFAR = {"VGG11": "vgg11_bn", "VGG16": "vgg16_bn", "VGG19": "vgg19_bn"}
TRAINED = ("ResNet110", "DenseNet40")
RECONSTRUCTED = ("Depth only", "Width only", "Resolution only")


def workload(name: str) -> Any:
    """A network by its name in the tables.

    Args:
        name: a key of `ZOO`, `IMAGENET` or `CIFAR`; one of `TRAINED` or `RECONSTRUCTED`;
            or `ResNet18@SIDE`, at another resolution.
    """
    import torch

    from sartor.ir.capture import capture
    from sartor.ir.workload import build_workload

    torch.manual_seed(0)
    module, side = _module(name)
    return build_workload(capture(module.eval(), torch.randn(1, 3, side, side)))


def _module(name: str) -> tuple[Any, int]:
    models = import_torchvision().models
    name, _, side = name.partition("@")
    if name in ZOO:
        built, resolution = ZOO[name]
        options = {"init_weights": False} if built == "inception_v3" else {}
        return models.get_model(built, weights=None, **options), resolution
    if name in IMAGENET:
        return models.get_model(IMAGENET[name], weights=None), int(side or 224)
    if name in CIFAR:
        return _cifar_vgg(models.get_model(CIFAR[name], weights=None)), 32
    if name in RECONSTRUCTED:
        return _reconstructed(models, name)
    return {"ResNet110": _resnet110, "DenseNet40": _densenet40}[name](), 32


def _reconstructed(models: Any, name: str) -> tuple[Any, int]:
    """ResNet-50 with the printed MACs: half of its inner blocks, three quarters of its width, or 176 pixels."""
    from torchvision.models.resnet import Bottleneck, ResNet

    if name == "Depth only":
        return ResNet(Bottleneck, [2, 2, 3, 2]), 224
    if name == "Width only":
        return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=36), 224
    return models.resnet50(weights=None), 176


def _cifar_vgg(model: Any) -> Any:
    from torch import nn

    return nn.Sequential(model.features, nn.Flatten(), nn.Linear(512, 10))


def _resnet110() -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, c_in: int, c_out: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
                nn.BatchNorm2d(c_out),
            )
            shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Identity() if c_in == c_out else shortcut

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.shortcut(x)).relu()

    layers: list[Any] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for index in range(18):
            layers.append(Block(channels, width, 2 if index == 0 and width > 16 else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _densenet40() -> Any:
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self, c_in: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, 12, 3, 1, 1, bias=False)
            )

        def forward(self, x: Any) -> Any:
            return torch.cat([x, self.body(x)], 1)

    layers: list[Any] = [nn.Conv2d(3, 24, 3, 1, 1, bias=False)]
    channels = 24
    for stage in range(3):
        for _ in range(12):
            layers.append(Layer(channels))
            channels += 12
        if stage < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
    layers += [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ]
    return nn.Sequential(*layers)
