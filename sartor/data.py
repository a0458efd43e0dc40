"""Data for a fit: where it comes from, what it must look like, and the score.

A data source is either

* `FILE.py:function`, returning a mapping with the splits `train`, `calibration`, `evaluate`, `test`
  (only `evaluate` is required) and optionally `loss` and `metric`; or
* `FILE.npz`, with one array per model input (or one array `inputs` for a model with one input) and an
  optional array `labels`, split 70/15/15 by seed. Files are never unpickled.

A split is a re-iterable of `(inputs, labels)`: `inputs` maps every input name to an array, `labels` is an array or
None. The first axis of the labels is the batch, and of every input that the model takes in any number of samples;
those inputs come first in a batch. Selection sees `evaluate`; the reported score is taken on
`test`. Where a split is missing, `calibration` falls back to `train` and then to `evaluate`, and `test` to
`evaluate` (`Data.test_is_evaluate`, in a report `score_split`); a missing `train` stays None.

How the score is computed is in `sartor.scoring`.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.data_sources import BATCH_SIZE, ArraySplit, authors_code, from_function, from_npz, sample_count
from sartor.errors import UsageError
from sartor.images import at_shapes
from sartor.scoring import Metric, score

if TYPE_CHECKING:
    from sartor.ir.program import Program

__all__ = ["BATCH_SIZE", "ArraySplit", "Data", "Signature", "Split", "load_data", "score", "signatures"]

Batch = tuple[dict[str, np.ndarray], "np.ndarray | None"]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What the model expects of one input.

    Attributes:
        dtype: element type.
        shape: the reference shape.
        any_batch: whether axis 0 is the batch axis, of any length.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    any_batch: bool = True


def signatures(program: Program) -> dict[str, Signature]:
    """The expected arrays of every input of `program`."""
    types = program.types()
    return {
        name: Signature(
            np.dtype(types[name].numpy()),
            shape,
            any_batch=program.batch.symbolic and name in program.batch.inputs,
        )
        for name, shape in program.input_shapes.items()
    }


class Split:
    """A re-iterable of checked batches.

    Args:
        name: one of `SPLITS`, for messages.
        batches: the source's own re-iterable.
        names: the model's input names.
        expected: signatures to check against, by input name; empty when the model is not known.
        source: file name and function, for messages.
        finite_labels: whether NaN and infinity are refused in labels; a metric of one's own may give
            them a meaning.

    Raises:
        UsageError: the source can be iterated only once, is empty, its first batch is malformed, or its
            code fails.
    """

    def __init__(
        self,
        name: str,
        batches: Iterable[Any],
        names: Sequence[str],
        expected: Mapping[str, Signature] | None = None,
        *,
        source: str = "",
        finite_labels: bool = True,
    ):
        self.name = name
        self._batches = batches
        self._expected = dict(expected or {})
        given = self._expected.get
        self._carriers = [name for name in names if (known := given(name)) is None or known.any_batch]
        self._names = (*self._carriers, *(name for name in names if name not in self._carriers))
        self._title = f"split '{name}' of '{source}'" if source else f"split '{name}'"
        self._file = source.partition(":")[0]
        self._finite_labels = finite_labels
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._check_source()

    def __iter__(self) -> Iterator[Batch]:
        labelled = None
        for index, item in enumerate(self._raw()):
            batch = self._checked(item, index)
            if labelled is None:
                labelled = batch[1] is not None
            elif labelled != (batch[1] is not None):
                raise UsageError(
                    f"Batch {index} of {self._title} has {'no ' if labelled else ''}labels, unlike batch 0; "
                    "give labels with every batch or with none."
                )
            yield at_shapes(batch[0], self._shapes), batch[1]

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> Split:
        """The same batches with inputs of another size, antialiased; see `sartor.images`.

        Args:
            shapes: by input; inputs that are not named stay, and so does the batch.
        """
        found = copy.copy(self)
        found._shapes = dict(shapes)
        return found

    @property
    def has_labels(self) -> bool:
        """Whether the first batch carries labels."""
        return self.first()[1] is not None

    def first(self) -> Batch:
        """The first batch.

        Raises:
            UsageError: the source gives none any more.
        """
        batch = next(iter(self), None)
        if batch is None:
            raise self._exhausted()
        return batch

    def _raw(self) -> Iterator[Any]:
        """The source's own items; only its own code runs under the guard."""
        with authors_code(f"Iterating {self._title}", self._file):
            iterator = iter(self._batches)
        for index in itertools.count():
            with authors_code(f"Batch {index} of {self._title}", self._file):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _exhausted(self) -> UsageError:
        return UsageError(
            f"{_capital(self._title)} gives no batch when it is iterated a second time; "
            "its __iter__ must start again from the beginning."
        )

    def _check_source(self) -> None:
        batches = self._batches
        title = _capital(self._title)
        if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise UsageError(
                f"{title} is a {type(batches).__name__}; expected a re-iterable of "
                "(inputs, labels) batches, such as a list."
            )
        with authors_code(f"Iterating {self._title}", self._file):
            once = iter(batches) is batches
        if once:
            raise UsageError(
                f"{title} is a {type(batches).__name__}, which can be iterated only once; "
                "return a list, or an object whose __iter__ starts again."
            )
        if next(iter(self), None) is None:
            raise UsageError(f"{title} is empty; it must have at least one batch.")
        if next(self._raw(), None) is None:
            raise self._exhausted()

    def _checked(self, item: Any, index: int) -> Batch:
        place = f"Batch {index} of {self._title}"
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Mapping):
            raise UsageError(
                f"{place} is a {_describe(item)}; expected a pair (inputs, labels) whose inputs map "
                "input names to arrays and whose labels are an array or None."
            )
        inputs, labels = item
        if set(inputs) != set(self._names):
            raise UsageError(
                f"{place} has inputs {sorted(map(str, inputs))}, but the model's inputs are "
                f"{sorted(self._names)}; the names must be the same."
            )
        checked = {name: self._array(f"{place}: input '{name}'", inputs[name], name) for name in self._names}
        lengths = {name: len(checked[name]) for name in self._carriers if checked[name].ndim}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"{place} has inputs of different batch sizes {lengths}; they must be equal.")
        length = sample_count(checked)
        if length == 0:
            raise UsageError(f"{place} has no samples; every batch must have at least one.")
        if labels is not None:
            labels = _as_array(f"{place}: labels", labels)
            # Which axis of an input of fixed shape holds the samples is not known.
            if labels.ndim == 0 or (lengths and len(labels) != length):
                raise UsageError(
                    f"{place} has {length} samples, but labels of shape {list(labels.shape)}; "
                    "the first axis of the labels must be the batch."
                )
            if self._finite_labels and labels.dtype.kind == "f" and not np.isfinite(labels).all():
                raise UsageError(
                    f"{place} has labels with NaN or infinity; clean them, or give a 'metric' with the data."
                )
        return checked, labels

    def _array(self, place: str, value: Any, name: str) -> np.ndarray:
        array = _as_array(place, value)
        expected = self._expected.get(name)
        if expected is None:
            return array
        if array.dtype != expected.dtype:
            raise UsageError(
                f"{place} is {array.dtype}, but the model takes {expected.dtype}; convert it with "
                f".astype('{expected.dtype}')."
            )
        wanted: tuple[Any, ...] = expected.shape
        if expected.any_batch and wanted:
            wanted = ("N", *wanted[1:])
        if len(array.shape) != len(wanted) or any(
            isinstance(want, int) and want != have for want, have in zip(wanted, array.shape, strict=True)
        ):
            raise UsageError(
                f"{place} has shape {list(array.shape)}, but the model takes {_dims(wanted)}; "
                "reshape the data, or set the model's shape with --shape."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"{place} contains NaN or infinity; clean the data first.")
        return array


JUDGING_SHARE = 1 / 32
"""Share of a recovery's time that one judgement may take: there are five and more, and training needs the most."""


class InTime:
    """As many first batches of a split as one pass over it managed within a time; the same ones ever after.

    Scores of several states of a model are comparable only on the same samples, so the first pass decides.

    Args:
        split: re-iterable of `(inputs, labels)`.
        seconds: for the first pass, what its consumer does with the batches included.
        batches: known from an earlier run, in place of a first pass that finds out.

    Attributes:
        batches: how many, or None before the first pass.
        samples: in those of the last pass.
        cut: whether there are more.
    """

    def __init__(self, split: Iterable[Batch], seconds: float, batches: int | None = None):
        self.batches = batches
        self.samples, self.cut = 0, False
        self._split, self._seconds = split, seconds

    def __iter__(self) -> Iterator[Batch]:
        started = time.perf_counter()
        count, samples = 0, 0
        for inputs, labels in self._split:
            over = self.batches is None and count and time.perf_counter() - started > self._seconds
            if over or count == self.batches:
                self.cut = True
                break
            yield inputs, labels
            count, samples = count + 1, samples + sample_count(inputs)
        self.batches, self.samples = count, samples


@dataclasses.dataclass(frozen=True)
class Data:
    """Checked data of a fit. See the module docstring for fallbacks.

    Attributes:
        evaluate: what selection may look at.
        train: what recovery trains on, or None.
        calibration: statistics and importance.
        test: what the reported score is taken on.
        loss: `loss(outputs, labels)` on torch tensors for recovery, or None.
        metric: score of the whole split, or None.
        test_is_evaluate: the source had no test split, so the reported score was also selected on.
        source: file name and function, without folders.
    """

    evaluate: Split
    train: Split | None
    calibration: Split
    test: Split
    loss: Callable[..., Any] | None = None
    metric: Metric | None = None
    test_is_evaluate: bool = False
    source: str = ""

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> Data:
        """The same data with inputs of another size; see `Split.at`."""
        splits = {name: getattr(self, name).at(shapes) for name in ("evaluate", "calibration", "test")}
        train = None if self.train is None else self.train.at(shapes)
        return dataclasses.replace(self, train=train, **splits)

    def fingerprint(self) -> str:
        """SHA-256 of the source's name and the first batches of what is scored; training data may be shuffled."""
        digest = hashlib.sha256(self.source.encode())
        for split in (self.evaluate, self.test):
            inputs, labels = split.first()
            for name, array in sorted(inputs.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
            digest.update(b"" if labels is None else np.ascontiguousarray(labels).tobytes())
        return digest.hexdigest()


def load_data(
    spec: str, input_names: Sequence[str], seed: int = 0, *, program: Program | None = None
) -> Data:
    """Load and check a data source.

    Args:
        spec: `FILE.py:function` or `FILE.npz`.
        input_names: names of the model's inputs.
        seed: of the 70/15/15 split of a `.npz` file; without effect on `FILE.py:function`.
        program: when given, shapes and element types are checked against its inputs.

    Raises:
        UsageError: the source is missing, empty, malformed or does not fit the model.
    """
    expected = signatures(program) if program is not None else {}
    splits: Mapping[str, Any]
    extra: dict[str, Any] = {}
    if spec.endswith(".npz"):
        fixed = {name: known.shape for name, known in expected.items() if not known.any_batch}
        splits = from_npz(Path(spec), input_names, seed, fixed)
    else:
        splits, extra = from_function(spec)
    checked = {
        name: Split(
            name,
            batches,
            input_names,
            expected,
            source=Path(spec).name,
            finite_labels="metric" not in extra,
        )
        for name, batches in splits.items()
    }
    train = checked.get("train")
    return Data(
        evaluate=checked["evaluate"],
        train=train,
        calibration=checked.get("calibration") or train or checked["evaluate"],
        test=checked.get("test") or checked["evaluate"],
        loss=extra.get("loss"),
        metric=extra.get("metric"),
        test_is_evaluate="test" not in checked,
        source=Path(spec).name,
    )


def _as_array(place: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "detach"):  # a torch tensor, without importing torch
        array = value.detach().cpu().numpy()
    else:
        try:
            array = np.asarray(value)
        except Exception as error:  # ragged lists, objects with a broken __array__
            raise UsageError(f"{place} cannot be made an array: {error}.") from error
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{place} has element type {array.dtype}; expected numbers or booleans.")
    return array


def _describe(value: Any) -> str:
    return (
        f"{type(value).__name__} of {len(value)}"
        if isinstance(value, (tuple, list))
        else type(value).__name__
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _dims(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
