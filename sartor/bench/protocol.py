"""The protocol of every metric: its numbers, and the sentence that stands beside the result.

Times under different protocols cannot be compared, so that none is shown without its own.
"""

from __future__ import annotations

import dataclasses

from sartor.backends.protocol import PRECISIONS
from sartor.errors import UsageError

WARM_UP_RUNS = 10
RUNS = 50
VISITS = 5
"""The runs of a network are taken in so many visits, in turn with the other networks of its target."""
FEWEST_RUNS = 3
GROWTH = 1.02
"""A batch that gives less than this times the best throughput so far has not grown."""
MEMORY_SHARE = 0.5
"""Of the memory that is free: a batch that would need more is not tried."""

PROTOCOL = {
    "latency": f"batch 1; {WARM_UP_RUNS} runs to warm up, then {RUNS} runs in {VISITS} visits, in turn with the other "
    "models on the target and with the parameterized ones; one further run at the start of each visit is "
    "discarded; the mean (median, p10 and p90 beside it); inputs and outputs bound before the clock starts",
    "throughput": f"batch doubled from 1 until memory is used up, the time is over, a limit of the batch is reached, "
    f"or two doublings in a row give less than {GROWTH:g} times the best; each batch {WARM_UP_RUNS} runs to warm up "
    f"and {RUNS} runs, or as many as its share of the time allows; samples over the mean time of a run; the best "
    "batch; EDLAB grows the batch until memory is used up or the time is over, the other two ends are departures; what "
    "ended it stands beside each result",
    "accuracy": "the converted model on the whole test split, every sample once, batch 1; the score of sartor.scoring",
    "flops": "F = T x FLOPs, T the throughput and FLOPs = 2 x MACs of one sample (Conv, ConvTranspose, Gemm, MatMul "
    "and recurrent operators of the model as it was given; 1 MAC = 2 FLOP), in every precision",
    "power": "highest draw that an on-board sensor showed during the runs of the best batch of the throughput, warm-up "
    "included and nothing before it; absent without a sensor",
    "efficiency": "E = T / P",
    "conversion": "seconds from the program to the artifact: legality, the target's compiler in a subprocess of its "
    "own, its start included, with no earlier conversion kept; capture and quantization are apart (preparation)",
    "roofline": "median latency at batch 1 of generated convolutional networks over depth, width, resolution and "
    "kernel size; the envelope joins those that no other beats in both work and time, and a model's share is the "
    "envelope's time at its work over its own; above 100 % it is faster than the generated ones between which it lies",
}
"""What each number is, by metric."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Deployment parameters and limits, the same for every model and target.

    Attributes:
        precisions: of `sartor.backends.protocol.PRECISIONS`.
        threads: compute threads of every target.
        batch_limit: largest batch of the throughput.
        time_limit_s: of the latency runs of one model, and again of its throughput.
        family_limit_s: of the parameterized models of one target and precision, conversion included; 0: none.
        conversion_limit_s: of one conversion.
        memory_limit_bytes: address space of each subprocess; None: see `process.default_memory_limit`.
        seed: of inputs, of random calibration data and of the family's weights.
    """

    precisions: tuple[str, ...] = ("f32",)
    threads: int = 1
    batch_limit: int = 256
    time_limit_s: float = 30.0
    family_limit_s: float = 60.0
    conversion_limit_s: float = 1800.0
    memory_limit_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [p for p in self.precisions if p not in PRECISIONS]
        if unknown or not self.precisions or len(set(self.precisions)) != len(self.precisions):
            raise UsageError(
                f"Precisions are {list(self.precisions)}; expected one or more of {', '.join(PRECISIONS)}, each once."
            )
        if self.batch_limit < 1 or self.threads < 1:
            raise UsageError("'batch_limit' and 'threads' must be at least 1.")

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form, for the report."""
        document = dataclasses.asdict(self) | {"precisions": list(self.precisions)}
        document["batch_limit_samples"] = document.pop("batch_limit")
        return {k: v for k, v in document.items() if v is not None}
