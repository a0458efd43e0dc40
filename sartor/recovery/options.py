"""What recovery is told, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sartor.errors import UsageError
from sartor.ir.program import Program


@dataclasses.dataclass(frozen=True)
class RecoveryOptions:
    """How to train; the defaults suit fine-tuning after a cut.

    Attributes:
        learning_rate: Adam's peak rate.
        temperature: of the softened class scores.
        label_weight: weight of the loss against labels beside distillation.
        mask_weight: weight of the share of units that masks keep (`insert-masks`), where there are masks.
        max_steps: stop after this many steps; the schedule then depends on steps only.
    """

    learning_rate: float = 1e-3
    temperature: float = 2.0
    label_weight: float = 0.5
    mask_weight: float = 1.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"Recovery option '{name}' is {getattr(self, name)}; it must be above 0.")
        if min(self.label_weight, self.mask_weight) < 0 or (
            self.max_steps is not None and self.max_steps < 1
        ):
            raise UsageError(
                "Recovery needs a label_weight and a mask_weight of at least 0 and max_steps of at least 1."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class RecoveryResult:
    """What came out.

    Attributes:
        program: the program with the best weights seen.
        steps: optimizer steps taken.
        seconds: wall time, resumed parts included.
        history: one entry per judgement: `step`, `seconds`, `phase` (start, statistics, training, final),
            `distance` (to the original on a fixed sample, lower is better), `kept`; `score` with an
            `evaluate`; `loss` and `learning_rate` while training.
        notes: what was done otherwise than asked, and why.
    """

    program: Program
    steps: int
    seconds: float
    history: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
