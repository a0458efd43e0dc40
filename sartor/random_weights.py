"""Random weights under which errors show: no fresh norms, no dead layers, activations of order one.

With running statistics a BatchNormalization normalises nothing, and every residual addition doubles the
variance: in a network of fifty blocks an error in a bias would drown. So weights are drawn with the
variance that theory gives, and scaled layer by layer to what one sample shows. Running statistics are
drawn around those of the sample: what activations have in common must not grow from layer to layer until
it hides in what they differ.

Reference: Mishkin & Matas, "All you need is a good init", ICLR 2016 (layer-sequential unit variance).
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sartor.ir.channels import ChannelAnalysis
from sartor.ir.program import Program
from sartor.ir.subgraphs import flat
from sartor.ir.workload import is_parameter
from sartor.passes.rewriter import Rewriter

_FEWEST_POSITIONS = 16  # per channel, for statistics that mean something
_ENOUGH = 2.0  # a layer whose output has a root mean square within this factor of 1 is left as drawn


def randomise(program: Program, analysis: ChannelAnalysis, seed: int, *, kind: str = "normal") -> Program:
    """The program with every parameter and buffer random, so that the variance of activations is preserved.

    All draws are uniform, which takes a fifth of the time of normal ones. Weights have variance 2 / fan-in
    and are then scaled so that their layer's output is of order one; norm scales lie in [0.5, 1.5], and
    everything else has mean 0 and standard deviation 0.3. Running means are those of one sample plus such
    deviations of it, running variances the sample's times [0.5, 1.5]. Single numbers (attention scales,
    exponents, bounds) and masks stay.

    Args:
        program: canonical; not changed.
        analysis: its channel groups.
        seed: of the draws and of the sample that layers are scaled by.
        kind: of that sample; see `sartor.ir.batch.random_inputs`.
    """
    clone = program.clone()
    rewriter = Rewriter(clone, "randomise")
    scaling, statistics, fans, weights = _roles(flat(program))
    consumed = {(m.initializer, m.axis) for g in analysis.groups for m in g.members if m.role == "consumer"}
    for name, value in sorted(clone.initializers.items()):
        tensor = value.const_value
        if tensor is None or not (name in statistics or is_parameter(program.initializers[name])):
            continue
        array = tensor.numpy()
        if not (array.min() >= -1e3 and array.max() <= 1e3):
            continue  # an attention mask, not a parameter
        shape = array.shape
        if name in scaling:
            spread = 0.0
        elif len(shape) >= 2:
            axes = [a for n, a in consumed if n == name]
            fan = fans.get(name) or math.prod(shape) / shape[axes[0] - 1 if axes else 0]
            spread = math.sqrt(2.0 / max(fan, 1.0))
        else:
            spread = 0.3
        key = (seed, zlib.crc32(name.encode()))  # of its own, so that a tensor can be drawn again alone
        rewriter.derive_initializer(name, functools.partial(_drawn, key, spread))
    clone.invalidate()
    for name, fit in _fitted(flat(clone), weights, seed, kind).items():
        rewriter.derive_initializer(name, fit)
    clone.invalidate()
    return clone


def _drawn(key: tuple[int, int], spread: float, like: np.ndarray) -> np.ndarray:
    """Uniform with mean 0 and standard deviation `spread`, or for spread 0 in [0.5, 1.5]; shaped as `like`."""
    generator = np.random.default_rng(key)
    kind = np.float64 if like.dtype == np.float64 else np.float32  # half the time, where it is enough
    width, lowest = (math.sqrt(12.0) * spread, -math.sqrt(3.0) * spread) if spread else (1.0, 0.5)
    drawn: Any = generator.random(like.shape, kind)
    drawn *= kind(width)  # in place: fresh memory costs more than the arithmetic
    drawn += kind(lowest)
    return np.asarray(drawn).astype(like.dtype, copy=False)


def _divided(by: float, array: np.ndarray) -> np.ndarray:
    return np.asarray(array / by).astype(array.dtype)


def _replaced(new: np.ndarray, array: np.ndarray) -> np.ndarray:
    return new.astype(array.dtype)


def _fitted(
    program: Program, weights: dict[str, str], seed: int, kind: str
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Weights and running statistics fitted to one sample, in one pass in which every layer sees fitted inputs.

    Args:
        program: with drawn weights, flat: layers of both branches of an `If` are fitted.
        weights: weight by name of the node that contracts with it.
        seed: of the sample.
        kind: of the sample.

    Returns:
        By initializer, what fits it.
    """
    import torch
    from torch import fx

    from sartor.ir.batch import random_inputs
    from sartor.ir.fx import to_tensor
    from sartor.ir.fx_run import Runner

    scales: dict[str, float] = {}
    statistics: dict[str, torch.Tensor] = {}
    norms = {
        n.name: n
        for n in program.nodes()
        if n.op_type == "BatchNormalization"
        and all(v is not None and v.name in program.initializers for v in n.inputs[3:5])
    }

    class Fitting(Runner):
        def run_node(self, n: fx.Node) -> Any:
            name = n.meta.get("onnx_node") or ""
            if name in norms and n.op == "call_module":
                return self._normalise(n, [v.name or "" for v in norms[name].inputs[3:5] if v is not None])
            result = super().run_node(n)
            weight = weights.get(name)
            if weight is None:
                return result
            if weight not in scales:
                size = float(result.square().mean().sqrt())
                ordinary = 1 / _ENOUGH <= size <= _ENOUGH or size == 0 or not math.isfinite(size)
                scales[weight] = 1.0 if ordinary else size
            # The bias is scaled, too, here but not in the program: it is small beside the rest.
            return result if scales[weight] == 1.0 else result / scales[weight]

        def _normalise(self, n: fx.Node, names: list[str]) -> Any:
            x, scale, bias, mean, variance = self.fetch_args_kwargs_from_env(n)[0]
            if names[0] not in statistics and names[1] not in statistics:
                spread, middle = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
                known = (spread > 1e-12) & (x.numel() // x.shape[1] >= _FEWEST_POSITIONS)
                statistics[names[0]] = torch.where(known, middle + mean * spread.sqrt(), mean)
                statistics[names[1]] = torch.where(known, spread * variance, variance)
            found = [statistics.get(k, v) for k, v in zip(names, (mean, variance), strict=True)]
            return self.call_module(str(n.target), (x, scale, bias, *found), {})

    runner = Fitting(program, torch.float32)
    inputs = random_inputs(program, seed=seed, kind=kind)
    with torch.no_grad():
        runner([to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs])
    fitted: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        name: functools.partial(_divided, size) for name, size in scales.items() if size != 1.0
    }
    return fitted | {k: functools.partial(_replaced, v.numpy()) for k, v in statistics.items()}


def _roles(program: Program) -> tuple[set[str], set[str], dict[str, float], dict[str, str]]:
    """What must be positive, what is a running statistic, fan-in by weight, and weight by contraction."""
    positive: set[str] = set()
    statistics: set[str] = set()
    fans: dict[str, float] = {}
    weights: dict[str, str] = {}
    for node in program.nodes():
        names = [v.name if v is not None else None for v in node.inputs]
        if node.op_type == "BatchNormalization":
            positive.update(n for n in (names[1], names[4]) if n)
            statistics.update(n for n in names[3:5] if n)
        elif node.op_type in ("LayerNormalization", "InstanceNormalization", "GroupNormalization"):
            positive.update(n for n in names[1:2] if n)
        elif node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            weight = node.inputs[1]
            producer = weight.producer() if weight is not None else None
            turned = producer is not None and producer.op_type == "Transpose"
            source = producer.inputs[0] if turned and producer is not None else weight
            if source is None or source.name not in program.initializers:
                continue
            weights[node.name or ""] = source.name or ""
            shape = program.initializer_shape(source.name or "")
            if node.op_type == "Conv":
                fans[source.name or ""] = math.prod(shape[1:])
            elif node.op_type == "ConvTranspose":
                groups, strides = node.attributes.get("group"), node.attributes.get("strides")
                step = math.prod(strides.value) if strides is not None else 1
                per = groups.value if groups is not None else 1
                fans[source.name or ""] = shape[0] / per * math.prod(shape[2:]) / step
            elif len(shape) >= 2:
                flipped = node.attributes.get("transB")
                last = turned or (node.op_type == "Gemm" and flipped is not None and flipped.value)
                fans[source.name or ""] = shape[-1] if last else shape[-2]
    return positive, statistics, fans, weights
