"""The oracle of exact foreign passes: the same outputs, with the program's weights and with random ones.

The foreign code also runs on copies with random weights, because trained weights hide errors: a bias that
is zero can be dropped unseen. Outputs are compared in float64 on the FX twin, and again before a final
Softmax. Where every weight survives bit for bit the tolerance is 1e-9; a pass that computes new weights
does so in the program's own float32, and is allowed that rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from sartor.errors import SartorError, VerificationError
from sartor.ir.channels import channel_groups
from sartor.ir.program import Program

TOLERANCE = 1e-9
TOLERANCE_NEW_WEIGHTS = 1e-5
SENSITIVITY = 100.0
DRAWS = 2
BATCH = 2


def require_same_function(
    name: str, before: Program, after: Program, again: Callable[[Program], Program]
) -> None:
    """Compare a program with what an exact pass made of it.

    Args:
        name: of the pass.
        before: its input.
        after: its result.
        again: runs the pass on another program of the same graph.

    Raises:
        VerificationError: outputs differ, or would not have shown a difference.
    """
    from sartor.random_weights import randomise

    analysis = channel_groups(before)
    references: list[list[np.ndarray]] = []
    for seed in range(DRAWS):
        drawn = randomise(before, analysis, seed)
        references.append(_require_close(name, drawn, again(drawn), seed, "random weights"))
    spread = _difference(*references)
    if not spread > SENSITIVITY * TOLERANCE_NEW_WEIGHTS:
        raise VerificationError(
            f"Pass '{name}' cannot be shown to be exact: the outputs hardly depend on weights and inputs (they differ "
            f"by {spread:.3g} between two draws). Declare another semantics, or compare a larger part of the model."
        )
    _require_close(name, before, after, DRAWS, "its own weights")


def _require_close(name: str, before: Program, after: Program, seed: int, which: str) -> list[np.ndarray]:
    """Compare outputs; returns those of `before`."""
    from sartor.ir.batch import random_inputs
    from sartor.ir.fx import run_twin
    from sartor.oracle import before_softmax

    inputs = random_inputs(before, size=BATCH if before.batch.symbolic else None, seed=seed)
    tolerance = TOLERANCE if _weights(after) <= _weights(before) else TOLERANCE_NEW_WEIGHTS
    pairs = [(before, after)]
    cut = before_softmax(before), before_softmax(after)
    if cut[0] is not before and cut[1] is not after:
        pairs.append(cut)
    kept: list[np.ndarray] = []
    for one, other in pairs:
        try:
            results = [list(run_twin(p, inputs).values()) for p in (one, other)]
        except SartorError as error:
            raise VerificationError(
                f"Pass '{name}' cannot be shown to be exact: {error} Declare another semantics if that is intended."
            ) from error
        difference = _difference(*results)
        if not difference <= tolerance:
            raise VerificationError(
                f"Pass '{name}' is declared exact, but its outputs differ by {difference:.3g} (tolerance "
                f"{tolerance:.0e}, float64, {which}). Repair it, or declare it approximate."
            )
        kept = kept or results[0]
    return kept


def _weights(program: Program) -> set[tuple[tuple[int, ...], str]]:
    """Shapes and contents of all float initializers."""
    found = set()
    for name, value in program.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            array = program.initializer_array(name)
            found.add((array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()))
    return found


def _difference(ones: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Largest max|a − b| / max|a| over the outputs, in order; infinities and NaN must stand in the same places."""
    worst = 0.0 if len(ones) == len(others) else np.inf
    for a, b in zip(ones, others, strict=False):
        if a.shape != b.shape:
            return np.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
            return np.inf
        a, b = a[finite], b[finite]
        if a.size:
            scale, gap = float(np.abs(a).max()), float(np.abs(a - b).max())
            worst = max(worst, gap / scale if scale > 0 else (0.0 if gap == 0 else np.inf))
    return float(worst)
