"""Ranges of activations on calibration data, by ONNX Runtime's calibrators."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.telemetry import import_vendor
from sartor.calibration import calibration_split
from sartor.data_sources import sample_count
from sartor.errors import BackendError
from sartor.ir.serialise import SINGLE_FILE_BYTES

if TYPE_CHECKING:
    from sartor.data import Split
    from sartor.ir.program import Program
    from sartor.passes.base import Context

Inputs = dict[str, np.ndarray]
_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_BINS = {"minmax": 0, "entropy": 512, "percentile": 2048}
"""Of a histogram. The runtime's default for entropy, 128, leaves it no threshold to choose but the largest value; its
search takes 0.2 s for a value at 512, and grows with the square."""
_BATCH = 16
"""Samples of one run: the calibrators hold every activation of one."""


def calibration_data(program: Program, context: Context) -> Split:
    """The split that ranges are taken on, checked against the program's inputs.

    Raises:
        UsageError: there is none; it is empty; names, types or shapes of its arrays are not those of the inputs.
    """
    return calibration_split(program, context.data, "ranges of activations are found on real inputs")


def pieces(split: Iterable[tuple[Inputs, Any]], samples: int, program: Program) -> Iterator[Inputs]:
    """The first `samples` samples, a few at a time where the batch axis is free."""
    left = samples
    for inputs, _ in split:
        if left <= 0:
            return
        length = sample_count(inputs, program.batch.inputs)
        free = program.batch.inputs if program.batch.symbolic else ()
        step = _BATCH if free else length
        for start in range(0, min(left, length), step):
            stop = min(start + step, left) if free else length
            yield {k: v[start:stop] if k in free else v for k, v in inputs.items()}
        left -= length


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a quantizer from printing and warning, and from giving the root logger a handler that stays for good."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(_nothing)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="ignore"):
            yield
    finally:
        root.removeFilter(_nothing)
        root.removeHandler(handler)


def _nothing(record: logging.LogRecord) -> bool:
    return False


class _One:
    """One batch, as the calibrators read it."""

    def __init__(self, inputs: Inputs):
        self._inputs: Inputs | None = inputs

    def get_next(self) -> Inputs | None:
        inputs, self._inputs = self._inputs, None
        return inputs


def find_ranges(
    program: Program, data: Iterable[Inputs], method: str, *, without: Collection[str] = ()
) -> Any:
    """Ranges by value name, in the form that ONNX Runtime's quantizer takes.

    Args:
        program: in float32; what is not understood is left out.
        data: at least one batch.
        method: `minmax`, `entropy` or `percentile` (99.999 %).
        without: values that a histogram cannot hold; those that `minmax` shows to be `unusable`.

    Raises:
        BackendError: the runtime fails on the data.
    """
    import_vendor("onnxruntime", "sartor")
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    understood = program.understood()
    with tempfile.TemporaryDirectory(prefix="sartor-calibrate-") as folder, quiet():
        model = understood.save(Path(folder) / "model.onnx")
        try:
            calibrator = create_calibrator(
                model,
                calibrate_method=CalibrationMethod[_METHODS[method]],
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                use_external_data_format=understood.serialised_bytes() > SINGLE_FILE_BYTES,
                extra_options={"symmetric": False, "num_bins": _BINS[method]},
            )
            if method != "minmax":
                calibrator.tensors_to_calibrate -= set(without)
            for inputs in data:
                # One batch at a time: a calibrator keeps every activation of a call until the call ends.
                calibrator.collect_data(_One(inputs))
            return calibrator.compute_data()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
            raise BackendError(f"ONNX Runtime could not calibrate the program: {lines[0][:500]}") from error


def unusable(program: Program, ranges: Any) -> Mapping[str, str]:
    """Values whose range no scale can stand for, or that have none, and why."""
    known = set(ranges.keys()) | set(program.initializers)
    found = {
        name: f"no range of '{name}' was found"
        for name, kind in program.types().items()
        if kind.name == "FLOAT" and name not in known
    }
    for name, data in ranges.items():
        low, high = (float(np.asarray(bound).reshape(-1)[0]) for bound in data.range_value)
        if not (np.isfinite(low) and np.isfinite(high)):
            found[name] = f"the range of '{name}' is [{low:.4g}, {high:.4g}], which is not finite"
        elif max(-low, high) > LARGEST:
            found[name] = (
                f"the range of '{name}' is [{low:.4g}, {high:.4g}]: such numbers mask others, and one step of 8 "
                "bits between them would be larger than all that is not masked"
            )
    return found


LARGEST = 1e6
"""Larger activations are attention masks or the like."""
