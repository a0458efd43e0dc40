"""Networks with random weights, in a precision, lowered to a target and verified there.

Weights are random (variance preserving), and so are calibration data: time does not depend on them, accuracy would.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import zoo_models

CALIBRATION_SAMPLES = 8
VERIFIED_SAMPLES = 2


@dataclasses.dataclass(frozen=True)
class Lowered:
    """An artifact, and how it agrees with its program.

    Attributes:
        artifact: as the target takes it.
        seconds: of the conversion, the start of its subprocess included.
        found: `sartor.lowered.Lowered`, or None where the artifact cannot be run on this machine.
    """

    artifact: Any
    seconds: float
    found: Any


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A network in inference mode, and its example inputs; `digits` is the small one of the examples."""
    import torch

    if name == "digits":
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples/digits"))
        from model import DigitsNet

        return DigitsNet().eval(), (torch.zeros(1, 1, 32, 32),)
    if name == "unet":
        torch.manual_seed(0)
        return unet(), (torch.randn(1, 3, 128, 128),)
    if name.startswith("vit_"):
        zoo_models.import_torchvision()  # timm imports it
        import timm

        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False).eval(), (torch.randn(1, 3, 224, 224),)
    return zoo_models.build(f"torchvision/{name}")


def unet() -> Any:
    """Four levels, 16 to 128 channels, transposed convolutions upwards (Ronneberger et al., 2015)."""
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [
                nn.Conv2d(width, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (16, 32, 64, 128)
            self.down = nn.ModuleList(double(i, o) for i, o in zip((3, *widths), widths, strict=False))
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in itertools.pairwise(widths)
            )
            self.join = nn.ModuleList(double(2 * i, i) for i in widths[:-1])
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for index, block in enumerate(self.down):
                x = block(x if index == 0 else self.pool(x))
                kept.append(x)
            for up, join, beside in zip(
                reversed(self.up), reversed(self.join), reversed(kept[:-1]), strict=True
            ):
                x = join(torch.cat([up(x), beside], dim=1))
            return self.head(x)

    return UNet().eval()


def random_program(name: str) -> Any:
    """The network with random weights of order one."""
    import sartor
    from sartor.ir.channels import channel_groups
    from sartor.random_weights import randomise

    module, examples = build(name)
    program = sartor.capture(module, examples, name=name)
    return randomise(program, channel_groups(program), seed=0)


def written(program: Any, passes: str) -> Any:
    """The program after some passes, calibrated on random inputs."""
    from sartor.ir.batch import random_inputs
    from sartor.passes.base import Context
    from sartor.passes.pipeline import Pipeline

    if not passes:
        return program
    batches = [(random_inputs(program, seed=1 + index), None) for index in range(CALIBRATION_SAMPLES)]
    return Pipeline.parse(passes).run(program, Context(data={"calibration": batches})).program


def lower(program: Any, target: str, precision: str, folder: Path, threads: int) -> Lowered:
    """Lower in a subprocess, then compare with the program in float64 where the target runs here."""
    from sartor import backends, lowered
    from sartor.backends import isolation
    from sartor.backends.protocol import TargetOptions

    options = TargetOptions(threads=threads, precision=precision)
    start = time.perf_counter()
    artifact = isolation.lower(target, program, folder, options, fresh=True)
    seconds = time.perf_counter() - start
    if backends.get(target).capabilities().not_run_here:
        return Lowered(artifact, seconds, None)
    found = lowered.verify(program, artifact, options, samples=VERIFIED_SAMPLES)
    return Lowered(artifact, seconds, found)
