"""What recovery is told, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sartor.errors import UsageError
from sartor.ir.program import Program

TEACHERS = ("always", "never", "wrong")
"""When the original is asked."""
PRECISIONS = ("f32", "bf16")
"""In which layers compute while training."""
GAMMA = 0.5
"""First size of resolution-adaptive training, as a share of the last (5.16); inferred from the source's tables."""


@dataclasses.dataclass(frozen=True)
class RecoveryOptions:
    """How to train; the defaults suit fine-tuning after a cut.

    Attributes:
        learning_rate: Adam's peak rate.
        temperature: of the softened class scores.
        teacher: when the original is asked: `always`; `never`, which trains on labels or a loss alone; or `wrong`,
            about the samples of a step that the program misclassifies (needs class labels).
        label_weight: weight of the loss against labels; None for 0.5 where the original is always asked, else 1.
        features: weight of the distance between attention maps of blocks (`sartor.recovery.features`).
        mask_weight: weight of the share of units that masks keep (`insert-masks`), where there are masks.
        rat: begin with images of this share of their size, and let it grow (resolution-adaptive training); `GAMMA` is
            the source's. None for the full size throughout.
        precision: of the program's layers in training: `f32`, or `bf16` where torch deems that safe. Weights,
            losses and judgements stay float32.
        max_steps: stop after this many steps; the schedule then depends on steps only.
    """

    learning_rate: float = 1e-3
    temperature: float = 2.0
    teacher: str = "always"
    label_weight: float | None = None
    features: float = 0.0
    mask_weight: float = 1.0
    rat: float | None = None
    precision: str = "f32"
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"Recovery option '{name}' is {getattr(self, name)}; it must be above 0.")
        for name, known in (("teacher", TEACHERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"Recovery option '{name}' is '{getattr(self, name)}'; it must be one of {', '.join(known)}."
                )
        for name in ("label_weight", "mask_weight", "features"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"Recovery option '{name}' is {value}; it must be at least 0.")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"Recovery option 'max_steps' is {self.max_steps}; it must be at least 1.")
        if self.rat is not None and not 0 < self.rat <= 1:
            raise UsageError(f"Recovery option 'rat' is {self.rat}; it must be above 0 and at most 1.")
        if self.features and self.teacher == "never":
            raise UsageError(
                "Recovery option 'features' compares with the original, which teacher 'never' does not ask; leave one "
                "of them away."
            )

    @property
    def weight_of_labels(self) -> float:
        """`label_weight`, or what stands for None."""
        if self.label_weight is not None:
            return self.label_weight
        return 0.5 if self.teacher == "always" else 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class RecoveryResult:
    """What came out.

    Attributes:
        program: the program with the best weights seen.
        steps: optimizer steps taken.
        seconds: wall time, resumed parts included.
        history: one entry per judgement: `step`, `seconds`, `phase` (start, statistics, training, final),
            `distance` (on a fixed sample, lower is better: to the original, or the loss against labels where
            it is not always asked), `kept`; `score` with an `evaluate`; `loss` and `learning_rate` while training.
        notes: what was done otherwise than asked, and why.
        method: what was done, in a word or two: distillation or fine-tuning.
        asked: samples that the original was run on.
        sizes: steps by height of the images, where it changed.
        training_macs: of a sample in a step, forward and backward, the mean over all steps; where sizes changed.
    """

    program: Program
    steps: int
    seconds: float
    history: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    method: str = "distillation"
    asked: int = 0
    sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    training_macs: int | None = None
