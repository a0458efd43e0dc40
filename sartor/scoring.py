"""The score of a model on a split: in [0, 1], higher is better.

* With a `metric`: whatever `metric(outputs, labels)` returns for the whole split, where `outputs` maps
  output names to arrays concatenated over the split. It must lie in [0, 1].
* With integer labels: accuracy of the first output, argmax over axis 1 of `[N, C, ...]` against labels
  `[N, ...]`.
* With floating labels of the first output's shape: `1 / (1 + e)`, `e = sum|output - label| / sum|label|`.
* Without labels: agreement with the original model, the mean over all outputs of the share of equal argmax
  for outputs `[N, C]` with C > 1, and of `1 / (1 + e)`, `e = sum|a - b| / sum|b|`, for every other output.

Without data there is no score, and the quality of a result is `unmeasured`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sartor.data_sources import sample_count
from sartor.errors import UsageError

Outputs = Mapping[str, np.ndarray]
Predict = Callable[[dict[str, np.ndarray]], Outputs]
Metric = Callable[[Outputs, Any], float]


def score(
    predict: Predict,
    split: Iterable[tuple[dict[str, np.ndarray], np.ndarray | None]],
    metric: Metric | None = None,
    reference_predict: Predict | None = None,
) -> tuple[float, int]:
    """Score `predict` on `split`; see the module docstring for the definition.

    Args:
        predict: maps input arrays to output arrays by name; the first output is the prediction.
        split: batches `(inputs, labels)`.
        metric: replaces the built-in definitions.
        reference_predict: the original model, needed only for a split without labels and no metric.

    Returns:
        The score in [0, 1] and the number of samples it was taken on.

    Raises:
        UsageError: labels and outputs do not fit each other, or there is nothing to compare with.
    """
    if metric is not None:
        return _with_metric(predict, split, metric)
    parts: list[_Part] = []
    count = 0
    for inputs, labels in split:
        outputs = predict(inputs)
        _refuse_non_finite(outputs)
        if labels is not None:
            parts.append(_against_labels(outputs, labels))
        elif reference_predict is not None:
            parts.extend(_against_reference(outputs, reference_predict(inputs)))
        else:
            raise UsageError(
                "The split has no labels and there is no original model to agree with; "
                "give labels or a metric."
            )
        count += sample_count(inputs)
    if not count:
        raise UsageError("The split is empty; a score needs at least one sample.")
    return _combine(parts), count


class _Part:
    """Sums of one batch for one output; `exact` counts equal predictions, otherwise sums of |.| are kept."""

    def __init__(self, output: str, exact: bool, first: float, second: float):
        self.output, self.exact, self.first, self.second = output, exact, first, second


def _combine(parts: list[_Part]) -> float:
    scores = []
    for output in dict.fromkeys(part.output for part in parts):
        own = [part for part in parts if part.output == output]
        kinds = [[p for p in own if p.exact is exact] for exact in (True, False)]
        weighed = [_score(same) * len(same) for same in kinds if same]
        scores.append(sum(weighed) / len(own))
    return float(np.mean(scores))


def _score(parts: list[_Part]) -> float:
    first, second = sum(p.first for p in parts), sum(p.second for p in parts)
    if parts[0].exact:
        return first / second
    return 1.0 / (1.0 + first / second) if second else float(first == 0.0)


def _against_labels(outputs: Outputs, labels: np.ndarray) -> _Part:
    name, output = next(iter(outputs.items()))
    if labels.dtype.kind in "iub":
        ids = labels.reshape(labels.shape[0]) if labels.shape[1:] == (1,) and output.ndim == 2 else labels
        if output.ndim < 2 or output.shape[1] < 2 or ids.shape != (output.shape[0], *output.shape[2:]):
            raise UsageError(
                f"Output '{name}' has shape {list(output.shape)}, which holds no class scores [N, C, ...] "
                f"for integer labels of shape {list(labels.shape)}; give a 'metric' with the data."
            )
        classes = output.shape[1]
        lowest, highest = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
        if lowest < 0 or highest >= classes:
            beyond = f"go down to {lowest}" if lowest < 0 else f"go up to {highest}"
            raise UsageError(
                f"The labels {beyond}, but output '{name}' has {classes} classes; number them from 0 to "
                f"{classes - 1}, or give a 'metric' with the data."
            )
        predicted = output.argmax(axis=1)
        return _Part(name, True, float((predicted == ids).sum()), float(ids.size))
    if labels.shape != output.shape:
        raise UsageError(
            f"Output '{name}' has shape {list(output.shape)} and the floating labels {list(labels.shape)}; "
            "they must be equal, or give a 'metric' with the data."
        )
    return _difference(name, output, labels)


def _against_reference(outputs: Outputs, reference: Outputs) -> list[_Part]:
    parts = []
    for name, expected in reference.items():
        output = outputs[name]
        if output.shape != expected.shape:  # a result of unknown size: nothing of it agrees
            parts.append(_Part(name, True, 0.0, float(max(len(expected), 1) if expected.ndim else 1)))
        elif expected.ndim == 2 and expected.shape[1] > 1:
            equal = output.argmax(axis=1) == expected.argmax(axis=1)
            parts.append(_Part(name, True, float(equal.sum()), float(equal.size)))
        else:
            parts.append(_difference(name, output, expected))
    return parts


def _difference(name: str, output: np.ndarray, expected: np.ndarray) -> _Part:
    wide = expected.astype(np.float64)
    return _Part(name, False, float(np.abs(output - wide).sum()), float(np.abs(wide).sum()))


def _with_metric(
    predict: Predict, split: Iterable[tuple[dict[str, np.ndarray], Any]], metric: Metric
) -> tuple[float, int]:
    gathered: dict[str, list[np.ndarray]] = {}
    labels: list[Any] = []
    count = 0
    for inputs, batch_labels in split:
        for name, value in predict(inputs).items():
            gathered.setdefault(name, []).append(value)
        labels.append(batch_labels)
        count += sample_count(inputs)
    if not count:
        raise UsageError("The split is empty; a score needs at least one sample.")
    outputs = {name: _joined(f"Output '{name}'", values) for name, values in gathered.items()}
    answer: Any = metric(outputs, None if labels[0] is None else _joined("The labels", labels))
    try:
        result = float(answer)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The data's metric returned a value of type '{type(answer).__name__}'; it must return one number "
            "in [0, 1]."
        ) from error
    if not 0.0 <= result <= 1.0:  # also refuses NaN
        raise UsageError(
            f"The data's metric returned {result}; a score must lie in [0, 1], higher is better. Rescale it."
        )
    return result, count


def _joined(what: str, batches: list[np.ndarray]) -> np.ndarray:
    """One array for a metric, which sees the whole split at once."""
    try:
        return np.concatenate(batches)
    except ValueError as error:
        shapes = sorted({np.shape(batch) for batch in batches})
        raise UsageError(
            f"{what} cannot be joined over the batches for the metric: their shapes are "
            f"{[list(shape) for shape in shapes[:3]]}. All axes but the first must be equal."
        ) from error


def _refuse_non_finite(outputs: Outputs) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UsageError(f"Output '{name}' contains NaN or infinity; a score of it means nothing.")
