"""How much each block adds to what can be told apart: a nearest-mean classifier behind every one of them, in one shot.

Reference: METHODS.md, imprinting (4.1) to (4.3); class means as weights are of Qi et al., "Low-shot learning with
imprinted weights", CVPR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sartor.errors import UsageError
from sartor.ir.layers import activated
from sartor.ir.program import Program
from sartor.strategies.feature_maps import feature_maps
from sartor.strategies.importance import Batches, BlockLike, removable


def imprint(program: Program, blocks: Sequence[BlockLike], data: Batches) -> dict[str, float]:
    """Accuracy of an imprinted classifier behind each block less that of the one before it, in [−1, 1].

    Classifiers are imprinted from the even samples and judged on the odd ones.

    Args:
        program: the program that `blocks` describe.
        blocks: residual blocks or layers; the first is compared with what enters it.
        data: re-iterable of `(inputs, labels)` with class ids.

    Raises:
        UsageError: labels are missing or no class ids, or a class has no samples to be judged by.
    """
    candidates = removable(blocks)
    behind = {block.name: _behind(program, block) for block in candidates}
    entry = _entry(candidates[0]) if candidates else ""
    right = accuracies(program, [*([entry] if entry else []), *behind.values()], data)
    scores, before = {}, right.get(entry, 0.0)
    for block in candidates:
        scores[block.name] = right[behind[block.name]] - before
        before = right[behind[block.name]]
    return scores


def accuracies(program: Program, values: Sequence[str], data: Batches) -> dict[str, float]:
    """Accuracy of an imprinted classifier on each value, in [0, 1].

    Args:
        program: the program.
        values: names; each once.
        data: re-iterable of `(inputs, labels)` with class ids.

    Raises:
        UsageError: labels are missing or no class ids, or a class has no samples to be judged by.
    """
    wanted = list(dict.fromkeys(values))
    length = embedding_length(program)
    embeddings: dict[str, list[np.ndarray]] = {value: [] for value in wanted}
    labels: list[np.ndarray] = []
    batches = iter(data)
    for (_, batch_labels), (_, found) in zip(batches, feature_maps(program, wanted, data), strict=False):
        if batch_labels is None or batch_labels.ndim != 1 or batch_labels.dtype.kind not in "iu":
            raise UsageError("Imprinting needs one class id per sample; use another criterion.")
        labels.append(batch_labels)
        for value, array in found.items():
            embeddings[value].append(embedding(array, length))
    if not labels:
        raise UsageError("The calibration data are empty; imprinting needs samples of every class.")
    known = np.concatenate(labels)
    return {value: accuracy(np.concatenate(parts), known) for value, parts in embeddings.items()}


def embedding(array: np.ndarray, length: int) -> np.ndarray:
    """A feature map pooled to `d = round(√(length / channels))` positions each way and flattened, `[N, …]` (4.1).

    Args:
        array: `[N, C, H, W]`, tokens `[N, T, C]`, or features `[N, C]`.
        length: about how long embeddings are.
    """
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if tensor.dim() == 3:  # tokens: their order is no place to pool over in two directions
        return np.asarray(tensor.mean(1).numpy())
    if tensor.dim() != 4:
        return np.asarray(tensor.reshape(len(tensor), -1).numpy())
    d = max(round(math.sqrt(length / tensor.shape[1])), 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(
        tensor, (min(d, tensor.shape[2]), min(d, tensor.shape[3]))
    )
    return np.asarray(pooled.reshape(len(tensor), -1).numpy())


def accuracy(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Share of odd samples whose class has the largest product with the mean of its even samples (4.2), (4.3).

    Raises:
        UsageError: fewer than two classes, or samples.
    """
    shown, judged = slice(0, None, 2), slice(1, None, 2)
    classes = np.unique(labels[shown])
    if len(classes) < 2 or not len(labels[judged]):
        raise UsageError("Imprinting needs samples of two classes or more; give more calibration samples.")
    weights = np.stack([embeddings[shown][labels[shown] == one].mean(axis=0) for one in classes])
    found = classes[np.argmax(embeddings[judged] @ weights.T, axis=1)]
    return float((found == labels[judged]).mean())


def embedding_length(program: Program) -> int:
    """Features that the last layer of the network reads."""
    shapes = program.shapes()
    for node in reversed(list(program.nodes())):
        if node.op_type in ("Gemm", "MatMul") and node.inputs[0] is not None:
            return int(shapes[node.inputs[0].name or ""][-1])
        if node.op_type == "Conv" and node.inputs[0] is not None:
            return int(shapes[node.inputs[0].name or ""][1])
    return 512


def _behind(program: Program, block: BlockLike) -> str:
    """The result of a block or layer, behind the activation that alone reads it."""
    name = str(getattr(block, "output", "") or getattr(block, "outputs", ("",))[0])
    value = next(value for node in program.nodes() for value in node.outputs if value.name == name)
    return activated(value).name or ""


def _entry(block: BlockLike) -> str:
    return str(getattr(block, "input", "") or getattr(block, "inputs", ("",))[0])
