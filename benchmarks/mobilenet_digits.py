"""MobileNetV2 on digits at 64 pixels, written to ONNX by torch's older exporter, not by Sartor's capture.

`python benchmarks/mobilenet_digits.py FILE.onnx` trains for about two minutes on two threads and writes the
file: opset 17, BatchNorm folded into the convolutions by the exporter, its own names and a dynamic batch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from models import MobileNetV2

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples" / "digits"))

from data import Batches, digits  # noqa: E402  (the example is a script folder, not a package)
from training import right, train  # noqa: E402

SIZE = 64


class Upscaled:
    """The batches of another split, every pixel doubled."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for inputs, labels in self.batches:
            yield {"image": np.repeat(np.repeat(inputs["image"], 2, axis=2), 2, axis=3)}, labels


def digits_64() -> dict[str, object]:
    """Sartor's data contract: the example's splits at 64 pixels."""
    return {name: Upscaled(split) for name, split in digits().items()}


def trained(epochs: int, threads: int) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    splits = digits_64()
    model = MobileNetV2(classes=10, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    train(model, optimizer, splits, epochs)
    print(f"test accuracy {right(model, splits['test']).mean():.2%}")
    return model.to(memory_format=torch.contiguous_format).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="FILE.onnx")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = trained(options.epochs, options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter announces its age
        torch.onnx.export(
            model, (torch.zeros(1, 1, SIZE, SIZE),), options.out, dynamo=False, opset_version=17,
            input_names=["image"], output_names=["scores"],
            dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
