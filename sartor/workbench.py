"""What a fit does with one candidate: lower it, measure it against the baseline, score it, check it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.budget import Limit
from sartor.ir.program import Program
from sartor.tasks import LocalRunner, Runner

if TYPE_CHECKING:
    from sartor.backends.many_models import ModelTimes
    from sartor.backends.measure import Measurement
    from sartor.backends.protocol import Artifact, TargetOptions
    from sartor.data import Data
    from sartor.ir.plan import Plan
    from sartor.lowered import Lowered
    from sartor.profiling.inside import Inside, InsideEffort
    from sartor.study import Study


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """What to fit to, and how.

    Attributes:
        target: backend name.
        budget: upper limits by key: latency (s), macs, weight_bytes, peak_activation_bytes.
        threads: of the target.
        precision: of the target.
        max_drop: largest loss of score, points (1 point = 0.01).
        recovery_s: seconds of recovery; 0 for none.
        recovery: fields of `sartor.recovery.RecoveryOptions` by name, where they are not its defaults.
        repair: begin recovery with least squares of the layers behind what went (`sartor.passes.repair`).
        rounds: in which the plan is carried out and recovered; see `sartor.fit_rounds`.
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
    recovery: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repair: bool = True
    rounds: int = 1
    strategy: str = "budgeted-greedy"
    seed: int = 0
    keep: tuple[str, ...] = ()


class Workbench:
    """Target, data and baseline of one fit.

    Latencies compare with `baseline`, the original in the target's precision; scores with `exact`, the original in
    its own precision, which is another artifact where the target's is int8 or f16.

    Args:
        program: the original.
        options: target, threads, precision, seed.
        data: splits for scores, or None.
        folder: scratch folder for artifacts.
        runner: where candidates are measured and scored; this machine by default. Lowering, verification and what
            scores agree with stay here in any case. The caller closes it.
        study: where measured candidates are shared, or None.
    """

    def __init__(
        self,
        program: Program,
        options: FitOptions,
        data: Data | None,
        folder: Path,
        runner: Runner | None = None,
        study: Study | None = None,
    ):
        from sartor import backends
        from sartor.backends import isolation
        from sartor.backends.protocol import TargetOptions
        from sartor.precision import own_precision

        self.program, self.options, self.data, self.folder = program, options, data, folder
        self.runner: Runner = runner or LocalRunner()
        self.study = study
        self.backend = backends.get(options.target)
        self.target = TargetOptions(threads=options.threads, precision=options.precision)
        self.baseline = self.exact = self.lower(program, folder / "baseline")
        own = own_precision(program, options.precision)
        if own != options.precision and own in self.backend.capabilities().precisions:
            exact = dataclasses.replace(self.target, precision=own)
            self.exact = isolation.lower(options.target, program, folder / "exact", exact)
        self.reference = isolation.Session(self.exact, self._run_as(self.exact))

    def _run_as(self, artifact: Artifact) -> TargetOptions:
        return dataclasses.replace(self.target, precision=artifact.precision)

    def written(self, program: Program, precision: str = "") -> Program:
        """A candidate in its precision, by default the target's: what is lowered, verified and delivered."""
        from sartor.precision import in_precision

        data, precision = self._data_for(program), precision or self.options.precision
        return in_precision(program, precision, data, seed=self.options.seed)[0]

    def _data_for(self, program: Program) -> Data | None:
        """The data at the size that a candidate takes its inputs in."""
        shapes = self._resized(program.input_shapes)
        return self.data.at(shapes) if self.data is not None and shapes else self.data

    def _resized(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Inputs of another size than the original's, whatever the batch."""
        first = 1 if self.program.batch.symbolic else 0
        return {
            name: tuple(shape)
            for name, shape in shapes.items()
            if shape[first:] != self.program.input_shapes.get(name, shape)[first:]
        }

    def lower(self, program: Program, folder: Path, precision: str = "") -> Artifact:
        """The artifact of a candidate, in `folder`; see `written`."""
        from sartor.backends import isolation

        options = dataclasses.replace(self.target, precision=precision or self.options.precision)
        return isolation.lower(self.options.target, self.written(program, precision), folder, options)

    def measure(self, artifacts: list[Artifact], seconds: float, seed: int | None = None) -> Measurement:
        """Interleaved measurement of `artifacts`, the baseline first."""
        return self.measure_all([artifacts], seconds, seed)[0]

    def measure_all(
        self, candidates: Sequence[list[Artifact]], seconds: float, seed: int | None = None
    ) -> list[Measurement]:
        """One measurement per entry, each with its baseline first; at once where the runner has several devices."""
        from sartor.tasks import requests

        tasks = [
            requests.measure_task(
                self.options.target,
                artifacts,
                self.target,
                time_limit_s=seconds,
                target_half_width=0.005,
                seed=self.options.seed if seed is None else seed,
            )
            for artifacts in candidates
        ]
        return [requests.measurement(result) for result in self.runner.run_all(tasks)]

    def time_models(self, models: Sequence[bytes], options: TargetOptions, repeats: int) -> ModelTimes:
        """Times of many small models where candidates are measured; see `backends.many_models.time_models`."""
        from sartor.tasks import requests

        with tempfile.TemporaryDirectory(prefix="sartor-models-") as folder:
            task = requests.time_models_task(
                self.options.target, models, options, Path(folder), repeats=repeats
            )
            return requests.model_times(self.runner.run(task))

    def time_inside(
        self, models: Sequence[bytes], options: TargetOptions, effort: InsideEffort
    ) -> list[Inside]:
        """Times of models and of the kernels inside them where candidates are measured."""
        from sartor.tasks import requests

        with tempfile.TemporaryDirectory(prefix="sartor-models-") as folder:
            task = requests.time_inside_task(self.options.target, models, options, Path(folder), effort)
            return requests.insides(self.runner.run(task))

    def score(self, artifact: Artifact, split: str) -> tuple[float, int]:
        """Score of an artifact as its target runs it, and the number of samples."""
        from sartor.scoring import score
        from sartor.tasks.requests import Predictions

        assert self.data is not None
        batches = getattr(self.data, split)
        shapes = self._resized(artifact.shapes)
        answers = Predictions(self.runner, artifact, self._run_as(artifact), batches, shapes)
        return score(answers.predict, answers, self.data.metric, self.original)

    def shared(self, digest: str) -> dict[str, Any] | None:
        """What another run measured of a plan, as fields of the journal; None without a study."""
        return None if self.study is None else self.study.find(digest)

    def share(
        self, plan: Plan, fields: Mapping[str, Any], limits: Mapping[str, float], baseline_s: float
    ) -> None:
        """Put a measured candidate into the study, if there is one.

        Args:
            plan: of the candidate.
            fields: of the journal.
            limits: absolute limit by budget key.
            baseline_s: latency of the baseline, which makes seconds of a ratio.
        """
        if self.study is None:
            return
        values = {**fields["static"], "latency": fields["ci95"][1] * baseline_s}
        over = {f"{key} <= {limit:.6g}": values[key] / limit - 1 for key, limit in limits.items()}
        self.study.record(plan, fields, over)

    def original(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs of the original model to agree with: those that are understood, if there are any."""
        outputs: dict[str, Any] = self.reference.run(inputs)
        known = {value.name for value in self.program.graph.outputs} & set(outputs)
        return {name: array for name, array in outputs.items() if name in known or not known}

    def verify(self, program: Program, artifact: Artifact) -> Lowered:
        """Compare an artifact with its program on calibration samples, or on random ones where there are no data.

        Raises:
            VerificationError: it is above the tolerance of the precision.
        """
        from sartor import lowered

        result = lowered.verify(
            program, artifact, self._run_as(artifact), data=self._data_for(program), seed=self.options.seed
        )
        lowered.require(result)
        return result

    def close(self) -> None:
        """End the subprocess that holds the baseline."""
        self.reference.close()


def static_costs(program: Program) -> dict[str, int]:
    """MACs, parameters and bytes of a program, by the report's keys."""
    from sartor.cost_models.static import static_cost

    cost = static_cost(program)
    return {
        key: int(getattr(cost, key))
        for key in ("macs", "parameters", "weight_bytes", "peak_activation_bytes")
    }
