"""What a kernel's weights cost that the weights of others have displaced from the caches.

A kernel inside a model finds its weights where they were left by the last inference: in the last cache if all of the
model's fit there, else partly in memory. What it takes longer then is taken off, so that what remains is its time with
warm weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.cost_models import rates
from sartor.cost_models.features import is_movement
from sartor.cost_models.law import Caches, cold_share
from sartor.cost_models.profile import Sample
from sartor.cost_models.rates import rounded_work
from sartor.cost_models.table import predict_samples

_FEW = 8  # samples of one family
_LEAST_BYTES = 100e3  # from memory; what fewer cost is noise
_LEAST_WARM = 0.3  # of a time; no kernel is nothing but waiting for its weights

Coefficients = tuple[float, float, float]


def fitted(samples: Sequence[Sample], caches: Caches, grid: Mapping[str, int]) -> dict[str, Coefficients]:
    """`Cold.by_family` of samples that were timed inside models, without families of which too few tell it.

    Models whose weights fit the last cache give the laws of kernels; how much longer kernels take in larger ones, per
    byte of their weights that memory holds, is the median over samples. What a law gets wrong of kernels with as many
    weights that the cache does hold is no waiting.

    Args:
        samples: timed kernels.
        caches: of the machine.
        grid: channel grid by family or operator.
    """
    inside = [s for s in samples if s.around_bytes and not is_movement(s.spec)]
    near = [s for s in inside if s.around_bytes <= caches.last]
    if not near:
        return {}
    result = {s.family: (0.0, 0.0, 0.0) for s in inside}
    law = rates.fitted(near, grid)
    alike = [s for s in near if _heavy(s)]
    away = [s for s in inside if _far_bytes(s, caches) >= _LEAST_BYTES]
    for family in sorted({s.family for s in away}):
        known, found = ([s for s in of if s.family == family] for of in (alike, away))
        if min(len(known), len(found)) < _FEW:
            del result[family]  # not known
        else:
            beyond = np.median(_ratios(law, known))
            said = np.array([s.warm_s for s in found]) / _ratios(law, found) * beyond
            waiting = [(s.warm_s - t) / _far_bytes(s, caches) for s, t in zip(found, said, strict=True)]
            result[family] = (0.0, 0.0, max(0.0, float(np.median(waiting))))
    return result


def _ratios(law: rates.Rates, samples: Sequence[Sample]) -> np.ndarray:
    """Times in units of what the law says."""
    said, _ = predict_samples((law,), samples)
    return np.array([s.warm_s for s in samples]) / said


def _heavy(sample: Sample) -> bool:
    """Whether a sample has weights that can be waited for."""
    return float(rounded_work(sample, {})[0].weight_bytes) >= _LEAST_BYTES


def _far_bytes(sample: Sample, caches: Caches) -> float:
    """Bytes of a sample's own weights that no cache holds."""
    return float(cold_share(sample.around_bytes, caches.last)) * float(
        rounded_work(sample, {})[0].weight_bytes
    )


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
    waiting = cold[sample.family][2] * _far_bytes(sample, caches)
    return dataclasses.replace(sample, warm_s=max(sample.warm_s - waiting, _LEAST_WARM * sample.warm_s))
