"""The measured tier: kernels whose signature was timed, at sizes between the samples.

What a lower tier says is corrected by what it gets wrong at the samples of the very signature: a Gaussian
process over the logarithms of the sizes and over their alignment. Samples may lie anywhere, so that a profile
may time where it is unsure; at a sample the correction is exact up to its noise, and away from all of them it
fades into what the samples have in common, and far away into none. Its variance is the error of the prediction.

Reference: C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", MIT Press 2006, §2.2
and, for leaving one out, §5.4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.features import alignment, is_movement
from sartor.cost_models.learned import BoostedResidual, as_signature, ensembles_of, noise_of
from sartor.cost_models.profile import ALONE, Company, Sample
from sartor.cost_models.protocol import KernelModel
from sartor.cost_models.signatures import Signature, key_of, variable_names

_COMMON = 0.5
"""Share of the variance that like sizes of a signature have in common; at a size of 50 times, most of it is gone."""
_LENGTH, _COMMON_LENGTH = 1.0, 4.0  # of the correlations, in natural logarithms of a size
_FAR, _FEWEST_TO_DOUBT = 3.0, 3  # standard deviations; samples of one signature
_ALIGNMENT = 0.35  # distance of one power of two between the alignments of two widths


@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """A Gaussian process over the sizes of one signature.

    Attributes:
        points: `[samples, coordinates]`.
        variance: of the process.
        weights: `K⁻¹ · residuals`.
        inverse: `K⁻¹`.
        lowest: smallest sampled size per variable.
        highest: largest.
        aligned: whether alignment is a coordinate.
    """

    points: np.ndarray
    variance: float
    weights: np.ndarray
    inverse: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    aligned: bool

    def at(self, sizes: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of `log(measured / predicted)` at sizes, each `[rows]`; there may be no variable at all."""
        covariance = _covariance(_coordinates(sizes, self.aligned, rows), self.points, self.variance)
        explained = ((covariance @ self.inverse) * covariance).sum(1)
        return covariance @ self.weights, np.maximum(self.variance - explained, 1e-8)

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Error at every sample without it, and the standard deviation that was expected of it."""
        diagonal = np.diag(self.inverse)
        return self.weights / diagonal, np.sqrt(1.0 / diagonal)

    def contains(self, sizes: Sequence[float]) -> bool:
        """Whether the sizes lie between samples, each by itself."""
        at = np.asarray(sizes, float)
        return bool(((at >= self.lowest * (1 - 1e-9)) & (at <= self.highest * (1 + 1e-9))).all())


class Corrections(Mapping[str, Correction]):
    """Corrections by `Signature.key`, made when they are first asked for: a network asks for some dozens of thousands.

    Args:
        samples: timed kernels.
        base: tiers below.

    Raises:
        ValueError: a sample has other sizes than its spec has variables.
    """

    def __init__(self, samples: Sequence[Sample], base: Sequence[KernelModel]):
        self.samples, self._base = samples, base
        self._members = by_spec(samples)
        for places in self._members.values():
            count = len(variable_names(samples[places[0]].spec))
            if any(len(samples[place].at) != count for place in places):
                raise ValueError(f"a sample of {samples[places[0]].spec['op']} has not {count} sizes")
        self._made: dict[str, Correction] = {}

    def make(self, keys: Iterable[str]) -> None:
        """Those of many signatures at once, which is faster than one after another."""
        wanted = [key for key in dict.fromkeys(keys) if key in self._members and key not in self._made]
        if wanted:
            samples = [self.samples[index] for key in wanted for index in self._members[key]]
            self._made |= corrections(samples, self._base)

    def __getitem__(self, key: str) -> Correction:
        self.make([key])
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


@dataclasses.dataclass(frozen=True, eq=False)
class KernelTable:
    """Corrections by signature. Satisfies `KernelModel`.

    Attributes:
        base: tiers below; the first that knows a kernel is the one that is corrected.
        corrections: by `Signature.key`.
    """

    base: tuple[KernelModel, ...]
    corrections: Corrections

    @property
    def tier(self) -> str:
        """See `KernelModel`."""
        return "measured"

    def knows(self, signature: Signature) -> bool:
        """Whether a sample of this very signature was timed."""
        return signature.key in self.corrections

    def predict(
        self, signature: Signature, sizes: Sequence[np.ndarray], period_s: Any = 0.0, company: Company = ALONE
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel`."""
        seconds, _ = first_that_knows(self.base, signature).predict(signature, sizes, period_s, company)
        shape = np.shape(seconds)
        flat = [np.broadcast_to(np.asarray(s, float), shape).ravel() for s in sizes]
        mean, variance = self.corrections[signature.key].at(flat, np.size(seconds))
        return seconds * np.exp(mean).reshape(shape), np.sqrt(variance).reshape(shape)

    def update(self, samples: Sequence[Sample]) -> KernelTable:
        """See `KernelModel`: signatures of these samples are corrected by them alone."""
        anew = {key_of(sample.spec) for sample in samples}
        kept = [sample for sample in self.corrections.samples if key_of(sample.spec) not in anew]
        return KernelTable(self.base, Corrections([*kept, *samples], self.base))

    def save(self) -> dict[str, Any]:
        """Nothing: the table follows from the samples of its profile."""
        return {}


def first_that_knows(models: Sequence[KernelModel], signature: Signature) -> KernelModel:
    """The best tier for a kernel; the last one knows everything."""
    return next((m for m in models if m.knows(signature)), models[-1])


def corrections(
    samples: Sequence[Sample], base: Sequence[KernelModel], residuals: np.ndarray | None = None
) -> dict[str, Correction]:
    """One correction per signature.

    Args:
        samples: timed kernels.
        base: tiers below.
        residuals: `log(measured / predicted)` per sample, where it is known of a model that had not seen the
            sample; NaN elsewhere. Those of `base` by default.
    """
    predicted, sd = predict_samples(base, samples)
    target = np.log(np.array([s.seconds for s in samples]) / predicted)
    if residuals is not None:
        target = np.where(np.isnan(residuals), target, residuals)
    noise = np.array([noise_of(s) for s in samples])
    found = {}
    for key, indices in by_spec(samples).items():
        expected, aligned = float(np.mean(sd[indices])), not is_movement(samples[indices[0]].spec)
        sizes = sizes_of(samples, indices)
        found[key] = _fit(sizes, target[indices], noise[indices], expected, aligned)
    return found


def predict_samples(base: Sequence[KernelModel], samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and the standard deviation of their logarithm by the best of some tiers, `[samples]` each.

    Args:
        base: the tiers, the roofline last.
        samples: kernels; their times are not looked at.
    """
    seconds, sd = np.empty(len(samples)), np.empty(len(samples))
    learned = next((model for model in base if isinstance(model, BoostedResidual)), None)
    rows: dict[str, list[np.ndarray]] = {}
    places: dict[str, list[int]] = {}
    for indices in by_spec(samples).values():
        signature = as_signature(samples[indices[0]])
        sizes = sizes_of(samples, indices)
        period, alike, twins, carried = (
            np.array([getattr(samples[i], name) for i in indices])
            for name in ("period_s", "alike", "twins", "carried")
        )
        company = Company(alike, twins)
        seconds[indices], sd[indices] = base[-1].predict(signature, sizes, period, company)
        if learned is not None and learned.knows(signature):
            family = ensembles_of(signature.family)
            mine = learned.families[family].rows(signature.spec, sizes, period, company, carried)
            rows.setdefault(family, []).append(mine)
            places.setdefault(family, []).extend(indices)
    for family, found in rows.items():
        assert learned is not None
        mean, sd[places[family]] = learned.families[family].correction(np.vstack(found))
        seconds[places[family]] *= np.exp(mean)
    return seconds, sd


def by_spec(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Indices of the samples of every spec, by its key."""
    members: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(key_of(sample.spec), []).append(index)
    return members


def sizes_of(samples: Sequence[Sample], indices: Sequence[int]) -> list[np.ndarray]:
    """An array per variable of samples of one spec."""
    return [np.array(column) for column in zip(*(samples[i].at for i in indices), strict=True)]


def _fit(
    sizes: Sequence[np.ndarray], target: np.ndarray, noise: np.ndarray, sd: float, aligned: bool
) -> Correction:
    points = _coordinates(sizes, aligned, len(target))
    variance = max(sd, 0.02) ** 2
    if len(target) >= _FEWEST_TO_DOUBT:  # a disturbed timing, one that all others contradict, is not followed
        away = np.abs(target - np.median(target))
        noise = np.where(away > _FAR * np.hypot(sd, noise), away, noise)
    covariance = _covariance(points, points, variance) + np.diag(noise**2 + 1e-8)
    inverse = np.linalg.inv(covariance)
    lowest = np.array([s.min() for s in sizes])
    highest = np.array([s.max() for s in sizes])
    return Correction(points, variance, inverse @ target, inverse, lowest, highest, aligned)


def _coordinates(sizes: Sequence[np.ndarray], aligned: bool, rows: int) -> np.ndarray:
    parts = [np.log(np.maximum(s, 1.0)) / _LENGTH for s in sizes]
    if aligned:
        parts += [np.minimum(alignment(s), 4.0) * _ALIGNMENT for s in sizes]
    return np.stack(parts, 1) if parts else np.zeros((rows, 0))


def _covariance(a: np.ndarray, b: np.ndarray, variance: float) -> np.ndarray:
    distance = np.abs(a[:, None, :] - b[None, :, :]).sum(2)
    common = _COMMON * np.exp(-distance * (_LENGTH / _COMMON_LENGTH))
    return variance * (common + (1 - _COMMON) * np.exp(-distance))
