"""Gradients of gates that are never inserted.

A gate multiplies exactly what the MASKED oracle zeroes: a unit's gate the weight slices of its consumers, a
block's gate the last affine layer of its branch. At gate 1, `dL/dg = <w, dL/dw>` over the slices `w` that it
multiplies, so one backward pass through the FX twin gives the gradient of every gate at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.strategies.importance import (
    AnalysisLike,
    Batches,
    BlockLike,
    GroupLike,
    Importance,
    members_with,
    per_unit,
    removable,
)


def gate_gradients(
    program: Program,
    analysis: AnalysisLike,
    blocks: Sequence[BlockLike],
    data: Batches,
    *,
    loss: Callable[..., Any] | None = None,
    dtype: Any = None,
) -> Importance:
    """Gradient of the mean loss with respect to every gate at 1, in one sweep over the data.

    Uses the FX twin in eval mode (BatchNormalization uses its running statistics), in float32 unless told
    otherwise.

    Args:
        program: the program that `analysis` and `blocks` describe.
        analysis: its channel groups.
        blocks: its residual blocks.
        data: re-iterable of `(inputs, labels)`.
        loss: `(outputs by name, labels or None) -> mean over samples`. By default the loss against labels of
            `sartor.recovery.losses`, or without labels the mean squared L2 norm of the outputs.
        dtype: torch float type of the computation.

    Returns:
        Signed gradients, one per unit and per removable block.

    Raises:
        UsageError: there are no data, or a group or block has nothing that a gate could multiply.
    """
    gates = {group.name: gate_members(analysis, group) for group in analysis.groups}
    tensors = {m.initializer for members in gates.values() for m in members}
    for block in removable(blocks):
        if not block.last_affine:
            raise UsageError(
                f"Block '{block.name}' is removable but has no last affine layer to put a gate on."
            )
        tensors.update(block.last_affine)
    gradients = mean_gradients(program, data, {name for name in tensors if name}, loss=loss, dtype=dtype)

    def product(name: str) -> np.ndarray:
        return program.initializer_array(name).astype(np.float64) * gradients[name]

    groups = {}
    for group in analysis.groups:
        totals = np.zeros(group.size)
        for member in gates[group.name]:
            totals += per_unit(product(member.initializer), member, group.size)
        groups[group.name] = totals
    scores = {b.name: float(sum(product(n).sum() for n in b.last_affine)) for b in removable(blocks)}
    return Importance(groups, scores)


def mean_gradients(
    program: Program,
    data: Batches,
    names: Iterable[str],
    *,
    loss: Callable[..., Any] | None = None,
    dtype: Any = None,
) -> dict[str, np.ndarray]:
    """Gradient of the mean loss over all samples with respect to initializers.

    Args:
        program: canonical program.
        data: re-iterable of `(inputs, labels)`; batches weigh by their number of samples.
        names: float initializers.
        loss: see `gate_gradients`.
        dtype: see `gate_gradients`.

    Returns:
        float64 arrays by initializer name; zeros for an initializer that no output depends on.

    Raises:
        UsageError: there are no data.
    """
    import torch

    from sartor.ir.fx import to_fx, to_tensor, twin_info
    from sartor.recovery import losses

    gm = to_fx(program, dtype=dtype or torch.float32).eval()
    info = twin_info(gm)
    probabilities = losses.probability_outputs(program)
    wanted = set(names)
    keys = {name: key for key, name in info.names.items()}
    state = gm.state_dict(keep_vars=True)
    tensors = {name: state[keys[name]] for name in sorted(wanted) if name in keys}
    for tensor in state.values():
        tensor.requires_grad_(False)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    count = 0
    for inputs, labels in data:
        arrays = [to_tensor(inputs[name], info.dtype) for name in info.inputs]
        samples = len(arrays[0])
        outputs = dict(zip(info.outputs, gm(*arrays), strict=True))
        target = None if labels is None else torch.as_tensor(np.asarray(labels))
        if loss is not None:
            value = losses.checked(loss(outputs, target))
        elif target is not None:
            value = losses.label_loss(outputs, target, probabilities)
        else:
            value = losses.output_energy(outputs)
        if value.requires_grad:  # false when no output depends on the wanted tensors
            (value * samples).backward()  # the mean over all data, whatever the batch sizes
        count += samples
    if not count:
        raise UsageError("The calibration data are empty; gradients need at least one sample.")
    result = {}
    for name in wanted:
        tensor = tensors.get(name)
        if tensor is None or tensor.grad is None:
            result[name] = np.zeros(program.initializer_array(name).shape)
        else:
            result[name] = tensor.grad.numpy().astype(np.float64) / count
    return result


def gate_members(analysis: AnalysisLike, group: GroupLike) -> list[Any]:
    """What a unit's gate multiplies: the slices that the MASKED oracle zeroes.

    These are the consumers' slices. An analysis that knows better (query rows of attention, whose consumer
    has no weight) says so by a method `masked_members(group)`.

    Raises:
        UsageError: nothing in the group could be masked.
    """
    masked = getattr(analysis, "masked_members", None)
    members = list(masked(group)) if masked is not None else members_with(group, "consumer")
    members = [m for m in members if m.initializer]
    if not members:
        raise UsageError(
            f"Group '{group.name}' has no consumer with weights, so a gate has no place. Use criterion l1 or "
            "l2, or --keep this group."
        )
    return members
