"""What one step of training costs: its time and its memory, for searches that weigh training beside inference.

    time   = 3 · forward(batch) + optimiser traffic / bandwidth
    memory = weights · (1 + gradients 1 + optimiser states) + batch · activations kept for the backward pass

The backward pass computes a gradient of the inputs and one of the weights, each with the products of the forward
pass: the source counts training FLOPs as exactly three times those of inference. A kernel keeps what leaves it,
and once more what it normalises; activations in place keep nothing of their own.

Reference: H. Kong, "Adaptive Neural Networks for Edge Intelligence", PhD thesis, NTU, 2023, section 5.2 (TICO):
equations 5.15 and 5.16 for the resolution of each epoch, table 5.11 for measured steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sartor.cost_models.protocol import CostEstimate
from sartor.cost_models.roofline import Roofline
from sartor.errors import UsageError
from sartor.ir.kernels import Kernel
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.quantities import Quantity
from sartor.ir.workload import Workload, presence

OPTIMISER_STATES = {"sgd": 0, "momentum": 1, "adam": 2}
"""Numbers that an optimiser keeps for every weight."""
PASSES = 3
"""Of a step, each as dear as inference: forward, gradient of the inputs, gradient of the weights."""
_DOUBLE_NODES = frozenset({"Silu"})


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """Costs of one step for a population of plans, each an array `[plans]` (0-d for a single plan).

    Attributes:
        step_s: seconds.
        macs: of forward and backward.
        state_bytes: weights, gradients and the optimiser's states.
        activation_bytes: kept from the forward to the backward pass, for the whole batch.
    """

    step_s: np.ndarray
    macs: np.ndarray
    state_bytes: np.ndarray
    activation_bytes: np.ndarray

    @property
    def step_bytes(self) -> np.ndarray:
        """All of it; workspaces and the framework's own memory are not in it."""
        return self.state_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True)
class TrainingModel:
    """Prices a step of training; see the module docstring.

    Attributes:
        forward: prices the forward pass, and gives the bandwidth for the optimiser's traffic.
        batch: samples of a step.
        optimiser: `sgd`, `momentum` or `adam`.
    """

    forward: Roofline
    batch: int = 128
    optimiser: str = "momentum"

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISER_STATES:
            raise UsageError(
                f"Optimiser '{self.optimiser}' is not known; use one of {sorted(OPTIMISER_STATES)}."
            )
        if self.batch < 1:
            raise UsageError(f"A batch of {self.batch} cannot be trained on; use at least 1.")

    @property
    def method(self) -> str:
        """One line for people."""
        return f"training step, batch {self.batch}, {self.optimiser}, three passes of {self.forward.method}"

    def evaluate(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> TrainingCost:
        """Price a population of plans, at the first of the input sizes where several are declared.

        Raises:
            PlanError: a removed block is not in the workload.
        """
        workload = workload if workload.sweep is None else workload.at()
        workload.check_removed(removed or {})
        plans = Population(fractions or {}, removed or {})
        priced = workload.evaluate(fractions, removed)
        batches = self.batch / _own_batch(workload)
        kept = plans.total([(presence(k), _kept(k)) for k in workload.kernels])
        states = OPTIMISER_STATES[self.optimiser]
        # Read weights, gradients and states; write weights and states.
        traffic = priced.weight_bytes * (3 + 2 * states)
        forward_s = self.forward.estimate_batch(workload, fractions, removed, batches=batches)
        return TrainingCost(
            step_s=PASSES * forward_s + traffic / self.forward.constants.bytes_per_s,
            macs=PASSES * batches * priced.macs,
            state_bytes=priced.weight_bytes * (2 + states),
            activation_bytes=batches * kept,
        )

    def estimate(
        self, workload: Workload, fractions: Fractions | None = None, removed: Removed | None = None
    ) -> CostEstimate:
        """Price one plan: metrics `train_step_s`, `train_step_bytes` and `train_step_macs`.

        Raises:
            PlanError: a removed block is not in the workload.
        """
        cost = self.evaluate(workload, fractions, removed)
        metrics = {
            "train_step_s": float(cost.step_s),
            "train_step_bytes": float(cost.step_bytes),
            "train_step_macs": float(cost.macs),
        }
        left_out = ("workspaces of kernels", "the framework's own memory", "loading and augmenting data")
        return CostEstimate(self.method, metrics, unmodelled=left_out)


def _own_batch(workload: Workload) -> float:
    first = next((o for k in workload.kernels for o in k.inputs if o is not None and not o.stored), None)
    return first.dims[0].full if first is not None and first.dims else 1.0


def _kept(kernel: Kernel) -> Quantity:
    """Activations that the backward pass needs of a kernel."""
    left = sum((o.bytes for o in kernel.outputs if "FLOAT" in o.dtype), Quantity())
    inside = 1 + sum(2 if _gated(op.op_type, op.attributes) else 1 for op in kernel.epilogue)
    normalised = len(kernel.nodes) > inside  # a BatchNormalization is in the nodes, not in the epilogue
    return left + left if normalised else left


def _gated(op_type: str, attributes: Any) -> bool:
    return op_type in _DOUBLE_NODES or (op_type == "HardSwish" and bool(attributes))


def resolution_at(done: float | np.ndarray, resolution: float, start: float = 0.5) -> np.ndarray:
    """Resolution of adaptive training when a share `done` of it is over, not rounded (5.15, 5.16).

    `r = ½ (cos((done + 1) π) + 1) (r_n - r_0) + r_0` with `r_0 = start · r_n`.

    Args:
        done: `i / n` of epochs, or of time, in [0, 1].
        resolution: r_n, at the end.
        start: share of it at the beginning.
    """
    first = start * resolution
    return np.asarray(0.5 * (np.cos((np.asarray(done) + 1.0) * math.pi) + 1.0) * (resolution - first) + first)


def epoch_resolutions(resolution: int, epochs: int, start: float = 0.5) -> np.ndarray:
    """Resolution of each epoch of resolution-adaptive training, an int array `[epochs]`.

    To the nearest integer of `resolution_at(i / n)`, which reproduces the source's tables where rounding down does
    not.

    Args:
        resolution: of the last epochs.
        epochs: n.
        start: share of it in the first epoch; 0.5 is inferred from tables 5.6 and 5.11.

    Raises:
        UsageError: no epoch, or a start outside (0, 1].
    """
    if epochs < 1 or not 0 < start <= 1:
        raise UsageError(
            f"A schedule of {epochs} epochs from {start} of the resolution does not exist; use at least one "
            "epoch and a start above 0 and up to 1."
        )
    return np.rint(resolution_at(np.arange(epochs) / epochs, resolution, start)).astype(int)


def adaptive_share(resolution: int, epochs: int, start: float = 0.5) -> float:
    """Training MACs with that schedule, as a share of those at full resolution: `mean(r_i²) / r²`."""
    return float(np.mean(epoch_resolutions(resolution, epochs, start).astype(float) ** 2)) / resolution**2
