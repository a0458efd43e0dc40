"""How far a backend's outputs may be from the reference, and how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.conformance.check import Failed

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds on the error of an output, relative to its own size.

    Attributes:
        largest: of max |a - b| / max |a|.
        typical: of the root mean square of a - b by that of a.
    """

    largest: float
    typical: float


TOLERANCES: Mapping[str, Tolerance] = {
    # Float32 sums of a few hundred terms are off by 1e-6; kernels in another order and fast exponentials by 1e-5.
    "f32": Tolerance(1e-4, 3e-5),
    # 11 bits: 5e-4 per operation, over the fifty operations of the largest network.
    "f16": Tolerance(2e-2, 1e-2),
    # 8 bits: 4e-3 per operation.
    "bf16": Tolerance(6e-2, 4e-2),
    # A value on the border between two steps of 1/255 may round either way, and the next layers see that.
    "int8": Tolerance(6e-2, 3e-2),
}

SHALLOW: Mapping[str, Tolerance] = {
    **TOLERANCES,
    # Input, weights, sum and output are rounded once each.
    "f16": Tolerance(2e-3, 1e-3),
}
"""For models of a few layers. Those of int8 are held to steps as well: see `compare_steps`."""

MOST_STEPS = 1
"""Two roundings of the same number on the border between two steps."""
MEAN_STEPS = 0.1
"""Such borders are rare. Truncation, down or to zero, is half a step off on average, another zero point one."""


def compare(
    expected: Mapping[str, np.ndarray],
    actual: Mapping[str, np.ndarray],
    precision: str,
    *,
    shallow: bool = False,
) -> str:
    """Observation of outputs that agree.

    Args:
        expected: from the FX twin in float64.
        actual: from the backend.
        precision: selects the tolerance.
        shallow: the model has a few layers only.

    Raises:
        Failed: other names, other shapes, a value that is not finite, or an error above the tolerance; says
            which output, where, and whether a rearrangement of the axes would explain it.
    """
    bound = (SHALLOW if shallow else TOLERANCES)[precision]
    if set(actual) != set(expected):
        raise Failed(f"Outputs are {sorted(actual)}; expected {sorted(expected)}.")
    largest = typical = 0.0
    for name, wanted in expected.items():
        found = np.asarray(actual[name])
        if found.shape != wanted.shape:
            raise Failed(f"Output '{name}' has shape {list(found.shape)}; expected {list(wanted.shape)}.")
        found = found.astype(np.float64)
        if not np.isfinite(found).all():
            raise Failed(
                f"Output '{name}' has {int((~np.isfinite(found)).sum())} values that are not finite."
            )
        error = relative_error(wanted, found)
        if error.largest > bound.largest or error.typical > bound.typical:
            place = np.unravel_index(int(np.abs(found - wanted).argmax()), wanted.shape)
            raise Failed(
                f"Output '{name}' is off by {error.largest:.2g} of its largest value (root mean square "
                f"{error.typical:.2g}); allowed {bound.largest:g} ({bound.typical:g}). Worst at "
                f"{[int(i) for i in place]}: {found[place]:.6g} where {wanted[place]:.6g} is right."
                f"{_explanation(wanted, found, bound)}"
            )
        largest, typical = max(largest, error.largest), max(typical, error.typical)
    return f"largest error {largest:.1e} of {bound.largest:g}, root mean square {typical:.1e} of {bound.typical:g}"


def compare_steps(runs: Sequence[tuple[Arrays, Arrays]], steps: Mapping[str, float]) -> str:
    """Observation of quantized outputs of a few layers that agree to the step.

    Args:
        runs: expected and actual outputs of each run; taken together, because an output may have six values.
        steps: scale of each output.

    Raises:
        Failed: a value is more than a step off, or too many are a step off.
    """
    most = mean = 0.0
    for name, step in steps.items():
        off = np.concatenate(
            [
                ((np.asarray(actual[name], np.float64) - expected[name]) / step).ravel()
                for expected, actual in runs
            ]
        )
        most, mean = max(most, float(np.abs(off).max())), max(mean, float(np.abs(off).mean()))
        told = f"Output '{name}', quantized in steps of {step:.4g}, is off by"
        if most > MOST_STEPS + 0.01:  # float32 multiplies the step
            wrong = int((np.abs(off) > MOST_STEPS + 0.01).sum())
            raise Failed(
                f"{told} up to {most:.3g} steps ({wrong} of {off.size} values by more than {MOST_STEPS}); allowed: "
                f"{MOST_STEPS}."
            )
        if mean > MEAN_STEPS:
            raise Failed(
                f"{told} {mean:.2f} steps on average over {off.size} values ({off.mean():+.2f} with the sign); "
                f"allowed: {MEAN_STEPS}. Truncation, or another zero point, would explain it; round half to even."
            )
    return f"at most {most:.0f} steps off, {mean:.2f} on average"


def relative_error(expected: np.ndarray, actual: np.ndarray) -> Tolerance:
    """The error of one output in both measures; infinite where everything should be zero and is not."""
    difference = np.abs(actual - expected)
    size = float(np.abs(expected).max(initial=0.0))
    if size == 0.0:
        off = 0.0 if float(difference.max(initial=0.0)) == 0.0 else float("inf")
        return Tolerance(off, off)
    spread = float(np.sqrt(np.square(expected).mean()))
    return Tolerance(float(difference.max()) / size, float(np.sqrt(np.square(difference).mean())) / spread)


def _explanation(expected: np.ndarray, actual: np.ndarray, bound: Tolerance) -> str:
    """A likely cause: the right values in another order along one axis."""
    for axis in range(expected.ndim):
        error = relative_error(np.sort(expected, axis), np.sort(actual, axis))
        if error.largest <= bound.largest:
            return f" The values are right, their order along axis {axis} is not."
    return ""
