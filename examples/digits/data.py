"""1,797 real scanned digits (scikit-learn), upscaled from 8 to 32 pixels, as Sartor's data contract.

`digits` returns the splits of `sartor fit --data examples/digits/data.py:digits`. The test split is
never trained or selected on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from scans import CALIBRATION, Batches, load_scans, rows_of_splits

SIZE = 32
MEAN, STD = 4.88, 6.02  # of all pixels in 0..16
MAX_SHIFT = 3  # pixels of the upscaled image; augmentation of the train split


def load_arrays() -> tuple[np.ndarray, np.ndarray]:
    """All images `[1797, 1, 32, 32]` in float32, normalised, and their labels."""
    from scipy.ndimage import zoom

    scans, labels = load_scans()
    scale = SIZE / scans.shape[-1]
    images = zoom((scans - MEAN) / STD, (1, scale, scale), order=1, mode="nearest")
    return images[:, None].astype(np.float32), labels


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
    parts = {name: (images[rows], labels[rows]) for name, rows in rows_of_splits().items()}
    return {
        "train": Batches(*parts["train"], shifted, shuffle=True),
        "calibration": Batches(*(array[:CALIBRATION] for array in parts["train"])),
        "evaluate": Batches(*parts["evaluate"]),
        "test": Batches(*parts["test"]),
    }
