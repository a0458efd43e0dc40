"""1,797 real scanned digits (scikit-learn), upscaled from 8 to 32 pixels, as Sartor's data contract.

`digits` returns the splits of `sartor fit --data examples/digits/data.py:digits`. The test split is
never trained or selected on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

SIZE = 32
MEAN, STD = 4.88, 6.02  # of all pixels in 0..16
COUNTS = {"train": 1100, "evaluate": 250, "test": 447}
MAX_SHIFT = 3  # pixels of the upscaled image; augmentation of the train split


def load_arrays() -> tuple[np.ndarray, np.ndarray]:
    """All images `[1797, 1, 32, 32]` in float32, normalised, and their labels."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    scale = SIZE / digits.images.shape[-1]
    images = zoom((digits.images - MEAN) / STD, (1, scale, scale), order=1, mode="nearest")
    return images[:, None].astype(np.float32), digits.target.astype(np.int64)


class Batches:
    """Re-iterable batches; the train split is shuffled and shifted anew, reproducibly, in every pass."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int = 64, augment: bool = False):
        self.images, self.labels, self.batch, self.augment = images, labels, batch, augment
        self._passes = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        order = np.arange(len(self.images))
        rng = np.random.default_rng(self._passes)
        if self.augment:
            self._passes += 1
            rng.shuffle(order)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            images = self.images[rows]
            if self.augment:
                images = shifted(images, rng)
            yield {"image": images}, self.labels[rows]


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every image `[N, 1, H, W]` moved by up to `MAX_SHIFT` pixels; the border is repeated."""
    pad = MAX_SHIFT
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="edge")
    offsets = rng.integers(0, 2 * pad + 1, size=(len(images), 2))
    return np.stack(
        [image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, offsets, strict=True)]
    )


def digits() -> dict[str, object]:
    """Splits train, calibration, evaluate and test; labels are class ids."""
    images, labels = load_arrays()
    order = np.random.default_rng(7).permutation(len(images))
    parts, start = {}, 0
    for name, count in COUNTS.items():
        rows = order[start : start + count]
        parts[name] = (images[rows], labels[rows])
        start += count
    return {
        "train": Batches(*parts["train"], augment=True),
        "calibration": Batches(*(array[:256] for array in parts["train"])),
        "evaluate": Batches(*parts["evaluate"]),
        "test": Batches(*parts["test"]),
    }
