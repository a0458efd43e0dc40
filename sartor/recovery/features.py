"""Where a network looks: attention maps of its blocks, which are compared whatever the widths.

    a = sum over channels of value²       A = a / ‖a‖₂ for each sample
    loss = mean over samples and values of ‖A_student - A_original‖₂²

A map has one number per position and none per channel, so that values of pruned widths compare; maps of two sizes are
compared at the smaller one. Values are found by name: rewriting keeps the names of those that it keeps.

Reference: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1, equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from sartor.images import resized
from sartor.ir.blocks import residual_blocks
from sartor.ir.program import Program

_SMALLEST_NORM = 1e-12  # of a map of zeros, whose gradient must be a number
_OVER_CHANNELS_LAST = frozenset({"LayerNormalization", "MatMul", "Gemm"})
_OVER_CHANNELS_SECOND = frozenset({"Conv", "ConvTranspose", "BatchNormalization"})


def attention_points(program: Program, original: Program) -> dict[str, int]:
    """Values that both programs compute and that have maps, with the axis of their channels.

    Results of residual blocks; where the original has none, the last value of each size of maps. Graph outputs are
    left out: they are compared as they are.
    """
    outputs = {value.name for value in original.graph.outputs}
    ours, theirs = program.shapes(), original.shapes()
    values = {value.name or "": value for node in original.nodes() for value in node.outputs}
    candidates = [block.outputs[0] for block in residual_blocks(original)] or _last_of_each_size(original)
    computed = {value.name for node in program.nodes() for value in node.outputs}
    points = {}
    for name in candidates:
        if name in outputs or name not in computed:
            continue
        axis = _channel_axis(values[name], len(theirs[name]))
        maps = [_without(shape[name], axis) for shape in (ours, theirs)]
        images = len(maps[0]) > 2 and len(maps[0]) == len(maps[1])
        if images or (maps[0] == maps[1] and len(maps[0]) == 2):  # tokens of two grids do not lie on one line
            points[name] = axis
    return points


def attention_map(value: Tensor, axis: int) -> Tensor:
    """Squares summed over channels, of norm 1 for each sample: `[N, positions...]`.

    Args:
        value: `[N, ..., C, ...]`.
        axis: of its channels.
    """
    return _of_norm_one(value.float().square().sum(axis))


def attention_loss(student: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Tensor:
    """Squared distance of the maps of a batch, the mean over samples and values; see the module docstring."""
    total = torch.zeros(())
    for name, theirs in original.items():
        ours = student[name]
        common = [min(pair) for pair in zip(ours.shape, theirs.shape, strict=True)]
        pair = [_of_norm_one(resized(each, common)) for each in (ours, theirs)]
        total = total + (pair[0] - pair[1]).flatten(1).square().sum(1).mean()
    return total / max(len(original), 1)


def _of_norm_one(maps: Tensor) -> Tensor:
    norms = maps.flatten(1).norm(dim=1).clamp_min(_SMALLEST_NORM)
    return maps / norms.reshape(-1, *[1] * (maps.dim() - 1))


def _channel_axis(value: ir.Value, rank: int) -> int:
    """As its readers have it: the last of tokens and of maps [N, H, W, C], the second of maps [N, C, H, W]."""
    for node, _ in value.uses():
        if node.op_type in _OVER_CHANNELS_LAST:
            return rank - 1
        if node.op_type in _OVER_CHANNELS_SECOND:
            return 1
    return rank - 1 if rank == 3 else 1


def _last_of_each_size(program: Program) -> list[str]:
    shapes = program.shapes()
    last: dict[tuple[int, ...], str] = {}
    for node in program.nodes():
        for value in node.outputs:
            name = value.name or ""
            shape = shapes.get(name, ())
            if len(shape) == 4 and shape[2] * shape[3] > 1:
                last.pop(shape[2:], None)
                last[shape[2:]] = name
    return list(last.values())


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
