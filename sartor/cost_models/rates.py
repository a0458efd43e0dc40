"""The fitted roofline of single kernels: per family, `t = launch + macs / rate + bytes / bandwidth`.

The sum, not the maximum, because a sum has a slope everywhere: the learned model corrects it, and what it gets
wrong between the two regimes is a smooth function of the intensity. Families with few samples share one law.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.profile import Sample
from sartor.cost_models.signatures import Signature
from sartor.cost_models.work import work_of_spec
from sartor.errors import MetricUnavailableError

_ANY = "*"
_FEW = 8  # samples below which a family has no law of its own
_LEAST_SD = 0.1
BOUNDS = ("launch", "compute", "bandwidth")


@dataclasses.dataclass(frozen=True)
class Rate:
    """Coefficients of one family: seconds, seconds per MAC, seconds per byte, and the error of their sum."""

    launch_s: float
    per_mac_s: float
    per_byte_s: float
    sd: float

    def terms(self, macs: Any, moved: Any) -> np.ndarray:
        """Seconds that go into launch, compute and bandwidth, `[3, …]`."""
        return np.stack([self.launch_s + 0.0 * moved, self.per_mac_s * macs, self.per_byte_s * moved])


@dataclasses.dataclass(frozen=True)
class Rates:
    """Laws by family. Satisfies `KernelModel`; it knows every kernel that has a signature."""

    by_family: Mapping[str, Rate]

    @property
    def tier(self) -> str:
        """See `KernelModel`."""
        return "roofline"

    def knows(self, signature: Signature) -> bool:
        """See `KernelModel`."""
        return True

    def predict(self, signature: Signature, sizes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel`."""
        found = work_of_spec(signature.spec, sizes)
        return self.seconds(signature.family, found.macs, found.moved)

    def seconds(self, family: str, macs: Any, moved: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, of kernels without a signature, too."""
        rate = self._rate(family)
        total = np.maximum(rate.terms(np.asarray(macs, float), np.asarray(moved, float)).sum(0), 1e-9)
        return total, np.full(total.shape, rate.sd)

    def bound(self, family: str, macs: float, moved: float) -> str:
        """Which of the three terms is the largest."""
        return BOUNDS[int(np.argmax(self._rate(family).terms(np.asarray(macs), np.asarray(moved))))]

    def update(self, samples: Sequence[Sample]) -> Rates:
        """See `KernelModel`: the families of these samples are fitted anew, to them alone."""
        return Rates({**self.by_family, **fitted(samples).by_family})

    def save(self) -> dict[str, Any]:
        """See `KernelModel`."""
        return {family: dataclasses.asdict(rate) for family, rate in sorted(self.by_family.items())}

    @staticmethod
    def load(document: Mapping[str, Any]) -> Rates:
        """Inverse of `save`."""
        return Rates({family: Rate(**entry) for family, entry in document.items()})

    def _rate(self, family: str) -> Rate:
        return self.by_family.get(family) or self.by_family[_ANY]


def fitted(samples: Sequence[Sample]) -> Rates:
    """Laws that fit samples best, in relative least squares with coefficients that are not negative.

    Raises:
        MetricUnavailableError: there are no samples.
    """
    if not samples:
        raise MetricUnavailableError(
            "No kernel could be timed on the target, so there is nothing to fit a latency to; look at the reasons "
            "that the timer gives."
        )
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for sample in samples:
        found = work_of_spec(sample.spec, [np.asarray(s) for s in sample.at])
        row = (float(found.macs), float(found.moved), sample.warm_s)
        for family in (sample.family, _ANY):
            rows.setdefault(family, []).append(row)
    return Rates({f: _fit(np.array(r)) for f, r in rows.items() if f == _ANY or len(r) >= _FEW})


def _fit(rows: np.ndarray) -> Rate:
    """The best of all sets of coefficients that may be zero: there are seven."""
    macs, moved, seconds = rows.T
    design = np.stack([np.ones(len(rows)), macs, moved], 1) / seconds[:, None]
    scale = np.maximum(np.abs(design).max(0), 1e-300)
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            columns = list(chosen)
            part, *_ = np.linalg.lstsq(design[:, columns] / scale[columns], np.ones(len(rows)), rcond=None)
            error = float(np.square(design[:, columns] / scale[columns] @ part - 1.0).sum())
            if (part >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[columns] = part / scale[columns]
    predicted = np.maximum(np.stack([np.ones(len(rows)), macs, moved], 1) @ best, 1e-12)
    sd = float(np.sqrt(np.mean(np.square(np.log(predicted / seconds)))))
    return Rate(float(best[0]), float(best[1]), float(best[2]), max(sd, _LEAST_SD))
