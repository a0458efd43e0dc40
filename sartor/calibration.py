"""Calibration data: which split passes look at, and its first samples in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.data import Split, signatures
from sartor.data_sources import sample_count
from sartor.errors import UsageError
from sartor.passes.base import CALIBRATION_SPLITS

if TYPE_CHECKING:
    from sartor.ir.program import Program
    from sartor.passes.base import Context

Inputs = dict[str, np.ndarray]


def calibration_split(program: Program, splits: Mapping[str, Any], purpose: str) -> Split:
    """The split that passes look at, checked against the program's inputs.

    Args:
        program: whose inputs the data must fit.
        splits: by name; the first of `CALIBRATION_SPLITS` that is there counts.
        purpose: what the data are for, as a clause, for the message.

    Raises:
        UsageError: there is none; it is empty; names, types or shapes of its arrays are not those of the inputs.
    """
    name = next((name for name in CALIBRATION_SPLITS if splits.get(name) is not None), None)
    if name is None:
        wanted = ", ".join(f"'{k}' {list(v)}" for k, v in program.input_shapes.items())
        raise UsageError(
            f"There is no calibration data: {purpose} ({wanted}). Give --data FILE.npz or FILE.py:function with the "
            "split 'calibration'."
        )
    return Split(name, splits[name], list(program.input_shapes), signatures(program), finite_labels=False)


def batches(program: Program, context: Context, *, samples: int, batch: int) -> Iterator[Inputs]:
    """The first samples of the calibration data, in batches of one size where the batch axis is free.

    Samples of several of the source's batches are joined, as long as inputs without samples are the same. A program
    of fixed batch size gets whole batches, until they have that many samples.

    Args:
        program: whose inputs the data must fit.
        context: with the data.
        samples: most samples.
        batch: samples of each batch; the last one may have fewer.

    Yields:
        One array per input.

    Raises:
        UsageError: as `calibration_split`.
    """
    split = calibration_split(program, context.data, "the network is run on real inputs")
    free = program.batch.inputs if program.batch.symbolic else ()
    left = samples
    held: Inputs = {}
    for inputs, _ in split:
        if left <= 0:
            break
        count = sample_count(inputs, program.batch.inputs)
        if not free:
            left -= count
            yield dict(inputs)
            continue
        taken = {name: array[:left] if name in free else array for name, array in inputs.items()}
        left -= count
        if held and any(not np.array_equal(held[name], taken[name]) for name in taken if name not in free):
            yield held
            held = {}
        held = {
            name: np.concatenate([held[name], array]) if held and name in free else array
            for name, array in taken.items()
        }
        length = len(held[free[0]])
        for start in range(0, length - batch + 1, batch):
            yield {
                name: array[start : start + batch] if name in free else array for name, array in held.items()
            }
        rest = length % batch
        held = (
            {n: array[length - rest :] if n in free else array for n, array in held.items()} if rest else {}
        )
    if held:
        yield held
