"""The training loop of recovery; see `sartor.recovery.distillation` for what it does and promises."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sartor.data import JUDGING_SHARE
from sartor.errors import UsageError
from sartor.ir.fx import pull_weights
from sartor.ir.program import Program
from sartor.recovery import pace
from sartor.recovery.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sartor.recovery.features import attention_points
from sartor.recovery.masks import mask_parameters
from sartor.recovery.objective import Objective
from sartor.recovery.options import RecoveryOptions, RecoveryResult
from sartor.recovery.processes import Processes
from sartor.recovery.samples import BATCH_SIZES, Batch, Samples
from sartor.recovery.schedule import Clock, Moment
from sartor.recovery.student import Student
from sartor.recovery.teacher import Teacher
from sartor.recovery.twins import Predict, batch_norms, reestimate_statistics, restore, snapshot
from sartor.recovery.view import View

Score = tuple[float, float]
_CLIP_NORM = 5.0  # Adam's steps do not depend on the gradient's scale: this only catches outliers
_JUDGED_SAMPLES = 256
_STATISTICS_BY = 0.25  # of the time, without which training waits for nothing
_FEWEST_STEPS = 32  # smaller batches rather than fewer steps than these in half the time
_STATISTICS_BATCHES = 64
_MASK_RATE = 10.0  # masks begin near 0.1, and Adam moves every number by about its rate in a step
_MINIMUM_BATCH = 4  # with fewer samples per channel, batch statistics are noise: train with running ones


class Training:
    """One recovery; most of its fields are what a checkpoint holds."""

    def __init__(
        self,
        program: Program,
        original: Program,
        data: Iterable[Any],
        budget_s: float,
        seed: int,
        loss: Callable[..., Any] | None,
        progress: Callable[[float, str], None] | None,
        evaluate: Callable[[Predict], float] | None,
        folder: Path | None,
        options: RecoveryOptions,
    ):
        pace.warm_up()
        self.clock = Clock(budget_s, options.max_steps)
        self.processes = Processes.current()
        self.program, self.options, self.folder = program, options, folder
        self.budget_s, self.evaluate = budget_s, evaluate
        shown = progress if self.processes.first else None
        self.report = shown or (lambda fraction, text: None)
        points = attention_points(program, original) if options.features else {}
        self.student = Student(program, original, options, points)
        self.gm = self.student.gm
        self.identity = {
            "program": program.sha256(),
            "original": original.sha256(),
            "seed": seed,
            **dataclasses.asdict(options),
        }
        found = None if folder is None else load_checkpoint(folder, self.identity)
        names = self.student.view.names
        self.samples = Samples(data, names, original.batch, seed, processes=self.processes)
        self.student.try_precision(self.samples.probe(pace.PROBE_SAMPLES)[0])
        self.teacher: Teacher | None = None
        if options.teacher != "never":
            self.teacher = Teacher(View(original, original, points), self.samples, self.processes)
        self.most_threads = torch.get_num_threads()
        self.judged = self.samples.sample(self._fit_into_time(found))
        self.masks = mask_parameters(self.gm)
        self.objective = Objective(program, options, loss, self.teacher, self.masks)
        self._check_labels()
        self.notes = [*self.student.notes, *self.objective.notes]
        if options.features and not points:
            self.notes.append("features were not compared: the programs have no maps in common")
        self.parameters = [p for p in self.gm.parameters() if p.requires_grad]
        if not self.parameters:
            raise UsageError("The program has no trainable weights, so nothing can be recovered.")
        known = {id(mask) for mask in self.masks}
        rates = ((1.0, [p for p in self.parameters if id(p) not in known]), (_MASK_RATE, self.masks))
        self.optimizer = torch.optim.Adam(
            [
                {"params": those, "lr": options.learning_rate, "times": times}
                for times, those in rates
                if those
            ]
        )
        self.phase = ""
        self.step = self.epoch = self.position = 0
        self.rate_scale = 1.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_score: Score = (-math.inf, -math.inf)
        if found is not None:
            self._resume(found)
        self.processes.wait()  # all have read the checkpoint before the first one writes another

    def execute(self) -> RecoveryResult:
        """Run, or resume, to the end."""
        for note in self.notes:
            self.report(0.0, note)
        if self.phase == "":
            self._judge("start")
        if self.phase == "start":
            self._statistics("statistics")
        if self.phase != "final":
            self._train()
            self._statistics("final")
        restore(self.gm, self.best)
        self.report(1.0, "done")
        return self._result()

    def _result(self) -> RecoveryResult:
        notes = list(self.notes)
        asked, met = (0, 0) if self.teacher is None else self.teacher.counts()
        if not self.step:
            notes.append(f"no training step fitted into {self.budget_s:.0f} s; give recovery more time")
        if self.options.teacher == "wrong" and met:
            saved = max(1 - asked / met, 0.0)
            notes.append(f"the original was asked about {asked} of {met} samples: {saved:.0%} saved")
        sizes = self.student.resolutions
        if sizes is not None and self.step:
            notes.append(sizes.describe())
        return RecoveryResult(
            pull_weights(self.program, self.gm),
            self.step,
            self.clock.elapsed_s,
            tuple(self.history),
            tuple(notes),
            "fine-tuning" if self.options.teacher == "never" else "distillation",
            asked,
            {} if sizes is None else dict(sorted(sizes.steps.items())),
            None if sizes is None else sizes.training_macs(),
        )

    # ---- judging ---------------------------------------------------------------------------
    def _judge(self, phase: str, **entry: Any) -> None:
        """Score the current weights and keep them if they are the best so far."""
        start = time.perf_counter()
        self.processes.average([b for b in self.gm.buffers() if b.is_floating_point()])
        scored = self._scored() if self.processes.first else None
        found, score = self.processes.decided(scored)  # type: ignore[misc]
        usable = not any(math.isnan(part) for part in score)
        # Equal scores are decided by the distance: a small evaluation split is full of ties.
        kept = not self.best or (usable and score > self.best_score)
        if kept:
            self.best = snapshot(self.gm)
            self.best_score = score if usable else (-math.inf, -math.inf)
        self.clock.judgement_s = time.perf_counter() - start
        seconds = round(self.clock.elapsed_s, 3)
        self.history.append(
            {"step": self.step, "phase": phase, **found, **entry, "kept": kept, "seconds": seconds}
        )
        self._save(phase)

    def _scored(self) -> tuple[dict[str, float], Score]:
        """What is known of the current weights, and what they are compared by."""
        self.gm.eval()
        with torch.no_grad():
            pairs = [(self._distance(batch), batch.count) for batch in self.judged]
        distance = sum(float(d) * n for d, n in pairs) / sum(n for _, n in pairs)
        if self.evaluate is None:
            return {"distance": distance}, (0.0, -distance)
        value = float(self.evaluate(self.student.predictor()))
        return {"distance": distance, "score": value}, (value, -distance)

    def _distance(self, batch: Batch) -> Tensor:
        return self.objective.distance(self.student.view(batch.inputs), batch)

    def _statistics(self, phase: str) -> None:
        """Re-estimate BatchNormalization from the best weights on; kept only where that is better."""
        restore(self.gm, self.best)
        fixed = self.options.max_steps is not None
        # A tenth more for the final ones, without which what training changed is judged by old statistics. Those before
        # it are left out where they would take much of its time: it renews them as it goes.
        limit_s = (1.1 if phase == "final" else _STATISTICS_BY) * self.budget_s
        needed_s = self.clock.judgement_s + 0.05 * self.budget_s
        in_time = fixed or self.processes.decided(self.clock.elapsed_s + needed_s < limit_s)
        if batch_norms(self.gm) and in_time and not self._tiny_batches:
            seconds = math.inf if fixed else 0.05 * self.budget_s
            batches = map(self.student.view.given, self.samples.inputs(_STATISTICS_BATCHES))
            reestimate_statistics(self.gm, batches, seconds=seconds)
            self._judge(phase)
            restore(self.gm, self.best)
        self._save(phase)

    @property
    def _tiny_batches(self) -> bool:
        return self.judged[0].count < _MINIMUM_BATCH * self.processes.count

    def _check_labels(self) -> None:
        """The first process sees whether they fit, so that the original is asked once; all go by what it found."""
        problem: UsageError | None = None
        if self.processes.first:
            try:
                self._check(self.judged[0])
            except UsageError as error:
                problem = error
        problem, use_labels = self.processes.decided((problem, self.objective.use_labels))
        if problem is not None:
            raise problem
        self.objective.use_labels = use_labels
        if self.teacher is not None:
            self.teacher.share()

    def _check(self, first: Batch) -> None:
        if self.teacher is not None and self.options.teacher == "always":
            self.teacher.remember(self.judged)
            self.objective.check(self.teacher(first), first)
            return
        with torch.no_grad():
            self.objective.check(self.student.view(first.inputs), first)

    # ---- training --------------------------------------------------------------------------
    def _fit_into_time(self, found: Checkpoint | None) -> int:
        """Choose threads and the batch size; the number of samples that progress is judged on.

        All of it before the first judgement: on a busy machine that one alone could take longer than the budget.
        """
        if self.options.max_steps is not None:
            return _JUDGED_SAMPLES
        step_s = self._choose_threads(0.02)
        if found is not None:  # positions and distances of a resumed run refer to what it chose
            self.samples.limit_batch(found.state["batch_size"] or BATCH_SIZES[1])
            return int(found.state["judged_samples"])
        probe, count = self.samples.probe(pace.PROBE_SAMPLES)
        forward_s = step_s / 3
        if self.teacher is not None and self.options.teacher == "always":
            forward_s += pace.forward_seconds(self.teacher.view.gm, probe, 0.01 * self.budget_s) / count
        most = 0.5 * self.budget_s / _FEWEST_STEPS / step_s * self.processes.count
        most, judged = self.processes.numbers([most, JUDGING_SHARE * self.budget_s / forward_s])
        self.samples.limit_batch(int(most))
        return min(max(int(judged), pace.PROBE_SAMPLES), _JUDGED_SAMPLES)

    def _choose_threads(self, share: float) -> float:
        """Use one thread where several are slower, in `share` of the time; seconds per sample of a step."""
        probe, count = self.samples.probe(pace.PROBE_SAMPLES)
        inputs = self.student.view.given(probe)
        return pace.choose_threads(self.gm, inputs, self.most_threads, share * self.budget_s / 2) / count

    def _train(self) -> None:
        if self.phase != "training":  # else it is resumed, and its schedule goes on
            self.clock.training_from_s = self.clock.elapsed_s
        frozen = self._tiny_batches
        note = f"BatchNormalization kept its running statistics: batches have under {_MINIMUM_BATCH} samples"
        if frozen and batch_norms(self.gm) and note not in self.notes:
            self.notes.append(note)
        self.clock.judged(self.step)
        recent = [0.0, 0]  # sum and count of losses since the last judgement
        reported_s = 0.0
        now = self._now()
        while not now.finished:
            before = self.step
            for batch in self.samples.epoch(self.epoch, self.position):
                rate = self._rate(now)
                value = self._update(batch, now, frozen)
                self.step += 1
                self.position += 1
                recent = [recent[0] + value, recent[1] + 1]
                now = self._now()
                if now.due and not now.finished:
                    self._judge("training", loss=recent[0] / recent[1], learning_rate=rate)
                    if self.options.max_steps is None:
                        self._choose_threads(0.005)  # other work on the machine comes and goes
                    self.clock.judged(self.step)
                    recent, now = [0.0, 0], self._now()
                if now.finished:
                    break
                if self.clock.elapsed_s - reported_s > 1.0:
                    reported_s = self.clock.elapsed_s
                    self.report(now.fraction, f"step {self.step}, loss {value:.4g}")
            else:
                if self.step == before and self.position == 0:
                    raise UsageError(
                        "The training data gave no batch when iterated again; give a list, or an object "
                        "whose __iter__ starts from the beginning."
                    )
                self.epoch, self.position = self.epoch + 1, 0
        if recent[1]:
            self._judge("training", loss=recent[0] / recent[1], learning_rate=self._rate(now))

    def _now(self) -> Moment:
        """What holds for the next step, by the clock of the first process."""
        now = self.clock.moment(self.step)
        fraction, finished, due = self.processes.numbers([now.fraction, now.finished, now.due])
        return Moment(fraction, bool(finished), bool(due))

    def _rate(self, now: Moment) -> float:
        return self.rate_scale * self.options.learning_rate * now.rate

    def _update(self, batch: Batch, now: Moment, frozen: bool) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(now) * group["times"]
        value = self.objective(self.student.learn(batch.inputs, now.fraction, frozen=frozen), batch)
        if self.teacher is not None:
            self.teacher.share()
        self.optimizer.zero_grad(set_to_none=True)
        (value if self.processes.alone else batch.weight * value).backward()
        self.processes.sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, _CLIP_NORM)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:  # a diverged step: back to the best weights, without the momentum that led here
            restore(self.gm, self.best)
            self.optimizer.state.clear()
            self.rate_scale *= 0.5
            if len(self.notes) < 8:
                self.notes.append(f"step {self.step}: the gradient was not finite; weights were put back")
        return float(value.detach())

    # ---- checkpoints -----------------------------------------------------------------------
    def _save(self, phase: str) -> None:
        self.phase = phase
        if self.folder is None:
            return
        tensors = {f"current/{key}": value for key, value in snapshot(self.gm).items()}
        tensors |= {f"best/{key}": value for key, value in self.best.items()}
        for index, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value)
        if self.teacher is not None:
            counts = self.teacher.state()
            tensors |= {f"teacher/{key}": value for key, value in counts.items()}
        state = {
            "phase": phase,
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "rate_scale": self.rate_scale,
            "seconds": self.clock.elapsed_s,
            "training_from_s": self.clock.training_from_s,
            "judgement_s": self.clock.judgement_s,
            "judged_samples": sum(batch.count for batch in self.judged),
            "batch_size": self.samples.batch_size,
            "best_score": [x if math.isfinite(x) else None for x in self.best_score],
            "sizes": {} if self.student.resolutions is None else dict(self.student.resolutions.steps),
            "history": self.history,
            "notes": self.notes,
        }
        if self.processes.first:
            save_checkpoint(self.folder, self.identity, Checkpoint(tensors, state))

    def _resume(self, found: Checkpoint) -> None:
        state = found.state

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

        self.best = part("best/")
        restore(self.gm, part("current/"))
        for index, parameter in enumerate(self.parameters):
            values = part(f"optimizer/{index}/")
            if values:
                self.optimizer.state[parameter] = values
        if self.teacher is not None and self.processes.first:
            self.teacher.resume(part("teacher/"))
        self.phase, self.rate_scale = state["phase"], state["rate_scale"]
        self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
        self.clock.earlier_s = state["seconds"]
        self.clock.training_from_s = state["training_from_s"]
        self.clock.judgement_s = state["judgement_s"]
        if self.student.resolutions is not None:
            self.student.resolutions.steps.update({int(k): n for k, n in state["sizes"].items()})
        score = [-math.inf if x is None else x for x in state["best_score"]]
        self.best_score = (score[0], score[1])
        self.history = list(state["history"])
        self.notes = list(state["notes"])
