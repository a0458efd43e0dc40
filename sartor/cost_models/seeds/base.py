"""What every predictor of this folder does, and the least-squares fits that they share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from sartor.errors import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class SeedPredictor(abc.ABC):
    """A number per network from a row of its columns. Values: `update` gives a new predictor.

    Options are the fields of a subclass in front of these.

    Attributes:
        seen_rows: rows that it has learned from, `[networks, columns]`.
        seen_values: what was measured for them, `[networks]`.
        coefficients: what the fit found, by name; empty before the first `update`.
    """

    kind: ClassVar[str]

    seen_rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)), kw_only=True)
    seen_values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0), kw_only=True)
    coefficients: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of what a row holds; empty where any number of columns is taken."""

    @abc.abstractmethod
    def _fit(self, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Coefficients from everything seen."""

    @abc.abstractmethod
    def _predict(self, rows: np.ndarray) -> np.ndarray:
        """Predictions of checked rows."""

    def predict(self, rows: Any) -> np.ndarray:
        """Predicted values, an array `[networks]`.

        Args:
            rows: array `[networks, columns]`.

        Raises:
            UsageError: nothing was learned yet, or the number of columns is wrong.
        """
        if not self.coefficients:
            raise UsageError(
                f"Predictor '{self.kind}' has learned nothing yet; update it with measured networks."
            )
        return self._predict(self._checked(rows))

    def update(self, rows: Any, values: Any) -> Self:
        """A predictor that has learned from these networks, too.

        Args:
            rows: array `[networks, columns]`.
            values: what was measured, `[networks]`.

        Raises:
            UsageError: wrong shapes, numbers that are not finite, or too few networks to tell the coefficients.
        """
        new, measured = self._checked(rows), np.asarray(values, float)
        if measured.shape != (len(new),) or not np.isfinite(measured).all():
            raise UsageError(
                f"Predictor '{self.kind}' got {len(new)} rows and values of shape {list(measured.shape)}; "
                "pass one finite number per row."
            )
        both = new if not self.seen_values.size else np.concatenate([self.seen_rows, new])
        all_values = np.concatenate([self.seen_values, measured])
        found = self._fit(both, all_values)
        return dataclasses.replace(self, seen_rows=both, seen_values=all_values, coefficients=found)

    def save(self) -> dict[str, Any]:
        """JSON-ready form; `load` is its inverse."""
        return {
            "kind": self.kind,
            "options": {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.kw_only},
            "rows": self.seen_rows.tolist(),
            "values": self.seen_values.tolist(),
            "coefficients": {name: np.asarray(value).tolist() for name, value in self.coefficients.items()},
        }

    @classmethod
    def load(cls, document: Mapping[str, Any]) -> Self:
        """Inverse of `save`.

        Raises:
            UsageError: of another kind, or malformed.
        """
        if document.get("kind") != cls.kind:
            raise UsageError(f"Expected a predictor of kind '{cls.kind}', found {document.get('kind')!r}.")
        try:
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in document["options"].items()}
            return cls(
                **options,
                seen_rows=np.asarray(document["rows"], float),
                seen_values=np.asarray(document["values"], float),
                coefficients={name: np.asarray(v, float) for name, v in document["coefficients"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"A saved predictor '{cls.kind}' is malformed ({error}); fit it again."
            ) from error

    def _checked(self, rows: Any) -> np.ndarray:
        found = np.asarray(rows, float)
        width = len(self.columns) or (self.seen_rows.shape[1] if self.seen_values.size else None)
        if found.ndim != 2 or width not in (None, found.shape[1]) or not np.isfinite(found).all():
            raise UsageError(
                f"Predictor '{self.kind}' got rows of shape {list(found.shape)}; pass finite numbers "
                f"[networks, {width or 'columns'}]{f', columns {list(self.columns)}' if self.columns else ''}."
            )
        return found


def least_squares(design: np.ndarray, values: np.ndarray, kind: str) -> np.ndarray:
    """Coefficients of a linear model, columns scaled so that units do not matter.

    Raises:
        UsageError: the networks do not tell the coefficients.
    """
    scale = np.abs(design).max(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    found, _, rank, _ = np.linalg.lstsq(design / scale, values, rcond=None)
    if rank < design.shape[1]:
        raise UsageError(
            f"Predictor '{kind}' has {design.shape[1]} coefficients, but {len(values)} networks that tell only "
            f"{rank}; add networks that differ in every column."
        )
    return np.asarray(found / scale)


def nonnegative_least_squares(design: np.ndarray, values: np.ndarray, sweeps: int = 2000) -> np.ndarray:
    """Coefficients that are at least 0, by coordinate descent on the normal equations."""
    scale = np.linalg.norm(design, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    columns = design / scale
    gram, target = columns.T @ columns, columns.T @ values
    found = np.zeros(design.shape[1])
    for _ in range(sweeps):
        before = found.copy()
        for j in range(len(found)):
            found[j] = max(0.0, found[j] + (target[j] - gram[j] @ found) / max(gram[j, j], 1e-30))
        if np.abs(found - before).max() <= 1e-13 * max(1.0, np.abs(found).max()):
            break
    return found / scale
