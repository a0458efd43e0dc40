"""The learned tier: what a fitted roofline misses, by boosted trees and a Gaussian process over features of a kernel.

`log t = log t_roofline + (trees(features) + process(features)) / 2`, one set per kernel family, products of all kinds
together. Away from the samples trees are constant and a process is 0, so the model extrapolates as the roofline does.
Several of both, each pair without one fold of the networks and of the signatures that were timed elsewhere, give the
mean and its spread; what each says of the fold that it has not seen gives the error, of kernels and of networks.

Fitting needs LightGBM (`pip install 'sartor[profile]'`); predicting needs numpy only.

References: J. H. Friedman, "Greedy function approximation: a gradient boosting machine", Annals of Statistics
29 (2001); G. Ke et al., "LightGBM", NeurIPS 2017; L. Breiman, "Bagging predictors", Machine Learning 24 (1996).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models import gaussian_process
from sartor.cost_models.features import features, is_movement, names_of
from sartor.cost_models.gaussian_process import GaussianProcesses
from sartor.cost_models.profile import ALONE, Company, Sample
from sartor.cost_models.protocol import KernelModel
from sartor.cost_models.signatures import Signature, key_of
from sartor.cost_models.trees import Trees, from_lightgbm
from sartor.errors import UsageError
from sartor.ir.quantities import Quantity

KIND = "boosted-residual/4"
FEWEST = 40
"""Samples of a family below which trees would only learn their noise."""
FOLDS = 8
_TIMING_NOISE = 0.01  # of a kernel's time, beside the interval that its sample states
_ROUNDS = 150
_PARAMETERS = {
    "objective": "huber",
    "alpha": 0.2,  # of the logarithm: what lies farther off is a disturbed timing, or a regime of few samples
    "learning_rate": 0.08,
    "num_leaves": 24,
    "min_data_in_leaf": 10,
    "lambda_l2": 1.0,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The models of one kernel family.

    Attributes:
        names: of the features that were used to fit it.
        ops: operators that were seen; each is one more column, 1.0 where it is the kernel's own.
        folds: ensembles of trees.
        processes: one per fold.
        sd: standard deviation of the logarithm on folds that an ensemble has not seen, its spread apart.
        heldout: `n` and `sd` of that.
    """

    names: tuple[str, ...]
    ops: tuple[str, ...]
    folds: tuple[Trees, ...]
    processes: GaussianProcesses
    sd: float
    heldout: Mapping[str, float]

    def rows(
        self,
        spec: Mapping[str, Any],
        sizes: Sequence[Any],
        period_s: Any = 0.0,
        company: Company = ALONE,
        carried: Any = False,
    ) -> np.ndarray:
        """Features with the columns of the operators."""
        return _with_ops(features(spec, sizes, period_s, company, carried), str(spec["op"]), self.ops)

    def correction(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of `log(measured / roofline)`, each `[rows]`."""
        said = said_by(self.folds, self.processes, rows)
        return said.mean(0), np.hypot(self.sd, said.std(0))

    def without(self, fold: int) -> Family:
        """What is known without the samples of a fold."""
        return dataclasses.replace(self, folds=(self.folds[fold],), processes=self.processes.of_fold(fold))


@dataclasses.dataclass(frozen=True, eq=False)
class BoostedResidual:
    """See the module docstring. Satisfies `KernelModel`.

    Attributes:
        base: the roofline that is corrected.
        families: by name.
    """

    base: KernelModel
    families: Mapping[str, Family]

    @property
    def tier(self) -> str:
        """See `KernelModel`."""
        return "learned"

    def without(self, fold: int) -> BoostedResidual:
        """What is known without the samples of a fold."""
        return BoostedResidual(self.base, {name: f.without(fold) for name, f in self.families.items()})

    def knows(self, signature: Signature) -> bool:
        """A family that was fitted, an operator that was in it."""
        family = self.families.get(ensembles_of(signature.family))
        return family is not None and signature.spec["op"] in family.ops

    def predict(
        self, signature: Signature, sizes: Sequence[np.ndarray], period_s: Any = 0.0, company: Company = ALONE
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel`."""
        family = self.families[ensembles_of(signature.family)]
        seconds, _ = self.base.predict(signature, sizes, period_s, company)
        mean, sd = family.correction(family.rows(signature.spec, sizes, period_s, company))
        shape = np.shape(seconds)
        return seconds * np.exp(mean).reshape(shape), sd.reshape(shape)

    def update(self, samples: Sequence[Sample]) -> BoostedResidual:
        """See `KernelModel`: the families of these samples are fitted anew, to them alone."""
        return BoostedResidual(self.base, {**self.families, **fit(samples, self.base).families})

    def save(self) -> dict[str, Any]:
        """See `KernelModel`; the roofline is saved apart."""
        return {name: _save(family) for name, family in sorted(self.families.items())}

    @staticmethod
    def load(document: Mapping[str, Any], base: KernelModel) -> BoostedResidual:
        """Inverse of `save`.

        Raises:
            ValueError: another kind of model, or features that this version does not compute.
        """
        return BoostedResidual(base, {name: _load(name, entry) for name, entry in document.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model and how far off it was on what it had not seen.

    Attributes:
        model: the model.
        unseen: per sample, `log(measured / predicted)` by the ensemble that had not seen its fold;
            NaN for samples of families without a model.
    """

    model: BoostedResidual
    unseen: np.ndarray

    @property
    def families(self) -> Mapping[str, Family]:
        """Of the model."""
        return self.model.families


def fit(samples: Sequence[Sample], base: KernelModel, *, seed: int = 0) -> Fit:
    """Fit one set of ensembles per family that has enough samples.

    Args:
        samples: of the roles that may be learned from.
        base: roofline to correct.
        seed: of the boosting.

    Raises:
        UsageError: LightGBM is not installed.
    """
    library = _lightgbm()
    members: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(ensembles_of(sample.family), []).append(index)
    families: dict[str, Family] = {}
    unseen = np.full(len(samples), np.nan)
    for name, indices in sorted(members.items()):
        chosen = [samples[i] for i in indices]
        if len(chosen) < FEWEST or len({is_movement(s.spec) for s in chosen}) > 1:
            continue
        families[name], unseen[indices] = _fit_family(library, chosen, base, seed)
    return Fit(BoostedResidual(base, families), unseen)


def ensembles_of(family: str) -> str:
    """The name of the ensembles of a family.

    Products share theirs, so that what was seen of a Gemm is known of a MatMul; where a runtime tells them apart, the
    operator's column does.
    """
    return "product" if family in ("gemm", "matmul") else family


def as_signature(sample: Sample) -> Signature:
    """The signature of a sample, its sizes as constants."""
    return signature_at(sample.spec, sample.family, sample.at)


def signature_at(spec: Mapping[str, Any], family: str, at: Sequence[float]) -> Signature:
    """A signature whose variables are constants."""
    kind = "movement" if is_movement(spec) else "contraction"
    variables = tuple(Quantity.product(float(size), ()) for size in at)
    return Signature(key_of(spec), family, kind, dict(spec), variables)


def noise_of(sample: Sample) -> float:
    """Standard deviation of the logarithm of a sample's time."""
    return float(np.hypot(sample.half_width / 1.96, _TIMING_NOISE))


def _fit_family(
    library: Any, samples: Sequence[Sample], base: KernelModel, seed: int
) -> tuple[Family, np.ndarray]:
    ops = tuple(sorted({str(s.spec["op"]) for s in samples}))
    rows = np.vstack(
        [
            _with_ops(
                features(s.spec, [[v] for v in s.at], s.period_s, s.company, s.carried),
                str(s.spec["op"]),
                ops,
            )
            for s in samples
        ]
    )
    said = [
        np.atleast_1d(
            base.predict(as_signature(s), [np.asarray([v]) for v in s.at], s.period_s, s.company)[0]
        )
        for s in samples  # one may have no variable at all
    ]
    target = np.log(np.array([s.seconds for s in samples]) / np.concatenate(said))
    noise = np.array([noise_of(s) for s in samples])
    weight = 1.0 / (noise**2 + _TIMING_NOISE**2)
    weight /= weight.mean()
    fold = _folds(samples)
    names = names_of(samples[0].spec)
    ensembles: list[Trees] = []
    for number in range(FOLDS):
        out = fold == number
        data = library.Dataset(rows[~out], target[~out], weight=weight[~out])
        booster = library.train({**_PARAMETERS, "seed": seed + number}, data, num_boost_round=_ROUNDS)
        ensembles.append(from_lightgbm(booster.dump_model()))
    processes = gaussian_process.fit(rows, target, noise, fold, names, FOLDS)
    by_fold = said_by(ensembles, processes, rows)
    unseen, spread = target - by_fold[fold, np.arange(len(rows))], by_fold.std(0)
    clipped = np.clip(unseen, *np.quantile(unseen, [0.01, 0.99]))  # one stuck timing is not the model's error
    variance = float(np.mean(clipped**2 - spread**2 - noise**2))
    sd = float(np.sqrt(max(variance, (0.3**2) * float(np.mean(clipped**2)), 1e-6)))
    heldout = {"n": len(samples), "sd": float(np.sqrt(np.mean(clipped**2)))}
    return Family(names, ops, tuple(ensembles), processes, sd, heldout), unseen


def said_by(folds: Sequence[Trees], processes: GaussianProcesses, rows: np.ndarray) -> np.ndarray:
    """Mean of the trees and the process of each fold, `[folds, rows]`."""
    return (np.stack([trees.predict(rows) for trees in folds]) + processes.predict(rows)) / 2


def fold_of(name: str) -> int:
    """The fold of a network, or of the key of a signature."""
    return hashlib.sha256(name.encode()).digest()[0] % FOLDS


def fold_of_sample(sample: Sample) -> int:
    """That of its network: a new one brings kernels none of which was seen. Elsewhere, that of its signature."""
    return fold_of(_judged_with(sample))


def _judged_with(sample: Sample) -> str:
    return sample.network or key_of(sample.spec)


def _folds(samples: Sequence[Sample]) -> np.ndarray:
    """A fold per sample; where they come from too few networks and signatures, anyhow."""
    if len(set(map(_judged_with, samples))) < 2 * FOLDS:
        return np.random.default_rng(0).permutation(len(samples)) % FOLDS
    return np.array([fold_of_sample(sample) for sample in samples])


def _with_ops(rows: np.ndarray, op: str, ops: Sequence[str]) -> np.ndarray:
    return np.hstack([rows, np.tile([float(op == known) for known in ops], (len(rows), 1))])


def _save(family: Family) -> dict[str, Any]:
    return {
        "kind": KIND,
        "features": list(family.names),
        "ops": list(family.ops),
        "sd": family.sd,
        "heldout": dict(family.heldout),
        "folds": [trees.to_dict() for trees in family.folds],
        "processes": family.processes.to_dict(),
    }


def _load(name: str, entry: Mapping[str, Any]) -> Family:
    from sartor.cost_models.features import CONTRACTION, MOVEMENT

    names = tuple(entry["features"])
    if entry["kind"] != KIND or names not in (CONTRACTION, MOVEMENT):
        raise ValueError(f"the learned model of family '{name}' is of a kind that this version does not have")
    folds = tuple(Trees.from_dict(trees) for trees in entry["folds"])
    columns = len(names) + len(entry["ops"])
    if any(len(t.feature) and t.feature.max() >= columns for t in folds):
        raise ValueError(f"the learned model of family '{name}' reads features that do not exist")
    processes = GaussianProcesses.from_dict(entry["processes"], columns)
    if len(processes.weights) != len(folds):
        raise ValueError(
            f"the learned model of family '{name}' has another number of processes than of ensembles"
        )
    return Family(names, tuple(entry["ops"]), folds, processes, float(entry["sd"]), dict(entry["heldout"]))


def _lightgbm() -> Any:
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError) as error:  # OSError: its OpenMP library is missing
        raise UsageError(
            f"Learning a model of kernel times needs LightGBM, which could not be imported ({error}); install it "
            "with: pip install 'sartor[profile]'"
        ) from error
