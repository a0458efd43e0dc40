"""Constants of a roofline from timed kernels.

Least absolute logarithm of predicted over measured time: half of the samples may be wrong before a constant is.
Searched one constant at a time, on a logarithmic scale that narrows; the objective is cheap and has few kinks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sartor.cost_models.profile import Sample
from sartor.cost_models.roofline_law import RooflineConstants, Terms, terms
from sartor.cost_models.work import Work, work_of_spec
from sartor.errors import UsageError

_ROUNDS = 14
_STEPS = np.linspace(-1.0, 1.0, 11)
_WIDEST = math.log(30.0)  # first step away from the starting point
_NARROWING = 0.6
_GRIDS = (1, 4, 8, 16, 32)  # widths of vector registers, in floats
_MAD_TO_SD = 1.4826
_SMALLEST_LOG_SD = 0.02


def fit(
    samples: Sequence[Sample],
    *,
    prior: RooflineConstants | None = None,
    grid_out: int | None = None,
    precision: str | None = None,
) -> RooflineConstants:
    """The constants under which a roofline is nearest to these samples.

    Args:
        samples: timed kernels.
        prior: constants to start from; they count as much as the samples that they rest on, at least as one.
        grid_out: step of output channels, where `prior` does not say; None: the one that fits best.
        precision: that the samples ran in; None: in that of their tensors.

    Raises:
        UsageError: no sample.
    """
    if not samples:
        raise UsageError("A roofline cannot be fitted to no samples; time some kernels first.")
    works = [work_of_spec(sample.spec, sample.at) for sample in samples]
    times = _times(samples)

    def errors(c: RooflineConstants) -> np.ndarray:
        predicted = np.array([float(t.seconds) for t in _terms(c, samples, works, precision)])
        return np.abs(np.log(predicted / times))

    if prior is not None:
        starts = [prior]
    else:
        steps = _GRIDS if grid_out is None else (grid_out,)
        starts = [_start(samples, works, step) for step in steps]
    fits = [_descend(start, samples, _terms(start, samples, works, precision), prior) for start in starts]
    found = fits[0] if len(fits) == 1 else min(fits, key=lambda c: float(np.mean(errors(c))))
    sd = _MAD_TO_SD * float(np.median(errors(found)))
    known = prior.samples if prior else 0
    if prior:
        sd = math.sqrt((known * prior.log_sd**2 + len(samples) * sd**2) / (known + len(samples)))
    return dataclasses.replace(found, log_sd=max(sd, _SMALLEST_LOG_SD), samples=known + len(samples))


def _terms(
    c: RooflineConstants, samples: Sequence[Sample], works: Sequence[Work], precision: str | None
) -> list[Terms]:
    return [terms(c, s.spec, w, precision) for s, w in zip(samples, works, strict=True)]


def _times(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.seconds for sample in samples])


def _start(samples: Sequence[Sample], works: Sequence[Work], grid_out: int) -> RooflineConstants:
    seconds = _times(samples)
    macs = np.array([float(w.macs) for w in works])
    moved = np.array([float(w.moved) for w in works])
    rates = macs[macs > 0] / seconds[macs > 0]
    fast = float(np.quantile(moved / seconds, 0.9))
    return RooflineConstants(
        macs_per_s=float(np.quantile(rates, 0.9)) if rates.size else fast,
        bytes_per_s=fast,
        launch_s=0.5 * float(seconds.min()),
        depthwise_macs_per_s=float(np.quantile(rates, 0.5)) if rates.size else None,
        grid_out=grid_out,
    )


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Terms of every sample at the starting constants, so that a trial is a few array operations."""

    dense_s: np.ndarray
    depthwise_s: np.ndarray
    moving_s: np.ndarray
    measured_s: np.ndarray

    def loss(self, shift: np.ndarray, launch_s: float) -> float:
        """Mean absolute log error when the rates are `exp(-shift)` times faster (dense, depthwise, moving)."""
        dense, depthwise, moving = np.exp(shift[:3])
        work_s = np.maximum(dense * self.dense_s + depthwise * self.depthwise_s, moving * self.moving_s)
        predicted = launch_s * math.exp(shift[3]) + work_s
        return float(np.mean(np.abs(np.log(predicted / self.measured_s))))


def _descend(
    start: RooflineConstants,
    samples: Sequence[Sample],
    at_start: Sequence[Terms],
    prior: RooflineConstants | None,
) -> RooflineConstants:
    compute = np.array([float(t.compute_s) for t in at_start])
    depthwise = np.array(["multiplier" in s.spec for s in samples])
    columns = _Columns(
        dense_s=np.where(depthwise, 0.0, compute),
        depthwise_s=np.where(depthwise, compute, 0.0),
        moving_s=np.array([float(t.bandwidth_s) for t in at_start]),
        measured_s=_times(samples),
    )
    weight = max(prior.samples, 1) / len(samples) if prior else 0.0
    told = np.array(
        [columns.dense_s.any(), columns.depthwise_s.any(), columns.moving_s.any(), start.launch_s > 0]
    )

    def objective(shift: np.ndarray) -> float:
        return columns.loss(shift, start.launch_s) + weight * float(np.abs(shift).sum())

    shift, width = np.zeros(4), _WIDEST
    best = objective(shift)
    for _ in range(_ROUNDS):
        for axis in np.flatnonzero(told):
            trials = [shift + width * step * np.eye(4)[axis] for step in _STEPS]
            losses = [objective(trial) for trial in trials]
            if min(losses) < best:
                best, shift = min(losses), trials[int(np.argmin(losses))]
        width *= _NARROWING
    return _moved(start, shift)


def _moved(start: RooflineConstants, shift: np.ndarray) -> RooflineConstants:
    dense, depthwise, moving, launch = (float(f) for f in np.exp(shift))
    own = start.depthwise_macs_per_s
    return dataclasses.replace(
        start,
        macs_per_s=start.macs_per_s / dense,
        depthwise_macs_per_s=None if own is None else own / depthwise,
        bytes_per_s=start.bytes_per_s / moving,
        launch_s=start.launch_s * launch,
        levels=tuple(dataclasses.replace(lv, bytes_per_s=lv.bytes_per_s / moving) for lv in start.levels),
    )
