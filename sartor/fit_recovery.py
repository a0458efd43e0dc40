"""What a fit asks before it recovers, and what it says of the data that it trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
