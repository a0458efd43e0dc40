"""The 1,797 scanned digits of scikit-learn in the splits that the examples share, and batches of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

COUNTS = {"train": 1100, "evaluate": 250, "test": 447}
CALIBRATION = 256  # samples, all of the train split
INK = 16.0  # of a pixel that is all pen

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@functools.cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans `[1797, 8, 8]` in float64, 0 (paper) to `INK`, and their labels `[1797]` in int64; read-only."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = found.images, found.target.astype(np.int64)
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


def rows_of_splits() -> dict[str, np.ndarray]:
    """Which scans belong to which split: every one to exactly one, always the same."""
    order = np.random.default_rng(7).permutation(sum(COUNTS.values()))
    ends = np.cumsum(list(COUNTS.values()))
    return dict(zip(COUNTS, np.split(order, ends[:-1]), strict=True))


class Batches:
    """Re-iterable batches `({"image": float32 [n, C, H, W]}, labels [n])`.

    Args:
        images: axis 0 the samples; what a model takes, or what `transform` makes that of.
        labels: class ids `[N]`.
        transform: makes the model's input of some rows of `images`, with a generator to draw from.
        batch: samples in every batch but the last.
        shuffle: another order and other draws in every pass, the same ones in the first, second, ... pass of
            every object; otherwise every pass is like the first.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: Transform | None = None,
        batch: int = 64,
        shuffle: bool = False,
    ):
        self.images, self.labels, self.transform = images, labels, transform
        self.batch, self.shuffle = batch, shuffle
        self._passes = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        order = np.arange(len(self.images))
        rng = np.random.default_rng(self._passes)
        if self.shuffle:
            self._passes += 1
            rng.shuffle(order)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            images = self.images[rows]
            if self.transform is not None:
                images = self.transform(images, rng)
            yield {"image": images}, self.labels[rows]
