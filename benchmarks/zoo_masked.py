"""Is a pruned `torch.nn.Module` the original without what was removed? Asked of any tool that names what it removes.

The reference is the original in which every parameter entry that was removed is zero: rows and columns of
weights, biases, scales, shifts, embedding columns. Then the removed units contribute nothing to whatever reads
them with weights, and the pruned module must compute the same in float64. Where something without weights mixes
over the removed axis (the mean and variance of a LayerNorm, a mean over channels) it does not: that is a finding,
not an artefact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import batchnorm, conv, instancenorm
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-9
_SEEN = 1e-6  # a reference that differs from the original by less would prove nothing


class Untracked(Exception):
    """What was removed cannot be said in terms of the original's parameters."""


# ---- random weights --------------------------------------------------------------------------
def randomise(module: nn.Module, inputs: tuple[Any, ...], seed: int) -> None:
    """Every parameter and buffer random in place, so that activations keep their size (`sartor.random_weights`).

    Weights ~ N(0, 2 / fan-in), scaled so that what a layer gives for `inputs` is of order one; scales of norms
    uniform in [0.5, 1.5]; running statistics those of its sample, disturbed; all else at most N(0, 0.3).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        for owner in module.modules():
            positive = "norm" in type(owner).__name__.lower()
            for name, p in owner.named_parameters(recurse=False):
                if p.numel() == 1 or not p.is_floating_point() or p.abs().max() > 1e3:
                    continue  # temperatures, bounds and masks stay
                if positive and name == "weight":
                    p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
                elif isinstance(owner, conv._ConvNd | nn.Linear) and name == "weight":
                    p.copy_(normal(p) * math.sqrt(2.0 / _fan(owner)))
                else:
                    p.copy_(normal(p) * min(0.3, math.sqrt(2.0 / p.shape[-1]) if p.dim() > 1 else 0.3))
        hooks = [
            owner.register_forward_pre_hook(_FitStatistics(generator))
            if isinstance(owner, batchnorm._BatchNorm)
            else owner.register_forward_hook(_FitScale())
            for owner in module.modules()
            if isinstance(owner, batchnorm._BatchNorm | conv._ConvNd | nn.Linear)
        ]
        try:
            module(*inputs)
        finally:
            for hook in hooks:
                hook.remove()


def _fan(layer: Any) -> float:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    area = math.prod(layer.kernel_size)
    return layer.in_channels / layer.groups * area / (math.prod(layer.stride) if layer.transposed else 1)


class _FitStatistics:
    """Running statistics near those of the first input."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.done = generator, False

    def __call__(self, norm: Any, arguments: tuple[Any, ...]) -> None:
        if self.done or norm.running_var is None:
            return
        self.done = True
        x = arguments[0]
        spread, middle = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        if x.numel() // x.shape[1] < 16:  # a statistic of a few positions means nothing
            spread, middle = torch.ones_like(spread), torch.zeros_like(middle)
        shift = torch.randn(spread.shape, generator=self.generator) * 0.3
        norm.running_mean.copy_(middle + shift * spread.sqrt())
        norm.running_var.copy_(
            spread.clamp_min(1e-3) * (torch.rand(spread.shape, generator=self.generator) + 0.5)
        )


class _FitScale:
    """A weight under which the layer's first output has a root mean square near one."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, layer: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        size = float(output.square().mean().sqrt())
        if self.done or 0.5 <= size <= 2 or size == 0 or not math.isfinite(size):
            return None
        self.done = True
        layer.weight.div_(size)
        return layer.forward(*arguments)


# ---- what was removed ------------------------------------------------------------------------
class Removed:
    """Original indices of everything removed, where a tool prunes step by step in indices of the moment.

    Args:
        original: the module before pruning; not changed.
    """

    def __init__(self, original: nn.Module) -> None:
        self.modules = dict(original.named_modules())
        self.parameters = dict(original.named_parameters())
        self.kept: dict[tuple[str, str, int], np.ndarray] = {}

    def module(self, name: str, role: str, indices: list[int]) -> None:
        """`indices` of the inputs (`in`) or outputs (`out`) of module `name` go."""
        if name not in self.modules:
            raise Untracked(f"module '{name}' is not in the original")
        size = _width(self.modules[name], role)
        if size is not None:
            self._remove((name, role, 0), size, indices)

    def parameter(self, name: str, axis: int, indices: list[int]) -> None:
        """`indices` of an axis of parameter `name` go."""
        if name not in self.parameters:
            raise Untracked(f"parameter '{name}' is not in the original")
        self._remove((name, "parameter", axis), self.parameters[name].shape[axis], indices)

    def _remove(self, key: tuple[str, str, int], size: int, indices: list[int]) -> None:
        kept = self.kept.get(key, np.arange(size))
        unique = np.unique(np.asarray(indices, dtype=np.int64))
        if unique.size and not 0 <= unique[0] <= unique[-1] < len(kept):
            raise Untracked(f"'{key[0]}' loses index {unique[-1]} of {len(kept)}")
        self.kept[key] = np.delete(kept, unique)

    def __iter__(self) -> Iterator[tuple[str, str, int, torch.Tensor]]:
        for (name, role, axis), kept in self.kept.items():
            if role == "parameter":
                size = self.parameters[name].shape[axis]
            else:
                size = _width(self.modules[name], role)
            yield name, role, axis, torch.from_numpy(np.setdiff1d(np.arange(size), kept))

    def count(self) -> int:
        return sum(int(indices.numel()) for *_, indices in self)


def _width(module: nn.Module, role: str) -> int | None:
    """How many units a module has on one side; None where it has no parameter per unit."""
    outer = role == "out"
    if isinstance(module, conv._ConvNd):
        return module.out_channels if outer else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if outer else module.in_features
    if isinstance(module, batchnorm._BatchNorm | instancenorm._InstanceNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    raise Untracked(f"no rule for {type(module).__name__}")


def masked(original: nn.Module, removed: Removed) -> nn.Module:
    """A copy of the original in which everything removed is zero."""
    copied = copy.deepcopy(original)
    modules, parameters = dict(copied.named_modules()), dict(copied.named_parameters())
    with torch.no_grad():
        for name, role, axis, indices in removed:
            if role == "parameter":
                parameters[name].index_fill_(axis, indices, 0.0)
            else:
                for tensor, dim, entries in _entries(modules[name], role, indices):
                    tensor.index_fill_(dim, entries, 0.0)
    return copied


def _entries(
    module: Any, role: str, indices: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Tensor, dimension and entries in which units of a module live."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            raise Untracked("MultiheadAttention with separate projections")
        threefold = torch.cat([indices + i * module.embed_dim for i in range(3)])
        yield module.in_proj_weight, 0, threefold
        yield module.in_proj_weight, 1, indices
        if module.in_proj_bias is not None:
            yield module.in_proj_bias, 0, threefold
        yield module.out_proj.weight, 1, indices
        module, role = module.out_proj, "out"
    depthwise = isinstance(module, conv._ConvNd) and module.groups == module.out_channels > 1
    if isinstance(module, conv._ConvNd) and module.groups > 1 and not depthwise:
        if module.transposed:
            raise Untracked("a grouped ConvTranspose")
        if role == "in":
            yield from _grouped_inputs(module, indices)
            return
    if role == "in" and isinstance(module, conv._ConvNd | nn.Linear) and not depthwise:
        yield module.weight, 0 if getattr(module, "transposed", False) else 1, indices
        return
    if module.weight is not None:
        last = isinstance(module, nn.Embedding | nn.LayerNorm)
        turned = getattr(module, "transposed", False) and not depthwise
        yield module.weight, -1 if last else int(turned), indices
    if getattr(module, "bias", None) is not None:
        yield module.bias, -1, indices


def _grouped_inputs(module: Any, indices: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    wide, high = module.in_channels // module.groups, module.out_channels // module.groups
    for group in indices.div(wide, rounding_mode="floor").unique().tolist():
        mine = indices[(indices >= group * wide) & (indices < (group + 1) * wide)] - group * wide
        yield module.weight[group * high : (group + 1) * high], 1, mine


# ---- comparison ------------------------------------------------------------------------------
def compare(
    original: nn.Module, pruned: nn.Module, removed: Removed, inputs: tuple[Any, ...]
) -> dict[str, Any]:
    """Whether the pruned module, which becomes float64, computes what the masked original does.

    Returns:
        `exact` (None where nothing can be said, with `inexact_reason`), `max_rel_error`, and `effect`: how much
        masking changes the original.
    """
    nothing = {"exact": None, "max_rel_error": None}
    try:
        reference = masked(original, removed).double()
    except Untracked as error:
        return {**nothing, "untracked": True, "inexact_reason": f"cannot be tracked: {error}"}
    x = tuple(i.double() for i in inputs)
    try:
        before, expected, found = (
            _outputs(m, x) for m in (copy.deepcopy(original).double(), reference, pruned.double())
        )
    except Exception as error:
        return {
            **nothing,
            "inexact_reason": f"does not run in float64: {type(error).__name__}: {str(error)[:120]}",
        }
    if [t.shape for t in expected] != [t.shape for t in found]:
        return {"exact": False, "max_rel_error": None, "inexact_reason": "the outputs changed their shapes"}
    if not all(bool(torch.isfinite(t).all()) for t in (*expected, *before)):
        return {**nothing, "inexact_reason": "the reference is not finite"}
    error, effect = _distance(expected, found), _distance(expected, before)
    row = {"exact": error <= TOLERANCE, "max_rel_error": error, "effect": effect}
    if not effect > _SEEN:
        row |= {"exact": None, "inexact_reason": "what was removed does not reach the output"}
    elif not row["exact"]:
        with _KeptStatistics(reference, removed):
            rest = _distance(_outputs(reference, x), found)
        norms = rest <= TOLERANCE
        row["inexact_reason"] = "only the statistics of norms differ" if norms else "computes something else"
    return row


class _KeptStatistics(TorchFunctionMode):
    """Norms take mean and variance over what is kept: what still differs then is not their doing."""

    def __init__(self, reference: nn.Module, removed: Removed) -> None:
        super().__init__()
        modules = dict(reference.named_modules())
        self.kept = {
            modules[name].weight: torch.from_numpy(kept)
            for (name, _, _), kept in removed.kept.items()
            if isinstance(modules.get(name), nn.LayerNorm | nn.GroupNorm)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norms = (nn.functional.layer_norm, nn.functional.group_norm)
        kept = self.kept.get(kwargs.get("weight")) if func in norms else None
        if kept is None:
            return func(*args, **kwargs)
        weight, bias = (kwargs[k][kept] if kwargs[k] is not None else None for k in ("weight", "bias"))
        x, setting = args
        axis = -1 if func is nn.functional.layer_norm else 1
        setting = (len(kept),) if axis == -1 else setting
        part = func(x.index_select(axis, kept), setting, weight, bias, kwargs["eps"])
        return torch.zeros_like(x).index_copy(axis, kept, part)


def _distance(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        scale = float(a.abs().max()) or 1.0
        error = float((a - b).abs().max()) / scale
        worst = max(worst, error if math.isfinite(error) else 1e300)
    return worst


def _outputs(module: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(flat(module(*inputs)))


def flat(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module returned, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from flat(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
