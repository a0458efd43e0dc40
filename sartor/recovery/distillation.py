"""Distillation and fine-tuning: train the twin of a cut program until it computes what the original computes.

Sequence: judge the start; re-estimate BatchNormalization statistics; train on the original's outputs (and on labels
where there are any; what is made smaller is in `sartor.recovery.objective`) under a cosine schedule that fits the
time; re-estimate statistics; keep the best state seen. Under a time budget the schedule follows the clock, and the
number of threads, the batch size and how many samples progress is judged on follow the speed of the machine, so two
runs may differ; with `max_steps` and time enough for them, all of it depends only on the seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.recovery.options import RecoveryOptions, RecoveryResult
from sartor.recovery.training import Training
from sartor.recovery.twins import Predict

__all__ = ["RecoveryOptions", "RecoveryResult", "distill"]


def distill(
    program: Program,
    original: Program,
    data: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray | None]],
    *,
    minutes: float,
    seed: int,
    loss: Callable[..., Any] | None = None,
    threads: int | None = None,
    progress: Callable[[float, str], None] | None = None,
    learning_rate: float | None = None,
    evaluate: Callable[[Predict], float] | None = None,
    checkpoint_dir: str | Path | None = None,
    options: RecoveryOptions | None = None,
) -> RecoveryResult:
    """Train `program` with `original` as its teacher; the result is never worse than the start.

    Args:
        program: the cut program; its graph stays as it is.
        original: the program before the cut, with the same inputs and outputs. Its inputs may have another size:
            data come at the original's, and the program sees them resized (`sartor.images`).
        data: training split: re-iterable of `(inputs, labels or None)`. Labels are class ids `[N, ...]`, rows
            of probabilities, or regression targets; see `sartor.recovery.losses.label_loss`.
        minutes: wall time for everything, evaluation included.
        seed: of the order of samples.
        loss: `(outputs by name, labels or None) -> mean over samples`, in place of the loss against labels.
        threads: of torch during the call; its setting by default.
        progress: called with the fraction done in [0, 1] and a line of text.
        learning_rate: short for `options.learning_rate`.
        evaluate: score of a predictor on the `evaluate` split, higher is better: it selects what is kept.
            Without it the distance to the original on a fixed training sample selects.
        checkpoint_dir: folder for a checkpoint after each judgement; a run with the same arguments resumes.
        options: see `RecoveryOptions`.

    Raises:
        UsageError: the batch axis is fixed, the signatures differ, data or options cannot be used, or labels are
            needed and there are none.
    """
    options = options or RecoveryOptions()
    if learning_rate is not None:
        options = dataclasses.replace(options, learning_rate=learning_rate)
    _check(program, original, minutes)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        training = Training(
            program, original, data, minutes * 60.0, seed, loss, progress, evaluate, folder, options
        )
        return training.execute()
    finally:
        torch.set_num_threads(before)


def _check(program: Program, original: Program, minutes: float) -> None:
    for what, each in (("program", program), ("original", original)):
        if not each.batch.symbolic:
            raise UsageError(
                f"Recovery needs a free batch axis, but the {what}'s is fixed: {each.batch.reason}. Use "
                "--recovery none, or export the model with a dynamic batch axis."
            )
    for kind in ("inputs", "outputs"):
        ours = [v.name for v in getattr(program.graph, kind)]
        theirs = [v.name for v in getattr(original.graph, kind)]
        if ours != theirs:
            raise UsageError(f"The program has {kind} {ours}, the original {theirs}; they must be the same.")
    if not (minutes > 0 and math.isfinite(minutes)):
        raise UsageError(
            f"Recovery was given {minutes} minutes; give a time above 0, or use --recovery none."
        )
