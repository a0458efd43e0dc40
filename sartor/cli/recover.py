"""Train a pruned model with the original as its teacher, and write the best state seen.

The data come at the original's input size. Several processes share every batch when torchrun starts them:
  torchrun --nproc-per-node 2 -m sartor recover PRUNED.onnx --original MODEL.onnx --data DATA --out OUT.onnx
A run that was killed goes on where it was: the same command resumes from '.OUT.onnx.recovery' beside the output.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments
from sartor.cli.output import Result, table
from sartor.cli.progress import Progress
from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.recovery import RecoveryOptions, RecoveryResult
    from sartor.recovery.processes import Processes

EXAMPLE = (
    "sartor recover small.onnx --original model.onnx --data data.py:digits --minutes 5 --out recovered.onnx"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "pruned", metavar="PRUNED", help="what is trained: FILE.onnx, as 'sartor apply' writes it"
    )
    parser.add_argument(
        "--original", dest="model", required=True, metavar="MODEL",
        help="what it was made from: FILE.onnx, or FILE.py:function returning (module, inputs)",
    )  # fmt: skip
    arguments.add_shape(parser)
    parser.add_argument("--data", required=True, help="FILE.py:function or FILE.npz; see the README")
    parser.add_argument("--out", required=True, metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--minutes",
        type=arguments.positive_number,
        default=5.0,
        metavar="M",
        help="wall time for everything (5)",
    )
    parser.add_argument(
        "--steps",
        type=arguments.positive,
        metavar="N",
        help="stop after N steps; all but the time then repeats",
    )
    parser.add_argument(
        "--teacher", choices=("always", "never", "wrong"), default="always",
        help="when the original is asked: about all samples, none (labels alone), or misclassified ones (always)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=arguments.positive_number, default=2.0, metavar="T", help="of class scores (2)"
    )
    parser.add_argument(
        "--features", type=arguments.not_negative, default=0.0, metavar="W",
        help="weight of the distance between attention maps of blocks (0)",
    )  # fmt: skip
    parser.add_argument(
        "--rat", type=arguments.positive_number, nargs="?", const=0.5, metavar="GAMMA",
        help="begin with images of this share of their size (0.5) and let it grow",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("f32", "bf16"), default="f32", help="of layers while training (f32)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of data splits and the order (0)")


def run(options: argparse.Namespace) -> Result:
    """Check what can be checked first; the first process writes, and the others say nothing."""
    from sartor.recovery.processes import together

    output = arguments.output_file(options.out)
    with together() as processes:
        try:
            result = _recover(options, output, processes)
        except SartorError as error:
            if processes.first:
                raise
            sys.stderr.write(f"sartor: process {processes.rank}: {error}\n")
            return Result({}, exit_code=error.exit_code, silent=True)
        return result if processes.first else Result({}, silent=True)


def _recover(options: argparse.Namespace, output: Path, processes: Processes) -> Result:
    from sartor.data import load_data
    from sartor.fit_recovery import what_was_trained_on
    from sartor.ir.capture import open_model
    from sartor.recovery import RecoveryOptions, distill

    settings = RecoveryOptions(
        teacher=options.teacher,
        temperature=options.temperature,
        features=options.features,
        rat=options.rat,
        precision=options.precision,
        max_steps=options.steps,
    )
    original = arguments.open_program(options)
    program = open_model(options.pruned, None)
    data = load_data(options.data, list(original.input_shapes), options.seed, program=original)
    folder = _checkpoints(options, settings, output, program, original, data, processes)
    judge = _Judge(options, folder, original, data)
    silent = contextlib.nullcontext(None)
    refused = contextlib.nullcontext() if folder.exists() or not processes.first else _nothing_left(folder)
    with refused, Progress.on_stderr() if processes.first else silent as progress:
        recovered = distill(
            program,
            original,
            data.train or data.calibration,
            minutes=options.minutes,
            seed=options.seed,
            loss=data.loss,
            threads=max(len(os.sched_getaffinity(0)) // processes.count, 1),
            progress=lambda fraction, text: progress(f"recovery {fraction:.0%}: {text}"),  # type: ignore[misc]
            evaluate=judge.evaluate,
            checkpoint_dir=folder,
            options=settings,
        )
    if not processes.first:
        return Result({}, silent=True)
    notes = list(recovered.notes)
    if data.train is None:
        notes.append(what_was_trained_on(data))
    result = _written(
        output, program, original, recovered, judge.scores(program, recovered.program), notes, processes
    )
    shutil.rmtree(folder.parent, ignore_errors=True)
    return result


def _written(
    output: Path,
    program: Program,
    original: Program,
    recovered: RecoveryResult,
    scores: dict[str, Any],
    notes: list[str],
    processes: Processes,
) -> Result:
    from sartor.ir.files import write_all

    paths = write_all(recovered.program.files(output))
    document = {
        "schema": "sartor.recover/1",
        "source": arguments.source_document(program),
        "original": arguments.source_document(original),
        "score": scores,
        "steps": recovered.steps,
        "seconds": round(recovered.seconds, 3),
        "processes": processes.count,
        "asked": recovered.asked,
        "sizes": {str(size): steps for size, steps in recovered.sizes.items()},
        "training_macs": recovered.training_macs,
        "history": [dict(entry) for entry in recovered.history],
        "notes": notes,
        "files": arguments.Written(tuple(paths)).to_list(),
    }
    rows = [(name, f"{scores[name]:.4f}") for name in ("original", "before", "after")]
    text = [
        table(rows, ("model", f"score on '{scores['split']}'")),
        f"{recovered.steps} steps in {recovered.seconds:.0f} s, {scores['samples']} samples scored",
        *notes,
        *(f"wrote {path}" for path in paths),
    ]
    return Result(document, "\n".join(text))


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Remove checkpoints of a recovery that is refused; those of one that is killed stay."""
    try:
        yield
    except SartorError:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise


class _Judge:
    """Scores: on `evaluate` during recovery, and on `test` after it."""

    def __init__(self, options: argparse.Namespace, folder: Path, original: Program, data: Data):
        from sartor.data import JUDGING_SHARE, InTime
        from sartor.recovery import predictor

        self._data, self._original = data, original
        self._reference = predictor(original)
        self._known = folder / "judged.json"
        self._split: Any = data.evaluate
        if options.steps is None:  # else it is the same samples on any machine
            batches = json.loads(self._known.read_text()) if self._known.exists() else None
            self._split = InTime(data.evaluate, JUDGING_SHARE * 60 * options.minutes, batches)

    def evaluate(self, predict: Callable[..., Any]) -> float:
        """What is kept is decided by this; a resumed recovery judges on the same samples."""
        from sartor.ir.files import write_atomic
        from sartor.scoring import score

        value, _ = score(predict, self._split, self._data.metric, self._reference)
        if self._split is not self._data.evaluate and not self._known.exists():
            write_atomic(self._known, json.dumps(self._split.batches).encode())
        return value

    def scores(self, program: Program, recovered: Program) -> dict[str, Any]:
        """Of the original and of the program before and after, on samples that decided nothing where there are any."""
        from sartor.recovery import predictor
        from sartor.recovery.sizes import Sizes
        from sartor.scoring import score

        sizes = Sizes.between(program, self._original)
        models: Mapping[str, Any] = {
            "original": self._reference,
            "before": predictor(program, sizes),
            "after": predictor(recovered, sizes),
        }
        found = {
            name: score(predict, self._data.test, self._data.metric, self._reference)
            for name, predict in models.items()
        }
        return {
            **{name: value for name, (value, _) in found.items()},
            "split": "evaluate" if self._data.test_is_evaluate else "test",
            "samples": found["after"][1],
        }


def _checkpoints(
    options: argparse.Namespace,
    settings: RecoveryOptions,
    output: Path,
    program: Program,
    original: Program,
    data: Data,
    processes: Processes,
) -> Path:
    """The folder of this recovery's checkpoints; those of one that led elsewhere are removed."""
    identity = {
        "program": program.sha256(),
        "original": original.sha256(),
        "data": data.fingerprint(),
        "options": dataclasses.asdict(settings),
        "minutes": options.minutes,
        "seed": options.seed,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = output.with_name(f".{output.name}.recovery") / digest
    if processes.first:
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    processes.wait()
    return folder
