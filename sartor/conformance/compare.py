"""How far a backend's outputs may be from the reference, and how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sartor.conformance.check import Failed


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


def compare(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], precision: str) -> str:
    """Observation of outputs that agree.

    Args:
        expected: from the FX twin in float64.
        actual: from the backend.
        precision: selects the tolerance.

    Raises:
        Failed: other names, other shapes, a value that is not finite, or an error above the tolerance; says
            which output, where, and whether a rearrangement of the axes would explain it.
    """
    bound = TOLERANCES[precision]
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
