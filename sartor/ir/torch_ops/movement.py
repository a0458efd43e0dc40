"""Operators that move, select, repeat or create data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.registry import operator

Ints = tuple[int, ...]


@operator("Reshape", static=(1,))
def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """New shape; 0 copies the input's length at that position, -1 takes what is left."""
    if not allowzero:
        shape = tuple(x.shape[i] if d == 0 else d for i, d in enumerate(shape))
    return torch.reshape(x, shape)


@operator("Expand", static=(1,))
def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcast to `shape`; a 1 there keeps the input's length."""
    rank = max(x.dim(), len(shape))
    own = (1,) * (rank - x.dim()) + tuple(x.shape)
    target = (1,) * (rank - len(shape)) + tuple(shape)
    sizes = [o if isinstance(t, int) and t == 1 else t for o, t in zip(own, target, strict=True)]
    # A length other than 1 on the input's side wins over whatever a broadcast asks for.
    sizes = [o if isinstance(o, int) and o != 1 else s for o, s in zip(own, sizes, strict=True)]
    return x.expand(sizes)


@operator("Tile", static=(1,))
def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Repeat the whole tensor along each axis."""
    return x.repeat(repeats)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Matrix of the axes before `axis` by the axes from it on."""
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze", static=(1,))
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Remove the given axes of length 1, or all of them."""
    if axes is None:
        return torch.squeeze(x)
    removed = {a % x.dim() for a in axes} if x.dim() else set()
    wrong = [a for a in removed if x.shape[a] != 1]
    if wrong:
        raise ValueError(f"Squeeze of axis {wrong[0]} of length {x.shape[wrong[0]]}; only length 1 can go")
    return x.reshape([d for i, d in enumerate(x.shape) if i not in removed])


@operator("Unsqueeze", static=(1,))
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Insert axes of length 1 at the given positions of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = torch.unsqueeze(x, axis)
    return x


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute the axes; reverse them by default."""
    return torch.permute(x, tuple(perm) if perm is not None else tuple(reversed(range(x.dim()))))


@operator("Concat")
def concat(*parts: Tensor, axis: int) -> Tensor:
    """Join along an axis."""
    return torch.cat(parts, axis)


@operator("Split", static=(1,), several=True)
def split(
    x: Tensor, lengths: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """Cut along an axis, into given lengths or into equal parts of which the last may be shorter."""
    if lengths is None:
        size, count = x.shape[axis], num_outputs or outputs
        part = -(-size // count)
        lengths = tuple(max(min(part, size - i * part), 0) for i in range(count))
    return tuple(torch.split(x, list(lengths), axis))


@operator("Slice", static=(1, 2, 3, 4))
def slice_axes(
    x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None
) -> Tensor:
    """`x[start:end:step]` on each given axis; a negative step walks backwards."""
    axes = axes if axes is not None else tuple(range(len(starts)))
    steps = steps if steps is not None else (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % x.dim()
        if step < 0:  # torch slices forwards only: mirror the axis and the bounds
            size = x.shape[axis]
            first, last, step = slice(start, end, step).indices(size)
            x = torch.flip(x, (axis,))
            start, end, step = size - 1 - first, size - 1 - last, -step
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Whole slices along `axis` at `indices`, whose axes replace it; negative indices count from the end."""
    axis = axis % x.dim()
    flat = torch.index_select(x, axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One element per index along `axis`."""
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Elements or slices at index tuples held in the last axis of `indices`."""
    depth = indices.shape[-1]
    batch = x.shape[:batch_dims]
    count = math.prod(batch)
    source = x.reshape(count, *x.shape[batch_dims:])
    places = indices.reshape(count, -1, depth)
    coordinates = [_wrapped(places[..., i], source.shape[1 + i]) for i in range(depth)]
    rows = torch.arange(count, device=x.device).reshape(count, 1)
    picked = source[(rows, *coordinates)]
    return picked.reshape((*indices.shape[:-1], *x.shape[batch_dims + depth :]))


@operator("Pad", static=(1, 3), scalars=(2,))
def pad(
    x: Tensor,
    pads: Ints,
    value: Tensor | float | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Extend (or crop, where negative) both ends of axes: `constant`, `reflect`, `edge` or `wrap`."""
    rank = x.dim()
    axes = tuple(a % rank for a in axes) if axes is not None else tuple(range(rank))
    begins = [0] * rank
    ends = [0] * rank
    for i, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[i], pads[len(axes) + i]
    if mode == "constant":
        fill = value if value is not None else 0
        if isinstance(fill, Tensor):
            fill = fill.reshape(()).item()
        amounts = [p for axis in reversed(range(rank)) for p in (begins[axis], ends[axis])]
        return functional.pad(x, amounts, value=fill)
    for axis in range(rank):
        if begins[axis] or ends[axis]:
            x = torch.index_select(x, axis, _pad_indices(x, axis, begins[axis], ends[axis], mode))
    return x


def _pad_indices(x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    size = x.shape[axis]
    positions = torch.arange(-begin, size + end, device=x.device)
    if mode == "edge":
        return torch.clamp(positions, 0, size - 1)
    if mode == "wrap":
        return torch.remainder(positions, size)
    if mode != "reflect":
        raise UnsupportedOperatorError(f"Pad has mode '{mode}'; expected constant, reflect, edge or wrap.")
    period = max(2 * (size - 1), 1)
    folded = torch.remainder(positions, period)
    return torch.minimum(folded, period - folded) if size > 1 else torch.zeros_like(positions)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """`[N, C r r, H, W]` to `[N, C, H r, W r]`; the block is the slow (`DCR`) or fast (`CRD`) part of C."""
    n, c, h, w = x.shape
    r = blocksize
    if mode == "CRD":
        return functional.pixel_shuffle(x, r)
    blocks = x.reshape(n, r, r, c // (r * r), h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // (r * r), h * r, w * r)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """`[N, C, H, W]` to `[N, r r C, H / r, W / r]`; the block is the slow (`DCR`) or fast (`CRD`) part."""
    n, c, h, w = x.shape
    r = blocksize
    blocks = x.reshape(n, c, h // r, r, w // r, r)
    blocks = blocks.permute(0, 1, 3, 5, 2, 4) if mode == "CRD" else blocks.permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * r * r, h // r, w // r)


@operator("Trilu", static=(1,))
def trilu(x: Tensor, k: Ints | None = None, *, upper: int = 1) -> Tensor:
    """Upper or lower triangle of the last two axes, the rest zero."""
    diagonal = k[0] if k else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The shape as an int64 tensor; where it only makes other shapes, plain numbers are used instead."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=x.device)


def dimension(x: Tensor, axis: int) -> int:
    """Length of one axis: what remains of Shape in shape arithmetic."""
    return x.shape[axis]


@operator("Size")
def size(x: Tensor) -> Tensor:
    """Number of elements as an int64 tensor."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


@operator("ConstantOfShape", static=(0,), types=("dtype",))
def constant_of_shape(shape: Ints, *, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor filled with one value."""
    return torch.full(tuple(shape), value, dtype=dtype)


@operator("Range", static=(0, 1, 2), types=("dtype",))
def arange(
    start: tuple[float, ...],
    limit: tuple[float, ...],
    delta: tuple[float, ...],
    *,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """`start + i delta` below (or above, for a negative delta) `limit`."""
    return torch.arange(start[0], limit[0], delta[0], dtype=dtype)


@operator("EyeLike", types=("dtype",))
def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix of the shape of `x`."""
    ones = torch.ones_like(x, dtype=dtype or x.dtype)
    return torch.triu(torch.tril(ones, k), k)


@operator("ScatterElements")
def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """`x` with single elements along `axis` replaced by, or combined with, `updates`."""
    places = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return torch.scatter_reduce(x, axis, places, updates, names[reduction], include_self=True)


@operator("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """`x` with elements or slices at index tuples replaced by, or combined with, `updates`."""
    depth = indices.shape[-1]
    steps = [math.prod(x.shape[i + 1 : depth]) for i in range(depth)]
    strides = torch.tensor(steps, dtype=torch.int64, device=x.device)
    wrapped = torch.stack([_wrapped(indices[..., i], x.shape[i]) for i in range(depth)], -1)
    rows = torch.sum(wrapped * strides, -1).reshape(-1)
    flat = x.reshape(math.prod(x.shape[:depth]), -1)
    values = updates.reshape(rows.shape[0], -1)
    places = rows.reshape(-1, 1).expand_as(values)
    if reduction == "none":
        return torch.scatter(flat, 0, places, values).reshape(x.shape)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    result = torch.scatter_reduce(flat, 0, places, values, names[reduction], include_self=True)
    return result.reshape(x.shape)
