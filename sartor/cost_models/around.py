"""What a kernel's weights cost that the weights of others have displaced from the caches.

A kernel inside a model finds its weights where they were left by the last inference: in the nearest cache if all
of the model's fit there, in the last one, or in memory. Fitted beside everything else that the kernel takes, as seconds
per byte of its own weights, and taken off, so that what remains is its time with warm weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.cost_models.features import is_movement
from sartor.cost_models.law import Caches, cold_share
from sartor.cost_models.profile import Sample
from sartor.cost_models.rates import fit_logarithm, names_of_laws, rounded_work

_FEW = 24  # samples of one way of computing, below which six coefficients would be noise
_LEAST_WARM = 0.3  # of a time; no kernel is nothing but waiting for its weights

Coefficients = tuple[float, float, float]


def fitted(samples: Sequence[Sample], caches: Caches, grid: Mapping[str, int]) -> dict[str, Coefficients]:
    """`Cold.by_family` of samples that were timed inside models; empty where there are none.

    Args:
        samples: timed kernels.
        caches: of the machine.
        grid: channel grid by family or operator.
    """
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for sample in samples:
        if not sample.around_bytes or is_movement(sample.spec):
            continue
        found, costly = rounded_work(sample, grid)
        weights = float(found.weight_bytes)
        if weights:
            near, last = shares(sample, caches)
            row = (
                1.0,
                float(found.macs),
                float(found.moved),
                costly,
                near * weights,
                last * weights,
                sample.warm_s,
            )
            rows.setdefault((sample.family, names_of_laws(sample)[0]), []).append(row)
    by_family: dict[str, list[tuple[int, float, float]]] = {}
    for (family, _), entries in rows.items():
        if len(entries) >= _FEW:
            table = np.array(entries)
            best, _ = fit_logarithm(table[:, :-1], table[:, -1], np.ones(len(table)))
            by_family.setdefault(family, []).append((len(table), float(best[4]), float(best[5])))
    result = {}
    for family, found_of in by_family.items():
        counts = np.array([n for n, _, _ in found_of], float)
        near, far = (float(np.average([f[i] for f in found_of], weights=counts)) for i in (1, 2))
        result[family] = (0.0, near, far)
    return result


def shares(sample: Sample, caches: Caches) -> tuple[float, float]:
    """Of the weights around a sample, what the nearest cache does not hold, and what none holds."""
    return tuple(float(cold_share(sample.around_bytes, size)) for size in (caches.near, caches.last))  # type: ignore


def warmed(samples: Sequence[Sample], caches: Caches, cold: Mapping[str, Coefficients]) -> tuple[Sample, ...]:
    """The samples as they would be with warm weights.

    Args:
        samples: timed kernels.
        caches: of the machine.
        cold: of `fitted`.
    """
    return tuple(_warmed(sample, caches, cold) for sample in samples)


def _warmed(sample: Sample, caches: Caches, cold: Mapping[str, Coefficients]) -> Sample:
    if not sample.around_bytes or sample.family not in cold:
        return sample
    weights = float(rounded_work(sample, {})[0].weight_bytes)
    _, per_byte, per_far_byte = cold[sample.family]
    near, last = shares(sample, caches)
    waiting = weights * (near * per_byte + last * per_far_byte)
    return dataclasses.replace(sample, warm_s=max(sample.warm_s - waiting, _LEAST_WARM * sample.warm_s))
