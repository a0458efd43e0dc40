"""Whether the oracle could have failed: what of a plan does its comparison show?

Each narrowed group must have a kept unit whose change by 10 % moves the output by more than 100 times the
tolerance. One backward pass gives a lower bound for all units; groups that it does not clear are changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sartor.comparison import relative_error, seen
from sartor.ir.channels import ChannelAnalysis, ChannelGroup
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter

SENSITIVITY = 100.0
PERTURBATION = 0.1
_PROBES = 64  # output elements whose mean, with random signs, is differentiated: a lower bound of the largest change
_REST = 1e-3  # weight of the mean over all other elements, which tells units that live from those that do not
_MOST_PERTURBED = 8  # groups that the bound does not clear are perturbed one by one, up to this many


def insensitive(
    original: Program,
    mask: Program,
    pruned: Program,
    plan: Plan,
    analysis: ChannelAnalysis,
    gradients: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    tolerance: float,
) -> tuple[str, ...]:
    """Groups and blocks of the plan whose perturbation would not have been seen."""
    from sartor.ir.fx import run_twin

    needed = SENSITIVITY * tolerance
    missing: list[str] = []
    finite = [a[np.isfinite(a)] for a in outputs.values()]
    scale = max((float(np.abs(a).max()) for a in finite if a.size), default=0.0)
    for name, entry in plan.groups.items():
        if not any(m.initializer in pruned.initializers for m in analysis.group(name).members):
            continue  # it went with a removed block: nothing of it is left to be wrong
        kept = np.asarray(entry.keep)
        unit = int(kept[np.argmax(np.abs(gradients[name][kept]))])
        if PERTURBATION * np.abs(gradients[name][unit]) > needed * scale:
            continue
        if len(missing) >= _MOST_PERTURBED or not moves(
            mask, analysis, analysis.group(name), unit, inputs, outputs, needed
        ):
            missing.append(name)
    if plan.blocks and relative_error(seen(run_twin(original, inputs)), outputs) <= needed:
        missing += plan.blocks
    return tuple(missing)


def moves(
    mask: Program,
    analysis: ChannelAnalysis,
    group: ChannelGroup,
    unit: int,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    needed: float,
) -> bool:
    """Whether a perturbation of one unit, where its gate would be, changes some output by more than `needed`."""
    from sartor.ir.fx import run_twin

    perturbed = mask.clone()
    rewriter = Rewriter(perturbed, "perturb")
    for member in analysis.masked_members(group):
        if len(analysis.program.initializers[member.initializer].uses()) != 1:
            return False  # MASKED reads a private copy of a shared parameter, which goes by another name
        place = (slice(None),) * member.axis + (member.index_map == unit,)
        rewriter.derive_initializer(member.initializer, functools.partial(_perturbed, place))
    perturbed.invalidate()
    return relative_error(seen(outputs), run_twin(perturbed, inputs)) > needed


def _perturbed(place: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[place] *= 1.0 + PERTURBATION
    return array


def probe(generator: np.random.Generator, size: int) -> np.ndarray:
    """Weights of a mean, with random signs, over some of `size` elements and a little over all."""
    weights = generator.choice([-1.0, 1.0], size) * (_REST / size)
    elements = generator.choice(size, min(_PROBES, size), replace=False)
    weights[elements] += generator.choice([-1.0, 1.0], len(elements)) / len(elements)
    return weights


def with_gradients(
    mask: Program, plan: Plan, analysis: ChannelAnalysis, inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Outputs of MASKED, and the derivative of a random mean of its elements by every unit's gate, in one sweep.

    The derivative is (but for the factor 1 + `_REST`) a lower bound of how far the gate moves some output, and one
    sweep serves all groups.
    """
    import torch

    from sartor.ir.fx import run_twin
    from sartor.strategies.gates import gate_gradients

    if not plan.groups:
        return run_twin(mask, inputs), {}
    generator = np.random.default_rng(1)
    outputs: dict[str, np.ndarray] = {}

    def loss(result: Mapping[str, torch.Tensor], _: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, output in result.items():
            outputs[name] = output.detach().numpy().copy()
            if output.is_floating_point() and output.numel():
                weights = torch.from_numpy(probe(generator, output.numel()))
                numbers = torch.where(output.isfinite(), output, 0.0).reshape(-1).to(torch.float64)
                total = total + (numbers * weights).sum() / len(result)
        return total

    data = [(dict(inputs), None)]
    found = gate_gradients(mask, analysis, (), data, loss=loss, dtype=torch.float64)
    return outputs, found.groups
