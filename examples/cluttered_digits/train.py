"""Train the network of model.py on the scenes and export it to model.onnx; about five minutes on two threads."""

from __future__ import annotations

import sys

import torch
from data import GRADES, SIZE, cluttered_digits, drawn, scenes
from model import WEIGHTS, ClutteredDigitsNet
from torch import nn
from training import main, right, train

NEAR = SIZE // 2


def trained(epochs: int) -> nn.Module:
    model = ClutteredDigitsNet()

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    # In whole pictures the digit is a tenth of what there is to see, and many epochs pass before the loss moves at
    # all. So digits are learnt where they fill the picture, at a quarter of the cost, and then to be found.
    print(f"{NEAR} pixels", flush=True)
    train(model, optimizer(), {"train": drawn(NEAR)}, epochs)
    print(f"{SIZE} pixels", flush=True)
    splits = cluttered_digits()
    train(model, optimizer(), splits, epochs)

    correct, grades = right(model, splits["test"]), scenes("test").grades
    shares = ", ".join(f"{name} {correct[grades == grade].mean():.2%}" for grade, name in enumerate(GRADES))
    print(f"test accuracy {correct.mean():.2%}: {shares}")
    return model


if __name__ == "__main__":
    sys.exit(main(__doc__, trained, torch.zeros(1, 3, SIZE, SIZE), WEIGHTS, epochs=12))
