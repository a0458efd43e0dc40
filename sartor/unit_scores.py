"""What steers a fit: the importance of every unit and block, by the best criterion that applies.

First-order gradients where there are data and gates for them, the norm of the weights otherwise; a fit says in
its decisions why. Only a model, or labels that a metric of the author's own gives their meaning, can make
gradients inapplicable: a loss that fails, or says nothing, is an error, because a search that ignores what it
was told to keep would end well and mean little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.data_sources import sample_count
from sartor.errors import UnsupportedOperatorError, UsageError
from sartor.strategies.criteria import criterion
from sartor.strategies.gates import gate_members
from sartor.strategies.importance import Importance, Subject, removable

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.workbench import Workbench

_SAMPLES = 1024


def unit_scores(bench: Workbench, analysis: Any, blocks: Sequence[Any]) -> tuple[Importance, list[str]]:
    """Scores of the original for a search; see `unit_scores_of`."""
    return unit_scores_of(bench, bench.program, analysis, blocks, {})


def unit_scores_of(
    bench: Workbench,
    program: Program,
    analysis: Any,
    blocks: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Importance, list[str]]:
    """Scores for a search, and lines that say which criterion they are of and why.

    Args:
        bench: data and seed.
        program: the original, or what a plan makes of it.
        analysis: its channel groups.
        blocks: its residual blocks.
        shapes: of its inputs where they are of another size than the data.

    Raises:
        UsageError: the data or its loss fail, or the loss has no usable gradient.
    """
    reason = _obstacle(bench, analysis, blocks)
    if not reason:
        assert bench.data is not None
        try:
            samples = Limited(bench.data.at(shapes).calibration)
            scores = criterion("taylor").unit_importance(
                Subject(program, analysis, blocks, samples, bench.data.loss, bench.options.seed)
            )
            reason = _defect(scores, bench.data)
        except UnsupportedOperatorError as error:  # the model has no twin to differentiate
            reason = str(error)
        if not reason:
            return scores, ["importance by criterion 'taylor'"]
    scores = criterion("l2").unit_importance(Subject(program, analysis, blocks, seed=bench.options.seed))
    return scores, [f"criterion 'taylor' does not apply: {reason}", "importance by criterion 'l2'"]


def _obstacle(bench: Workbench, analysis: Any, blocks: Sequence[Any]) -> str:
    """Why gradients of gates cannot score this model, as far as that is known before they are computed."""
    if bench.data is None:
        return "there are no data"
    if not bench.program.batch.symbolic:
        return f"the batch axis is fixed: {bench.program.batch.reason}"
    try:
        for group in analysis.groups:
            gate_members(analysis, group)
    except UsageError as error:
        return str(error)
    for block in removable(blocks):
        if not block.last_affine:
            return f"block '{block.name}' has no last affine layer to put a gate on"
    if bench.data.metric is not None and bench.data.loss is None:
        return _labels_misfit(bench, bench.data)
    return ""


def _labels_misfit(bench: Workbench, data: Data) -> str:
    """Why the built-in loss cannot read labels that were made for a metric of the author's own."""
    import torch

    from sartor.recovery import losses

    inputs, labels = data.calibration.first()
    if labels is None:
        return ""
    outputs = {name: torch.as_tensor(np.array(a)) for name, a in bench.reference.run(inputs).items()}
    try:
        losses.label_loss(outputs, torch.as_tensor(np.array(labels)))
    except UsageError as error:
        return str(error)
    return ""


def _defect(scores: Importance, data: Data) -> str:
    """Why scores rank nothing, or an empty text.

    Raises:
        UsageError: they do not, and it is the author's loss that made them.
    """
    values = [*(np.ravel(units) for units in scores.groups.values()), np.array([*scores.blocks.values()])]
    every = np.concatenate(values)
    if not np.isfinite(every).all():
        found = "NaN or infinite gradients"
    elif every.size and not every.any():
        found = "a gradient of 0 for every unit"
    else:
        return ""
    if data.loss is not None:
        raise UsageError(
            f"The loss of '{data.source}' has {found} on the calibration samples, so it cannot say what matters; "
            "return a finite loss that depends on the outputs."
        )
    return f"it gives {found} on the calibration samples"


class Limited:
    """The first `count` samples of a split, in whole batches, re-iterable."""

    def __init__(self, split: Any, count: int = _SAMPLES):
        self.split, self.count = split, count

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for inputs, labels in self.split:
            yield inputs, labels
            seen += sample_count(inputs)
            if seen >= self.count:
                return
