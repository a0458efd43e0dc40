"""Kernels as sums of products of four vectors (CP), by tensorly's alternating least squares.

    W[o, i, y, x] ≈ Σ_r  A[o, r] B[i, r] C[y, r] D[x, r]

so that a convolution becomes 1 × 1 into r channels, a column and a row for each of them, and 1 × 1 out of them.

Reference: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015,
arXiv 1412.6553.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np

from sartor.errors import UsageError
from sartor.passes import factors

_ROUNDS, _CONVERGED, _SEED = 200, 1e-8, 0
"""Of the least squares; the seed fills up the singular vectors that they start from, where an axis has too few."""
_HELD = 1e-9
"""Penalty on the squares of factors, of a weight of norm 1, where they could not be solved for without one."""
_STEP = 16
"""A rank is found to within a part of this: each try is a decomposition."""


def cp(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the four layers, as ONNX stores them.

    They are `[rank, in, 1, 1]`, `[rank, 1, height, 1]`, `[rank, 1, 1, width]` and `[out, rank, 1, 1]`. The four vectors
    of a product have equal norms, so that none is much larger than the others.

    Args:
        weight: `[out, in, height, width]`.
        rank: number of products.

    Raises:
        UsageError: tensorly is not installed.
    """
    tensor = np.ascontiguousarray(weight, np.float64)
    outer, into, column, row = _decomposed(tensor.tobytes(), tensor.shape, rank)
    return (
        into.T[:, :, None, None],
        column.T[:, None, :, None],
        row.T[:, None, None, :],
        outer[:, :, None, None],
    )


def cp_rank(weight: np.ndarray, energy: float, most: int) -> int:
    """The smallest rank, to within a sixteenth, whose products keep this share of the squares of a weight.

    No product of a rank keeps more than the best matrix of that rank along one axis, which rules out most ranks for
    nothing.

    Args:
        weight: `[out, in, height, width]`.
        energy: in (0, 1].
        most: ranks above are not tried.

    Returns:
        A rank, or one above `most` where none up to it keeps as much.

    Raises:
        UsageError: tensorly is not installed.
    """
    least = max(
        factors.energy_rank(factors.singular_values(np.moveaxis(weight, axis, 0), "cp"), energy)
        for axis in range(4)
    )
    if least > most or kept(weight, least) >= energy * (1 - 1e-12):
        return least
    if kept(weight, most) < energy * (1 - 1e-12):
        return most + 1
    below, enough = least, most
    while enough - below > max(1, below // _STEP):
        middle = (below + enough) // 2
        if kept(weight, middle) >= energy * (1 - 1e-12):
            enough = middle
        else:
            below = middle
    return enough


def kept(weight: np.ndarray, rank: int) -> float:
    """The share of the squares of a weight that its products of a rank keep."""
    into, column, row, outer = (
        part.squeeze(squeezed) for part, squeezed in zip(cp(weight, rank), _ONES, strict=True)
    )
    near = np.einsum("ri,ry,rx,or->oiyx", into, column, row, outer, optimize=True)
    whole = float((weight.astype(np.float64) ** 2).sum())
    return 1.0 - float(((weight - near) ** 2).sum()) / whole if whole else 1.0


_ONES = ((2, 3), (1, 3), (1, 2), (2, 3))
"""Axes of length 1 of the four weights."""


@functools.lru_cache(maxsize=8)
def _decomposed(data: bytes, shape: tuple[int, ...], rank: int) -> tuple[np.ndarray, ...]:
    """A, B, C and D; kept, because a layer that is priced and then replaced needs them twice."""
    try:
        import tensorly
        from tensorly.decomposition import parafac
    except ImportError as error:
        raise UsageError(
            "Kind 'cp' of 'factorize' needs the package 'tensorly', which is not installed. Install it with: "
            "pip install 'sartor[factorize]'"
        ) from error
    tensor = np.frombuffer(data, np.float64).reshape(shape)
    norm = float(np.linalg.norm(tensor))
    if norm == 0.0:
        return tuple(np.zeros((length, rank)) for length in shape)
    with (
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
        tensorly.backend_context("numpy", local_threadsafe=True),
    ):
        warnings.simplefilter(
            "ignore"
        )  # an axis with fewer singular vectors than the rank is nothing unusual
        for held in (0, _HELD):
            try:
                _, found = parafac(
                    tensor / norm,
                    rank,
                    n_iter_max=_ROUNDS,
                    tol=_CONVERGED,
                    init="svd",
                    random_state=_SEED,
                    linesearch=True,
                    l2_reg=held,
                )
            except np.linalg.LinAlgError:
                continue
            if all(np.isfinite(part).all() for part in found):
                break
        else:
            raise UsageError(
                f"A kernel of shape {list(shape)} could not be decomposed with rank {rank}. Use another rank or kind."
            )
    return _balanced([np.asarray(part) for part in found], norm)


def _balanced(parts: list[np.ndarray], times: float) -> tuple[np.ndarray, ...]:
    """Factors of so many times the sum, whose columns have equal norms over all four."""
    norms = [np.linalg.norm(part, axis=0) for part in parts]
    root = (times * np.prod(norms, axis=0)) ** (1 / len(parts))
    return tuple(
        part * (root / np.where(norm > 0, norm, 1.0)) for part, norm in zip(parts, norms, strict=True)
    )
