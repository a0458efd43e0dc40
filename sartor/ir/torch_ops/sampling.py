"""Operators that read between pixels: grid sampling, region pooling, deformable convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.registry import operator

Ints = Sequence[int]
_MODES = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}


@operator("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Sample `x [N, C, *spatial]` at `grid [N, *out, 2 or 3]`, whose coordinates lie in [-1, 1]."""
    if x.dim() not in (4, 5) or mode not in _MODES or (mode == "cubic" and x.dim() != 4):
        raise UnsupportedOperatorError(
            f"GridSample has mode '{mode}' on {x.dim() - 2} spatial axes; expected linear or nearest on two or "
            "three, or cubic on two."
        )
    return functional.grid_sample(
        x, grid.to(x.dtype), mode=_MODES[mode], padding_mode=padding_mode, align_corners=bool(align_corners)
    )


def _corners(size: int, position: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels around each position on one axis and their weights; the border pixel repeats."""
    clamped = torch.clamp(position, 0, size - 1)
    low = torch.floor(clamped)
    fraction = clamped - low
    high = torch.clamp(low + 1, max=size - 1)
    return [(low.to(torch.int64), 1 - fraction), (high.to(torch.int64), fraction)]


@operator("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Average (or ONNX's maximum of weighted pixels) of samples in each bin of each region `[x1, y1, x2, y2]`.

    With `sampling_ratio=0` the number of samples depends on the size of each region.
    """
    half = coordinate_transformation_mode == "half_pixel"
    boxes = rois * spatial_scale - (0.5 if half else 0.0)
    extents = boxes[:, 2:] - boxes[:, :2]
    if not half:
        extents = torch.clamp(extents, min=1.0)  # degenerate regions become one pixel
    bins = (output_width, output_height)
    results = []
    for index in range(rois.shape[0]):
        steps = [extents[index, i] / bins[i] for i in range(2)]
        counts = [sampling_ratio if sampling_ratio > 0 else max(math.ceil(float(s)), 0) for s in steps]
        axes = []
        for i in range(2):
            inside = (torch.arange(bins[i] * counts[i], dtype=x.dtype, device=x.device) + 0.5) / max(
                counts[i], 1
            )
            axes.append(boxes[index, i] + inside * steps[i])
        image = x[batch_indices[index].to(torch.int64)]
        results.append(_pooled(image, axes[1], axes[0], counts[::-1], (output_height, output_width), mode))
    return torch.stack(results) if results else x.new_zeros((0, x.shape[1], output_height, output_width))


def _pooled(
    image: Tensor, ys: Tensor, xs: Tensor, counts: list[int], bins: tuple[int, int], mode: str
) -> Tensor:
    """One region: `image [C, H, W]` at the product of `ys` and `xs`, pooled to `[C, *bins]`."""
    height, width = image.shape[1:]
    within = ((ys >= -1) & (ys <= height)).reshape(-1, 1) & ((xs >= -1) & (xs <= width)).reshape(1, -1)
    terms = []
    for (row, row_weight), (column, column_weight) in itertools.product(
        _corners(height, ys), _corners(width, xs)
    ):
        weight = row_weight.reshape(-1, 1) * column_weight.reshape(1, -1) * within
        terms.append(image[:, row][:, :, column] * weight)
    if mode == "avg":
        samples = terms[0] + terms[1] + terms[2] + terms[3]
    else:
        samples = torch.amax(torch.stack(terms), 0)
    split = samples.reshape(image.shape[0], bins[0], counts[0], bins[1], counts[1])
    if 0 in counts:
        return torch.zeros((image.shape[0], *bins), dtype=image.dtype, device=image.device)
    return torch.mean(split, (2, 4)) if mode == "avg" else torch.amax(split, (2, 4))


@operator("DeformConv")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    offset_group: int = 1,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution whose taps move by `offset [N, offset_group * k * k * 2, H', W']`; two spatial axes.

    Reference: Zhu et al., "Deformable ConvNets v2", CVPR 2019, equation 1.
    """
    if x.dim() != 4:
        raise UnsupportedOperatorError(f"DeformConv has {x.dim() - 2} spatial axes; expected two.")
    dilations, strides, pads = dilations or (1, 1), strides or (1, 1), pads or (0, 0, 0, 0)
    n, channels, height, width = x.shape
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    out = offset.shape[2:]
    moved = offset.reshape(n, offset_group, taps, 2, *out)
    where = list(itertools.product(range(kernel[0]), range(kernel[1])))
    base = []
    for axis in range(2):
        shape = [1, 1, 1, 1, 1]
        shape[3 + axis] = out[axis]
        start = torch.arange(out[axis], dtype=x.dtype, device=x.device) * strides[axis] - pads[axis]
        tap = torch.tensor([w[axis] * dilations[axis] for w in where], dtype=x.dtype, device=x.device)
        base.append(start.reshape(shape) + tap.reshape(1, 1, -1, 1, 1))
    ys, xs = moved[:, :, :, 0] + base[0], moved[:, :, :, 1] + base[1]  # [N, G, taps, *out]
    planes = x.reshape(n, offset_group, channels // offset_group, height * width)
    sampled = _bilinear(planes, (height, width), ys, xs)  # [N, G, C / G, taps, *out]
    if mask is not None:
        sampled = sampled * mask.reshape(n, offset_group, 1, taps, *out)
    columns = sampled.reshape(n, group, channels // group, taps, *out)
    weights = weight.reshape(group, weight.shape[0] // group, weight.shape[1], taps)
    y = torch.einsum("ngctij,goct->ngoij", columns, weights).reshape(n, weight.shape[0], *out)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _bilinear(planes: Tensor, size: tuple[int, int], ys: Tensor, xs: Tensor) -> Tensor:
    """`planes [N, G, C, H * W]` at positions `[N, G, ...]`; zero outside the image."""
    n, groups, channels, _ = planes.shape
    height, width = size
    rows, columns = torch.floor(ys), torch.floor(xs)
    total = torch.zeros((n, groups, channels, *ys.shape[2:]), dtype=planes.dtype, device=planes.device)
    for down, right in itertools.product((0, 1), (0, 1)):
        row, column = rows + down, columns + right
        weight = (1 - torch.abs(ys - row)) * (1 - torch.abs(xs - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        flat = torch.clamp(row, 0, height - 1) * width + torch.clamp(column, 0, width - 1)
        places = flat.to(torch.int64).reshape(n, groups, 1, -1).expand(n, groups, channels, -1)
        picked = torch.gather(planes, 3, places).reshape(total.shape)
        total = total + picked * (weight * inside).unsqueeze(2)
    return total
