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
    per_sample: str = "",
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
        per_sample: `square` or `absolute`: the mean over samples of that of their own gradients; they are run one by
            one. Empty: the gradient of the mean, signed.

    Returns:
        One number per unit and per removable block.

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
    sums = {key: np.zeros(size) for key, size in sizes.items()}
    of_one: Callable[[np.ndarray], np.ndarray] | None = {"square": np.square, "absolute": np.abs}.get(
        per_sample
    )
    for inputs, labels in one_by_one(data) if of_one is not None else data:
        arrays = [to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs]
        samples = next((len(a) for a in arrays if a.dim()), 1)
        outputs = runner(arrays)
        value = _loss_of(outputs, labels, loss, probabilities)
        if value.requires_grad:  # false when no output depends on a gate
            (value * samples).backward()  # the mean over all data, whatever the batch sizes
        count += samples
        for key, vector in gates.vectors.items():
            if of_one is not None and vector.grad is not None:
                sums[key] += of_one(vector.grad.numpy().astype(np.float64))
                vector.grad = None
    if not count:
        raise UsageError("The calibration data are empty; gradients need at least one sample.")

    def gradient(key: str) -> np.ndarray:
        if of_one is not None:
            return sums[key] / count
        vector = gates.vectors[key]
        found = torch.zeros_like(vector) if vector.grad is None else vector.grad
        return found.numpy().astype(np.float64) / count

    return Importance(
        {group.name: gradient(f"group {group.name}") for group in analysis.groups},
        {block.name: float(gradient(f"block {block.name}")[0]) for block in removable(blocks)},
    )


def weight_gradients(
    program: Program, names: Sequence[str], data: Batches, *, loss: Callable[..., Any] | None = None
) -> dict[str, np.ndarray]:
    """Gradient of the mean loss with respect to initializers, float64, by the FX twin in float32.

    Args:
        program: the program.
        names: of floating-point initializers; of one that the twin does not need it is zero.
        data: re-iterable of `(inputs, labels)`.
        loss: as in `gate_gradients`.

    Raises:
        UsageError: there are no data.
    """
    import torch

    from sartor.ir.fx import to_fx, to_tensor, twin_info
    from sartor.recovery import losses

    twin = to_fx(program, dtype=torch.float32)
    info = twin_info(twin)
    by_name = {name: key for key, name in info.names.items()}
    parameters = {name: twin.get_parameter(by_name[name]) for name in names if name in by_name}
    probabilities = losses.probability_outputs(program)
    count = 0
    for inputs, labels in data:
        arrays = [to_tensor(inputs[name], info.dtype) for name in info.inputs]
        samples = next((len(a) for a in arrays if a.dim()), 1)
        outputs = dict(zip(info.outputs, twin(*arrays), strict=True))
        (_loss_of(outputs, labels, loss, probabilities) * samples).backward()
        count += samples
    if not count:
        raise UsageError("The calibration data are empty; gradients need at least one sample.")
    found = {}
    for name in names:
        gradient = parameters[name].grad if name in parameters else None
        shape = program.initializer_shape(name) or ()
        found[name] = np.zeros(shape) if gradient is None else gradient.numpy().astype(np.float64) / count
    return found


def _loss_of(
    outputs: Any, labels: np.ndarray | None, loss: Callable[..., Any] | None, probabilities: frozenset[str]
) -> Any:
    import torch

    from sartor.recovery import losses

    target = None if labels is None else torch.as_tensor(np.asarray(labels))
    if loss is not None:
        return losses.checked(loss(outputs, target))
    if target is not None:
        return losses.label_loss(outputs, target, probabilities)
    return losses.output_energy(outputs)


def one_by_one(data: Batches) -> Batches:
    """Samples as batches of one."""
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
