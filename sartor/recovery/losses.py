"""Losses for gradients and recovery: against labels, against the original, or without either.

Every loss takes `outputs`, a mapping from graph output names to tensors, and is the mean over the samples of
a batch. The first output is the prediction that labels are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sartor.errors import UsageError
from sartor.ir.program import Program

Outputs = Mapping[str, Tensor]
Loss = Callable[[Outputs, "Tensor | None"], Tensor]


def probability_outputs(program: Program) -> frozenset[str]:
    """Graph outputs that a Softmax produces: cross-entropy must take their logarithm first."""
    names = []
    for value in program.graph.outputs:
        node = value.producer()
        if node is not None and node.op_type == "Softmax" and node.domain in ("", "ai.onnx"):
            names.append(value.name or "")
    return frozenset(names)


def logits(output: Tensor, name: str, probabilities: frozenset[str]) -> Tensor:
    """Scores whose softmax is the prediction, also where the network ends in a Softmax."""
    if name not in probabilities:
        return output
    return torch.log(output.clamp_min(torch.finfo(output.dtype).tiny))


def is_classification(output: Tensor) -> bool:
    """Whether an output is read as class scores when no labels say otherwise: `[N, C]` with C > 1."""
    return output.dim() == 2 and output.shape[1] > 1


def misclassified(outputs: Outputs, labels: Tensor) -> Tensor:
    """Samples whose highest score in the first output `[N, C]` is not their class id, booleans `[N]`."""
    return next(iter(outputs.values())).argmax(1) != labels.reshape(-1)


def label_loss(outputs: Outputs, labels: Tensor, probabilities: frozenset[str] = frozenset()) -> Tensor:
    """Loss of the first output against labels.

    * integer labels `[N, ...]` for `[N, C, ...]`: cross-entropy;
    * rows of probabilities `[N, C]` for `[N, C]`: cross-entropy with soft labels;
    * other float labels of the output's shape: mean squared error.

    Raises:
        UsageError: labels and output do not fit each other, or labels are not finite.
    """
    name, output = next(iter(outputs.items()))
    if labels.is_floating_point():
        if labels.shape != output.shape:
            raise UsageError(
                f"Output '{name}' has shape {list(output.shape)} and its float labels {list(labels.shape)}; "
                "they must be equal, or give a 'loss' with the data."
            )
        if not bool(torch.isfinite(labels).all()):
            raise UsageError("Labels contain NaN or infinity; clean them, or give a 'loss' with the data.")
        labels = labels.to(output.dtype)
        if is_classification(output) and _are_probabilities(labels):
            return functional.cross_entropy(logits(output, name, probabilities), labels)
        return functional.mse_loss(output, labels)
    ids = labels.to(torch.int64)
    if output.dim() == 2 and tuple(ids.shape[1:]) == (1,):
        ids = ids.reshape(-1)
    if output.dim() < 2 or output.shape[1] < 2 or ids.shape != (output.shape[0], *output.shape[2:]):
        raise UsageError(
            f"Output '{name}' has shape {list(output.shape)}, which holds no class scores [N, C, ...] for "
            f"integer labels of shape {list(labels.shape)}; give a 'loss' with the data."
        )
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= output.shape[1]:
        raise UsageError(
            f"Labels range from {lowest} to {highest}, but output '{name}' has {output.shape[1]} classes; "
            "use class ids from 0."
        )
    return functional.cross_entropy(logits(output, name, probabilities), ids)


def checked(value: Tensor) -> Tensor:
    """The value of a user's loss, which must be one number that depends on the outputs.

    Raises:
        UsageError: it is not a scalar tensor.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = type(value).__name__
        found = (
            f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"value of type '{kind}'"
        )
        raise UsageError(
            f"The data's loss returned a {found}; it must return one torch scalar that depends on the outputs, "
            "such as a mean."
        )
    return value.reshape(())


def output_energy(outputs: Outputs, labels: Tensor | None = None) -> Tensor:
    """Mean over samples of the squared L2 norm of all outputs.

    The scalar for gradients without labels: cross-entropy against the network's own predictions would have
    a gradient of zero everywhere, and so no information.
    """
    total = torch.zeros((), dtype=next(iter(outputs.values())).dtype)
    for output in outputs.values():
        if output.is_floating_point():
            total = total + output.reshape(output.shape[0], -1).square().sum(1).mean()
    return total


def distillation_loss(
    student: Outputs, teacher: Outputs, temperature: float, probabilities: frozenset[str] = frozenset()
) -> Tensor:
    """Distance of the student's outputs from the original's, summed over outputs.

    * class scores `[N, C]`: `T² KL(softmax(teacher / T) ‖ softmax(student / T))`;
    * any other float output: squared error divided by the mean square of the original's output, so that
      the scale of an output does not weigh it.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, section 2.
    """
    total = torch.zeros((), dtype=next(iter(student.values())).dtype)
    for name, target in teacher.items():
        if not target.is_floating_point():
            continue
        output = student[name]
        if is_classification(target):
            ours = functional.log_softmax(logits(output, name, probabilities) / temperature, 1)
            theirs = functional.log_softmax(logits(target, name, probabilities) / temperature, 1)
            divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            total = total + temperature**2 * divergence
        else:
            scale = target.square().mean().clamp_min(torch.finfo(target.dtype).tiny)
            total = total + functional.mse_loss(output, target) / scale
    return total


def _are_probabilities(labels: Tensor) -> bool:
    sums = labels.sum(1)
    return bool((labels >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
