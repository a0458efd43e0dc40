"""Profile before you cut: the score that MODEL keeps when one group or one block of it goes and nothing else does.

Every channel group is narrowed alone to each ratio, and every removable residual block is removed alone; nothing is
recovered. The middle ratio of all groups and all blocks come first, so that a study that --seconds ends has seen all of
the network. DIR receives sensitivity.json and sensitivity.html; an interrupted study resumes with the same command.
"""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result
from sartor.cli.progress import Progress
from sartor.passes.base import CRITERIA

EXAMPLE = "sartor sensitivity model.onnx --data data.py:digits --ratios 0.25,0.5,0.75 --seconds 60 --out sensitivity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="FILE.py:function or FILE.npz: 'evaluate' is scored, criteria and statistics see 'calibration'",
    )
    parser.add_argument(
        "--criterion", default="l2", metavar="NAME", help=f"which units go first: {CRITERIA} (l2)"
    )
    parser.add_argument(
        "--ratios",
        type=ratios,
        default=(0.25, 0.5, 0.75),
        metavar="R,…",
        help="shares of a group's units to remove, each above 0 and below 1 (0.25,0.5,0.75)",
    )
    parser.add_argument(
        "--samples",
        type=arguments.positive,
        default=512,
        metavar="N",
        help="most samples of 'evaluate' that are scored (512)",
    )
    parser.add_argument(
        "--seconds",
        type=arguments.positive_number,
        metavar="S",
        help="time limit; what it does not suffice for is named (none)",
    )
    parser.add_argument(
        "--reestimate",
        action="store_true",
        help="take the statistics of BatchNormalization anew after each cut, which costs no training",
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of data splits and random criteria (0)"
    )
    parser.add_argument("--all", action="store_true", help="leave nothing out of the text")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of sensitivity.json and sensitivity.html"
    )
    arguments.add_keep(parser)


def ratios(text: str) -> tuple[float, ...]:
    """Numbers between 0 and 1, separated by commas."""
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0.0 < value < 1.0:
            raise argparse.ArgumentTypeError(f"'{part.strip()}' is not a number above 0 and below 1")
        found.append(value)
    return tuple(found)


def run(options: argparse.Namespace) -> Result:
    """Check what can be checked, then score cut by cut."""
    from sartor.data import load_data
    from sartor.report.sensitivity_table import summary
    from sartor.sensitivity import StudyOptions, study

    chosen = StudyOptions(
        criterion=options.criterion,
        ratios=options.ratios,
        samples=options.samples,
        seconds=options.seconds,
        reestimate=options.reestimate,
        seed=options.seed,
        keep=tuple(options.keep),
    )
    folder = arguments.output_folder(options.out)
    program = arguments.open_program(options)
    data = load_data(options.data, list(program.input_shapes), options.seed, program=program)
    with Progress.on_stderr() as progress:
        document = study(program, chosen, data, folder, progress)
    return Result(document, f"{summary(document, options.all)}\nwrote {folder}")
