"""The fitted roofline of single kernels: per family, `t = launch + macs / rate + bytes / bandwidth`.

Output widths are rounded up to the channel grid first: what a register or a block of channels computes, it computes
whole. What is left of widths off the grid is then their penalty, and where none was timed, it is none.
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
from sartor.cost_models.signatures import Signature, variable_names
from sartor.cost_models.work import Work, work_of_spec
from sartor.errors import MetricUnavailableError

_ANY = "*"
_FEW = 8  # samples below which a family has no law of its own
_LEAST_SD = 0.1
_STEPPED = frozenset(
    {"channels", "c_in", "c_out", "in_per_group", "out_per_group", "k", "n", "input", "hidden"}
)
"""Variables that are widths of a tensor; groups, rows and bytes have no grid."""
_ROUNDED = frozenset({"channels", "c_out", "n"})
"""Output widths that are computed in whole registers. How a runtime pads the groups of a convolution, if it does,
is left to what was learned."""
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
    """Satisfies `KernelModel`; knows every kernel that has a signature.

    Attributes:
        by_family: laws.
        grid: channel grid by family or operator; widths of others are not rounded.
    """

    by_family: Mapping[str, Rate]
    grid: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tier(self) -> str:
        """See `KernelModel`."""
        return "roofline"

    def knows(self, signature: Signature) -> bool:
        """See `KernelModel`."""
        return True

    def predict(self, signature: Signature, sizes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel`."""
        found = _work(signature.spec, signature.family, sizes, self.grid)
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
        return Rates({**self.by_family, **fitted(samples, self.grid).by_family}, self.grid)

    def save(self) -> dict[str, Any]:
        """See `KernelModel`."""
        return {family: dataclasses.asdict(rate) for family, rate in sorted(self.by_family.items())}

    @staticmethod
    def load(document: Mapping[str, Any], grid: Mapping[str, int]) -> Rates:
        """Inverse of `save`; the grid is that of the profile."""
        return Rates({family: Rate(**entry) for family, entry in document.items()}, grid)

    def _rate(self, family: str) -> Rate:
        return self.by_family.get(family) or self.by_family[_ANY]


def grid_step(grid: Mapping[str, int], family: str, op: str) -> int:
    """Channel grid of an operator; 1 where it has none."""
    return int(grid.get(family, grid.get(op, 1)))


def stepped(spec: Mapping[str, Any]) -> list[int]:
    """Which variables are widths that have a grid; the last of them is the output's."""
    return [i for i, name in enumerate(variable_names(spec)) if name in _STEPPED]


def _work(spec: Mapping[str, Any], family: str, sizes: Sequence[Any], grid: Mapping[str, int]) -> Work:
    """Work with the output width rounded up."""
    step, names = grid_step(grid, family, str(spec["op"])), variable_names(spec)
    rounded = [np.asarray(s, float) for s in sizes]
    if step > 1 and names[-1:] and names[-1] in _ROUNDED:
        rounded[-1] = np.ceil(rounded[-1] / step - 1e-9) * step
    return work_of_spec(spec, rounded)


def fitted(samples: Sequence[Sample], grid: Mapping[str, int] | None = None) -> Rates:
    """Laws that fit samples best, in relative least squares with coefficients that are not negative.

    Args:
        samples: timed kernels.
        grid: channel grid by family or operator.

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
        found = _work(sample.spec, sample.family, sample.at, grid or {})
        row = (float(found.macs), float(found.moved), sample.warm_s)
        for family in (sample.family, _ANY):
            rows.setdefault(family, []).append(row)
    laws = {f: _fit(np.array(r)) for f, r in rows.items() if f == _ANY or len(r) >= _FEW}
    return Rates(laws, dict(grid or {}))


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
