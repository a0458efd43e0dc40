"""Real scanned digits at random places and sizes on crops of two photographs, 96 pixels, as Sartor's data contract.

`cluttered_digits` returns the splits of `sartor fit --data examples/cluttered_digits/data.py:cluttered_digits`.
`scenes` returns the same samples as arrays, with what the contract has no place for: where the digit is, and how hard
it is to see. Scans and photographs come with scikit-learn; everything else is drawn from a seed.

No scan and no pixel of a photograph is in two of train, evaluate and test (`TILES`). The test split is never trained
or selected on. Calibration has scans and tiles of train.

How well a digit can be seen is computed from the picture, without any network: `visibility`.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sartor.errors import UsageError
from sartor.images import resized

sys.path.insert(0, str(Path(__file__).parents[1]))

from scans import CALIBRATION, INK, Batches, load_scans, rows_of_splits

SIZE = 96  # pixels, height and width
SIDES = (24, 64)  # pixels of a pasted scan, drawn log-uniformly
CONTRASTS = (
    0.15,
    0.5,
)  # luminance; the pen is lighter or darker, and up to 0.5 one of both is always possible
TINT = 0.15  # largest change of a channel that colours the pen and leaves its luminance
COPIES = 4  # scenes of every scan in a pass over train, evaluate or test
SEEDS = {"train": 1, "calibration": 2, "evaluate": 3, "test": 4}
MEAN, STD = 0.39, 0.31  # of all values of the train split, in 0..1
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, ITU-R BT.601
TILES = {
    "china.jpg": ("rert", "rrer", "rttr"),
    "flower.jpg": ("rrte", "trtr", "rerr"),
}
"""Which part of each photograph, in 3 rows and 4 columns, shows behind digits of t(r)ain, (e)valuate and (t)est; dealt
so that every split has about the same shares of easy and hard digits."""
GRADES = ("easy", "medium", "hard")
BOUNDS = (1.2, 0.6)
"""Digits of at least the first `visibility` are easy, below the second hard."""
FLOOR = 0.05  # luminance; clutter below it hides nothing


@dataclass(frozen=True)
class Scenes:
    """Pictures of one digit each, and what is known about them; axis 0 of every array is the samples.

    Attributes:
        images: uint8 `[N, 3, H, W]`.
        labels: class ids, int64 `[N]`.
        boxes: smallest box around the ink, int64 `[N, 4]`: x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
        contrast: between the pen and the mean of what its strokes cover, in luminance 0..1, float32 `[N]`.
        clutter: standard deviation of the luminance without the digit, in the box and a quarter of its longer
            side around it, float32 `[N]`.
        visibility: see `visibility`, float32 `[N]`.
        grades: index into `GRADES`, int64 `[N]`.
        rows: which of the 1,797 scans, int64 `[N]`.
        places: the crop behind: photograph, top, left, quarter turns, mirrored; int64 `[N, 5]`. See `crop`.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    contrast: np.ndarray
    clutter: np.ndarray
    visibility: np.ndarray
    grades: np.ndarray
    rows: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def visibility(boxes: np.ndarray, contrast: np.ndarray, clutter: np.ndarray) -> np.ndarray:
    """How well each digit can be seen: contrast over clutter, times the box's longer side over `SIZE`.

    Args:
        boxes: `[N, 4]`, x0, y0, x1, y1 in pixels.
        contrast: luminance 0..1, `[N]`.
        clutter: luminance, `[N]`; `FLOOR` is added.
    """
    sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    return sides / SIZE * contrast / (clutter + FLOOR)


def grades_of(seen: np.ndarray) -> np.ndarray:
    """Index into `GRADES` of each visibility `[N]`, int64."""
    return (seen[:, None] < np.array(BOUNDS)).sum(axis=1)


@functools.cache
def photographs() -> np.ndarray:
    """Both photographs, in the order of `TILES`, uint8 `[2, 3, 427, 640]`."""
    from sklearn.datasets import load_sample_image

    return np.stack([load_sample_image(name).transpose(2, 0, 1) for name in TILES])


def tiles(split: str) -> np.ndarray:
    """The parts of the photographs that a split may show, int64 `[T, 5]`: photograph, y0, x0, y1, x1 in pixels."""
    letter = {"train": "r", "calibration": "r", "evaluate": "e", "test": "t"}[split]
    _, _, height, width = photographs().shape
    found = []
    for photograph, rows in enumerate(TILES.values()):
        ys = np.linspace(0, height, len(rows) + 1).astype(int)
        xs = np.linspace(0, width, len(rows[0]) + 1).astype(int)
        found += [
            (photograph, ys[i], xs[j], ys[i + 1], xs[j + 1])
            for i, row in enumerate(rows)
            for j, owner in enumerate(row)
            if owner == letter
        ]
    return np.array(found)


def crop(place: np.ndarray, size: int = SIZE) -> np.ndarray:
    """The background at one row of `Scenes.places`, uint8 `[3, size, size]`."""
    photograph, top, left, turns, mirrored = place
    found = np.rot90(photographs()[photograph, :, top : top + size, left : left + size], turns, (1, 2))
    return found[:, :, ::-1] if mirrored else found


def compose(rows: np.ndarray, split: str, rng: np.random.Generator, size: int = SIZE) -> Scenes:
    """One new scene for each of some scans.

    Args:
        rows: which of the 1,797 scans, `[N]`; a scan may be there more than once.
        split: whose tiles show behind them.
        rng: place, size, colours and background are drawn from it.
        size: height and width in pixels, at most `SIZE`; digits that would not fit become smaller.
    """
    scans, labels = load_scans()
    owned = tiles(split)
    images = np.empty((len(rows), 3, size, size), np.uint8)
    found = [
        _draw(image, scans[row] / INK, owned[rng.integers(len(owned))], rng)
        for image, row in zip(images, rows, strict=True)
    ]
    boxes, contrast, clutter, places = (np.stack(parts) for parts in zip(*found, strict=True))
    seen = visibility(boxes, contrast, clutter)
    return Scenes(
        images, labels[rows], boxes, contrast, clutter, seen, grades_of(seen), np.asarray(rows), places
    )


def _draw(
    image: np.ndarray, scan: np.ndarray, tile: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray | np.floating, ...]:
    """Fill an image `[3, size, size]` with one scan `[8, 8]` in 0..1 on a tile: box, contrast, clutter and place."""
    size = image.shape[-1]
    photograph, y0, x0, y1, x1 = tile
    top, left = rng.integers(y0, y1 - size + 1), rng.integers(x0, x1 - size + 1)
    place = np.array([photograph, top, left, rng.integers(4), rng.integers(2)])
    image[:] = crop(place, size)
    light = np.tensordot(LUMINANCE, image / 255, 1)

    low, high = (min(side, size) for side in SIDES)
    side = round(low * (high / low) ** rng.random())
    y, x = rng.integers(0, size - side + 1, 2)
    ink = resized(scan[None], (1, side, side))[0]
    ys, xs = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    box = np.array([x + xs[0], y + ys[0], x + xs[-1] + 1, y + ys[-1] + 1])

    covered = np.s_[y : y + side, x : x + side]
    level = np.average(light[covered], weights=ink)
    step = rng.uniform(*CONTRASTS) * rng.choice((-1, 1))
    tint = rng.uniform(-TINT, TINT, 3)
    pen = level + (step if 0 <= level + step <= 1 else -step) + tint - tint @ LUMINANCE
    pen = np.clip(pen, 0, 1)
    behind = image[:, *covered] / 255
    image[:, *covered] = np.rint(255 * (behind + ink * (pen[:, None, None] - behind)))

    margin = max(box[2] - box[0], box[3] - box[1]) // 4
    around = light[max(box[1] - margin, 0) : box[3] + margin, max(box[0] - margin, 0) : box[2] + margin]
    return box, np.float32(abs(pen @ LUMINANCE - level)), np.float32(around.std()), place


@functools.cache
def scenes(split: str) -> Scenes:
    """The samples of a split of `cluttered_digits`, in its order; the arrays are read-only, the splits hold the same.

    Train draws anew in every pass, so of train this is one scene of every scan; `compose` draws as many as one likes.

    Raises:
        UsageError: no split of this name.
    """
    if split not in SEEDS:
        raise UsageError(f"There is no split '{split}'; expected one of {list(SEEDS)}.")
    rows = rows_of_splits()["train" if split == "calibration" else split]
    rows = {"train": rows, "calibration": rows[:CALIBRATION]}.get(split, np.tile(rows, COPIES))
    found = compose(rows, split, np.random.default_rng(SEEDS[split]))
    for array in vars(found).values():
        array.setflags(write=False)
    return found


def normalised(images: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Images `[N, 3, H, W]` in uint8 as the model takes them, float32."""
    return (images.astype(np.float32) / 255 - MEAN) / STD


def drawn(size: int = SIZE) -> Batches:
    """The train split: new scenes in every pass.

    Args:
        size: height and width in pixels; in smaller pictures the digit is easier to find.
    """
    rows = np.tile(rows_of_splits()["train"], COPIES)
    _, labels = load_scans()

    def new(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return normalised(compose(rows, "train", rng, size).images)

    return Batches(rows, labels[rows], new, shuffle=True)


def cluttered_digits() -> dict[str, object]:
    """Splits train, calibration, evaluate and test; images float32 `[n, 3, 96, 96]`, labels are class ids."""
    fixed = {name: scenes(name) for name in ("calibration", "evaluate", "test")}
    return {
        "train": drawn(),
        **{name: Batches(found.images, found.labels, normalised) for name, found in fixed.items()},
    }
