"""Models before they meet a target: at one sample per run, in a precision, and what they cost on paper."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sartor.backends.precision import precision_of
from sartor.errors import UsageError
from sartor.precision import own_precision, written_in

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program

FLOP_PER_MAC = 2
_CALIBRATION_SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program in a precision.

    Attributes:
        program: at one sample per run where its batch allows it.
        seconds: that the passes took.
        calibration: `data`, `random inputs`, or empty where nothing was calibrated.
    """

    program: Program
    seconds: float = 0.0
    calibration: str = ""


def at_batch(program: Program, samples: int) -> Program:
    """`program` with reference shapes of so many samples.

    Raises:
        UsageError: its batch is fixed.
    """
    from sartor.ir.batch import with_shapes

    if not program.batch.symbolic:
        raise UsageError(f"The batch of '{program.source.name}' is fixed because {program.batch.reason}.")
    shapes = {name: (samples, *program.input_shapes[name][1:]) for name in program.batch.inputs}
    return with_shapes(program, shapes)


def samples_per_run(program: Program) -> int:
    """Samples that one run takes: 1, or the batch that the model is fixed to, as far as its inputs agree on it."""
    if program.batch.symbolic:
        return 1
    leading = {shape[0] for shape in program.input_shapes.values() if shape}
    return leading.pop() if len(leading) == 1 else 1


def identify(program: Program) -> dict[str, Any]:
    """What a model is called, and which one it is."""
    return {
        "name": program.source.name,
        "sha256": program.sha256(),
        "input_shapes": _shapes(program),
    }


def _shapes(program: Program) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in program.input_shapes.items()}


def describe(program: Program) -> dict[str, Any]:
    """The model's entry in a report: what identifies it, and its costs for one sample.

    Raises:
        ModelError: a shape depends on data, so that they cannot be counted.
    """
    from sartor.cost_models.static import static_cost

    single = at_batch(program, 1) if program.batch.symbolic else program
    cost, samples = static_cost(single), samples_per_run(program)
    return {
        **identify(program),
        "input_shapes": _shapes(single),
        "precision": precision_of(program),
        "macs": cost.macs // samples,
        "operations_flop": FLOP_PER_MAC * cost.macs // samples,
        "parameters": cost.parameters,
        "weight_bytes": cost.weight_bytes,
        "peak_activation_bytes": cost.peak_activation_bytes // samples,
    }


def prepare(program: Program, precision: str, data: Data | None, seed: int) -> Prepared:
    """The program in `precision`; as it is, where it is written in it or the runtime sees to it.

    Raises:
        SartorError: a pass refuses the program or the data.
    """
    single = at_batch(program, 1) if program.batch.symbolic else program
    if own_precision(single, precision) == precision:
        return Prepared(single)
    from sartor.passes.base import Context

    begun = time.perf_counter()
    calibration: Any = data.calibration if data is not None else random_batches(single, seed)
    context = Context(data={"calibration": calibration}, seed=seed)
    written, _ = written_in(single, precision, context)
    used = "data" if data is not None else "random inputs"
    return Prepared(written, time.perf_counter() - begun, used)


def random_batches(program: Program, seed: int) -> list[tuple[dict[str, Any], None]]:
    """Random calibration data: enough for times, and for nothing else."""
    from sartor.ir.batch import random_inputs

    return [(random_inputs(program, seed=seed + i), None) for i in range(_CALIBRATION_SAMPLES)]


def distinct(programs: Sequence[Program]) -> None:
    """Refuse models that a report could not tell apart.

    Raises:
        UsageError: none is given, or two have one name.
    """
    names = [program.source.name for program in programs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        observed = f"two are named '{twice[0]}'" if twice else "none is given"
        raise UsageError(
            f"A benchmark needs models with names of their own, and {observed}; rename or add one."
        )
