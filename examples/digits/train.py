"""Train the network of model.py on the digits and export it to model.onnx; about a minute on two threads."""

from __future__ import annotations

import sys

import torch
from data import digits
from model import WEIGHTS, DigitsNet
from torch import nn
from training import main, right, train


def trained(epochs: int) -> nn.Module:
    splits = digits()
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    train(model, optimizer, splits, epochs)
    print(f"test accuracy {right(model, splits['test']).mean():.2%}")
    return model


if __name__ == "__main__":
    sys.exit(main(__doc__, trained, torch.zeros(1, 1, 32, 32), WEIGHTS, epochs=12))
