"""The oracle of pruning: the pruned program computes what MASKED computes, or the run stops.

Both are compared on weights that are randomised so that the variance of activations is preserved (a
fresh BatchNorm hides errors), before a final Softmax (it hides everything), in float64 on the FX twin
and in float32 as the target runs it. A check that could not have failed is no check: each narrowed
group must have a kept unit whose change by 10 % moves the output by more than 100 times the tolerance,
otherwise the verdict is `inconclusive`.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import VerificationError
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.ir.workload import is_parameter
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.rewriter import Rewriter

TOLERANCE_F64 = 1e-9
TOLERANCE_F32 = 1e-4
SENSITIVITY = 100.0
PERTURBATION = 0.1
ATTEMPTS = 4
"""Draws of weights before a group counts as insensitive: in one draw a narrow layer may be dead behind its ReLU."""


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
    backend: Any = None,
    threads: int = 1,
    seed: int = 0,
    tolerance: float = TOLERANCE_F64,
) -> OracleResult:
    """Compare the pruned program with MASKED on randomised weights.

    Args:
        program: the canonical original.
        plan: what to remove.
        analysis: channel groups of `program`, if they are at hand.
        backend: also compare both as this backend lowers them to float32.
        threads: of that backend.
        seed: of weights and inputs.
        tolerance: relative, in float64.

    Raises:
        PlanError: the plan is not legal.
    """
    analysis = analysis or channel_groups(program)
    worst: OracleResult | None = None
    for attempt in range(ATTEMPTS):
        original = before_softmax(randomise(program, analysis, seed + attempt))
        result = compare(
            original,
            before_softmax(apply_plan(original, plan, analysis)),
            before_softmax(masked(original, plan, analysis)[0]),
            plan,
            analysis=analysis,
            backend=backend if attempt == 0 else None,
            threads=threads,
            seed=seed + attempt,
            tolerance=tolerance,
        )
        worst = result if worst is None else _both(worst, result)
        if worst.verdict != "inconclusive":
            break
    assert worst is not None
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
    backend: Any = None,
    threads: int = 1,
    seed: int = 0,
    tolerance: float = TOLERANCE_F64,
) -> OracleResult:
    """Compare given programs; `check` builds them from a plan. Planted bugs are tested through this."""
    from sartor.ir.batch import random_inputs
    from sartor.ir.fx import run_twin

    inputs = random_inputs(original, seed=seed)
    small = run_twin(pruned, inputs)
    large = run_twin(mask, inputs)
    error = relative_error(large, small)
    lowered = None
    if backend is not None:
        lowered = relative_error(*(_run_lowered(p, inputs, backend, threads) for p in (mask, pruned)))
    insensitive = _insensitive(original, mask, plan, analysis, inputs, large, tolerance)
    wrong = not error <= tolerance or (lowered is not None and not lowered <= TOLERANCE_F32)
    verdict = "failed" if wrong else "inconclusive" if insensitive else "passed"
    return OracleResult(verdict, error, tolerance, lowered, TOLERANCE_F32, insensitive)


def relative_error(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Largest max|a − b| / max|a| over the outputs; infinite for NaN, infinities or different shapes."""
    worst = 0.0
    for name, a in reference.items():
        b = other[name]
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf
        if a.size and np.issubdtype(a.dtype, np.number):
            a, b = a.astype(np.float64), b.astype(np.float64)
            scale = float(np.abs(a).max())
            difference = float(np.abs(a - b).max())
            worst = max(worst, difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf))
    return worst


def require(result: OracleResult, program: Program, plan: Plan, folder: Path | None) -> None:
    """Stop the run unless the oracle passed; a reproducer (model and plan) is left in `folder`.

    Raises:
        VerificationError: the verdict is not `passed`.
    """
    if result.verdict == "passed":
        return
    note = ""
    if folder is not None:
        program.save(folder / "model.onnx")
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
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


def randomise(program: Program, analysis: ChannelAnalysis, seed: int) -> Program:
    """The program with every parameter and buffer random, so that the variance of activations is preserved.

    Weights ~ N(0, 2 / fan-in), norm scales and variances uniform in [0.5, 1.5], everything else
    N(0, 0.3). Single numbers (attention scales, exponents, bounds) and masks stay.
    """
    clone = program.clone()
    rewriter = Rewriter(clone, "randomise")
    generator = np.random.default_rng(seed)
    positive, statistics, fans = _roles(program)
    consumed = {(m.initializer, m.axis) for g in analysis.groups for m in g.members if m.role == "consumer"}
    for name, value in sorted(clone.initializers.items()):
        tensor = value.const_value
        if tensor is None or not (name in statistics or is_parameter(program.initializers[name])):
            continue
        array = tensor.numpy()
        if not np.isfinite(array).all() or np.abs(array).max() > 1e3:
            continue  # an attention mask, not a parameter
        if name in positive:
            drawn = generator.random(array.shape) + 0.5
        elif array.ndim >= 2:
            axes = [a for n, a in consumed if n == name]
            fan = fans.get(name) or math.prod(array.shape) / array.shape[axes[0] - 1 if axes else 0]
            drawn = generator.standard_normal(array.shape) * math.sqrt(2.0 / max(fan, 1.0))
        else:
            drawn = generator.standard_normal(array.shape) * 0.3
        rewriter.set_initializer(name, drawn.astype(array.dtype))
    clone.invalidate()
    return clone


def _roles(program: Program) -> tuple[set[str], set[str], dict[str, float]]:
    """Initializers that must be positive (norm scales, variances), running statistics, fan-in of weights."""
    positive: set[str] = set()
    statistics: set[str] = set()
    fans: dict[str, float] = {}
    for node in program.nodes():
        names = [v.name if v is not None else None for v in node.inputs]
        if node.op_type == "BatchNormalization":
            positive.update(n for n in (names[1], names[4]) if n)
            statistics.update(n for n in names[3:5] if n)
        elif node.op_type in ("LayerNormalization", "InstanceNormalization", "GroupNormalization"):
            positive.update(n for n in names[1:2] if n)
        elif node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            weight = node.inputs[1]
            producer = weight.producer() if weight is not None else None
            turned = producer is not None and producer.op_type == "Transpose"
            source = producer.inputs[0] if turned and producer is not None else weight
            if source is None or source.name not in program.initializers:
                continue
            shape = program.initializer_array(source.name or "").shape
            if node.op_type == "Conv":
                fans[source.name or ""] = math.prod(shape[1:])
            elif node.op_type == "ConvTranspose":
                groups, strides = node.attributes.get("group"), node.attributes.get("strides")
                step = math.prod(strides.value) if strides is not None else 1
                per = groups.value if groups is not None else 1
                fans[source.name or ""] = shape[0] / per * math.prod(shape[2:]) / step
            elif len(shape) >= 2:
                flipped = node.attributes.get("transB")
                last = turned or (node.op_type == "Gemm" and flipped is not None and flipped.value)
                fans[source.name or ""] = shape[-1] if last else shape[-2]
    return positive, statistics, fans


def before_softmax(program: Program) -> Program:
    """The program with the input of a final Softmax as the output, in place of what hides differences."""
    clone = program.clone()
    changed = False
    for index, output in enumerate(clone.graph.outputs):
        node = output.producer()
        if node is not None and node.op_type in ("Softmax", "LogSoftmax") and node.inputs[0] is not None:
            source = node.inputs[0]
            if source.producer() is not None and not source.is_graph_output():
                source.type, source.shape = output.type, output.shape
                clone.graph.outputs[index] = source
                changed = True
    if not changed:
        return program
    clone.invalidate()
    return clone


def _run_lowered(
    program: Program, inputs: Mapping[str, np.ndarray], backend: Any, threads: int
) -> dict[str, np.ndarray]:
    from sartor.backends.protocol import TargetOptions

    options = TargetOptions(threads=threads, precision="f32")
    with tempfile.TemporaryDirectory(prefix="sartor-oracle-") as folder:
        artifact = backend.lower(program, Path(folder) / "lowered", options)
        result: dict[str, np.ndarray] = backend.load(artifact, options).run(inputs)
    return result


def _insensitive(
    original: Program,
    mask: Program,
    plan: Plan,
    analysis: ChannelAnalysis,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    tolerance: float,
) -> tuple[str, ...]:
    """Groups and blocks of the plan whose perturbation would not have been seen."""
    from sartor.ir.fx import run_twin

    needed = SENSITIVITY * tolerance
    missing: list[str] = []
    if plan.groups:
        gradients = _gradients(mask, analysis, inputs, outputs)
        scale = max(float(np.abs(a).max()) for a in outputs.values())
        for name, entry in plan.groups.items():
            moved = PERTURBATION * np.abs(gradients[name][list(entry.keep)]).max()
            if not moved > needed * scale:
                missing.append(name)
    if plan.blocks and relative_error(run_twin(original, inputs), outputs) <= needed:
        missing += plan.blocks
    return tuple(missing)


def _gradients(
    mask: Program,
    analysis: ChannelAnalysis,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
) -> Mapping[str, np.ndarray]:
    """Derivative of one random mean of the outputs by every unit's gate, in one backward sweep.

    It is a lower bound of how far the gate moves some output; one sweep serves all groups.
    """
    import torch

    from sartor.strategies.gates import gate_gradients

    generator = np.random.default_rng(1)
    signs = {name: torch.from_numpy(generator.choice([-1.0, 1.0], a.shape)) for name, a in outputs.items()}

    def loss(result: Mapping[str, torch.Tensor], _: Any) -> torch.Tensor:
        return torch.stack([(result[n] * s.to(result[n].dtype)).mean() for n, s in signs.items()]).sum()

    return gate_gradients(mask, analysis, (), [(dict(inputs), None)], loss=loss).groups


__all__ = ["OracleResult", "check", "compare", "randomise", "relative_error", "require"]
