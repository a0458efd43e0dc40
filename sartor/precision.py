"""A program in the precision that it is to be lowered in: quantized, cast, or as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.precision import precision_of

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.passes.base import Context, Refusal

_PASSES = {"int8": "fold-batch-norm,quantize", "f16": "cast"}


def own_precision(program: Program, precision: str) -> str:
    """The precision of the program before `in_precision`: what its baseline without loss computes in."""
    return precision if precision not in _PASSES else precision_of(program)


def in_precision(
    program: Program,
    precision: str,
    data: Data | None = None,
    *,
    keep: tuple[str, ...] = (),
    seed: int = 0,
    max_drop: float | None = None,
) -> tuple[Program, tuple[Refusal, ...]]:
    """The program written in `precision`, and what stayed in float32 with the reasons.

    Args:
        program: canonical; returned as it is when it is written so already, or when the runtime sees to it.
        precision: as in `TargetOptions`.
        data: calibration data; int8 needs them.
        keep: globs of nodes and parameters that stay in float32.
        seed: of random inputs where there are no data.
        max_drop: of `quantize`: largest loss of score, points.

    Raises:
        UsageError: int8 without data, or with data that do not fit.
    """
    from sartor.passes.base import Context

    context = Context(seed=seed, keep=keep)
    if data is not None:
        splits = {"calibration": data.calibration, "evaluate": data.evaluate}
        context = Context(data=splits, loss=data.loss, metric=data.metric, seed=seed, keep=keep)
    return written_in(program, precision, context, max_drop=max_drop)


def written_in(
    program: Program, precision: str, context: Context, *, max_drop: float | None = None
) -> tuple[Program, tuple[Refusal, ...]]:
    """As `in_precision`, with what the passes look at."""
    if own_precision(program, precision) == precision:
        return program, ()
    from sartor.passes.pipeline import Pipeline

    text = _PASSES[precision]
    if precision == "int8" and max_drop is not None:
        text += f"{{max-drop={max_drop!r}}}"
    result = Pipeline.parse(text).run(program, context)
    return result.program, result.results[-1].result.refusals
