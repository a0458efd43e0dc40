"""Time per node of the reference: the twin runs node by node anyway."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from sartor.backends.inputs import random_inputs
from sartor.backends.protocol import Artifact, KernelTime, TargetOptions
from sartor.backends.reference import run
from sartor.ir.fx_run import Runner

if TYPE_CHECKING:
    from torch import fx

_WARM_UP_RUNS = 1


class TimedRunner(Runner):
    """A twin that adds up seconds by node of the program, for as long as one run takes."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node, with the reading of its weights."""
        started = time.perf_counter()
        result = super().run_node(n)
        name = n.meta.get("onnx_node", "")
        if name:  # inputs, weights and outputs belong to no node
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per node over `runs` inferences, in execution order.

    Raises:
        UsageError: precision or shapes.
        BackendError: the model cannot be loaded or run.
    """
    made: list[TimedRunner] = []

    def runner(*arguments: Any) -> TimedRunner:
        made.append(TimedRunner(*arguments))
        return made[0]

    session = run.session(artifact, options, runner)
    once = session.prepare(random_inputs(artifact.inputs, {**artifact.shapes, **options.shapes}, seed=0))
    samples: list[dict[str, float]] = []
    for index in range(_WARM_UP_RUNS + runs):
        made[0].seconds = {}
        once()
        if index >= _WARM_UP_RUNS:
            samples.append(made[0].seconds)
    types = {node.name: node.op_type for node in made[0].program.nodes()}
    return [
        KernelTime(
            name=name,
            op_type=types.get(name, ""),
            nodes=(name,) if name in types else (),
            median_s=statistics.median(sample[name] for sample in samples),
            runs=runs,
            implementation="torch float64",
        )
        for name in samples[0]
    ]
