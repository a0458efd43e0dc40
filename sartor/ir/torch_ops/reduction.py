"""Reductions and operators that mix values along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sartor.ir.torch_ops.registry import operator

Axes = tuple[int, ...] | None


def _reduced_axes(x: Tensor, axes: Axes, noop: int) -> tuple[int, ...]:
    if not axes:
        return () if noop else tuple(range(x.dim()))
    return tuple(sorted(a % x.dim() for a in axes))


def _reduction(
    op_type: str,
    over: Callable[[Tensor, tuple[int, ...], bool], Tensor],
    before: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Callable[..., Tensor]:
    """Build one Reduce*: `after(over(before(x)))`; with nothing to reduce, `over` is left out."""

    def reduce(x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = _reduced_axes(x, axes, noop_with_empty_axes)
        dtype = x.dtype
        if before is not None:
            x = before(x)
        if dims:
            x = over(x, dims, bool(keepdims))
        if after is not None:
            x = after(x)
        return x.to(dtype)

    reduce.__name__ = reduce.__qualname__ = f"reduce_{op_type.removeprefix('Reduce').lower()}"
    reduce.__doc__ = f"{op_type} over `axes`, all of them by default."
    operator(op_type, static=(1,))(reduce)
    return reduce


def _extreme(torch_function: Callable[..., Tensor], empty: float) -> Callable[..., Tensor]:
    def over(x: Tensor, dims: tuple[int, ...], keepdims: bool) -> Tensor:
        if any(x.shape[d] == 0 for d in dims):
            value = empty
            if x.dtype is torch.bool:
                value = empty > 0
            elif not x.is_floating_point():
                limits = torch.iinfo(x.dtype)
                value = limits.min if empty < 0 else limits.max
            shape = [1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdims or d not in dims]
            return torch.full(shape, value, dtype=x.dtype, device=x.device)
        return torch_function(x, dims, keepdim=keepdims)

    return over


def _product(x: Tensor, dims: tuple[int, ...], keepdims: bool) -> Tensor:
    for d in reversed(dims):
        x = torch.prod(x, d, keepdim=keepdims)
    return x


def _sum(x: Tensor, dims: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keepdims)


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.logsumexp(x, dims, keepdim=keepdims)


def _root(x: Tensor) -> Tensor:
    return torch.sqrt(x if x.is_floating_point() else x.to(torch.float64))


def _log(x: Tensor) -> Tensor:
    return torch.log(x if x.is_floating_point() else x.to(torch.float64))


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.float64)


def _mean(x: Tensor, dims: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.mean(_floating(x), dims, keepdim=keepdims)


reduce_l1 = _reduction("ReduceL1", _sum, before=torch.abs)
reduce_l2 = _reduction("ReduceL2", _sum, before=torch.square, after=_root)
reduce_log_sum = _reduction("ReduceLogSum", _sum, after=_log)
reduce_log_sum_exp = _reduction("ReduceLogSumExp", _log_sum_exp, before=_floating)
reduce_max = _reduction("ReduceMax", _extreme(torch.amax, -math.inf))
reduce_mean = _reduction("ReduceMean", _mean)
reduce_min = _reduction("ReduceMin", _extreme(torch.amin, math.inf))
reduce_prod = _reduction("ReduceProd", _product)
reduce_sum = _reduction("ReduceSum", _sum)
reduce_sum_square = _reduction("ReduceSumSquare", _sum, before=torch.square)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax along one axis; in 16 bits it rounds after each step of its definition, as ONNX's does."""
    if x.dtype in (torch.float16, torch.bfloat16):
        raised = torch.exp(x - torch.amax(x, axis, keepdim=True))
        return raised / torch.sum(raised, axis, keepdim=True)
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithm of softmax along one axis."""
    return torch.log_softmax(x, axis)


@operator("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along the axis, 0 elsewhere."""
    chosen = functional.one_hot(torch.argmax(x, axis), x.shape[axis])
    return torch.movedim(chosen, -1, axis).to(x.dtype)


def _arg(
    search: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, select_last_index: int
) -> Tensor:
    if not select_last_index:
        return search(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - search(torch.flip(x, (axis,)), axis, keepdim=bool(keepdims))


@operator("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the maximum along the axis: the first, or the last of equals."""
    return _arg(torch.argmax, x, axis, keepdims, select_last_index)


@operator("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the minimum along the axis: the first, or the last of equals."""
    return _arg(torch.argmin, x, axis, keepdims, select_last_index)


@operator("CumSum", static=(1,))
def cum_sum(x: Tensor, axis: tuple[int, ...], *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sum along the axis; `exclusive` leaves the element itself out."""
    dim = axis[0]
    source = torch.flip(x, (dim,)) if reverse else x
    result = torch.cumsum(source, dim, dtype=x.dtype)
    if exclusive:
        result = result - source
    return torch.flip(result, (dim,)) if reverse else result


@operator("TopK", static=(1,), several=True)
def top_k(
    x: Tensor, k: tuple[int, ...], *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int
) -> tuple[Tensor, ...]:
    """The `k` largest or smallest along the axis with their indices; of equals the lower index first."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return (torch.narrow(values, axis, 0, k[0]), torch.narrow(indices, axis, 0, k[0]))[:outputs]
