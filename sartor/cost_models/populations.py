"""Populations of plans over several input sizes and batches, priced one size and batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sartor.ir.extents import BATCH, SIZE
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.workload import Workload


def by_size(
    workload: Workload,
    fractions: Fractions,
    removed: Removed,
    size: Any,
    batch: Any,
    price: Callable[[Workload, Population], Sequence[Any]],
) -> list[np.ndarray]:
    """What `price` says of a population, one declared input size and batch after the other.

    Args:
        workload: what the plans belong to.
        fractions: kept fraction per group.
        removed: removed blocks.
        size: declared input size, an index or an array `[plans]`.
        batch: samples, a number or an array `[plans]`.
        price: quantities of a population, each a scalar or `[plans]`.

    Raises:
        PlanError: a removed block, a size or a batch is not in the workload.
    """
    workload.check_removed(removed)
    given = workload.lengths({}, size, batch)
    if SIZE not in given:
        plans = Population(fractions, removed)
        return [np.zeros(plans.shape) + part for part in price(workload, plans)]
    columns = [np.asarray(v) for v in (given[SIZE], given[BATCH], *fractions.values(), *removed.values())]
    shape = np.broadcast_shapes(*(c.shape for c in columns))
    sizes, samples = (np.broadcast_to(c, shape) for c in columns[:2])
    found: list[np.ndarray] = []
    for one, many in sorted({*zip(sizes.ravel().tolist(), samples.ravel().tolist(), strict=True)}):
        here = (sizes == one) & (samples == many)
        kept, gone = (
            {name: np.broadcast_to(v, shape)[here] for name, v in part.items()}
            for part in (fractions, removed)
        )
        parts = price(workload.at(one, many), Population(kept, gone))
        found = found or [np.zeros(shape) for _ in parts]
        for whole, part in zip(found, parts, strict=True):
            whole[here] = part
    return found
