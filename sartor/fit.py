"""The main job: a budget in, a verified smaller network out.

baseline → kernel table → strategy proposes a plan, priced in bulk → apply → oracle → lower → measure, interleaved
with the baseline → tighten and repeat → recover → lower → verify → a fresh measurement that selected nothing decides
the status. Measurements and decisions go to a journal: a run that was killed resumes with what it had measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.budget import Limit
from sartor.errors import EXIT_BUDGET_MISSED, EXIT_MET, EXIT_QUALITY_MISSED, UsageError, VerificationError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.ir.workload import build_workload
from sartor.strategies.budgeted_greedy import BudgetedGreedy, Decision, require_strategy

if TYPE_CHECKING:
    from sartor.backends.measure import Measurement
    from sartor.backends.protocol import Artifact
    from sartor.data import Data

STATIC = ("macs", "weight_bytes", "peak_activation_bytes")
LOWERED_TOLERANCE = {"f32": 1e-4, "bf16": 5e-2}
"""Relative error of an artifact against the float64 reference, by precision."""
_MOST_MEASURED = 6
_TABLE_S, _SELECT_S, _FINAL_S = 20.0, 12.0, 30.0
_SLACK = 0.985  # selection wants the interval's upper bound this far inside: the final run is another draw
_IMPORTANCE_SAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """What to fit to, and how.

    Attributes:
        target: backend name.
        budget: upper limits by key: latency (s), macs, weight_bytes, peak_activation_bytes.
        threads: of the target.
        precision: of the target.
        max_drop: largest loss of score, points (1 point = 0.01).
        recovery_s: seconds of distillation; 0 for none.
        strategy: what decides.
        seed: of importance, training and measuring order.
        keep: globs of parameters, nodes and modules that stay.
    """

    target: str
    budget: Mapping[str, Limit]
    threads: int = 1
    precision: str = "f32"
    max_drop: float = 1.0
    recovery_s: float = 0.0
    strategy: str = "budgeted-greedy"
    seed: int = 0
    keep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Outcome of a fit.

    Attributes:
        report: the document of `report.json`.
        exit_code: 0 met, 3 budget missed, 4 quality missed.
        folder: the bundle.
    """

    report: dict[str, Any]
    exit_code: int
    folder: Path


class Silent:
    """Progress that shows nothing."""

    def __call__(self, text: str) -> None:
        """Ignore a line."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Ignore a new stage."""

    def advance(self, count: int = 1) -> None:
        """Ignore a step."""


def fit(
    program: Program,
    options: FitOptions,
    data: Data | None,
    out_dir: str | os.PathLike[str],
    progress: Any = None,
) -> FitResult:
    """Fit `program` to a budget and write the bundle to `out_dir`.

    Args:
        program: canonical program.
        options: target, budget and limits.
        data: splits for importance, recovery and scores; None leaves the quality unmeasured.
        out_dir: folder of the bundle; an earlier bundle there is replaced.
        progress: callable with a line of text, with `stage` and `advance`; silent by default.

    Raises:
        UsageError: options that cannot be met, such as a limit below the feasible floor; nothing is written.
        VerificationError: an oracle failed or was inconclusive; a reproducer lies beside `out_dir`.
    """
    from sartor.report.bundle import check_destination

    require_strategy(options.strategy)
    folder = Path(out_dir)
    check_destination(folder)
    existed = folder.exists()
    try:
        return _Fit(program, options, data, folder, progress or Silent()).run()
    except UsageError:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class _Fit:
    def __init__(self, program: Program, options: FitOptions, data: Data | None, folder: Path, progress: Any):
        from sartor import backends
        from sartor.backends.protocol import TargetOptions

        if data is None and options.recovery_s > 0:
            raise UsageError("Recovery needs data to train on; give data, or use recovery none.")
        self.program, self.options, self.data, self.folder, self.progress = (
            program,
            options,
            data,
            folder,
            progress,
        )
        self.backend = backends.get(options.target)
        self.target = TargetOptions(threads=options.threads, precision=options.precision)
        self.analysis = channel_groups(program, options.keep)
        self.blocks = [b for b in residual_blocks(program) if not self._protected(b)]
        self.workload = build_workload(
            program, self.analysis.extents, [b for b in self.blocks if b.removable]
        )
        self.history: list[dict[str, Any]] = []
        self.decisions: list[str] = []
        self.limits: dict[str, float] = {}

    def _protected(self, block: Any) -> bool:
        import fnmatch

        names = [*block.nodes, *block.last_affine, block.name]
        names += [p.module for n in block.nodes if (p := self.program.provenance.get(n)) is not None]
        return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in self.options.keep)

    def run(self) -> FitResult:
        from sartor.backends.legality import require_legal
        from sartor.journal import Journal

        require_legal(self.options.target, self.backend.legality(self.program, self.target))
        key = {
            "source": self.program.source.sha256,
            "shapes": {k: list(v) for k, v in self.program.input_shapes.items()},
            "options": dataclasses.asdict(self.options),
            "versions": self._versions(),
            "data": self.data.source if self.data is not None else None,
        }
        with (
            Journal(self.folder / "journal.jsonl", key) as self.journal,
            tempfile.TemporaryDirectory(prefix="sartor-fit-") as work,
        ):
            self.work = Path(work)
            return self._run()

    # ---- stages ----------------------------------------------------------------------------
    def _run(self) -> FitResult:
        self.progress.stage("baseline")
        self.baseline = self._lower(self.program, "baseline")
        self.reference = self.backend.load(self.baseline, self.target)
        self.before = self._static(self.program)
        first = self._measure([self.baseline], _SELECT_S / 2)
        self.baseline_s = first.latencies[0].median
        self._set_limits()
        plan = Plan(self.program.source.sha256)
        predicted_s = self.baseline_s
        if any(self._value(key) > limit for key, limit in self.limits.items()):
            self.progress.stage("kernel table")
            self.table = self._kernel_table()
            plan, predicted_s = self._select()
        else:
            self.decisions.append("the original is within every limit; nothing is removed")
        return self._deliver(plan, predicted_s)

    def _value(self, key: str) -> float:
        return self.baseline_s if key == "latency" else float(self.before[key])

    def _set_limits(self) -> None:
        for key, limit in self.options.budget.items():
            self.limits[key] = limit.absolute(self._value(key))

    def _kernel_table(self) -> Any:
        from sartor.backends.measure import time_models
        from sartor.cost_models.measured import MeasuredTable
        from sartor.cost_models.sampling import build_table

        known = self.journal.find("table")
        if known is not None:
            return MeasuredTable.from_json(known["table"])
        options = dataclasses.replace(self.target, flush_denormals=True)

        def timer(models: list[bytes]) -> Any:
            return time_models(self.options.target, models, options, repeats=3)

        table = build_table(
            self.workload,
            timer,
            target={"name": self.options.target, **self.target.to_dict()},
            channel_grid=lambda op: self.backend.channel_grid(op, self.options.precision),
            seconds=_TABLE_S,
        )
        table.calibrate(self.workload, self.baseline_s)
        self.journal.append("table", table=table.to_json())
        return table

    def _select(self) -> tuple[Plan, float]:
        importance, criterion = self._importance()
        self.decisions.append(f"importance by criterion '{criterion}'")
        strategy = BudgetedGreedy(
            self.analysis, self.blocks, importance, self.workload, self._price, lambda g: self._grid(g)
        )
        self._check_floor(strategy.floor())
        self.progress.stage("search", _MOST_MEASURED)
        wanted = dict(self.limits)
        if "latency" in wanted:
            wanted["latency"] *= 0.97
        best: tuple[Plan, float, float] | None = None
        last: tuple[Plan, float] | None = None
        for step in range(1, _MOST_MEASURED + 1):
            decision = strategy.search(wanted)
            record = self._try(step, decision)
            self.progress.advance()
            last = (decision.plan, decision.predicted.get("latency", self.baseline_s))
            if "latency" not in self.limits:
                return last
            goal = self.limits["latency"] / self.baseline_s
            ratio, upper = record["ratio"], record["ci95"][1]
            self.table.calibrate(
                self.workload,
                ratio * self.baseline_s,
                decision.plan.fractions(),
                {b: True for b in decision.plan.blocks},
            )
            if upper <= goal * _SLACK:
                if best is None or ratio > best[2]:
                    best = (*last, ratio)
                if ratio >= goal * 0.93 or step == _MOST_MEASURED:
                    break
                wanted["latency"] = min(
                    self.limits["latency"] * 0.97, wanted["latency"] * goal * 0.965 / ratio
                )
                self.decisions.append(f"step {step} is {ratio:.3f}×, further than needed; loosened")
            else:
                if best is not None:
                    break
                wanted["latency"] = min(
                    wanted["latency"], self.limits["latency"] * 0.975 * 0.975 * goal / upper
                )
                self.decisions.append(f"step {step} is {ratio:.3f}× (upper {upper:.3f}); tightened")
                if not decision.feasible:
                    break
        return (best[0], best[1]) if best is not None else last  # type: ignore[return-value]

    def _try(self, step: int, decision: Decision) -> dict[str, Any]:
        """Apply, prove, lower and measure a decision, or take it from the journal."""
        digest = hashlib.sha256(decision.plan.to_json().encode()).hexdigest()
        known = self.journal.find("measured", plan=digest)
        if known is None:
            from sartor.passes.prune import apply_plan

            pruned = apply_plan(self.program, decision.plan, self.analysis)
            artifact = self._lower(pruned, f"step{step}")
            measured = self._measure([self.baseline, artifact], _SELECT_S)
            fields: dict[str, Any] = {
                "plan": digest,
                "ratio": measured.ratio.latency,
                "ci95": list(measured.ratio.latency_ci95),
                "predicted_latency_s": decision.predicted.get("latency"),
            }
            if self.data is not None:
                fields["score"] = self._score(artifact, "evaluate")[0]
            known = self.journal.append("measured", **fields)
        entry: dict[str, Any] = {
            "step": step,
            "change": describe(decision),
            "measured_ratio": known["ratio"],
            "measured_ci95": known["ci95"],
        }
        if known["predicted_latency_s"] is not None:
            entry["predicted_latency_s"] = known["predicted_latency_s"]
        if "score" in known:
            entry["score"] = known["score"]
        self.history.append(entry)
        self.progress(f"step {step}: {known['ratio']:.3f}x measured, {entry['change']}")
        return known

    def _deliver(self, plan: Plan, predicted_s: float) -> FitResult:
        from sartor.passes.masked import masked
        from sartor.passes.prune import apply_plan
        from sartor.report import write_report
        from sartor.report.bundle import Bundle

        self.progress.stage("oracle")
        pruned = apply_plan(self.program, plan, self.analysis)
        mask, _ = masked(self.program, plan, self.analysis)
        verdict = self._prove(plan) if plan.groups or plan.blocks else None
        result = self._recover(pruned)
        with Bundle(self.folder) as bundle:
            pruned.save(bundle.folder / "pruned.onnx")
            mask.save(bundle.folder / "masked.onnx")
            result.save(bundle.folder / "model.onnx")
            (bundle.folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
            artifact = self.backend.lower(result, bundle.folder / "artifact", self.target)
            lowered_error = self._verify(result, artifact)
            self.progress.stage("final measurement")
            final = self._measure([self.baseline, artifact], _FINAL_S, seed=self.options.seed + 1)
            report = self._report(plan, predicted_s, verdict, artifact, result, final, lowered_error)
            write_report(report, bundle.folder)
            bundle.commit(source={"sha256": self.program.source.sha256, "name": self.program.source.name})
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        self.journal.append("delivered", status=report["status"], ratio=report["ratio"])
        codes = {"met": EXIT_MET, "budget-missed": EXIT_BUDGET_MISSED, "quality-missed": EXIT_QUALITY_MISSED}
        return FitResult(report, codes[report["status"]], self.folder)

    def _prove(self, plan: Plan) -> Any:
        from sartor import oracle

        verdict = oracle.check(
            self.program,
            plan,
            analysis=self.analysis,
            backend=self.backend,
            threads=self.options.threads,
            seed=self.options.seed,
        )
        if verdict.verdict != "passed":
            reproducer = self.folder.with_name(self.folder.name + ".reproducer")
            reproducer.mkdir(parents=True, exist_ok=True)
            oracle.require(verdict, self.program, plan, reproducer)
        return verdict

    @property
    def _checkpoints(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.recovery")

    def _recover(self, pruned: Program) -> Program:
        if self.data is None or self.options.recovery_s <= 0:
            return pruned
        from sartor.recovery.distillation import distill

        self.progress.stage("recovery")
        train = self.data.train or self.data.calibration
        recovered = distill(
            pruned,
            self.program,
            train,
            minutes=self.options.recovery_s / 60.0,
            seed=self.options.seed,
            loss=self.data.loss,
            threads=len(os.sched_getaffinity(0)),
            progress=lambda fraction, text: self.progress(f"recovery {fraction:.0%}: {text}"),
            evaluate=lambda predict: self._score_with(predict, "evaluate")[0],
            checkpoint_dir=self._checkpoints,
        )
        self.decisions.append(
            f"recovered by distillation: {recovered.steps} steps in {recovered.seconds:.0f} s"
        )
        self.decisions.extend(recovered.notes)
        return recovered.program

    # ---- parts -----------------------------------------------------------------------------
    def _lower(self, program: Program, name: str) -> Artifact:
        artifact: Artifact = self.backend.lower(program, self.work / name, self.target)
        return artifact

    def _measure(self, artifacts: list[Artifact], seconds: float, seed: int | None = None) -> Measurement:
        from sartor.backends.measure import measure

        return measure(
            self.options.target,
            artifacts,
            self.target,
            time_limit_s=seconds,
            target_half_width=0.01,
            seed=self.options.seed if seed is None else seed,
        )

    def _static(self, program: Program) -> dict[str, int]:
        from sartor.cost_models.static import static_cost

        cost = static_cost(program)
        return {
            key: int(getattr(cost, key))
            for key in ("macs", "parameters", "weight_bytes", "peak_activation_bytes")
        }

    def _price(
        self, fractions: Mapping[str, np.ndarray], removed: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        priced: dict[str, np.ndarray] = {}
        if "latency" in self.limits:
            priced["latency"] = np.atleast_1d(self.table.estimate_batch(self.workload, fractions, removed))
        if "macs" in self.limits or "weight_bytes" in self.limits:
            cost = self.workload.evaluate(fractions, removed)
            priced.update(
                {k: np.atleast_1d(getattr(cost, k)) for k in ("macs", "weight_bytes") if k in self.limits}
            )
        if "peak_activation_bytes" in self.limits:
            priced["peak_activation_bytes"] = np.atleast_1d(
                self.workload.peak_activation_bytes(fractions, removed)
            )
        return priced

    def _grid(self, group: Any) -> int:
        readers = {
            node.op_type
            for member in group.members
            for node, _ in self.program.initializers[member.initializer].uses()
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        }
        return max((self.backend.channel_grid(op, self.options.precision) for op in readers), default=1)

    def _check_floor(self, floor: Mapping[str, float]) -> None:
        for key, limit in self.limits.items():
            slack = 0.9 if key == "latency" else 1.0  # the latency floor is a prediction
            if floor[key] * slack > limit:
                full = self._value(key)
                raise UsageError(
                    f"The budget {key}={limit:.6g} is below the feasible floor: the smallest plan is predicted at "
                    f"{floor[key]:.6g} ({floor[key] / full:.3f}x of {full:.6g}). Raise the limit, or protect less."
                )

    def _importance(self) -> tuple[Any, str]:
        from sartor.strategies.criteria import criterion

        if self.data is not None and self.program.batch.symbolic:
            batches = _Limited(self.data.calibration, _IMPORTANCE_SAMPLES)
            try:
                scores = criterion("taylor").unit_importance(
                    self.program,
                    self.analysis,
                    self.blocks,
                    data=batches,
                    loss=self.data.loss,
                    seed=self.options.seed,
                )
                return scores, "taylor"
            except UsageError as error:
                self.decisions.append(f"criterion 'taylor' does not apply: {error}")
        return criterion("l2").unit_importance(
            self.program, self.analysis, self.blocks, seed=self.options.seed
        ), "l2"

    def _score(self, artifact: Artifact, split: str) -> tuple[float, int]:
        return self._score_with(self.backend.load(artifact, self.target).run, split)

    def _score_with(self, predict: Callable[..., Any], split: str) -> tuple[float, int]:
        from sartor.scoring import score

        assert self.data is not None
        return score(predict, getattr(self.data, split), self.data.metric, self.reference.run)

    def _verify(self, program: Program, artifact: Artifact) -> float:
        """Relative error of the artifact against the program in float64, on a calibration input where there is one."""
        from sartor.ir.batch import random_inputs
        from sartor.ir.fx import run_twin
        from sartor.oracle import relative_error

        inputs: Any = random_inputs(program, seed=self.options.seed)
        if self.data is not None:
            inputs = self.data.calibration.first()[0]
        expected = run_twin(program, inputs)
        error = relative_error(expected, self.backend.load(artifact, self.target).run(inputs))
        tolerance = LOWERED_TOLERANCE.get(self.options.precision, 1e-4)
        if not error <= tolerance:
            raise VerificationError(
                f"The artifact for '{self.options.target}' differs from the float64 reference by {error:.3g}, above "
                f"{tolerance:.0e} for {self.options.precision}."
            )
        return error

    def _versions(self) -> dict[str, str]:
        import importlib.metadata
        import platform

        import sartor

        versions = {"sartor": sartor.__version__, "python": platform.python_version()}
        for name in ("numpy", "onnx", "onnx-ir", "onnxscript", "torch", self.options.target):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return versions

    # ---- report ----------------------------------------------------------------------------
    def _report(
        self,
        plan: Plan,
        predicted_s: float,
        verdict: Any,
        artifact: Artifact,
        result: Program,
        final: Measurement,
        lowered_error: float,
    ) -> dict[str, Any]:
        baseline: dict[str, Any] = {"latency_s": dataclasses.asdict(final.latencies[0]), **self.before}
        after: dict[str, Any] = {"latency_s": dataclasses.asdict(final.latencies[1]), **self._static(result)}
        quality = "unmeasured"
        if self.data is not None:
            baseline["score"], baseline["score_n"] = self._score(self.baseline, "test")
            after["score"], after["score_n"] = self._score(artifact, "test")
            lost = baseline["score"] - after["score"]
            quality = "kept" if lost <= self.options.max_drop / 100.0 + 1e-12 else "missed"
        low, high = final.ratio.latency_ci95
        met = True
        for key, limit in self.options.budget.items():
            if key == "latency":
                wanted = limit.value if limit.relative else limit.value / final.latencies[0].median
                met &= high <= wanted
            else:
                met &= after[key] <= limit.absolute(self.before[key])
        status = "budget-missed" if not met else "quality-missed" if quality == "missed" else "met"
        passed = {"max_rel_error": 0.0, "tolerance": 1e-9, "verdict": "passed", "note": "nothing was removed"}
        sizes = {g.name: g.size for g in self.analysis.groups}
        return {
            "schema": "sartor.report/1",
            "status": status,
            "quality": quality,
            "source": dataclasses.asdict(self.program.source),
            "target": dict(final.target),
            "budget": {
                key: {"value": limit.value, "relative": limit.relative}
                | ({"ratio": limit.absolute(self.baseline_s) / self.baseline_s} if key == "latency" else {})
                for key, limit in self.options.budget.items()
            },
            "max_drop": self.options.max_drop,
            "baseline": baseline,
            "result": after,
            "ratio": {"latency": final.ratio.latency, "latency_ci95": [low, high]},
            "predicted": {"latency_s": predicted_s},
            "oracle": verdict.to_dict() if verdict is not None else passed,
            "lowered": {
                "max_rel_error": lowered_error,
                "tolerance": LOWERED_TOLERANCE.get(self.options.precision, 1e-4),
            },
            "history": self.history,
            "widths": [
                {
                    "name": name,
                    "before": size,
                    "after": len(plan.groups[name].keep) if name in plan.groups else size,
                }
                for name, size in sizes.items()
            ],
            "blocks_removed": list(plan.blocks),
            "decisions": self.decisions,
            "conditions": final.to_dict()["conditions"]
            | {"ended_by": final.ended_by, "rounds": len(final.rounds)},
            "versions": self._versions(),
        }


class _Limited:
    """The first `count` samples of a split, re-iterable."""

    def __init__(self, split: Any, count: int):
        self.split, self.count = split, count

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for inputs, labels in self.split:
            yield inputs, labels
            seen += len(next(iter(inputs.values())))
            if seen >= self.count:
                return


def describe(decision: Decision) -> str:
    """One line: how many groups were narrowed and which blocks removed."""
    plan = decision.plan
    parts = [f"{len(plan.groups)} groups narrowed"]
    if plan.blocks:
        parts.append(f"{len(plan.blocks)} blocks removed ({', '.join(itertools.islice(plan.blocks, 4))})")
    return ", ".join(parts)
