"""Tables over positions at another input size: one entry per position, interpolated between those that there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sartor.ir.lengths import Axis, Factor, Unscalable


def resampled(array: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """A table at the other size, by antialiased bicubic interpolation over its one or two axes that change.

    Parts of an axis that stay (a class token) are kept as they are. This is what Vision Transformers are fine-tuned
    with at another resolution: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, section 3.2.

    Args:
        array: floats; each axis as long as `axes` say for now.
        axes: of the array.

    Raises:
        Unscalable: more than two factors change together.
    """
    for index, axis in enumerate(axes):
        if axis.scaled and len(axis.parts) > 1:
            ends = np.cumsum([Axis((part,)).now for part in axis.parts])
            pieces = [
                resampled(piece, [*axes[:index], Axis((part,)), *axes[index + 1 :]])
                for piece, part in zip(np.split(array, ends[:-1], index), axis.parts, strict=True)
            ]
            return np.concatenate(pieces, index)
    factors = [  # an axis of several parts is one that stays
        factor
        for axis in axes
        for factor in (axis.parts[0] if len(axis.parts) == 1 else (Factor(axis.now, axis.then),))
    ]
    moving = [index for index, factor in enumerate(factors) if factor.now != factor.then]
    if not moving:
        return array
    if len(moving) > 2:
        raise Unscalable(f"is a table in {len(moving)} dimensions that change together, expected one or two")
    import torch

    last = range(-len(moving), 0)
    table = np.moveaxis(array.reshape([factor.now for factor in factors]), moving, last)
    now, then = (
        [1] * (2 - len(moving)) + [getattr(factors[i], at) for i in moving] for at in ("now", "then")
    )
    flat = torch.from_numpy(np.ascontiguousarray(table, np.float32)).reshape(1, -1, *now)
    found = torch.nn.functional.interpolate(flat, size=then, mode="bicubic", antialias=True).numpy()
    lead = table.shape[: -len(moving)]
    grown = np.moveaxis(found.reshape(*lead, *then[2 - len(moving) :]), last, moving)
    return np.ascontiguousarray(grown.reshape([axis.then for axis in axes]), array.dtype)
