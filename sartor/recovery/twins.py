"""Running twins on numpy batches, and re-estimating BatchNormalization statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, fx

from sartor.ir.fx import to_array, to_fx, to_tensor, twin_info
from sartor.ir.program import Program
from sartor.ir.torch_ops import BatchNorm
from sartor.recovery.sizes import Sizes

Predict = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def predictor(twin: Program | fx.GraphModule, sizes: Sizes | None = None) -> Predict:
    """A function from input arrays to output arrays by name, on the FX twin in float32 and eval mode.

    Args:
        twin: a program, or a module made by `to_fx`, whose mode is put back after each call.
        sizes: how arrays are resized on the way in and out, for a program at another size than its original's.
    """
    sizes = sizes or Sizes()
    gm = to_fx(twin, dtype=torch.float32) if isinstance(twin, Program) else twin
    info = twin_info(gm)

    def predict(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        training = gm.training
        gm.eval()
        try:
            with torch.no_grad():
                tensors = [to_tensor(inputs[name], info.dtype) for name in info.inputs]
                results = gm(*sizes.given(info.inputs, tensors))
                outputs = sizes.taken(dict(zip(info.outputs, results, strict=True)))
        finally:
            gm.train(training)
        return {name: to_array(output) for name, output in outputs.items()}

    return predict


def snapshot(gm: fx.GraphModule) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {key: tensor.detach().clone() for key, tensor in gm.state_dict().items()}


def restore(gm: fx.GraphModule, state: Mapping[str, Tensor]) -> None:
    """Put a snapshot back in place, so that optimizers keep their references."""
    with torch.no_grad():
        for key, tensor in gm.state_dict(keep_vars=True).items():
            tensor.copy_(state[key])


def batch_norms(gm: fx.GraphModule) -> list[BatchNorm]:
    """The BatchNormalization calls of a twin."""
    return [module for module in gm.modules() if isinstance(module, BatchNorm)]


def reestimate_statistics(
    gm: fx.GraphModule,
    batches: Iterable[list[Tensor]],
    *,
    seconds: float = float("inf"),
    frozen: Collection[BatchNorm] = (),
) -> int:
    """Replace running statistics by the plain average over `batches`; leaves the module in eval mode.

    A cut network has other activations than those its statistics were taken on, and the momentum of training
    would need hundreds of steps to forget the old ones.

    Args:
        gm: a twin.
        batches: input tensors in the order of the twin's inputs.
        seconds: time after which the average stops.
        frozen: norms that keep their statistics, and normalise by them.

    Returns:
        Number of batches averaged; with 0 nothing changed.
    """
    modules = [module for module in batch_norms(gm) if module not in frozen]
    momenta = [module.momentum for module in modules]
    deadline = time.perf_counter() + seconds
    count = 0
    if not modules:
        return 0
    gm.train()
    for module in frozen:
        module.eval()
    try:
        with torch.no_grad():
            for tensors in batches:
                for module in modules:
                    module.momentum = count / (count + 1)
                gm(*tensors)
                count += 1
                if time.perf_counter() > deadline:
                    break
    finally:
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
        gm.eval()
    return count
