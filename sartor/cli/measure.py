"""Measure the latency of MODEL on a target, alone or interleaved with OTHER, with its interval.

With --against, OTHER is the baseline and the ratio is MODEL / OTHER: below 1, MODEL is faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sartor.cli import arguments
from sartor.cli.output import Result, seconds
from sartor.cli.progress import Progress
from sartor.errors import SartorError

EXAMPLE = "sartor measure small.onnx --against model.onnx --target onnxruntime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument("--against", metavar="OTHER", help="the baseline, measured in alternation with MODEL")
    arguments.add_target(parser)
    parser.add_argument(
        "--time-limit",
        type=arguments.positive_number,
        default=60.0,
        metavar="S",
        help="of the rounds (60)",
    )
    parser.add_argument(
        "--half-width",
        type=arguments.positive_number,
        default=0.02,
        help="stop when the interval's half width is this share of the median (0.02)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of inputs and of the order (0)")


def run(options: argparse.Namespace) -> Result:
    """Lower what is to be measured into a temporary folder, then measure."""
    from sartor.backends import isolation
    from sartor.backends.measure import measure
    from sartor.ir.capture import open_model

    program = arguments.open_program(options)
    target = arguments.target_options(options, program)
    programs = [program]
    if options.against is not None:
        try:
            programs.insert(0, open_model(options.against, dict(program.input_shapes)))
        except SartorError as error:
            raise type(error)(f"'{options.against}' with the input shapes of MODEL: {error}") from error
    with (
        tempfile.TemporaryDirectory(prefix="sartor-") as folder,
        Progress.on_stderr() as progress,
    ):
        artifacts = [
            isolation.lower(options.target, p, Path(folder) / str(i), target) for i, p in enumerate(programs)
        ]
        progress.stage("measuring")
        measurement = measure(
            options.target,
            artifacts,
            target,
            time_limit_s=options.time_limit,
            target_half_width=options.half_width,
            seed=options.seed,
            on_round=lambda _: progress.advance(),
        )
    document = measurement.to_dict()
    document["model"] = arguments.source_document(program)
    if options.against is not None:
        document["against"] = arguments.source_document(programs[0])
    return Result(document, _text(document))


def _text(document: dict[str, Any]) -> str:
    lines = []
    for label in ("baseline", "candidate"):
        if label in document:
            latency = document[label]["latency_s"]
            name = document["against" if label == "baseline" and "against" in document else "model"]["name"]
            lines.append(
                f"{name}: median {seconds(latency['median'])} "
                f"(p10 {seconds(latency['p10'])}, p90 {seconds(latency['p90'])})"
            )
    if "ratio" in document:
        low, high = document["ratio"]["latency_ci95"]
        lines.append(f"ratio {document['ratio']['latency']:.3f}, 95 % interval [{low:.3f}, {high:.3f}]")
    target = document["target"]
    lines.append(
        f"on {target['name']} {target['version']}, {target['threads']} thread(s), {target['precision']}, "
        f"{len(document['rounds'])} rounds, ended by {document['ended_by'].replace('_', ' ')}"
    )
    return "\n".join(lines)
