"""`reestimate-batch-norm`: running statistics of what norms see now."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Take running means and variances of BatchNormalization anew, on calibration data.

    Becomes: z = BatchNormalization(y, γ, β, μ, σ²)   →   z = BatchNormalization(y, γ, β, μ′, σ²′)

    μ′ and σ²′ are the averages over batches of the mean and the unbiased variance of y. A network that was cut has
    other activations than those its statistics were taken on; new ones win back a part of what the cut cost, without
    training.

    Requires: data. Before `fold-batch-norm`, which takes the norms away.

    Ensures: nothing changes but running statistics.

    Refuses when: there is no BatchNormalization. A norm keeps its statistics, with the reason, when they are computed
    or shared; it is in training mode or in a body of `If`; a batch gives it one value per channel; it or a statistic
    is kept.

    Reference: Li et al., "EagleEye: fast sub-net evaluation for efficient neural network pruning", ECCV 2020.
    """

    name: ClassVar[str] = "reestimate-batch-norm"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE
    needs_data: ClassVar[bool] = True

    samples: int = option(512, help="most samples of `calibration` that are looked at", minimum=1)
    batch: int = option(64, help="samples of one batch, where the model takes any number", minimum=1)

    def plan(self, program: Program, context: Context) -> Any:
        """Statistics by initializer. See `Pass.plan`.

        Raises:
            UsageError: the data do not fit, or a statistic is not finite.
        """
        if not any(node.op_type == "BatchNormalization" for node in program.graph.all_nodes()):
            reason = "it has no BatchNormalization; let this pass come before 'fold-batch-norm'"
            return Planned(None, (Refusal(program.source.name, reason),))
        found, left = context.supplied("statistics")(program, context, samples=self.samples, batch=self.batch)
        refusals = tuple(Refusal(node, reason) for node, reason in left)
        plan = {"statistics": {name: array.astype(np.float64).tolist() for name, array in found.items()}}
        return Planned(plan if found else None, refusals)

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Write them. See `Pass.apply`."""
        for name, values in plan["statistics"].items():
            old = program.initializer_array(name)
            rewriter.set_initializer(name, np.asarray(values).astype(old.dtype).reshape(old.shape))
            rewriter.count("statistics_reestimated")
