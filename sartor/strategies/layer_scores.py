"""Scores of whole layers and blocks: a filter criterion averaged over their filters, and ensembles of ranks.

Reference: METHODS.md, LayerPrune (5.1) to (5.4). A block has the filters of all layers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.strategies.criteria import CRITERIA, criterion
from sartor.strategies.data_criteria import required
from sartor.strategies.feature_maps import map_of_block
from sartor.strategies.gates import weight_gradients
from sartor.strategies.importance import Batches, BlockLike, Subject, removable
from sartor.strategies.imprinting import imprint

_BY_WEIGHT = {"l1": 1, "l2": 2, "taylor-weight": 2}
"""Criteria that are a norm over the numbers of each filter, and which."""
_BY_MAP = frozenset({"activation", "hrank"})
LAYER_CRITERIA = (*CRITERIA, "imprint")
"""What layers can be ranked by; several, joined by `+`, are an ensemble of ranks."""


class _NoGroups:
    groups: Sequence[Any] = ()


def layer_scores(
    name: str,
    program: Program,
    blocks: Sequence[BlockLike],
    *,
    data: Batches | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """How much each removable block or layer matters; only the order means something.

    Args:
        name: a criterion, `imprint`, or several joined by `+`: then the sum of ranks, 0 for the least important.
        program: the program that `blocks` describe.
        blocks: residual blocks, or layers.
        data: re-iterable of `(inputs, labels)`.
        loss: as criteria take it.
        seed: of random criteria.

    Raises:
        UsageError: there is no such criterion, it cannot score this program, or data are missing.
    """
    names = name.split("+")
    if len(names) > 1:
        ranks = [_ranks(layer_scores(one, program, blocks, data=data, loss=loss, seed=seed)) for one in names]
        return {block.name: float(sum(rank[block.name] for rank in ranks)) for block in removable(blocks)}
    if name == "imprint":
        return imprint(program, blocks, required(data, name))
    whole = criterion(name)
    if name in _BY_WEIGHT:
        return _mean_norms(name, program, blocks, data, loss)
    if name == "bn-gamma":
        return {block.name: _mean_gamma(program, block) for block in removable(blocks)}
    found = whole.unit_importance(Subject(program, _NoGroups(), blocks, data, loss, seed)).blocks
    if name == "fpgm":
        return {
            block.name: found[block.name] / sum(len(rows) for _, rows in filters(program, block))
            for block in removable(blocks)
        }
    if name in _BY_MAP:
        shapes = program.shapes()
        maps = {block.name: map_of_block(program, block) for block in removable(blocks)}
        return {key: found[key] / shapes[one.value][one.axes[0]] for key, one in maps.items()}
    return dict(found)


def filters(program: Program, block: BlockLike) -> list[tuple[str, np.ndarray]]:
    """Weights of the layers in a block, by initializer, one row per filter."""
    inside, found = set(block.nodes), []
    for node in program.nodes():
        weight = node.inputs[1] if node.name in inside and len(node.inputs) > 1 else None
        if (
            weight is not None
            and weight.name in program.initializers
            and (axis := _filter_axis(node)) is not None
        ):
            array = program.initializer_array(weight.name or "").astype(np.float64)
            found.append((weight.name or "", rows_of(array, axis)))
    return found


def rows_of(array: np.ndarray, axis: int) -> np.ndarray:
    """An array with one row per index of an axis."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _filter_axis(node: ir.Node) -> int | None:
    """The axis of a layer's weight along which its filters lie; None where it is no layer."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}.get(node.op_type)


def _mean_norms(
    name: str,
    program: Program,
    blocks: Sequence[BlockLike],
    data: Batches | None,
    loss: Callable[..., Any] | None,
) -> dict[str, float]:
    """Equations 5.1 and 5.2."""
    own = {block.name: filters(program, block) for block in removable(blocks)}
    if name == "taylor-weight":
        weights = sorted({weight for found in own.values() for weight, _ in found})
        gradients = weight_gradients(program, weights, required(data, name), loss=loss)
        axes = {
            node.inputs[1].name: axis
            for node in program.nodes()
            if len(node.inputs) > 1
            and node.inputs[1] is not None
            and (axis := _filter_axis(node)) is not None
        }
        own = {
            key: [(weight, rows * rows_of(gradients[weight], axes[weight])) for weight, rows in found]
            for key, found in own.items()
        }
    return {
        key: float(
            np.concatenate([np.linalg.norm(rows, _BY_WEIGHT[name], axis=1) for _, rows in found]).mean()
        )
        for key, found in own.items()
    }


def _mean_gamma(program: Program, block: BlockLike) -> float:
    """Equation 5.3."""
    inside = set(block.nodes)
    scales = [
        program.initializer_array(node.inputs[1].name or "").astype(np.float64)
        for node in program.nodes()
        if node.name in inside and node.op_type == "BatchNormalization" and node.inputs[1] is not None
    ]
    if not scales:
        raise UsageError(
            f"Criterion 'bn-gamma' needs a BatchNormalization in every block; '{block.name}' has none. Use l1, l2 or "
            "taylor."
        )
    return float((np.concatenate(scales) ** 2).mean())


def _ranks(scores: Mapping[str, float]) -> dict[str, int]:
    """0 for the lowest; of equal ones the first in order."""
    order = sorted(scores, key=lambda name: scores[name])
    return {name: rank for rank, name in enumerate(order)}
