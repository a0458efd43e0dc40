"""MobileNetV2 on digits at 64 pixels, written to ONNX by torch's older exporter, not by Sartor's capture.

`python benchmarks/mobilenet_digits.py FILE.onnx` trains for about two minutes on two threads and writes the
file: opset 17, BatchNorm folded into the convolutions by the exporter, its own names and a dynamic batch.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from models import MobileNetV2
from torch.nn import functional

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "examples" / "digits"))

from data import Batches, digits  # noqa: E402  (the example is a script folder, not a package)

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


def accuracy(model: torch.nn.Module, batches: Upscaled) -> float:
    model.eval()
    right = count = 0
    with torch.inference_mode():
        for inputs, labels in batches:
            right += int((model(torch.from_numpy(inputs["image"])).argmax(1).numpy() == labels).sum())
            count += len(labels)
    return right / count


def train(epochs: int, threads: int) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    splits = digits_64()
    model = MobileNetV2(classes=10, channels=1).to(memory_format=torch.channels_last)
    steps = epochs * len(splits["train"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps, pct_start=0.25)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for inputs, labels in splits["train"]:
            images = torch.from_numpy(inputs["image"]).to(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(images), torch.from_numpy(labels))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4:
            score = accuracy(model, splits["evaluate"])
            print(f"epoch {epoch + 1}  evaluate {score:.1%}  {time.perf_counter() - start:.0f} s", flush=True)
    print(f"test accuracy {accuracy(model, splits['test']):.2%}")
    return model.to(memory_format=torch.contiguous_format).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="FILE.onnx")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = train(options.epochs, options.threads)
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
