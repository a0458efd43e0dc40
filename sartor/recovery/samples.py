"""The training set of recovery: held in memory and shuffled where it fits, streamed where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sartor.data_sources import sample_count
from sartor.errors import UsageError
from sartor.ir.fx import to_tensor
from sartor.ir.program import Batch as BatchAxis
from sartor.recovery.processes import Processes

CACHE_BYTES = 512 << 20
"""Largest training set that is held in memory, inputs and labels together."""
BATCH_SIZES = (16, 128)
"""Bounds of the batch size: BatchNormalization needs some samples, and steps must not become too few."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One training step's worth of data.

    Attributes:
        inputs: in the order of the original's inputs, at the original's size.
        labels: or None.
        count: samples.
        weight: share of the samples of all processes.
        rows: which samples of those that are held in memory, `[N]`; None where none are.
    """

    inputs: list[Tensor]
    labels: Tensor | None
    count: int
    weight: float = 1.0
    rows: Tensor | None = None


class Samples:
    """Batches of a training set.

    A set within `CACHE_BYTES` is shuffled anew each epoch, by seed and epoch only. A larger one keeps its own batches
    and order. So does one that cannot be shuffled: the model takes one batch size only, or has an input without
    samples, such as a scale, that differs between batches.

    Args:
        data: re-iterable of `(inputs by name, labels or None)`.
        names: of the inputs, in order.
        axis: which inputs carry samples.
        seed: of the order.
        processes: that share the batches; alone by default.
        cache_bytes: in place of `CACHE_BYTES`.

    Raises:
        UsageError: there are no data.
    """

    def __init__(
        self,
        data: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray | None]],
        names: Sequence[str],
        axis: BatchAxis,
        seed: int,
        *,
        processes: Processes | None = None,
        cache_bytes: int | None = None,
    ):
        self._data = data
        self._names = tuple(names)
        self._axis = axis
        self._carries = [axis.symbolic and name in axis.inputs for name in names]
        self._seed = seed
        self._processes = processes or Processes()
        self._count = 0
        self._inputs: list[Tensor] = []
        self._labels: Tensor | None = None
        self._batch_size = BATCH_SIZES[0]
        self._first: list[Tensor] = []
        self._first_count = 0
        self.cached = self._load(CACHE_BYTES if cache_bytes is None else cache_bytes)

    @property
    def count(self) -> int | None:
        """Number of samples where they are held in memory."""
        return self._count if self.cached else None

    @property
    def batch_size(self) -> int | None:
        """Samples per training step where they are held in memory."""
        return self._batch_size if self.cached else None

    def limit_batch(self, most: int) -> None:
        """Make training steps of at most `most` samples, but of no fewer than the lower of `BATCH_SIZES`."""
        if self.cached:
            self._batch_size = min(self._batch_size, max(most, BATCH_SIZES[0]))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of one epoch, from batch `start` on."""
        if not self.cached:
            for position, (inputs, labels) in enumerate(self._data):
                if position >= start:
                    yield self._shared(self._streamed(inputs, labels))
            return
        order = torch.from_numpy(np.random.default_rng([self._seed, number]).permutation(self._count))
        parts = list(torch.split(order, self._batch_size))
        if len(parts) > 1 and len(parts[-1]) < self._batch_size:
            parts.pop()  # a handful of samples would upset BatchNormalization
        for part in parts[start:]:
            yield self._shared(self._select(part))

    def probe(self, limit: int) -> tuple[list[Tensor], int]:
        """Inputs of the first batch and its samples: at most `limit`, or all where the model takes no fewer."""
        if not any(self._carries):
            return self._first, self._first_count
        cut = [t[:limit] if carries else t for t, carries in zip(self._first, self._carries, strict=True)]
        return cut, min(limit, self._first_count)

    def sample(self, limit: int) -> list[Batch]:
        """The same few batches every time: what progress is compared on; at most `limit` samples."""
        if self.cached:
            order = torch.from_numpy(np.random.default_rng(self._seed).permutation(self._count))
            return [self._select(part) for part in torch.split(order[:limit], self._batch_size)]
        batches: list[Batch] = []
        for inputs, labels in self._data:
            batches.append(self._streamed(inputs, labels))
            if sum(b.count for b in batches) >= limit:
                break
        return batches

    def inputs(self, limit: int) -> Iterator[list[Tensor]]:
        """Inputs of this process's share of at most `limit` batches."""
        if not self.cached:
            for position, (inputs, _) in enumerate(self._data):
                if position >= limit:
                    return
                yield self._shared(self._streamed(inputs, None)).inputs
            return
        order = torch.from_numpy(np.random.default_rng(self._seed).permutation(self._count))
        for part in torch.split(order, self._batch_size)[:limit]:
            if len(part) >= self._processes.count:
                yield self._shared(self._select(part)).inputs

    def some(self, inputs: Sequence[Tensor], which: Tensor) -> list[Tensor]:
        """Inputs of some samples: rows by number, or by a boolean for each."""
        return [
            tensor[which] if carries else tensor
            for tensor, carries in zip(inputs, self._carries, strict=True)
        ]

    def _load(self, limit: int) -> bool:
        inputs: list[list[Tensor]] = []
        labels: list[Tensor | None] = []
        size = 0
        counts: list[int] = []
        for batch_inputs, batch_labels in self._data:
            tensors = self._tensors(batch_inputs)
            target = labels_of(batch_labels)
            if not self._first:
                self._first, self._first_count = tensors, sample_count(batch_inputs, self._axis.inputs)
            if not self._axis.symbolic or any(
                not carries and not torch.equal(tensor, first)
                for tensor, first, carries in zip(tensors, self._first, self._carries, strict=True)
            ):
                return False
            counts.append(sample_count(batch_inputs, self._axis.inputs))
            inputs.append(tensors)
            labels.append(target)
            size += sum(
                t.numel() * t.element_size() for t in [*tensors, *([] if target is None else [target])]
            )
            if size > limit:
                return False
        if not inputs:
            raise UsageError("The training data are empty; recovery needs at least one batch.")
        self._inputs = [
            torch.cat(parts) if carries else parts[0]
            for parts, carries in zip(zip(*inputs, strict=True), self._carries, strict=True)
        ]
        present = [target for target in labels if target is not None]
        if present and len(present) == len(labels):
            self._labels = torch.cat(present)
        self._count = sum(counts)
        low, high = BATCH_SIZES
        self._batch_size = min(max(counts[0], low), high, self._count)
        return True

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> list[Tensor]:
        missing = [name for name in self._names if name not in inputs]
        if missing:
            raise UsageError(f"The training data lack input '{missing[0]}'; they have {sorted(inputs)}.")
        return [to_tensor(inputs[name], torch.float32) for name in self._names]

    def _select(self, part: Tensor) -> Batch:
        labels = None if self._labels is None else self._labels[part]
        return Batch(self.some(self._inputs, part), labels, len(part), rows=part)

    def _streamed(self, inputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> Batch:
        return Batch(self._tensors(inputs), labels_of(labels), sample_count(inputs, self._axis.inputs))

    def _shared(self, batch: Batch) -> Batch:
        """This process's share of a batch."""
        if self._processes.alone:
            return batch
        which = torch.arange(batch.count)[self._processes.share(batch.count)]
        return Batch(
            self.some(batch.inputs, which),
            None if batch.labels is None else batch.labels[which],
            len(which),
            len(which) / batch.count,
            None if batch.rows is None else batch.rows[which],
        )


def labels_of(labels: np.ndarray | None) -> Tensor | None:
    """Labels as they are trained on: whole numbers as int64, others as float32."""
    if labels is None:
        return None
    array = np.asarray(labels)
    return torch.from_numpy(
        np.array(array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64))
    )
