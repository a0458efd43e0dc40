"""Train the network of model.py on the digits and export it to model.onnx; about a minute on two threads."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from data import digits
from model import WEIGHTS, DigitsNet
from torch.nn import functional

FOLDER = Path(__file__).parent


def accuracy(model: torch.nn.Module, batches) -> float:
    model.eval()
    correct = count = 0
    with torch.inference_mode():
        for inputs, labels in batches:
            predicted = model(torch.from_numpy(inputs["image"])).argmax(1).numpy()
            correct += int((predicted == labels).sum())
            count += len(labels)
    return correct / count


def train(epochs: int, threads: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    splits = digits()
    # This layout trains about 15 % faster on CPUs.
    model = DigitsNet().to(memory_format=torch.channels_last)
    steps = epochs * len(splits["train"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
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
        score = accuracy(model, splits["evaluate"])
        spent = time.perf_counter() - start
        print(
            f"epoch {epoch + 1:2d}/{epochs}  loss {loss.item():.3f}  evaluate {score:.1%}  {spent:.0f} s",
            flush=True,
        )
    print(f"test accuracy {accuracy(model, splits['test']):.2%}")
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER / "model.onnx")
    options = parser.parse_args()

    from safetensors.torch import save_file

    import sartor

    model = train(options.epochs, options.threads, options.seed).to(memory_format=torch.contiguous_format)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    sartor.capture(model, (torch.zeros(1, 1, 32, 32),), name="digits").save(options.out)
    print(f"wrote {options.out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
