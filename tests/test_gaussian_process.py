"""Gaussian processes over features: what they say without a fold, far away, and of what is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sartor.cost_models import gaussian_process
from sartor.cost_models.features import CONTRACTION, MOVEMENT
from sartor.cost_models.gaussian_process import GaussianProcesses

NAMES = ("log_rows", "log_columns", "stride", "log_macs")
FOLDS = 3


def drawn(count=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.column_stack([rng.uniform(0, 8, (count, 2)), rng.integers(1, 3, count), rng.normal(size=count)])
    rows = np.column_stack([rows, rng.integers(0, 2, count)])  # an operator
    return (
        rows,
        np.sin(rows[:, 0] / 2) + 0.3 * rows[:, 2],
        np.full(count, 0.01),
        rng.integers(0, FOLDS, count),
    )


def test_what_is_known_without_a_fold_is_what_its_samples_alone_would_not_change():
    """Written out: the inverse of the covariance of all others, instead of parts of the inverse of all."""
    rows, target, noise, folds = drawn()
    known = gaussian_process.fit(rows, target, noise, folds, NAMES, FOLDS)
    asked, *_ = drawn(20, seed=1)
    scales = np.array([1.0, 1.0, 0.5, 0.0, 0.7]) / 6.0
    far = np.quantile(np.abs(target - np.median(target)), 0.995)
    target = np.clip(target, np.median(target) - far, np.median(target) + far)
    variance = np.mean(target**2)

    def covariance(one, other):
        return variance * np.exp(-np.abs((one[:, None] - other[None, :]) * scales).sum(2))

    for fold in range(FOLDS):
        keep = folds != fold
        own = covariance(rows[keep], rows[keep]) + np.diag(noise[keep] ** 2 + 0.05**2)
        expected = covariance(asked, rows[keep]) @ np.linalg.solve(own, target[keep])
        np.testing.assert_allclose(known.predict(asked)[fold], expected, atol=2e-3)  # points have four digits
        alone = known.of_fold(fold).predict(asked)
        np.testing.assert_allclose(alone, known.predict(asked)[fold : fold + 1], rtol=1e-12)
        assert not known.weights[fold][~keep].any()


def test_it_goes_through_samples_and_forgets_what_is_far_away():
    rows, target, noise, _ = drawn(200)
    known = gaussian_process.fit(rows, target, noise, np.full(200, -1), NAMES, 1)
    assert np.abs(known.predict(rows)[0] - target).max() < 0.15
    unseen, truth, *_ = drawn(100, seed=3)
    assert np.sqrt(np.mean(np.square(known.predict(unseen)[0] - truth))) < 0.2 < 0.5 < truth.std()
    far = rows[:5].copy()
    far[:, :2] += 200.0
    np.testing.assert_allclose(known.predict(far), 0.0, atol=1e-6)


def test_what_follows_from_other_features_counts_nothing():
    rows, target, noise, folds = drawn()
    known = gaussian_process.fit(rows, target, noise, folds, NAMES, FOLDS)
    other = rows.copy()
    other[:, NAMES.index("log_macs")] += 5.0
    np.testing.assert_array_equal(known.predict(other), known.predict(rows))
    assert set(gaussian_process._SCALES) <= {*CONTRACTION, *MOVEMENT}


def test_a_disturbed_timing_is_not_followed():
    rows, target, noise, _ = drawn(300)
    disturbed = target.copy()
    disturbed[7] += 50.0
    said = [
        gaussian_process.fit(rows, y, noise, np.full(300, -1), NAMES, 1).predict(rows)[0]
        for y in (target, disturbed)
    ]
    assert np.abs(np.delete(said[0] - said[1], 7)).max() < 0.2


def test_rows_are_computed_in_chunks_as_if_they_were_alone(monkeypatch):
    rows, target, noise, folds = drawn()
    known = gaussian_process.fit(rows, target, noise, folds, NAMES, FOLDS)
    alone = np.hstack([known.predict(row[None, :]) for row in rows])
    np.testing.assert_allclose(known.predict(rows), alone, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(gaussian_process, "_CHUNK", 7 * len(rows))
    np.testing.assert_allclose(known.predict(rows), alone, rtol=1e-9, atol=1e-12)


def test_of_many_samples_some_are_taken(monkeypatch):
    rows, target, noise, folds = drawn(100)
    monkeypatch.setattr(gaussian_process, "_MOST", 40)
    known = gaussian_process.fit(rows, target, noise, folds, NAMES, FOLDS)
    assert known.points.shape[0] == known.weights.shape[1] == 40
    assert np.corrcoef(known.predict(rows)[0], target)[0, 1] > 0.9


def test_it_survives_its_file():
    rows, target, noise, folds = drawn()
    known = gaussian_process.fit(rows, target, noise, folds, NAMES, FOLDS)
    again = GaussianProcesses.from_dict(json.loads(json.dumps(known.to_dict())), rows.shape[1])
    np.testing.assert_array_equal(again.predict(rows), known.predict(rows))


@pytest.mark.parametrize("change", [{"scales": [1.0]}, {"points": [[1.0]]}, {"weights": [[np.nan, 1.0]]}])
def test_arrays_that_do_not_belong_together_are_refused(change):
    good = {"scales": [1.0, 0.0], "points": [[1.0], [2.0]], "weights": [[0.5, 0.5]]}
    assert GaussianProcesses.from_dict(good, 2).predict(np.array([[6.0, 9.0]])).shape == (1, 1)
    with pytest.raises(ValueError, match="Gaussian processes"):
        GaussianProcesses.from_dict({**good, **change}, 2)
