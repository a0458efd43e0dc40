"""What every cut is judged on: the same samples each time, and ONNX Runtime, which runs the cut program."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends.telemetry import import_vendor
from sartor.data import Batch
from sartor.data_sources import sample_count
from sartor.errors import BackendError, UsageError
from sartor.ir.program import Program
from sartor.ir.serialise import SINGLE_FILE_BYTES
from sartor.scoring import Metric, Outputs, Predict, score

HELD_BYTES = 1 << 30
"""Most that samples take in memory."""


class HeldSamples:
    """The first samples of a split, read once and held in memory; re-iterable.

    Args:
        split: batches `(inputs, labels)`.
        most: samples; the last batch is shortened to them where it can be.
        carriers: inputs whose first axis is the samples; empty where batches cannot be shortened.
        piece: most samples of a batch; longer ones are divided where they can be.
        seconds: for the first pass, what its consumer does with the batches included. It ends after the batch that
            goes beyond.

    Attributes:
        samples: held so far.
        bytes: that they take, and whatever else is to count; a consumer may add to it.
        short_of: what there was not enough of for all that was asked for, `time` or `memory`; empty otherwise.
    """

    def __init__(
        self,
        split: Iterable[Batch],
        most: int,
        carriers: Iterable[str] = (),
        *,
        piece: int | None = None,
        seconds: float = float("inf"),
    ):
        self._split, self._most, self._carriers = split, most, tuple(carriers)
        self._piece, self._seconds = piece or most, seconds
        self._held: list[Batch] = []
        self._complete = False
        self.samples, self.bytes, self.short_of = 0, 0, ""

    def __iter__(self) -> Iterator[Batch]:
        if self._complete:
            yield from self._held
            return
        started = time.perf_counter()
        self._held, self.samples, self.bytes = [], 0, 0  # what a pass that was given up has left
        for batch in self._pieces():
            if self._held and self._enough(started):
                break
            self._held.append(batch)
            self.samples += sample_count(batch[0], self._carriers)
            self.bytes += sum(array.nbytes for array in batch[0].values())
            yield batch
        self._complete = True

    def _enough(self, started: float) -> bool:
        if time.perf_counter() - started > self._seconds:
            self.short_of = "time"
        elif self.bytes > HELD_BYTES:
            self.short_of = "memory"
        return bool(self.short_of)

    def _pieces(self) -> Iterator[Batch]:
        """Batches of the split, divided and shortened where that can be, until there are enough samples."""
        left = self._most
        for inputs, labels in self._split:
            count = sample_count(inputs, self._carriers)
            if not self._carriers:
                yield inputs, labels
            for start in range(0, min(count, left), self._piece) if self._carriers else ():
                rows = slice(start, min(start + self._piece, left))
                cut = {k: array[rows] if k in self._carriers else array for k, array in inputs.items()}
                yield cut, None if labels is None else labels[rows]
            left -= count
            if left <= 0:
                return


class Trial:
    """Scores programs on the same samples; the first must be the original, with which the others may have to agree.

    Args:
        held: the samples.
        metric: of the data, or None.
    """

    def __init__(self, held: HeldSamples, metric: Metric | None):
        self._held, self._metric = held, metric
        self._original: list[Outputs] = []

    def score(self, predict: Predict) -> float:
        """The score, see `sartor.scoring`.

        Raises:
            UsageError: there is none: data and outputs do not fit each other, or an output is not finite.
            BackendError: ONNX Runtime cannot run the program.
        """
        waiting = iter(list(self._original))

        def original(inputs: dict[str, np.ndarray]) -> Outputs:
            known = next(waiting, None)
            if known is None:
                known = predict(inputs)
                self._original.append(known)
                self._held.bytes += sum(array.nbytes for array in known.values())
            return known

        return score(predict, self._held, self._metric, original)[0]


def predictor(program: Program) -> Predict:
    """Runs a program, with whatever is left as it is at its end, on all processors that this process may use.

    Raises:
        BackendError: ONNX Runtime cannot load it.
    """
    runtime = import_vendor("onnxruntime", "sartor")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="sartor-cut-") as folder:
        model: str | bytes
        if program.serialised_bytes() <= SINGLE_FILE_BYTES:
            model = program.to_bytes()
        else:
            model = str(program.save(Path(folder) / "cut.onnx"))
        session = _translated(
            "load", lambda: runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        )
    names = [output.name for output in session.get_outputs()]

    def predict(inputs: Mapping[str, np.ndarray]) -> Outputs:
        return dict(zip(names, _translated("run", lambda: session.run(names, dict(inputs))), strict=True))

    return predict


def _translated(verb: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # the runtime's exceptions derive from Exception, one class per status
        text = " ".join(str(error).split())[:500].rstrip(".")
        raise BackendError(f"ONNX Runtime could not {verb} the program: {text}.") from error


def reestimated(program: Program, held: HeldSamples) -> Program:
    """The program with the running statistics of its BatchNormalizations taken anew on samples.

    Raises:
        UsageError: it has none, or a batch is too small for a variance.
        UnsupportedOperatorError: it has no twin to run in training mode.
    """
    import torch

    from sartor.ir.fx import pull_weights, to_fx, to_tensor, twin_info
    from sartor.recovery.twins import reestimate_statistics

    gm = to_fx(program, dtype=torch.float32)
    info = twin_info(gm)
    batches = [inputs for inputs, _ in held]
    sizes = [sample_count(inputs, program.batch.inputs) for inputs in batches]
    whole = (
        b for b, size in zip(batches, sizes, strict=True) if size == sizes[0]
    )  # the last may be one sample
    try:
        averaged = reestimate_statistics(
            gm, ([to_tensor(inputs[name], info.dtype) for name in info.inputs] for inputs in whole)
        )
    except ValueError as error:  # torch: more than one value per channel is needed
        raise UsageError(
            f"The statistics of BatchNormalization cannot be taken anew on batches of {sizes[0]}: {error}. Give the "
            "data in larger batches, or leave --reestimate away."
        ) from error
    if not averaged:
        raise UsageError(
            f"'{program.source.name}' has no BatchNormalization whose statistics could be taken anew; leave "
            "--reestimate away."
        )
    return pull_weights(program, gm)
