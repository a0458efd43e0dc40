"""A bundle, loaded and ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.arrays import require_arrays
from sartor.backends.artifact import check_inputs, concrete_shapes
from sartor.backends.protocol import TensorSpec
from sartor.errors import BackendError, UsageError
from sartor.runtime.bundle import Condition, OpenedBundle, Stage, open_bundle

if TYPE_CHECKING:
    from sartor.backends.protocol import Session


def load(bundle: str | os.PathLike[str], *, threads: int = 1) -> BundleSession:
    """Check a bundle and load its artifacts, each in its target's runtime.

    Args:
        bundle: folder with `bundle.json`.
        threads: compute threads of every stage.

    Raises:
        ModelError: the bundle is damaged, contradicts its artifacts, or names files outside its folder.
        UsageError: a target's runtime is not installed.
        BackendError: a runtime refuses an artifact.
    """
    from sartor import backends
    from sartor.backends.protocol import TargetOptions

    opened = open_bundle(Path(bundle))
    sessions: dict[str, Session] = {}
    for name, artifact in opened.artifacts.items():
        options = TargetOptions(threads=threads, precision=artifact.precision)
        sessions[name] = backends.get(artifact.target).load(artifact, options)
    return BundleSession(opened, sessions)


class BundleSession:
    """Runs the stages of a bundle.

    Attributes:
        inputs: the contract of what goes in.
        outputs: of what comes out.
        ran: by stage, for how many samples it ran in the last call of `run`.
    """

    def __init__(self, bundle: OpenedBundle, sessions: Mapping[str, Session]):
        self.inputs: tuple[TensorSpec, ...] = bundle.document.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.document.outputs
        self.ran: dict[str, int] = {}
        self._stages = bundle.document.stages
        self._sessions = sessions
        self._per_sample = bundle.per_sample

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            UsageError: an input is missing, unknown, no numpy array, or of the wrong type or shape.
            BackendError: a runtime failed, or answered something else than its artifact says.
        """
        count = self._check(inputs)
        self.ran = dict.fromkeys((stage.name for stage in self._stages), 0)
        values: dict[str, np.ndarray] = dict(inputs)
        present = {name: np.ones(count, dtype=bool) for name in inputs}
        for stage in self._stages:
            self._run_stage(stage, values, present, count)
        return {tensor.name: values[tensor.name] for tensor in self.outputs}

    def _run_stage(
        self,
        stage: Stage,
        values: dict[str, np.ndarray],
        present: dict[str, np.ndarray],
        count: int,
    ) -> None:
        wanted = np.ones(count, dtype=bool)
        for value in stage.inputs.values():
            wanted &= present.get(value, np.zeros(count, dtype=bool))
        if stage.when is not None:
            known = wanted & present.get(stage.when.value, np.zeros(count, dtype=bool))
            wanted = known.copy()
            if known.any():
                subject = values[stage.when.value]
                rows = subject[known] if stage.when.value in self._per_sample else subject
                wanted[known] = _holds(stage.when, rows, int(known.sum()))
        if not wanted.any():
            return
        some = not wanted.all()
        given = {
            name: values[value][wanted] if some and value in self._per_sample else values[value]
            for name, value in stage.inputs.items()
        }
        found = self._sessions[stage.name].run(given)
        self.ran[stage.name] = int(wanted.sum())
        for name, value in stage.outputs.items():
            result = found.get(name)
            rows = self.ran[stage.name] if value in self._per_sample else None
            if result is None or (rows is not None and result.shape[:1] != (rows,)):
                raise BackendError(
                    f"Stage '{stage.name}' was to give '{name}'{f' for {rows} samples' if rows else ''}; its session "
                    f"gave {'nothing' if result is None else f'shape {list(result.shape)}'}. That is a defect of its "
                    "target's backend."
                )
            if rows is not None and (some or value in values):
                result = _merged(values.get(value), result, wanted)
            values[value] = result
            present[value] = present.get(value, np.zeros(count, dtype=bool)) | wanted

    def _check(self, inputs: Mapping[str, np.ndarray]) -> int:
        """The number of samples."""
        require_arrays(inputs)
        sizes = concrete_shapes(self.inputs, {name: array.shape for name, array in inputs.items()})
        check_inputs(self.inputs, sizes, inputs)
        empty = next((name for name, array in inputs.items() if not array.size), None)
        if empty is not None:
            raise UsageError(
                f"Input '{empty}' has shape {list(inputs[empty].shape)}; give at least 1 sample."
            )
        first = next((t.name for t in self.inputs if t.name in self._per_sample), None)
        return len(inputs[first]) if first is not None else 1


def _merged(old: np.ndarray | None, new: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`new` at `rows`, and `old` elsewhere: what is in the other rows nobody reads."""
    merged = np.zeros((len(rows), *new.shape[1:]), new.dtype) if old is None else old.copy()
    merged[rows] = new
    return merged


def _holds(condition: Condition, value: np.ndarray, samples: int) -> np.ndarray:
    """Whether each of `samples` fulfils the condition."""
    flat: Any = np.asarray(value, dtype=np.float64).reshape(samples, -1)
    if condition.metric == "value":
        if flat.shape[1] != 1:
            raise UsageError(
                f"The condition on '{condition.value}' reads one number per sample; it has {flat.shape[1]}."
            )
        measured = flat[:, 0]
    else:
        shifted = np.exp(flat - flat.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        ordered = np.sort(probabilities, axis=1)
        if condition.metric == "max-probability":
            measured = ordered[:, -1]
        elif condition.metric == "probability-difference":
            measured = ordered[:, -1] - (ordered[:, -2] if ordered.shape[1] > 1 else 0.0)
        else:
            measured = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(axis=1)
    if condition.comparison == "below":
        return np.asarray(measured < condition.threshold)
    if condition.comparison == "at-least":
        return np.asarray(measured >= condition.threshold)
    return np.asarray(measured == condition.threshold)
