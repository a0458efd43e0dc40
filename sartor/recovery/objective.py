"""What training makes smaller: the distance from the original, from labels, and what masks keep.

    teacher always:  D(student, original) + w · L(student, labels)
    teacher wrong:   D(student, original) over misclassified samples + w · L(student, labels)
    teacher never:   w · L(student, labels)

with w = `label_weight`, plus `features` times the distance of attention maps on the samples that the original is asked
about, plus `mask_weight` times the share of units that masks keep, where there are masks. In the
second line the original is asked about no other sample than those: the first term is equation (7.3), the sum (7.4)
without its early exits. D differs from the source's cross-entropy by the original's own entropy, which has no gradient.

Reference: query-efficient distillation, METHODS.md, self-distillation (7.3), (7.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.recovery import losses
from sartor.recovery.features import attention_loss
from sartor.recovery.losses import Outputs
from sartor.recovery.masks import kept_share
from sartor.recovery.options import RecoveryOptions
from sartor.recovery.samples import Batch, labels_of
from sartor.recovery.teacher import Teacher


class Objective:
    """The loss of a step, and the distance by which states of the program are compared.

    Args:
        program: in training.
        options: weights, temperature and when the original is asked.
        loss: of the data, in place of the loss against labels.
        teacher: the original; None where it is never asked.
        masks: in the program.

    Attributes:
        use_labels: whether the data have labels that fit.
        notes: what was done otherwise than asked, and why.
    """

    def __init__(
        self,
        program: Program,
        options: RecoveryOptions,
        loss: Callable[..., Any] | None,
        teacher: Teacher | None,
        masks: Sequence[Tensor],
    ):
        self.options, self.loss, self.teacher, self.masks = options, loss, teacher, masks
        self.probabilities = losses.probability_outputs(program)
        self._names = [value.name or "" for value in program.graph.outputs]
        self.notes: list[str] = []
        self.use_labels = True

    def check(self, outputs: Outputs, batch: Batch) -> None:
        """See on a first batch whether its labels can be used.

        Args:
            outputs: of the student, or where there are any, of the original.
            batch: that they belong to.

        Raises:
            UsageError: labels are needed, and there are none, or they do not fit.
        """
        if self.options.teacher == "wrong":
            _require_classes(outputs, batch.labels)
        if self.loss is not None:
            return
        reason = "there are none"
        self.use_labels = batch.labels is not None
        if batch.labels is not None:
            try:
                losses.label_loss(outputs, batch.labels, self.probabilities)
            except UsageError as error:
                reason, self.use_labels = str(error), False
                self.notes.append(f"labels were not used: {error}")
        if self.options.teacher == "never" and not self.use_labels:
            raise UsageError(
                f"Recovery with teacher 'never' needs labels on all training data, or a loss, but {reason}. Give "
                "them with the data, or use teacher 'always'."
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss of a step; may ask the original.

        Args:
            outputs: of the student, with its attention maps.
            batch: that they belong to.
        """
        parts = [self._taught(outputs, batch), self._closed(), self._labelled(outputs, batch)]
        if parts[2] is not None:
            parts[2] = self.options.weight_of_labels * parts[2]
        return _sum(parts)

    def distance(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What is compared between states: from the original, or from labels where it is not always asked."""
        always = self.options.teacher == "always"
        taught = self._taught(outputs, batch) if always else self._labelled(outputs, batch)
        return _sum([taught, self._closed()])

    def _taught(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        if self.teacher is None:
            return None
        which = None
        if self.options.teacher == "wrong" and batch.labels is not None:
            self.teacher.meet(batch)
            which = losses.misclassified(outputs, batch.labels)
            if not bool(which.any()):
                return None
            outputs = {name: output[which] for name, output in outputs.items()}
        answers = self.teacher(batch, which)
        final = {name: answers[name] for name in self._names}
        value = losses.distillation_loss(outputs, final, self.options.temperature, self.probabilities)
        maps = {name: answer for name, answer in answers.items() if name not in final and name in outputs}
        return value + self.options.features * attention_loss(outputs, maps) if maps else value

    def _labelled(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        if self.loss is not None:
            given = {name: outputs[name] for name in self._names}
            return losses.checked(self.loss(given, batch.labels))
        if not self.use_labels or batch.labels is None:
            if self.options.teacher != "always":
                raise UsageError(
                    "A batch of the training data has no labels, unlike the first; give labels with all of them."
                )
            return None
        return losses.label_loss(outputs, batch.labels, self.probabilities)

    def _closed(self) -> Tensor | None:
        return self.options.mask_weight * kept_share(self.masks) if self.masks else None


def require_labels(
    program: Program, options: RecoveryOptions, labels: np.ndarray | None, loss: Callable[..., Any] | None
) -> None:
    """Refuse options whose labels are missing or do not fit, without running anything.

    Args:
        program: whose first output labels belong to.
        options: of the recovery.
        labels: of a first batch of training data, or None.
        loss: of the data, or None.

    Raises:
        UsageError: as `Objective.check`.
    """
    shapes = program.shapes()
    outputs = {v.name or "": torch.zeros(1, *shapes[v.name or ""][1:]) for v in program.graph.outputs}
    first = None if labels is None else labels_of(labels[:1])
    Objective(program, options, loss, None, []).check(outputs, Batch([], first, 1))


def _sum(parts: Sequence[Tensor | None]) -> Tensor:
    found = [part for part in parts if part is not None]
    value = found[0]
    for part in found[1:]:
        value = value + part
    return value


def _require_classes(outputs: Outputs, labels: Tensor | None) -> None:
    name, output = next(iter(outputs.items()))
    ids = labels is not None and not labels.is_floating_point() and labels.numel() == len(labels)
    if ids and losses.is_classification(output):
        return
    found = "no labels" if labels is None else f"labels of shape {list(labels.shape)} and type {labels.dtype}"
    raise UsageError(
        f"Recovery with teacher 'wrong' asks the original about misclassified samples only and needs one class id "
        f"per sample for scores [N, C], but output '{name}' has shape {list(output.shape)} and the training data "
        f"have {found}. Use teacher 'always'."
    )
