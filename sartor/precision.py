"""A program in the precision that it is to be lowered in: quantized, cast, or as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.precision import precision_of

if TYPE_CHECKING:
    from sartor.backends.protocol import TargetOptions
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.passes.base import Context, Refusal

_PASSES = {"int8": "fold-batch-norm,quantize", "f16": "cast"}


def own_precision(program: Program, precision: str) -> str:
    """The precision of the program before `in_precision`: what its baseline without loss computes in."""
    return precision if precision not in _PASSES else precision_of(program)


def require_legal(target: str, program: Program, options: TargetOptions) -> None:
    """Refuse a program that its target cannot take, before it is calibrated or cast.

    Which nodes stay in float32 is not known before; what is refused breaks a rule in float32 and in the precision.
    The program as it is written is checked again when it is lowered.

    Args:
        target: registered backend.
        program: as for `in_precision`.
        options: threads, precision and shapes of the artifact.

    Raises:
        UsageError: the target's package is not installed, or it does not have the precision.
        BackendError: the program breaks a rule; the others that it breaks are notes.
    """
    from sartor import backends, errors
    from sartor.backends import legality
    from sartor.backends.protocol import LegalityReport

    backend = backends.get(target)
    backend.capabilities()
    broken = []
    for form in _forms(program, options.precision):
        try:
            broken.append(backend.legality(form, options).violations)
        except errors.BackendError:  # a legalisation that refuses this form; the written one may be another
            return
    sure = set.intersection(*({(f.node, f.rule) for f in findings} for findings in broken))
    found = tuple(finding for finding in broken[0] if (finding.node, finding.rule) in sure)
    legality.require_legal(target, LegalityReport(found))


def _forms(program: Program, precision: str) -> list[Program]:
    """The program as it is, and as it would be if every node that may be written in the precision were."""
    own = own_precision(program, precision)
    if own == precision or own != "f32":
        return [program]
    from sartor.passes import cast, quantize
    from sartor.passes.fold_batch_norm import FoldBatchNorm
    from sartor.quantization import placement

    if precision == "f16":
        return [program, cast.Cast().replay(program, cast.everywhere(program)).program]
    folded = FoldBatchNorm().run(program).program
    return [folded, quantize.Quantize().replay(folded, placement.everywhere(folded)).program]


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
