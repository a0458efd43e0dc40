"""The main job: a budget in, a verified smaller network out.

baseline → kernel table → strategy proposes a plan, priced in bulk → apply → oracle → lower → measure, interleaved
with the baseline → tighten and repeat → recover → lower → verify → a fresh measurement that selected nothing decides
the status. Measurements and decisions go to a journal beside the bundle: a run that was killed resumes with what it
had measured, and a run that was delivered leaves its journal in the bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import (
    EXIT_BUDGET_MISSED,
    EXIT_MET,
    EXIT_QUALITY_MISSED,
    EXIT_USAGE,
    UsageError,
)
from sartor.fit_profile import require_of_this
from sartor.fit_recovery import Recovery, require_recovery
from sartor.fit_report import fit_report
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.journal import Journal
from sartor.passes.base import Context
from sartor.passes.candidates import kept_by
from sartor.selection import Selection
from sartor.strategies.protocol import strategy
from sartor.versions import versions
from sartor.workbench import FitOptions, Workbench, static_costs

if TYPE_CHECKING:
    from sartor.cost_models.profile import DeviceProfile
    from sartor.data import Data
    from sartor.study import Storage, Study
    from sartor.tasks import Runner

__all__ = ["FitOptions", "FitResult", "fit"]

_BASELINE_S, _FINAL_S = 6.0, 30.0


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
    *,
    runner: Runner | None = None,
    storage: Storage | None = None,
    profile: DeviceProfile | None = None,
) -> FitResult:
    """Fit `program` to a budget and write the bundle to `out_dir`.

    Args:
        program: canonical program.
        options: target, budget and limits.
        data: splits for importance, recovery and scores; None leaves the quality unmeasured.
        out_dir: folder of the bundle; an earlier bundle there is replaced.
        progress: callable with a line of text, with `stage` and `advance`; silent by default.
        runner: where candidates are measured and scored, see `sartor.tasks.open_runner`; this machine by default.
        storage: of a study that keeps measured candidates beside the journal, to be shared; see `sartor.study`.
        profile: of the target on this machine, which predicts. None, or one that no longer holds: the network's own
            kernels are timed.

    Raises:
        UsageError: options that cannot be met, such as a limit below the feasible floor, or a profile of another
            target, precision or number of threads; nothing is written.
        VerificationError: an oracle failed or was inconclusive; a reproducer lies beside `out_dir`.
    """
    from sartor.report.bundle import check_destination

    strategy(options.strategy)
    folder = Path(out_dir)
    check_destination(folder)
    missing = [path for path in folder.parents if not path.exists()]
    this = _Fit(program, options, data, folder, progress or Silent(), runner, storage, profile)
    resumable = this.journal_path.exists()
    try:
        return this.run()
    except BaseException as error:
        refused = getattr(error, "exit_code", None) == EXIT_USAGE or isinstance(error, SystemExit)
        ours = "journal" in vars(this)  # else another process holds it, or there is none yet
        if ours and not resumable and (refused or not this.journal.records):
            this.journal_path.unlink(missing_ok=True)
            shutil.rmtree(this.checkpoints, ignore_errors=True)
        elif ours:
            error.add_note(
                f"What was measured is kept in '{this.journal_path}'; the same command resumes from it."
            )
        for path in missing:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()
        raise


class _Fit:
    def __init__(
        self,
        program: Program,
        options: FitOptions,
        data: Data | None,
        folder: Path,
        progress: Any,
        runner: Runner | None,
        storage: Storage | None,
        profile: DeviceProfile | None,
    ):
        if profile is not None:
            require_of_this(profile, options)
        if data is None and options.recovery_s > 0:
            raise UsageError("Recovery needs data to train on; give data, or use recovery none.")
        if options.recovery_s > 0 and not program.batch.symbolic:
            raise UsageError(
                f"Recovery needs a free batch axis, but the model's is fixed: {program.batch.reason}. Use "
                "--recovery none, or export the model with a dynamic batch axis."
            )
        if data is not None and options.recovery_s > 0 and options.recovery:
            require_recovery(program, options, data)
        self.program, self.options, self.data = program, options, data
        self.folder, self.progress = folder, progress
        self.runner, self.storage, self.profile = runner, storage, profile
        self.decisions: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.untouched = False
        self.seconds: dict[str, float] = {}
        self.recovery: dict[str, Any] = {"limit_s": options.recovery_s, "seconds": 0.0, "steps": 0}
        if options.recovery:
            self.recovery["options"] = dict(options.recovery)
        self.journal_path = folder.with_name(f".{folder.name}.journal.jsonl")
        self.checkpoints = folder.with_name(f".{folder.name}.recovery")

    def run(self) -> FitResult:
        from sartor.backends.protocol import TargetOptions
        from sartor.precision import require_legal

        target = TargetOptions(threads=self.options.threads, precision=self.options.precision)
        require_legal(self.options.target, self.program, target)
        self.analysis = channel_groups(self.program, self.options.keep)
        kept = Context(keep=self.options.keep)
        self.blocks = [b for b in residual_blocks(self.program) if kept_by(self.program, b, kept) is None]
        key = {
            "source": self.program.source.sha256,
            "shapes": {k: list(v) for k, v in self.program.input_shapes.items()},
            "options": dataclasses.asdict(self.options),
            "versions": versions(self.options.target),
            "data": self.data.fingerprint() if self.data is not None else None,
            "profile": None if self.profile is None else self.profile.sha256(),
        }
        if self.runner is not None and self.runner.device:
            key["device"] = self.runner.device  # what was measured on another is not resumed from
        with (
            Journal(self.journal_path, key) as self.journal,
            tempfile.TemporaryDirectory(prefix="sartor-fit-") as work,
        ):
            if self.journal.find("delivered"):  # killed before it could be put away: a finished run, not ours
                self.journal.clear()
            self.progress.stage("baseline")
            self.bench = Workbench(
                self.program, self.options, self.data, Path(work), self.runner, self._study(key)
            )
            with contextlib.closing(self.bench):
                if self.data is not None:
                    if self.data.test_is_evaluate:
                        self.decisions.append(
                            "the score is on 'evaluate', which selection saw: there is no 'test'"
                        )
                    self.bench.score(self.bench.exact, "evaluate")  # refuses data before anything is measured
                if self.bench.exact is not self.bench.baseline:
                    self.decisions.append(
                        f"latencies compare with the original in {self.options.precision}, scores with the original "
                        f"in {self.bench.exact.precision}"
                    )
                with self._timed("search"):
                    chosen = self._select()
                return self._deliver(*chosen)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def _study(self, key: dict[str, Any]) -> Study | None:
        if self.storage is None:
            return None
        from sartor.study import study_of

        return study_of(self.storage, key, self.options, self.program, self.analysis.groups, self.blocks)

    # ---- stages ----------------------------------------------------------------------------
    def _select(self) -> tuple[Plan, float]:
        """The plan and its predicted latency, seconds."""
        self.before = static_costs(self.program)
        selection = Selection(
            self.bench, self.analysis, self.blocks, self.journal, self.progress, self.profile
        )
        values: dict[str, float] = dict(self.before)
        static = {k: v.absolute(values[k]) for k, v in self.options.budget.items() if k != "latency"}
        selection.require_reachable(static, values)
        known = self.journal.find("baseline")
        if known is None:
            first = self.bench.measure([self.bench.baseline], _BASELINE_S)
            known = self.journal.append("baseline", latency_s=first.latencies[0].median)
        self.baseline_s = float(known["latency_s"])
        values["latency"] = self.baseline_s
        limits = {key: limit.absolute(values[key]) for key, limit in self.options.budget.items()}
        if not selection.strategy.grows and all(values[key] <= limit for key, limit in limits.items()):
            self.untouched = True
            self.decisions.append("the original is within every limit; nothing is removed")
            return Plan(self.program.source.sha256), self.baseline_s
        try:
            return selection.run(limits, values)
        finally:
            self.history, self.decisions = selection.history, [*self.decisions, *selection.decisions]

    def _deliver(self, plan: Plan, predicted_s: float) -> FitResult:
        from sartor.passes.masked import masked
        from sartor.passes.prune import apply_plan
        from sartor.report import write_report
        from sartor.report.bundle import Bundle
        from sartor.runtime import Stage, write_bundle

        self.progress.stage("oracle")
        verdict = self._prove(plan) if plan.groups or plan.blocks or plan.widened else None
        if plan.precision:
            self.decisions.append(f"the network is delivered in {plan.precision}")
        for name, shape in plan.sizes.items():
            before, after = ("x".join(map(str, s)) for s in (self.program.input_shapes[name], shape))
            self.decisions.append(
                f"input '{name}' is {after} in place of {before}: callers resize, antialiased, as the score's data were"
            )
        chosen = plan
        with self._timed("recovery"):
            plan, recovered = self._recovered(chosen)
        if plan != chosen:
            verdict = self._prove(plan)  # rounds chose other units
        pruned = apply_plan(self.program, plan, self.analysis)
        mask, _ = masked(self.program, plan, self.analysis)
        result = self.bench.written(recovered, plan.precision)
        with Bundle(self.folder) as bundle:
            pruned.save(bundle.folder / "pruned.onnx")
            mask.save(bundle.folder / "masked.onnx")
            result.save(bundle.folder / "model.onnx")
            (bundle.folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
            artifact = self.bench.lower(result, bundle.folder / "artifact", plan.precision)
            agreement = self.bench.verify(result, artifact)
            self.progress.stage("final measurement")
            final = self.bench.measure([self.bench.baseline, artifact], _FINAL_S, seed=self.options.seed + 1)
            costs = {**static_costs(recovered), "weight_bytes": static_costs(result)["weight_bytes"]}
            report = fit_report(self, plan, predicted_s, verdict, artifact, costs, final, agreement)
            write_report(report, bundle.folder)
            write_bundle(
                bundle.folder,
                artifact.inputs,
                artifact.outputs,
                [Stage.of(artifact, "main", "artifact")],
            )
            self.journal.append("delivered", status=report["status"], ratio=report["ratio"])
            shutil.copyfile(self.journal_path, bundle.folder / "journal.jsonl")
            bundle.commit(source={"sha256": self.program.source.sha256, "name": self.program.source.name})
        self.journal_path.unlink()
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        codes = {"met": EXIT_MET, "budget-missed": EXIT_BUDGET_MISSED, "quality-missed": EXIT_QUALITY_MISSED}
        return FitResult(report, codes[report["status"]], self.folder)

    def _prove(self, plan: Plan) -> Any:
        from sartor import oracle

        verdict = oracle.check(
            self.program,
            plan,
            analysis=self.analysis,
            target=self.options.target,
            threads=self.options.threads,
            seed=self.options.seed,
        )
        if verdict.verdict != "passed":
            reproducer = self.folder.with_name(self.folder.name + ".reproducer")
            reproducer.mkdir(parents=True, exist_ok=True)
            oracle.require(verdict, self.program, plan, reproducer)
        return verdict

    def _recovered(self, plan: Plan) -> tuple[Plan, Program]:
        from sartor.passes.prune import apply_plan

        if self.data is None or self.options.recovery_s <= 0 or self.untouched:
            return plan, apply_plan(self.program, plan, self.analysis)
        self.progress.stage("recovery")
        recovery = Recovery(
            self.bench, self.analysis, self.blocks, self.journal, self.progress, self.checkpoints
        )
        done, recovered = recovery.run(plan)
        self.recovery.update(recovery.report)
        self.decisions.extend(recovery.decisions)
        return done, recovered
