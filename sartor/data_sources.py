"""Where data comes from: `FILE.py:function` or `FILE.npz`. What it must look like is in `sartor.data`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import SartorError, UsageError

SPLITS = ("train", "calibration", "evaluate", "test")
FRACTIONS = (0.70, 0.15, 0.15)
"""Shares of train, evaluate and test when one file is split."""
BATCH_SIZE = 64


def sample_count(inputs: Mapping[str, np.ndarray], carriers: Sequence[str] = ()) -> int:
    """Samples in one batch: the length of the first input of `carriers`, or of the first that has an axis."""
    named = [inputs[name] for name in carriers if name in inputs]
    return next((len(array) for array in (*named, *inputs.values()) if array.ndim), 1)


@contextlib.contextmanager
def authors_code(what: str, file: str = "") -> Iterator[None]:
    """Turn whatever the author's own code raises here into one sentence.

    `sys.exit` counts as a failure, too: its number must not become the exit code of a command of ours.

    Args:
        what: the subject of the sentence, e.g. "The metric of 'data.py:digits'".
        file: name of the author's file; the sentence says the innermost line of it.

    Raises:
        UsageError: the code raised anything but an error of Sartor or an interrupt.
    """
    try:
        yield
    except SartorError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if file and Path(frame.filename).name == file]
        where = f" ({file}:{lines[-1]})" if lines else ""
        raise UsageError(f"{what} failed: {_one_line(error)}{where}.") from error


def guarded(function: Callable[..., Any], what: str, file: str) -> Callable[..., Any]:
    """`function`, failing as `authors_code` says."""

    @functools.wraps(function, updated=())
    def call(*arguments: Any) -> Any:
        with authors_code(what, file):
            return function(*arguments)

    return call


def from_function(spec: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits and extras (`loss`, `metric`) returned by `FILE.py:function`."""
    file, separator, function = spec.rpartition(":")
    if not separator or not file.endswith(".py") or not function.isidentifier():
        raise UsageError(f"Data '{spec}' is neither FILE.npz nor FILE.py:function.")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"The data file '{file}' does not exist.")
    result = _call(path, function)
    if not isinstance(result, Mapping):
        raise UsageError(
            f"'{spec}' returned a {type(result).__name__}; expected a mapping with the splits {list(SPLITS)}."
        )
    unknown = sorted(map(str, set(result) - {*SPLITS, "loss", "metric"}))
    if unknown:
        raise UsageError(
            f"'{spec}' returned unknown keys {unknown}; expected some of {[*SPLITS, 'loss', 'metric']}."
        )
    splits = {name: result[name] for name in SPLITS if result.get(name) is not None}
    if "evaluate" not in splits:
        raise UsageError(
            f"'{spec}' returned no split 'evaluate'; it is the one that is required, return at least that."
        )
    extra = {name: result[name] for name in ("loss", "metric") if result.get(name) is not None}
    for name, value in extra.items():
        if not callable(value):
            raise UsageError(f"'{name}' of '{spec}' is a {type(value).__name__}; it must be callable.")
    place = f"{path.name}:{function}"
    return splits, {
        name: guarded(value, f"The {name} of '{place}'", path.name) for name, value in extra.items()
    }


def _call(path: Path, function: str) -> Any:
    """Import `path` under a private name, with its own folder importable, and call `function()`."""
    name = f"sartor_data_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"The data file '{path}' cannot be imported.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with authors_code(f"The import of the data file '{path}'", path.name):
            module_spec.loader.exec_module(module)
        target = getattr(module, function, None)
        if not callable(target):
            raise UsageError(f"The data file '{path}' has no function '{function}'.")
        with authors_code(f"'{path}:{function}'", path.name):
            return target()
    finally:
        sys.path.remove(str(path.resolve().parent))


def from_npz(
    path: Path, names: Sequence[str], seed: int, fixed: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, ArraySplit]:
    """Splits cut from one archive, 70/15/15 by seed.

    Args:
        path: the archive.
        names: of the model's inputs.
        seed: of the order of samples.
        fixed: shapes of those inputs that take no other. An array of such a shape is a constant, part of every
            batch; where all inputs are fixed, batches have the length that the model wants.

    Raises:
        UsageError: missing, malformed, or not the arrays that the model takes.
    """
    fixed = fixed or {}
    arrays = _read_npz(path)
    labels = arrays.pop("labels", None) if "labels" not in names else None
    if set(arrays) == {"inputs"} and "inputs" not in names:
        if len(names) != 1:
            raise UsageError(
                f"'{path}' has one array 'inputs', but the model has the inputs {sorted(names)}; "
                "name one array after each input."
            )
        arrays = {names[0]: arrays["inputs"]}
    if set(arrays) != set(names):
        raise UsageError(
            f"'{path}' has the arrays {sorted(arrays)}, but the model's inputs are {sorted(names)}; "
            "name the arrays as the inputs, plus an optional 'labels'."
        )
    constants = {name: array for name, array in arrays.items() if array.shape == fixed.get(name)}
    arrays = {name: array for name, array in arrays.items() if name not in constants}
    if not arrays:
        raise UsageError(
            f"'{path}' has one batch of the model's fixed shapes; at least 3 are needed for train, evaluate and "
            "test. Stack them along axis 0."
        )
    counts = {name: (len(array) if array.ndim else 0) for name, array in arrays.items()}
    if labels is not None:
        counts["labels"] = len(labels) if labels.ndim else 0
    if len(set(counts.values())) != 1:
        raise UsageError(f"'{path}' has arrays of different lengths {counts}; axis 0 must be the samples.")
    count = next(iter(counts.values()))
    if count < 3:
        raise UsageError(f"'{path}' has {count} samples; at least 3 are needed for train, evaluate and test.")
    order = np.random.default_rng(seed).permutation(count)
    evaluate, test = (max(1, round(count * fraction)) for fraction in FRACTIONS[1:])
    bounds = {
        "train": order[: count - evaluate - test],
        "evaluate": order[count - evaluate - test : count - test],
        "test": order[count - test :],
    }
    whole = len(fixed) == len(names)
    batch = next((fixed[name][0] for name in arrays if fixed.get(name)), 1) if whole else BATCH_SIZE
    return {
        name: ArraySplit(arrays, labels, indices, batch, whole_batches=whole, constants=constants)
        for name, indices in bounds.items()
    }


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"The data file '{path}' does not exist.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UsageError(f"The data file '{path}' is not an .npz archive.")
            # not ascontiguousarray, which gives a scalar an axis
            return {name: np.asarray(archive[name], order="C") for name in archive.files}
    except UsageError:
        raise
    except Exception as error:  # zip, header and pickle errors have no common class
        raise UsageError(
            f"The data file '{path}' cannot be read as an .npz of plain arrays: {_one_line(error)}."
        ) from error


class ArraySplit:
    """Batches cut from arrays by index, in a fixed order.

    Args:
        arrays: by input name, axis 0 the samples.
        labels: axis 0 the samples, or None.
        indices: which samples, in which order.
        batch: samples per batch.
        whole_batches: leave out a last, smaller batch (for models with a fixed batch).
        constants: inputs without samples, part of every batch.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        labels: np.ndarray | None,
        indices: np.ndarray,
        batch: int = BATCH_SIZE,
        whole_batches: bool = False,
        constants: Mapping[str, np.ndarray] | None = None,
    ):
        self.arrays, self.labels, self.indices = dict(arrays), labels, np.asarray(indices)
        self.constants = dict(constants or {})
        self.batch, self.whole_batches = batch, whole_batches

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch)
        return whole + (1 if rest and not self.whole_batches else 0)

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        for index in range(len(self)):
            rows = self.indices[index * self.batch : (index + 1) * self.batch]
            labels = None if self.labels is None else self.labels[rows]
            yield {name: array[rows] for name, array in self.arrays.items()} | self.constants, labels


def _one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__
