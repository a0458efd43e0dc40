"""Weights as products of smaller ones: singular values, and Tucker's decomposition by higher-order iteration.

CP is in `sartor.passes.polyadic`. Every function takes a weight as ONNX stores it and gives the weights of the layers
that replace it, first to last. At full rank their product is the weight.
"""

from __future__ import annotations

import numpy as np

_ROUNDS, _CONVERGED = 50, 1e-9


def energy_rank(singular: np.ndarray, energy: float) -> int:
    """The smallest rank that keeps this share of the squared singular values; at least 1.

    Args:
        singular: in descending order.
        energy: in (0, 1].
    """
    squares = np.cumsum(np.asarray(singular, np.float64) ** 2)
    if not len(squares) or squares[-1] == 0.0:
        return 1
    return int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12)) + 1)


def singular_values(weight: np.ndarray, kind: str) -> np.ndarray:
    """Of the matrix that a factorization of this kind cuts; for `tucker` and `cp`, of the output channels.

    Args:
        weight: `[out, in]`, or `[out, in, height, width]`.
        kind: `svd`, `spatial`, `tucker` or `cp`.
    """
    matrix = _spatial_matrix(weight) if kind == "spatial" else weight.reshape(weight.shape[0], -1)
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def svd(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`[out, in]` as `[rank, in]` and `[out, rank]`, the best of that rank (Eckart & Young, 1936).

    Both carry the root of the singular values, so that neither is much larger than the other.
    """
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    return root[:, None] * right[:rank], left[:, :rank] * root


def spatial_svd(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A kernel as a column and a row: `[rank, in, height, 1]` and `[out, rank, 1, width]`.

    Jaderberg et al., "Speeding up convolutional neural networks with low rank expansions", BMVC 2014, scheme 2, in the
    closed form of Tai et al., "Convolutional neural networks with low-rank regularization", ICLR 2016.
    """
    out, into, height, width = weight.shape
    row, column = svd(_spatial_matrix(weight), rank)  # [rank, out * width], [in * height, rank]
    vertical = column.reshape(into, height, 1, rank).transpose(3, 0, 1, 2)
    horizontal = row.reshape(rank, out, 1, width).transpose(1, 0, 2, 3)
    return vertical, horizontal


def _spatial_matrix(weight: np.ndarray) -> np.ndarray:
    """Rows are input channels and heights, columns output channels and widths."""
    out, into, height, width = weight.shape
    return weight.transpose(1, 2, 0, 3).reshape(into * height, out * width)


def tucker2(weight: np.ndarray, rank_in: int, rank_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A kernel between two changes of channels: `[rank_in, in, 1, 1]`, the core, and `[out, rank_out, 1, 1]`.

    Tucker's decomposition of the two channel axes, by higher-order orthogonal iteration from the truncated one
    (De Lathauwer et al., 2000). Kim et al., "Compression of deep convolutional neural networks for fast and low power
    mobile applications", ICLR 2016.

    Returns:
        Weights of the three layers; the core is `[rank_out, rank_in, height, width]`.
    """
    tensor = weight.astype(np.float64)
    into = _leading(np.moveaxis(tensor, 1, 0), rank_in)
    before = -1.0
    for _ in range(_ROUNDS):
        outer = _leading(np.einsum("oihw,ir->orhw", tensor, into), rank_out)
        narrowed = np.einsum("oihw,or->rihw", tensor, outer)
        into = _leading(np.moveaxis(narrowed, 1, 0), rank_in)
        core = np.einsum("rihw,is->rshw", narrowed, into)
        kept = float((core**2).sum())
        if kept - before <= _CONVERGED * max(kept, 1e-300):
            break
        before = kept
    return into.T[:, :, None, None], core, outer[:, :, None, None]


def _leading(tensor: np.ndarray, rank: int) -> np.ndarray:
    """The leading left singular vectors of a tensor unfolded along its first axis; `[length, rank]`."""
    left, _, _ = np.linalg.svd(tensor.reshape(tensor.shape[0], -1), full_matrices=False)
    return left[:, :rank]
