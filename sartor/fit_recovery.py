"""The recovery of a fit: what it asks before it starts, how it begins, and in how many rounds it cuts and trains."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.data import JUDGING_SHARE, InTime
from sartor.errors import SartorError
from sartor.fit_rounds import Rounds, rounds_of
from sartor.ir.plan import Plan
from sartor.passes.prune import apply_plan

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.channels import ChannelAnalysis
    from sartor.ir.program import Program
    from sartor.journal import Journal
    from sartor.workbench import FitOptions, Workbench


def require_recovery(program: Program, options: FitOptions, data: Data) -> None:
    """Refuse a recovery that could not begin, before anything is searched.

    Raises:
        UsageError: options that do not go together, or labels that are needed and do not fit.
    """
    from sartor.recovery.objective import require_labels
    from sartor.recovery.options import RecoveryOptions

    labels = (data.train or data.calibration).first()[1]
    require_labels(program, RecoveryOptions(**options.recovery), labels, data.loss)


_TRAINING_SHARE = 0.1
"""Share of a round's time that training has in any case, whatever was done before it."""


class Recovery:
    """Cuts the original as a plan says and trains what is left, in one round or several.

    Everything is cut at once in one round. In several, each takes the same share of the units and blocks that go and
    of the time, and asks the network that the last one trained which units matter least: the plan's widths stay, and
    its choice of units may not.

    Attributes:
        decisions: what happened, a line each.
        report: `seconds`, `steps` and, of several, `rounds`.

    Args:
        bench: model, data and options.
        analysis: channel groups of the original.
        blocks: its residual blocks.
        journal: of the run.
        progress: callable with a line of text.
        folder: of checkpoints.
    """

    def __init__(
        self,
        bench: Workbench,
        analysis: ChannelAnalysis,
        blocks: Any,
        journal: Journal,
        progress: Callable[[str], None],
        folder: Path,
    ):
        assert bench.data is not None
        self._bench, self._analysis, self._blocks = bench, analysis, blocks
        self._data, self._options, self._program = bench.data, bench.options, bench.program
        self._journal, self._progress, self._folder = journal, progress, folder
        self._used: set[Path] = set()
        self.decisions: list[str] = []
        self.report: dict[str, Any] = {"seconds": 0.0, "steps": 0}
        known = self._journal.find("judged")
        self._judged = InTime(
            self._data.evaluate,
            JUDGING_SHARE * self._options.recovery_s / self._options.rounds,
            None if known is None else known["batches"],
        )

    def run(self, plan: Plan) -> tuple[Plan, Program]:
        """The plan that was carried out, and the network that came of it."""
        count = rounds_of(plan, self._options.rounds)
        if count < self._options.rounds:
            self.decisions.append("nothing of the plan can be divided, so it was recovered in one round")
        current, done = self._program, plan
        if count == 1:
            current = self._trained(
                apply_plan(current, plan, self._analysis),
                current,
                self._options.recovery_s,
                time.perf_counter(),
            )
        else:
            self.report["rounds"] = count
            current, done = self._in_rounds(plan, count)
        self._said()
        return done, current

    def _in_rounds(self, plan: Plan, count: int) -> tuple[Program, Plan]:
        rounds = Rounds(self._bench, self._analysis, self._blocks, self._journal, plan, count)
        current, done = self._program, Plan(plan.source_sha256)
        for number in range(1, count + 1):
            begun = time.perf_counter()
            done, cut = rounds.cut(number, current, done)
            self._progress(f"round {number} of {count}")
            seconds = self._options.recovery_s / count
            current = self._trained(cut, current, seconds, begun, f"round {number}: ")
        return current, done

    def _trained(
        self, cut: Program, before: Program, seconds: float, begun: float, head: str = ""
    ) -> Program:
        """What one round makes of a network that was cut out of `before`."""
        from sartor.recovery.distillation import RecoveryOptions, distill

        options, start = self._options, cut
        if options.repair:
            start, said = repaired(
                cut,
                self._program,
                self._data,
                seconds,
                options.seed,
                self._evaluate,
                before=before,
                journal=self._journal,
            )
            self.decisions.extend([head + said] if said else [])
        spent_s = time.perf_counter() - begun
        found = distill(
            start,
            self._program,
            self._data.train or self._data.calibration,
            minutes=max(seconds - spent_s, _TRAINING_SHARE * seconds) / 60.0,
            seed=options.seed,
            loss=self._data.loss,
            threads=len(os.sched_getaffinity(0)),
            progress=lambda fraction, text: self._progress(f"recovery {head}{fraction:.0%}: {text}"),
            evaluate=self._evaluate,
            checkpoint_dir=self._checkpoint(cut),
            options=RecoveryOptions(**options.recovery),
        )
        self.report["seconds"] = round(self.report["seconds"] + found.seconds + spent_s, 3)
        self.report["steps"] += found.steps
        if found.steps:
            self.decisions.append(
                f"{head}recovered by {found.method}: {found.steps} steps in {found.seconds:.0f} s"
            )
        self.decisions.extend(head + note for note in found.notes)
        return found.program

    def _evaluate(self, predict: Callable[..., Any]) -> float:
        from sartor.scoring import score

        value, _ = score(predict, self._judged, self._data.metric, self._bench.reference.run)
        if self._journal.find("judged") is None:
            self._journal.append("judged", batches=self._judged.batches)
        return value

    def _checkpoint(self, cut: Program) -> Path:
        """The folder of a round's checkpoints; those of a killed run that led elsewhere are removed."""
        identity = json.dumps([self._journal.key, cut.sha256()], sort_keys=True)
        folder = self._folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._used.add(folder)
        if self._options.rounds == 1:
            for other in {*self._folder.glob("*")} - self._used:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        return folder

    def _said(self) -> None:
        if self._judged.cut:
            samples = self._judged.samples
            self.decisions.append(
                f"recovery was judged on the first {samples} samples of 'evaluate': more did not fit its time"
            )
        if self._data.train is None:
            self.decisions.append(what_was_trained_on(self._data))


_TRIALS, _MOST = (2, 8), 256  # samples
_SHARE = 0.25  # of the time of recovery


def repaired(
    pruned: Program,
    original: Program,
    data: Data,
    seconds: float,
    seed: int,
    evaluate: Callable[[Any], float],
    *,
    before: Program | None = None,
    journal: Journal | None = None,
) -> tuple[Program, str]:
    """Where training begins: the pruned network, or what least squares make of it where that scores better.

    Two trials with few samples say how many fit into a quarter of the time.

    Args:
        pruned: the network after its plan.
        original: that the data are for.
        data: whose calibration split is looked at.
        seconds: of the whole recovery.
        seed: of the choice of positions.
        evaluate: score of a predictor that takes what the original takes.
        before: the network that `pruned` was cut out of, if it is not the original.
        journal: of a run, which has to begin in the same place when it is resumed.

    Returns:
        The network, and what was found, in words; empty where nothing can be repaired.
    """
    from sartor.passes.base import Context
    from sartor.passes.repair import Repair
    from sartor.recovery.sizes import Sizes
    from sartor.recovery.twins import predictor

    sizes = Sizes.between(pruned, original)
    reference = at_size_of(before or original, pruned)
    calibration = data.at({name: shape for name, (_, shape) in sizes.inputs.items()}).calibration
    context = Context(data={"calibration": calibration}, original=reference)
    digest = pruned.sha256()
    known = None if journal is None else journal.find("repaired", program=digest)
    if known is None:
        samples, said = _repairable(pruned, context, seconds, seed)
    else:
        samples, said = known["samples"], known["said"]
    found = pruned
    if samples:
        found = Repair(samples=samples, seed=seed).run(pruned, context).program
    if samples and known is None:
        was, now = evaluate(predictor(pruned, sizes)), evaluate(predictor(found, sizes))
        said = f"least squares on {samples} samples take the score on 'evaluate' from {was:.1%} to {now:.1%}"
        if now < was:
            found, samples, said = pruned, 0, f"{said}: not taken"
    if known is None and journal is not None:
        journal.append("repaired", program=digest, samples=samples, said=said)
    return found, said


def at_size_of(original: Program, pruned: Program) -> Program:
    """The original with inputs of the size that a network takes, which was cut out of it."""
    shapes = {k: shape for k, shape in pruned.input_shapes.items() if shape != original.input_shapes[k]}
    return apply_plan(original, Plan(original.source.sha256, sizes=shapes)) if shapes else original


def _repairable(pruned: Program, context: Any, seconds: float, seed: int) -> tuple[int, str]:
    """How many samples fit into repair's share of the time, 0 for none, and why none do where there is a reason."""
    from sartor.passes.repair import Repair

    took_s = []
    try:
        for samples in _TRIALS:
            start = time.perf_counter()
            if not Repair(samples=samples, seed=seed).run(pruned, context).modified:
                return 0, ""
            took_s.append(time.perf_counter() - start)
    except SartorError as error:
        return 0, f"layers were not repaired by least squares: {error}"
    few, more = _TRIALS
    each_s = max((took_s[1] - took_s[0]) / (more - few), 0.25 * took_s[1] / more)  # the difference is noisy
    fixed_s = max(took_s[1] - more * each_s, 0.0)
    samples = min(int((_SHARE * seconds - sum(took_s) - fixed_s) / each_s), _MOST)
    if samples < more:
        return 0, f"layers were not repaired by least squares: {more} samples take {took_s[1]:.1f} s"
    return samples, ""


def what_was_trained_on(data: Data) -> str:
    """The decision that a source without `train` leads to."""
    if data.calibration is not data.evaluate:
        return "recovery trained on 'calibration': there is no 'train'"
    if not data.test_is_evaluate:
        return "recovery trained on 'evaluate', on which selection judges: there is no 'train'"
    return (
        "WARNING: recovery trained on the samples that are scored, so the score says little about any others: the "
        "data have only 'evaluate'; give 'train' and 'test'"
    )
