"""What a fit asks before it recovers, how it begins, and what it says of the data that it trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.workbench import FitOptions


def require_recovery(program: Program, options: FitOptions, data: Data) -> None:
    """Refuse a recovery that could not begin, before anything is searched.

    Raises:
        UsageError: options that do not go together, or labels that are needed and do not fit.
    """
    from sartor.recovery.objective import require_labels
    from sartor.recovery.options import RecoveryOptions

    labels = (data.train or data.calibration).first()[1]
    require_labels(program, RecoveryOptions(**options.recovery), labels, data.loss)


_TRIAL, _MOST = 8, 256  # samples
_SHARE = 0.25  # of the time of recovery


def repaired(
    pruned: Program,
    original: Program,
    data: Data,
    seconds: float,
    seed: int,
    evaluate: Callable[[Any], float],
) -> tuple[Program, str]:
    """Where training begins: the pruned network, or what least squares make of it where that scores better.

    A few samples say how many fit into a quarter of the time.

    Args:
        pruned: the network after its plan.
        original: the network before.
        data: whose calibration split is looked at.
        seconds: of the whole recovery.
        seed: of the choice of positions.
        evaluate: score of a predictor.

    Returns:
        The network, and what was found, in words; empty where nothing can be repaired.
    """
    from sartor.passes.base import Context
    from sartor.passes.repair import Repair
    from sartor.recovery.twins import predictor

    context = Context(data={"calibration": data.calibration}, original=original)
    start = time.perf_counter()
    try:
        found = Repair(samples=_TRIAL, seed=seed).run(pruned, context)
        if not found.modified:
            return pruned, ""
        took_s = time.perf_counter() - start
        samples = min(int(_TRIAL * (_SHARE * seconds / took_s - 1.0)), _MOST)
        if samples < _TRIAL:
            return pruned, f"layers were not repaired by least squares: {_TRIAL} samples take {took_s:.1f} s"
        if samples > _TRIAL:
            found = Repair(samples=samples, seed=seed).run(pruned, context)
    except SartorError as error:
        return pruned, f"layers were not repaired by least squares: {error}"
    before, after = evaluate(predictor(pruned)), evaluate(predictor(found.program))
    said = f"least squares on {samples} samples take the score on 'evaluate' from {before:.1%} to {after:.1%}"
    return (found.program, said) if after >= before else (pruned, f"{said}: not taken")


def what_was_trained_on(data: Data) -> str:
    """The decision that a source without `train` leads to."""
    if data.calibration is not data.evaluate:
        return "recovery trained on 'calibration': there is no 'train'"
    if not data.test_is_evaluate:
        return "recovery trained on 'evaluate', on which selection judges: there is no 'train'"
    return (
        "WARNING: recovery trained on the samples that are scored, so the score says little about any others: the "
        "data have only 'evaluate'; give 'train' and 'test'"
    )
