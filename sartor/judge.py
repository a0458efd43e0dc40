"""How good a candidate is before anything is trained: its loss and score, and what of it matters.

The network of a plan is what recovery would begin with: layers behind what went are repaired by least squares, on few
samples; where there are none, or `repair` is not wanted, it gets new BatchNormalization statistics. Without either, a
narrow network says nothing, and whoever compares would rather give up blocks or pixels. It then answers some samples of
`evaluate`. Everything that was found out is in the run's journal, so that a run that is resumed
makes the same decisions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.errors import SartorError, UsageError
from sartor.images import at_shapes
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.journal import Journal
from sartor.strategies import criteria
from sartor.strategies.importance import Importance, Subject
from sartor.study import plan_digest
from sartor.unit_scores import Limited, unit_scores_of

if TYPE_CHECKING:
    from sartor.workbench import Workbench

SAMPLES = 512
"""Samples of `evaluate` that a candidate answers."""
_REPAIR_SAMPLES, _REPAIR_POSITIONS = 128, 32
_STATISTICS_BATCHES = 8
_TIMED_STEPS = 3
_MOST_MINUTES = 24 * 60.0  # steps end a training of candidates, not the clock
_WORST = 1e30


class Judge:
    """See the module docstring. Satisfies `sartor.strategies.space.Judge`.

    Args:
        bench: model, data and seed.
        analysis: channel groups of the original.
        blocks: its residual blocks.
        journal: of the run.
        progress: called with a line of text per candidate.
    """

    def __init__(
        self,
        bench: Workbench,
        analysis: ChannelAnalysis,
        blocks: Sequence[Any],
        journal: Journal,
        progress: Callable[[str], None],
    ):
        self._bench, self._analysis, self._blocks = bench, analysis, blocks
        self._journal, self._progress = journal, progress
        self._base, self._tuned = bench.program, ""

    @property
    def has_data(self) -> bool:
        """Whether there is anything to judge by."""
        return self._bench.data is not None

    def loss(self, plan: Plan) -> float:
        """Mean loss against labels, by the data's own loss where there is one; without labels, against the original.

        Raises:
            UsageError: there are no data.
        """
        return float(self._judged(plan)["loss"])

    def score(self, plan: Plan) -> float:
        """Score on the same samples, as `sartor.scoring` defines it.

        Raises:
            UsageError: there are no data.
        """
        return float(self._judged(plan)["score"])

    def prospect(self, plan: Plan, share: float) -> float:
        """Score on `evaluate` after a part of the time that recovery has; without recovery, `score`.

        Args:
            plan: of the network.
            share: of the time.

        Raises:
            UsageError: there are no data.
        """
        seconds = share * self._bench.options.recovery_s
        if seconds <= 0:
            return self.score(plan)
        digest = self._digest(plan)
        known = self._journal.find("prospect", plan=digest, seconds=seconds)
        if known is None:
            score = self._recovered(plan, seconds)
            known = self._journal.append("prospect", plan=digest, seconds=seconds, score=score)
            self._progress(f"candidate: score {known['score']:.3f} after {seconds:.1f} s of recovery")
        return float(known["score"])

    def tune(self, plan: Plan, steps: int) -> None:
        """Train a plan's network, and judge with the weights that it gets from here on.

        Args:
            plan: of the network; the part that it leaves of those judged later has these weights.
            steps: of training.

        Raises:
            UsageError: there are no data, or the network cannot be trained.
        """
        from sartor.recovery.distillation import RecoveryOptions, distill
        from sartor.tuning import put_back

        digest = self._digest(plan)
        found = distill(
            self._program(plan),
            self._bench.program,
            self._data.train or self._data.calibration,
            minutes=_MOST_MINUTES,
            seed=self._bench.options.seed,
            loss=self._data.loss,
            threads=len(os.sched_getaffinity(0)),
            checkpoint_dir=self._bench.folder / "tuned" / digest[-80:],
            options=RecoveryOptions(**{**self._bench.options.recovery, "max_steps": steps}),
        )
        self._base = put_back(self._base, plan, self._analysis, found.program)
        self._tuned = f"-{self._base.sha256()[:16]}"
        self._progress(f"candidate: {found.steps} steps of training")

    def training(self, plan: Plan) -> tuple[float, float]:
        """Seconds per sample of a training step, and bytes that one of a batch holds.

        Bytes are those that the backward pass needs, and three times the parameters: gradients and two moments.

        Raises:
            UsageError: there are no data.
        """
        known = self._journal.find("training", plan=plan_digest(plan))
        if known is None:
            seconds, size = self._trained(plan)
            known = self._journal.append("training", plan=plan_digest(plan), seconds=seconds, bytes=int(size))
        return float(known["seconds"]), float(known["bytes"])

    def importance(self, plan: Plan, criterion: str = "") -> tuple[ChannelAnalysis, Importance]:
        """Groups of a plan's network, and what matters in it on `calibration`.

        Args:
            plan: of the network.
            criterion: of `sartor.strategies.criteria`; by default gradients of gates, as for the original.

        Raises:
            UsageError: there are no data, or gates say nothing about this network.
        """
        from sartor.ir.blocks import residual_blocks

        program, _ = self._begun(plan)
        analysis = channel_groups(program, self._bench.options.keep)
        shapes = {name: shape for name, shape in program.input_shapes.items() if name in plan.sizes}
        names = {block.name for block in self._blocks} - set(plan.blocks)
        blocks = [block for block in residual_blocks(program) if block.name in names]
        if not criterion:
            return analysis, unit_scores_of(self._bench, program, analysis, blocks, shapes)[0]
        samples = Limited(self._data.at(shapes).calibration)
        subject = Subject(program, analysis, blocks, samples, self._data.loss, self._bench.options.seed)
        return analysis, criteria.criterion(criterion).unit_importance(subject)

    def layer_scores(self, criterion: str) -> Mapping[str, float]:
        """Importance of the original's blocks; see `sartor.strategies.layer_scores`.

        Raises:
            UsageError: there is no such criterion, or it needs data that are missing.
        """
        from sartor.strategies.layer_scores import layer_scores

        data = self._bench.data
        return layer_scores(
            criterion,
            self._bench.program,
            self._blocks,
            data=None if data is None else Limited(data.calibration),
            loss=None if data is None else data.loss,
            seed=self._bench.options.seed,
        )

    # ---- one candidate ---------------------------------------------------------------------
    def _judged(self, plan: Plan) -> Mapping[str, Any]:
        digest = self._digest(plan)
        known = self._journal.find("judged-plan", plan=digest)
        if known is None:
            loss, score = self._answers(plan)
            finite = math.isfinite(loss)  # a network whose loss is not is the worst of all
            known = self._journal.append(
                "judged-plan", plan=digest, loss=loss if finite else _WORST, score=score
            )
            self._progress(f"candidate: loss {loss:.4g}, score {score:.3f}")
        return known

    def _program(self, plan: Plan) -> Program:
        from sartor.passes.prune import apply_plan

        return apply_plan(self._base, plan, self._analysis)

    def _digest(self, plan: Plan) -> str:
        """What is known of a plan belongs to the weights that it was judged with."""
        return plan_digest(plan) + self._tuned

    def _begun(self, plan: Plan) -> tuple[Program, bool]:
        """A plan's network as recovery would begin with it, and whether anything was repaired."""
        program, options = self._program(plan), self._bench.options
        if self._tuned or not ((plan.groups or plan.blocks) and options.repair):
            return program, False  # what was trained is no longer what the original's layers make
        try:
            found = self._repair.run(program, self._reference(tuple(sorted(plan.sizes.items()))))
        except SartorError:  # one that cannot be repaired is judged as it is
            return program, False
        return found.program, found.modified

    @property
    def _repair(self) -> Any:
        from sartor.passes.repair import Repair

        return Repair(samples=_REPAIR_SAMPLES, positions=_REPAIR_POSITIONS, seed=self._bench.options.seed)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a judge lives as long as its search)
    def _reference(self, sizes: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
        """What networks of an input size are repaired to: the original at that size, with what its layers make."""
        from sartor.passes.base import Context

        original = self._bench.program
        if sizes:
            original = self._program(Plan(original.source.sha256, sizes=dict(sizes)))
        data = {"calibration": self._data.at(dict(sizes)).calibration}
        context = Context(data=data, original=original)
        return dataclasses.replace(context, extras={"targets": self._repair.targets(original, context)})

    def _twin(self, plan: Plan) -> tuple[Any, Mapping[str, tuple[int, ...]]]:
        """The twin of a plan's network, and the shapes it takes."""
        import torch

        from sartor.ir.fx import pull_weights, to_fx, to_tensor, twin_info
        from sartor.recovery.twins import reestimate_statistics

        program, mended = self._begun(plan)
        twin = to_fx(program, dtype=torch.float32)
        info = twin_info(twin)
        if not mended:
            batches = itertools.islice(self._data.at(plan.sizes).calibration, _STATISTICS_BATCHES)
            reestimate_statistics(
                twin, ([to_tensor(inputs[name], info.dtype) for name in info.inputs] for inputs, _ in batches)
            )
        if plan.precision:
            written = self._bench.written(pull_weights(program, twin), plan.precision)
            twin = to_fx(written, dtype=torch.float32)
        return twin, plan.sizes

    def _answers(self, plan: Plan) -> tuple[float, float]:
        import torch

        from sartor.recovery import losses
        from sartor.recovery.twins import predictor
        from sartor.scoring import score

        twin, shapes = self._twin(plan)
        predict = predictor(twin)
        probabilities = losses.probability_outputs(self._bench.program)
        given = self._samples
        answers = [predict(at_shapes(inputs, shapes)) for inputs, _ in given]
        total = count = 0.0
        for answer, (inputs, labels), expected in zip(answers, given, self._expected, strict=True):
            outputs = {name: torch.from_numpy(np.array(array)) for name, array in answer.items()}
            wanted = None if labels is None else torch.from_numpy(np.array(labels))
            if self._data.loss is not None:
                value = losses.checked(self._data.loss(outputs, wanted))
            elif wanted is None or self._data.metric is not None:
                teacher = {name: torch.from_numpy(np.array(array)) for name, array in expected.items()}
                value = losses.distillation_loss(outputs, teacher, 1.0, probabilities)
            else:
                value = losses.label_loss(outputs, wanted, probabilities)
            samples = len(next(iter(inputs.values())))
            total, count = total + float(value) * samples, count + samples
        found = iter(answers)
        expected_of = iter(self._expected)
        scored, _ = score(lambda _: next(found), given, self._data.metric, lambda _: next(expected_of))
        return total / count, scored

    def _recovered(self, plan: Plan, seconds: float) -> float:
        from sartor.recovery.distillation import RecoveryOptions, distill
        from sartor.scoring import score

        data = self._data

        def evaluate(predict: Callable[..., Any]) -> float:
            return score(predict, self._samples, data.metric, self._bench.original)[0]

        program, _ = self._begun(plan)  # takes what it takes: in a part of the time a repair might not end
        found = distill(
            program,
            self._bench.program,
            data.train or data.calibration,
            minutes=seconds / 60.0,
            seed=self._bench.options.seed,
            loss=data.loss,
            threads=len(os.sched_getaffinity(0)),
            evaluate=evaluate,
            options=RecoveryOptions(**self._bench.options.recovery),
        )
        return max((entry["score"] for entry in found.history if "score" in entry), default=0.0)

    def _trained(self, plan: Plan) -> tuple[float, float]:
        import torch

        from sartor.ir.fx import to_tensor, twin_info
        from sartor.recovery import losses

        twin, shapes = self._twin(plan)
        info = twin_info(twin)
        inputs = at_shapes(self._samples[0][0], shapes)
        tensors = [to_tensor(inputs[name], info.dtype) for name in info.inputs]
        parameters = [p for p in twin.parameters() if p.requires_grad]
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        times = []
        for index in range(_TIMED_STEPS):
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(pack if not index else lambda t: t, lambda t: t):
                outputs = dict(zip(info.outputs, twin(*tensors), strict=True))
                value = losses.output_energy(outputs)
            value.backward()  # type: ignore[no-untyped-call]
            times.append(time.perf_counter() - start)
            for parameter in parameters:
                held.pop(parameter.untyped_storage().data_ptr(), None)
                parameter.grad = None
        size = sum(held.values()) + 4 * sum(p.numel() * p.element_size() for p in parameters)
        return min(times) / len(tensors[0]), float(size)

    # ---- what candidates are judged on -----------------------------------------------------
    @property
    def _data(self) -> Any:
        if self._bench.data is None:
            raise UsageError("Candidates cannot be judged without data; give data.")
        return self._bench.data

    @functools.cached_property
    def _samples(self) -> list[Any]:
        return list(Limited(self._data.evaluate, SAMPLES))

    @functools.cached_property
    def _expected(self) -> list[dict[str, Any]]:
        """What the original says; only a loss or score without labels reads it."""
        if all(labels is not None for _, labels in self._samples) and self._data.metric is None:
            return [{} for _ in self._samples]
        return [self._bench.original(inputs) for inputs, _ in self._samples]
