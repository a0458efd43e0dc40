"""Recoveries that several processes run together; one process that runs them alone gives what is compared.

torchrun --nproc-per-node 2 recovery_processes.py OUT
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from test_recovery import network, normal, samples, score, steps
from test_recovery_teacher import plain

from sartor.recovery import RecoveryOptions, RecoveryResult, distill
from sartor.recovery import samples as training_set
from sartor.recovery.processes import Processes, together

STEPS = steps(12, learning_rate=1e-2)


def resumed(folder: Path, **more: object) -> RecoveryResult:
    """A recovery with a checkpoint in `folder`."""
    data = samples(64, labels="ids", batch=32)
    return distill(plain(1), plain(), data, minutes=1, seed=0, checkpoint_dir=folder, options=STEPS, **more)  # type: ignore[arg-type]


def runs(folder: Path, processes: Processes) -> Iterator[tuple[str, RecoveryResult]]:
    """Name and result of each recovery."""
    data = samples(64, labels="ids", batch=32)
    judged, lines = [], []

    def evaluate(predict: object) -> float:
        judged.append(processes.rank)
        return score(predict, data)

    def progress(fraction: float, text: str) -> None:
        lines.append(text)

    yield (
        "plain",
        distill(
            plain(1), plain(), data, minutes=1, seed=0, options=STEPS, evaluate=evaluate, progress=progress
        ),
    )
    assert bool(judged) == bool(lines) == processes.first, "the first process judges and reports"
    better = itertools.count()  # the last state is kept: that of re-estimated statistics
    yield (
        "norms",
        distill(
            network(noise=0.3),
            network(),
            data,
            minutes=1,
            seed=0,
            options=STEPS,
            evaluate=lambda predict: float(next(better)),
        ),
    )
    wrong = RecoveryOptions(teacher="wrong", max_steps=12, learning_rate=1e-9, rat=0.5)
    yield "wrong", distill(plain(1), plain(), data, minutes=1, seed=0, options=wrong)
    yield "resumed", resumed(folder / "checkpoint")
    yield "timed", distill(plain(1), plain(), data, minutes=0.5 / 60, seed=0, threads=1)
    before, training_set.CACHE_BYTES = training_set.CACHE_BYTES, 1000
    uneven = [({"x": normal(count, 3, 6, 6, seed=count)}, None) for count in (16, 7, 12)]
    yield "streamed", distill(plain(1), plain(), uneven, minutes=1, seed=0, options=STEPS)
    training_set.CACHE_BYTES = before


def write(folder: Path, processes: Processes) -> None:
    """Write weights and what is said of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in runs(folder, processes):
        arrays = {k: result.program.initializer_array(k) for k in result.program.initializers}
        np.savez(folder / f"{name}.{processes.rank}.npz", **arrays)  # type: ignore[arg-type]
        history = [[e["phase"], e["distance"], e["kept"]] for e in result.history]
        said = {"steps": result.steps, "asked": result.asked, "notes": result.notes, "history": history}
        (folder / f"{name}.{processes.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    with together() as found:
        write(Path(sys.argv[1]), found)
