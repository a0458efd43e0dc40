"""Gradients of gates that are never inserted.

A gate multiplies exactly what the MASKED oracle zeroes: a unit's gate the weight slices of its consumers, a
block's gate the last affine layer of its branch. At gate 1, `dL/dg = <w, dL/dw>` over the slices `w` that it
multiplies, so one backward pass through the FX twin gives the gradient of every gate at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    squared: bool = False,
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
        squared: the mean over samples of their squared gradients instead; samples are run one by one.

    Returns:
        Signed gradients, or means of squares, one per unit and per removable block.

    Raises:
        UsageError: there are no data, or a group or block has nothing that a gate could multiply.
    """
    import torch

    from sartor.ir.fx import to_tensor
    from sartor.ir.fx_run import Gates, Runner
    from sartor.recovery import losses

    members = {
        f"group {g.name}": [(m.initializer, m.axis, m.index_map) for m in gate_members(analysis, g)]
        for g in analysis.groups
    }
    sizes = {f"group {group.name}": group.size for group in analysis.groups}
    for block in removable(blocks):
        if not block.last_affine:
            raise UsageError(
                f"Block '{block.name}' is removable but has no last affine layer to put a gate on."
            )
        members[f"block {block.name}"] = [
            (name, 0, np.zeros((program.initializer_shape(name) or (1,))[0], dtype=np.int64))
            for name in block.last_affine
        ]
        sizes[f"block {block.name}"] = 1
    gates = Gates(sizes, members, dtype or torch.float32)
    runner = Runner(program, dtype or torch.float32, gates=gates)
    probabilities = losses.probability_outputs(program)
    count = 0
    squares = {key: np.zeros(size) for key, size in sizes.items()}
    for inputs, labels in _one_by_one(data) if squared else data:
        arrays = [to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs]
        samples = next((len(a) for a in arrays if a.dim()), 1)
        outputs = runner(arrays)
        target = None if labels is None else torch.as_tensor(np.asarray(labels))
        if loss is not None:
            value = losses.checked(loss(outputs, target))
        elif target is not None:
            value = losses.label_loss(outputs, target, probabilities)
        else:
            value = losses.output_energy(outputs)
        if value.requires_grad:  # false when no output depends on a gate
            (value * samples).backward()  # the mean over all data, whatever the batch sizes
        count += samples
        for key, vector in gates.vectors.items() if squared else ():
            if vector.grad is not None:
                squares[key] += vector.grad.numpy().astype(np.float64) ** 2
                vector.grad = None
    if not count:
        raise UsageError("The calibration data are empty; gradients need at least one sample.")

    def gradient(key: str) -> np.ndarray:
        if squared:
            return squares[key] / count
        vector = gates.vectors[key]
        found = torch.zeros_like(vector) if vector.grad is None else vector.grad
        return found.numpy().astype(np.float64) / count

    return Importance(
        {group.name: gradient(f"group {group.name}") for group in analysis.groups},
        {block.name: float(gradient(f"block {block.name}")[0]) for block in removable(blocks)},
    )


def _one_by_one(data: Batches) -> Batches:
    for inputs, labels in data:
        count = next((len(array) for array in inputs.values() if array.ndim), 1)
        for i in range(count):
            sample = {k: a[i : i + 1] if a.ndim and len(a) == count else a for k, a in inputs.items()}
            yield sample, None if labels is None else labels[i : i + 1]


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
