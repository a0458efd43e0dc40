"""A bundle, loaded and ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.artifact import check_inputs, concrete_shapes, open_artifact
from sartor.backends.protocol import TensorSpec
from sartor.errors import UsageError
from sartor.runtime.bundle import BundleDocument, Condition, Stage, read_bundle

if TYPE_CHECKING:
    from sartor.backends.protocol import Session


def load(bundle: str | os.PathLike[str], *, threads: int = 1) -> BundleSession:
    """Check a bundle and load its artifacts, each in its target's runtime.

    Args:
        bundle: folder with `bundle.json`.
        threads: compute threads of every stage.

    Raises:
        ModelError: the bundle is damaged, or names files outside its folder.
        UsageError: an artifact has no manifest, or a target's runtime is not installed.
        BackendError: a runtime refuses an artifact.
    """
    from sartor import backends
    from sartor.backends.protocol import TargetOptions

    folder = Path(bundle)
    document = read_bundle(folder)
    sessions: dict[str, Session] = {}
    for stage in document.stages:
        artifact = open_artifact(folder / stage.artifact)
        options = TargetOptions(threads=threads, precision=artifact.precision)
        sessions[stage.name] = backends.get(artifact.target).load(artifact, options)
    return BundleSession(document, sessions)


class BundleSession:
    """Runs the stages of a bundle.

    Attributes:
        inputs: the contract of what goes in.
        outputs: of what comes out.
        ran: by stage, for how many samples it ran in the last call of `run`.
    """

    def __init__(self, document: BundleDocument, sessions: Mapping[str, Session]):
        self.inputs: tuple[TensorSpec, ...] = document.inputs
        self.outputs: tuple[TensorSpec, ...] = document.outputs
        self.ran: dict[str, int] = {}
        self._stages = document.stages
        self._sessions = sessions
        # Samples are told apart along the first axis of what has a symbolic one; else the whole call is one sample.
        self._batched = {t.name for t in self.inputs if t.shape and isinstance(t.shape[0], str)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            UsageError: an input is missing, unknown, or of the wrong type or shape.
            BackendError: a runtime failed.
        """
        count = self._check(inputs)
        self.ran = dict.fromkeys((stage.name for stage in self._stages), 0)
        values: dict[str, np.ndarray] = dict(inputs)
        present = {name: np.ones(count, dtype=bool) for name in inputs}
        split = set(self._batched)
        for stage in self._stages:
            self._run_stage(stage, values, present, split, count)
        return {tensor.name: values[tensor.name] for tensor in self.outputs}

    def _run_stage(
        self,
        stage: Stage,
        values: dict[str, np.ndarray],
        present: dict[str, np.ndarray],
        split: set[str],
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
                rows = subject[known] if stage.when.value in split else subject
                wanted[known] = _holds(stage.when, rows, int(known.sum()))
        if not wanted.any():
            return
        some = not wanted.all()
        given = {
            name: values[value][wanted] if some and value in split else values[value]
            for name, value in stage.inputs.items()
        }
        found = self._sessions[stage.name].run(given)
        self.ran[stage.name] = int(wanted.sum())
        for name, value in stage.outputs.items():
            result = found[name]
            if self._batched and result.ndim and len(result) == wanted.sum():
                split.add(value)
                if some or value in values:
                    result = _merged(values.get(value), result, wanted)
            values[value] = result
            present[value] = present.get(value, np.zeros(count, dtype=bool)) | wanted

    def _check(self, inputs: Mapping[str, np.ndarray]) -> int:
        """The number of samples."""
        sizes = concrete_shapes(self.inputs, {name: array.shape for name, array in inputs.items()})
        check_inputs(self.inputs, sizes, inputs)
        empty = next((name for name, array in inputs.items() if not array.size), None)
        if empty is not None:
            raise UsageError(
                f"Input '{empty}' has shape {list(inputs[empty].shape)}; give at least 1 sample."
            )
        first = next(iter(sorted(self._batched)), None)
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
