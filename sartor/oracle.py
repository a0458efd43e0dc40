"""The oracle of pruning: the pruned program computes what MASKED computes, or the run stops.

Both are compared on weights that are randomised so that the variance of activations is preserved (a
fresh BatchNorm hides errors), before a final Softmax (it hides everything), in float64 on the FX twin
and in float32 as the target runs it. A check that could not have failed is no check: each narrowed
group must have a kept unit whose change by 10 % moves the output by more than 100 times the tolerance,
otherwise the verdict is `inconclusive`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.backends.precision import precision_of
from sartor.comparison import relative_error, seen
from sartor.conditions import cases, decisive, force, gates, groups_in
from sartor.errors import InternalError, ModelError, VerificationError
from sartor.falsifiability import insensitive, with_gradients
from sartor.ir.branches import BRANCHES, branch, is_choice
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.cleanup import cast_to
from sartor.ir.files import write_atomic
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan, at_plan_size
from sartor.random_weights import randomise

TOLERANCE_F64, TOLERANCE_GROWN = 1e-9, 1e-6
"""Relative error in float64; of a plan that widens groups more, because what reads copies is divided and rounded."""
LOWERED_TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "int8": 5e-2}
"""Relative error of an artifact against the float64 reference, by the coarsest type it computes in."""
_PRECISION = ("Cast", "QuantizeLinear", "DequantizeLinear")
KINDS = ("normal", "positive", "normal", "zeros")
"""Inputs of each attempt. One is enough, unless a narrow layer is dead behind its ReLU in this draw of weights, or the
model makes no numbers of such inputs: the logarithm of a negative one, an index out of range."""


@dataclasses.dataclass(frozen=True)
class OracleResult:
    """What the oracle saw.

    Attributes:
        verdict: `passed`, `failed` or `inconclusive`.
        max_rel_error: max|a − b| / max|a| in float64.
        tolerance: of `max_rel_error`.
        lowered_rel_error: the same in float32 on the target; absent when no target was given.
        lowered_tolerance: of `lowered_rel_error`.
        insensitive: groups and blocks whose change the output did not show.
    """

    verdict: str
    max_rel_error: float
    tolerance: float
    lowered_rel_error: float | None
    lowered_tolerance: float
    insensitive: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        document = dataclasses.asdict(self)
        document["insensitive"] = list(self.insensitive)
        if self.lowered_rel_error is None:
            del document["lowered_rel_error"]
        return document


def check(
    program: Program,
    plan: Plan,
    *,
    analysis: ChannelAnalysis | None = None,
    target: str | None = None,
    threads: int = 1,
    seed: int = 0,
    tolerance: float | None = None,
) -> OracleResult:
    """Compare the pruned program with MASKED on randomised weights.

    Args:
        program: the canonical original.
        plan: what to remove.
        analysis: channel groups of `program`, if they are at hand.
        target: also compare both as this backend lowers and runs them, in subprocesses.
        threads: of that backend.
        seed: of weights and inputs.
        tolerance: relative, in float64; by default `TOLERANCE_F64`, or `TOLERANCE_GROWN`.

    Raises:
        PlanError: the plan is not legal.
    """
    if tolerance is None:
        tolerance = TOLERANCE_GROWN if plan.widened else TOLERANCE_F64
    if plan.sizes or plan.replaces_layers:  # proven is what zeros can say, at the plan's size
        program, plan = at_plan_size(program, plan.without_replacements())
        analysis = None
    analysis = analysis or channel_groups(program)
    worst: OracleResult | None = None
    unfit: ModelError | None = None
    for attempt in range(len(KINDS)):
        kind = KINDS[attempt]
        try:
            original = before_softmax(randomise(program, analysis, seed + attempt, kind=kind))
            result = compare(
                original,
                before_softmax(apply_plan(original, plan, analysis)),
                before_softmax(masked(original, plan, analysis)[0]),
                plan,
                analysis=analysis,
                target=target if worst is None else None,
                threads=threads,
                seed=seed + attempt,
                tolerance=tolerance,
                kind=kind,
            )
        except ModelError as error:  # the model refuses these inputs
            unfit = unfit or error
            continue
        worst = result if worst is None else _both(worst, result)
        if worst.verdict != "inconclusive":
            break
    if worst is None:
        raise unfit or InternalError("The oracle made no attempt.")
    return worst


def _both(one: OracleResult, other: OracleResult) -> OracleResult:
    """Two draws of weights together: errors are the worst, and what either draw shows is shown."""
    insensitive = tuple(name for name in one.insensitive if name in other.insensitive)
    failed = "failed" in (one.verdict, other.verdict)
    return dataclasses.replace(
        one,
        verdict="failed" if failed else "inconclusive" if insensitive else "passed",
        max_rel_error=max(one.max_rel_error, other.max_rel_error),
        insensitive=insensitive,
    )


def compare(
    original: Program,
    pruned: Program,
    mask: Program,
    plan: Plan,
    *,
    analysis: ChannelAnalysis,
    target: str | None = None,
    threads: int = 1,
    seed: int = 0,
    tolerance: float = TOLERANCE_F64,
    kind: str = "normal",
) -> OracleResult:
    """Compare given programs; `check` builds them from a plan. Planted bugs are tested through this.

    Where an `If` depends on data, once for every case of `sartor.conditions`, which together take each branch.
    """
    from sartor.ir.batch import random_inputs
    from sartor.ir.fx import run_twin

    inputs = random_inputs(original, seed=seed, kind=kind)
    small = run_twin(pruned, inputs)
    forced = cases(mask)
    if forced:
        results, unseen, shown, readers = [], set(plan.groups), decisive(pruned), gates(analysis)
        for case in forced:
            here = groups_in(readers, mask, case)
            unseen -= here
            results.append(
                compare(
                    force(original, case, shown),
                    force(pruned, case, shown),
                    force(mask, case, shown),
                    dataclasses.replace(plan, groups={k: v for k, v in plan.groups.items() if k in here}),
                    analysis=analysis,
                    target=target,
                    threads=threads,
                    seed=seed,
                    tolerance=tolerance,
                    kind=kind,
                )
            )
        return _all_cases(results, relative_error(seen(run_twin(mask, inputs)), small), plan, unseen)
    large, gradients = with_gradients(mask, plan, analysis, inputs)
    error = relative_error(seen(large), small)
    lowered = None
    if target is not None:
        at, small_at = (_run_lowered(p, inputs, target, threads) for p in (mask, pruned))
        lowered = relative_error(seen(at), small_at)
    hidden = insensitive(original, mask, pruned, plan, analysis, gradients, inputs, large, tolerance)
    limit = lowered_tolerance(original)
    wrong = not error <= tolerance or (lowered is not None and not lowered <= limit)
    verdict = "failed" if wrong else "inconclusive" if hidden else "passed"
    return OracleResult(verdict, error, tolerance, lowered, limit, hidden)


def _all_cases(results: Sequence[OracleResult], error: float, plan: Plan, unseen: set[str]) -> OracleResult:
    """Every branch together: errors are the worst, `error` of the conditions as they are among them.

    A group must show in every case that computes with it (those in `unseen` have none), a block in some case.
    """
    worst = max(error, *(r.max_rel_error for r in results))
    lowered = max((r.lowered_rel_error for r in results if r.lowered_rel_error is not None), default=None)
    hidden = unseen | {n for r in results for n in r.insensitive if n in plan.groups}
    hidden |= set.intersection(*(set(r.insensitive) for r in results))
    insensitive = tuple(sorted(hidden))
    failed = not worst <= results[0].tolerance or any(r.verdict == "failed" for r in results)
    verdict = "failed" if failed else "inconclusive" if insensitive else "passed"
    return dataclasses.replace(
        results[0],
        verdict=verdict,
        max_rel_error=worst,
        lowered_rel_error=lowered,
        insensitive=insensitive,
    )


def lowered_tolerance(program: Program, precision: str = "f32") -> float:
    """Tolerance of `program` lowered to `precision`, or as it is where its own floats are coarser."""
    own = {"FLOAT16": "f16", "BFLOAT16": "bf16"}
    coarse = {own.get(dtype.name, "f32") for dtype in program.types().values()}
    return max(LOWERED_TOLERANCE.get(name, 1e-4) for name in {precision, *coarse})


def require(result: OracleResult, program: Program, plan: Plan, folder: Path | None) -> None:
    """Stop the run unless the oracle passed; a reproducer (model and plan) is left in `folder`.

    Raises:
        VerificationError: the verdict is not `passed`.
    """
    if result.verdict == "passed":
        return
    note = ""
    if folder is not None:
        # The plan names the model beside it, not the file that this one was made from.
        own = dataclasses.replace(plan, source_sha256=program.sha256())
        program.save(folder / "model.onnx")
        write_atomic(folder / "plan.json", own.to_json().encode())
        note = f" Reproduce it with the model and plan in '{folder}'."
    if result.verdict == "failed":
        raise VerificationError(
            f"The pruned program differs from MASKED by {result.max_rel_error:.3g} (float64, tolerance "
            f"{result.tolerance:.0e}; lowered {result.lowered_rel_error}, tolerance {result.lowered_tolerance:.0e})."
            f"{note}"
        )
    raise VerificationError(
        f"The oracle is inconclusive: a change of {', '.join(result.insensitive[:5])} does not reach the output, "
        f"so that an error there would not be seen. Protect it with --keep.{note}"
    )


# ---- parts -----------------------------------------------------------------------------------


def before_softmax(program: Program) -> Program:
    """The program with the input of a final Softmax as the output, in place of what hides differences."""
    clone = program.clone()
    if not any([_cut(clone.graph, index) for index in range(len(clone.graph.outputs))]):
        return program
    clone.invalidate()
    return clone


def _cut(graph: ir.Graph, index: int) -> bool:
    """Give the input of a final Softmax in its place; both branches of an `If` may end in one.

    Casts and quantization between it and the output go with it; the output keeps its element type.
    """
    output = graph.outputs[index]
    node = output.producer()
    between: set[str] = set()
    while (
        node is not None and node.graph is graph and node.op_type in _PRECISION and node.inputs[0] is not None
    ):
        between.add(node.op_type)
        node = node.inputs[0].producer()
    if node is None or node.graph is not graph:
        return False
    if is_choice(node) and not between and not output.uses():
        return any([_cut(branch(node, key), node.outputs.index(output)) for key in BRANCHES])
    source = node.inputs[0] if node.op_type in ("Softmax", "LogSoftmax") else None
    maker = source.producer() if source is not None else None
    if source is None or maker is None or maker.graph is not graph or source.is_graph_output():
        return False
    if between and (output.dtype is None or not output.dtype.is_floating_point()):
        return False
    if "Cast" in between and output.dtype is not None:
        source = cast_to(source, output.dtype)
    source.type, source.shape = output.type, output.shape
    graph.outputs[index] = source
    return True


def _run_lowered(
    program: Program, inputs: Mapping[str, np.ndarray], target: str, threads: int
) -> dict[str, np.ndarray]:
    from sartor.backends import isolation
    from sartor.backends.protocol import TargetOptions

    options = TargetOptions(threads=threads, precision=precision_of(program))
    with tempfile.TemporaryDirectory(prefix="sartor-oracle-") as folder:
        artifact = isolation.lower(target, program.understood(), Path(folder) / "lowered", options)
        with isolation.Session(artifact, options) as session:
            return session.run(inputs)


__all__ = ["OracleResult", "check", "compare", "randomise", "relative_error", "require"]
